"""What measurements of the benchmark share: results kept until a run is complete, joined, and as tables."""

from collections.abc import Callable, Sequence
from pathlib import Path

from circuitsae.benchmark import BenchmarkResult
from circuitsae.benchmark.result import Measured
from transcoders.formats.files import read_json


def kept(folder: Path, fresh: bool, measure: Callable[[], BenchmarkResult]) -> BenchmarkResult:
    """What was measured before, or is now."""
    path = folder / "benchmark.json"
    if fresh or not path.is_file():
        measure().save(folder)
    record = read_json(path)
    rows = tuple(Measured(**row | {"value": float("nan") if row["value"] is None else row["value"]})
                 for row in record["rows"])  # fmt: skip
    return BenchmarkResult(rows, record["seconds"], record["model"], record["settings"])


def joined(results: Sequence[BenchmarkResult]) -> BenchmarkResult:
    """Seeds of one dictionary, or several dictionaries, as one result."""
    seconds = {task: sum(one.seconds[task] for one in results) for task in results[0].seconds}
    rows = tuple(row for one in results for row in one.rows)
    families = {name: each for one in results for name, each in one.settings.get("families", {}).items()}
    settings = {**results[0].settings, **({"families": families} if families else {})}
    return BenchmarkResult(rows, seconds, results[0].model, settings)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(r) + " |" for r in rows),
    ]
