"""The page of `gpu.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

from gpu_rows import OURS, Row
from machine import table_text

CLAIM = """Seconds of one piece of work, the median of several in one run, the device waited for before and after;
beside the same of other packages, each in its own environment. *Floor*: the larger of the operations that the work
needs at this machine's bf16 rate and the bytes that it has to move at its bandwidth, both measured in this run (a large
product, a large copy). *Share of rate*, *of bandwidth*: operations and bytes over seconds, as shares of these.
Operations of graphs are those of the textbook algorithm, bytes one number for each edge; of steps, those where only
active features are touched, and what Adam reads and writes. Validation has no count. *Peak*: memory above what was held
before. Goals are issue 22's, for an H200. `benchmarks/gpu.py`, `make gpu-bench`."""
COLUMNS = (
    "work", "with", "time", "to ours", "floor", "floor / time", "share of rate", "of bandwidth", "peak", "goal",
    "edges",
)  # fmt: skip


def page(wanted: Sequence[Row], found: Mapping[Row, Any], device: str, machine: Mapping[str, Any]) -> str:
    """All rows, those of one work together; what failed or was not reached says so."""
    ours = {row.work: result["seconds"] for row, result in found.items() if row.tool == OURS and _is_done(result)}
    works = list(dict.fromkeys(row.work for row in wanted))
    ordered = sorted(wanted, key=lambda row: works.index(row.work))
    rows = [_cells(row, found.get(row), machine, ours.get(row.work)) for row in ordered]
    rates = (
        f"{machine['bandwidth'] / 1e9:,.0f} GB/s, bf16 {_tera(machine['bf16'])}, float32 {_tera(machine['float32'])}"
    )
    where = f"{machine['name']} ({device}), {rates}, torch {machine['torch']}"
    return table_text("gpu", CLAIM, where, COLUMNS, rows)


def _is_done(result: Mapping[str, Any] | None) -> bool:
    return result is not None and "error" not in result


def _cells(row: Row, result: Mapping[str, Any] | None, machine: Mapping[str, Any], ours: float | None) -> list[str]:
    if result is None or not _is_done(result):
        why = "not reached; run again" if result is None else " ".join(str(result["error"]).replace("|", "/").split())
        return [row.work, row.tool, why, *[""] * 6, row.goal, ""]
    seconds = result["seconds"]
    to_ours = "" if row.tool == OURS or ours is None else f"{seconds / ours:.2g} ×"
    floors = ["", "", "", ""]
    if "operations" in result:
        by_rate, by_bytes = result["operations"] / machine["bf16"], result["bytes"] / machine["bandwidth"]
        floor = max(by_rate, by_bytes)
        floors = [spoken(floor), _share(floor / seconds), _share(by_rate / seconds), _share(by_bytes / seconds)]
    peak = f"{result['peak_mb']:,.0f} MB" if "peak_mb" in result else ""
    edges = f"{result['edges']:,}" if "edges" in result else ""
    return [row.work, row.tool, spoken(seconds), to_ours, *floors, peak, row.goal, edges]


def spoken(seconds: float) -> str:
    """Three digits."""
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


def _share(share: float) -> str:
    return f"{100 * share:.2g} %"


def _tera(rate: float) -> str:
    return f"{rate / 1e12:,.3g} TFLOP/s"
