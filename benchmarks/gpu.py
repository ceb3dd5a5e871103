"""Attribution, validation and training on a GPU, beside circuit-tracer, sparsify and CLT-Forge in the same run.

Each figure is a line of runs/gpu/rows.jsonl as soon as it is measured, and is not measured again on the same device
with the same torch and the same commit: a run that was stopped, or ran out of `--minutes`, goes on where it was. Peers
are installed into environments of their own (`benchmarks/interop`); where that fails, the page says so.

    python benchmarks/gpu.py                       # writes benchmarks/results/gpu.md
    python benchmarks/gpu.py --clt-forge CHECKOUT/src
    python benchmarks/gpu.py --tiny --out runs/gpu-tiny.md --peers none     # everything once, small, on any machine
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from answers import AnsweringProcess
from attribution_cases import Case, Prepared, counted_operations, prepare
from gpu_rows import FORGE, OURS, SPARSIFY, TRACER, Row, rows
from gpu_table import page
from interop.environments import CIRCUIT_TRACER, SOURCES, Environment
from interop.environments import SPARSIFY as SPARSIFY_ENVIRONMENT

from transcoders.devices import choose_device
from transcoders.files import write_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.md"
WORKERS = ROOT / "benchmarks" / "workers"
ENVIRONMENTS: Mapping[str, Environment] = {
    TRACER: CIRCUIT_TRACER, SPARSIFY: SPARSIFY_ENVIRONMENT, FORGE: SOURCES,
}  # fmt: skip


@dataclass
class Options:
    """What to measure, and where to write it."""

    out: Path | None = None
    """Page to write; benchmarks/results/gpu.md unless `--tiny`, which has to name one."""
    lines: Path | None = None
    """Where figures are kept, a line each; runs/gpu/rows.jsonl, or with `--tiny` beside the page."""
    device: str = "auto"
    """cuda, mps or cpu; the accelerator there is by default."""
    tiny: bool = False
    """Small sizes, for a test of this script on any machine. Nothing it says is about speed."""
    peers: Literal["all", "installed", "none"] = "all"
    """Which of them: installed first where they are not, only those that are, none."""
    clt_forge: str = ""
    """For PYTHONPATH: the `src` of a checkout of CLT-Forge."""
    minutes: float = 6.0
    """No row begins after this long; run again for those that are left. Installing peers is not counted."""
    retry: bool = False
    """Measure again what failed."""
    only: list[str] = field(default_factory=list)
    """Rows whose work has one of these texts in it."""


ROW_SECONDS = 90.0
"""A row that takes longer is ended, and the page says so."""


class Lines:
    """What has been measured; a line each, so that a run can stop at any time."""

    def __init__(self, path: Path, retry: bool) -> None:
        self.path, self.found = path, {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            record = json.loads(line)
            if not (retry and "error" in record["result"]):
                self.found[record["key"]] = record["result"]

    def put(self, key: str, result: dict[str, Any]) -> None:
        self.found[key] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "result": result, "at": time.strftime("%Y-%m-%dT%H:%M:%S")}) + "\n")


def started_worker(python: str, script: str, paths: str, device: str) -> AnsweringProcess:
    """One tool in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": paths, "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        environment |= {"SPARSIFY_DISABLE_TRITON": "1", "TORCHDYNAMO_DISABLE": "1"}
    return AnsweringProcess([python, "-W", "ignore", str(WORKERS / script)], environment)


class Tools:
    """The worker of each tool, made at its first row; why there is none where there is none."""

    def __init__(self, options: Options, device: str) -> None:
        self.options, self.device, self.installing = options, device, 0.0
        self._made: dict[str, AnsweringProcess | str] = {}

    def __getitem__(self, tool: str) -> AnsweringProcess | str:
        if tool not in self._made:
            self._made[tool] = self._make(tool)
        return self._made[tool]

    def _make(self, tool: str) -> AnsweringProcess | str:
        if tool == OURS:
            return started_worker(sys.executable, "gpu_worker.py", str(ROOT), self.device)
        environment = ENVIRONMENTS[tool]
        if self.options.peers == "all":
            start = time.perf_counter()
            try:
                environment.make()
            except (subprocess.CalledProcessError, OSError) as error:
                return f"cannot be installed here ({type(error).__name__})"
            finally:
                self.installing += time.perf_counter() - start
        if not environment.python.exists():
            return "not installed here"
        paths = self.options.clt_forge if tool == FORGE else ""
        return started_worker(str(environment.python), "gpu_peer_worker.py", paths, self.device)

    def stop(self) -> None:
        for worker in self._made.values():
            if isinstance(worker, AnsweringProcess):
                worker.stop()


def main(given: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=given)
    if options.tiny and options.out is None:
        raise SystemExit("--tiny measures nothing of worth; name a page with --out, such as runs/gpu-tiny.md.")
    out = options.out or RESULTS
    lines = Lines(
        options.lines or (out.with_suffix(".jsonl") if options.tiny else ROOT / "runs/gpu/rows.jsonl"), options.retry
    )
    os.environ.setdefault("PIP_RETRIES", "1")
    device = str(choose_device(options.device))
    tools = Tools(options, device)
    if device == "cpu" and not options.tiny:
        raise SystemExit("There is no GPU here that torch can use; --tiny tries the script out.")
    wanted = [row for row in rows(options.tiny, bool(options.clt_forge)) if _is_wanted(row, options)]
    with tempfile.TemporaryDirectory() as folder:
        machine = _rates(tools, lines, device, options)
        try:
            left = measure(wanted, tools, lines, device, machine, options, Path(folder))
        finally:
            tools.stop()
    write_file(out, page(wanted, {row: lines.found.get(_key(row, device, machine)) for row in wanted}, device, machine))
    print(f"{out} written; {left} rows are left, run again for them" if left else f"{out} written")


def _is_wanted(row: Row, options: Options) -> bool:
    named = not options.only or any(text in row.work for text in options.only)
    return named and (row.tool == OURS or options.peers != "none")


def _rates(tools: Tools, lines: Lines, device: str, options: Options) -> dict[str, Any]:
    """The machine's name and rates, measured once for a device and torch."""
    key = json.dumps(["rates", device, torch.__version__, options.tiny])
    if key not in lines.found:
        worker = tools[OURS]
        assert isinstance(worker, AnsweringProcess)
        found = worker.ask(json.dumps({"kind": "rates", "device": device, "tiny": options.tiny}))
        if "error" in found:
            raise SystemExit(f"The device cannot be measured: {found['error']}")
        lines.put(key, found)
    return lines.found[key]


def _key(row: Row, device: str, machine: Mapping[str, Any]) -> str:
    """What a figure is of: the work, the tool, the device and the versions."""
    ours = _version() if row.tool == OURS else ""
    case = None if row.case is None else asdict(row.case)
    return json.dumps([row.work, row.tool, row.task, case, row.here or device, machine["name"], machine["torch"], ours])


def _version() -> str:
    """Of our code, by its commit; what is not committed does not count."""
    found = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip()


def measure(
    wanted: list[Row],
    tools: Tools,
    lines: Lines,
    device: str,
    machine: Mapping[str, Any],
    options: Options,
    folder: Path,
) -> int:
    """Every row that has no figure yet, as long as there is time; how many are left."""
    start, prepared, left = time.perf_counter(), {}, 0
    for row in wanted:
        key = _key(row, device, machine)
        if key in lines.found:
            continue
        if time.perf_counter() - start - tools.installing > 60 * options.minutes:
            left += 1
            continue
        worker = tools[row.tool]
        if isinstance(worker, str):
            lines.put(key, {"error": worker})
            continue
        print(f"{row.tool}: {row.work} …", flush=True)
        lines.put(key, _one(row, worker, device, options, prepared, folder))
    return left


def _one(
    row: Row, worker: AnsweringProcess, device: str, options: Options, prepared: dict[Case, Prepared], folder: Path
) -> dict[str, Any]:
    task = {**row.task, "kind": row.kind, "device": "cpu" if row.here else device, "rounds": 2 if options.tiny else 5}
    cost = row.cost
    if row.case is not None:
        if row.case not in prepared:
            prepared[row.case] = prepare(row.case, _empty(folder / str(len(prepared))))
        ready = prepared[row.case]
        task |= {
            "model": str(ready.model), "dictionaries": str(ready.dictionaries), "tokens": ready.tokens,
            "n_layers": row.case.n_layers, "max_features": 4096,
        }  # fmt: skip
        if row.kind == "graph":
            task |= {"kind_of": row.case.kind}
            cost = sum(counted_operations(ready, 10).values()), 0.0
    if row.tool in (SPARSIFY, FORGE):
        task |= {"library": row.tool, "kind_of": row.task["kind"]}
    found = worker.ask(json.dumps(task), seconds=ROW_SECONDS)
    if row.kind == "graph" and cost is not None and "edges" in found:
        cost = cost[0], 4.0 * found["edges"]  # each edge is written once
    return found | ({} if cost is None else {"operations": cost[0], "bytes": cost[1]})


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    main()
