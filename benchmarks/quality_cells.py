"""Measured cells of `quality.py` in a JSONL file, and the processes that measure them."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from answers import AnsweringProcess
from quality_cases import ENVIRONMENTS, OURS, PEERS, SHAPES, Case, Cell, Peer
from quality_data import HELD_OUT, files

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).parent / "workers" / "quality_worker.py"
BATCH = 1024
POINTS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0)
"""Shares of a run after which the held-out FVU is measured."""


@dataclass(frozen=True)
class Place:
    """Where things are on this machine."""

    cache: Path
    model: Path
    corpus: Path
    clt_forge: str
    """For PYTHONPATH; empty where there is no checkout."""

    @property
    def data(self) -> Path:
        return self.cache / "data"

    def task(self, cell: Cell) -> dict[str, Any]:
        shape = SHAPES[cell.case.shape]
        reads, writes = files(self.data, cell.case.data, cell.case.kind, shape.d, model=self.model, corpus=self.corpus)
        return {
            "library": cell.library, "kind": cell.case.kind, "d": shape.d, "width": shape.width, "k": shape.k,
            "batch": BATCH, "steps": cell.steps, "rate": cell.rate, "seed": cell.seed, "threads": 1,
            "settings": dict(cell.settings), "reads": str(reads), "writes": writes and str(writes),
            "held_out": HELD_OUT,
        }  # fmt: skip

    def python(self, library: str) -> str | None:
        """The interpreter of a library's environment; None where it is not installed."""
        if library in (OURS, "oracle"):
            return sys.executable
        if PEERS[library].checkout and not self.clt_forge:
            return None
        python = ENVIRONMENTS / PEERS[library].environment / "bin" / "python"
        return str(python) if python.exists() else None

    def version(self, library: str) -> str:
        """Of a package its version, of ours the content of `transcoders` as git knows it."""
        if library in (OURS, "oracle"):
            return _own_version()
        peer = PEERS[library]
        if peer.checkout:
            if not self.clt_forge:
                return "unknown"
            sources = b"".join(p.read_bytes() for p in sorted(_first(self.clt_forge).rglob("*.py")))
            return hashlib.sha256(sources).hexdigest()[:12]
        return _installed(peer)


def _first(paths: str) -> Path:
    return Path(paths.split(os.pathsep)[0])


def _installed(peer: Peer) -> str:
    folder = ENVIRONMENTS / peer.environment / "lib"
    found = sorted(folder.glob(f"python*/site-packages/*{peer.module}-*.dist-info"))
    return found[0].name.removesuffix(".dist-info").rpartition("-")[2] if found else "unknown"


def _own_version() -> str:
    """Of what the files hold now: a temporary index takes them in, committed or not."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "GIT_INDEX_FILE": str(Path(folder) / "index")}

        def git(*arguments: str) -> str:
            command = ["git", "-C", str(ROOT), *arguments]
            return subprocess.run(command, env=environment, text=True, capture_output=True, check=True).stdout.strip()

        git("add", "transcoders")
        return git("write-tree", "--prefix=transcoders/")[:12]


class Cells:
    """What has been measured; every cell is one line, so that a run can stop at any time."""

    def __init__(self, path: Path, versions: Mapping[str, str], *, retry: bool = False) -> None:
        """`retry`: forget those that failed."""
        self.path, self.versions = path, versions
        self._results: dict[str, dict[str, Any]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            record = json.loads(line)
            if not (retry and "error" in record["result"]):
                self._results[_name(record["key"])] = record["result"]

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """None where it is not measured, or failed."""
        result = self._results.get(_name(cell.key(self.versions[cell.library])))
        return None if result is None or "error" in result else result

    def done(self, cell: Cell) -> bool:
        """Whether it need not be run again."""
        return _name(cell.key(self.versions[cell.library])) in self._results

    def failure(self, cell: Cell) -> str | None:
        return (self._results.get(_name(cell.key(self.versions[cell.library]))) or {}).get("error")

    def put(self, cell: Cell, result: dict[str, Any]) -> None:
        self._write(cell.key(self.versions[cell.library]), result)

    def timing(self, case: Case) -> dict[str, list[float]]:
        """Seconds of a step in each of the turns that the libraries took; empty where that is not measured."""
        record = self._results.get(_name(self._timing_key(case))) or {"seconds": {}}
        return {name: [s / record["steps"] for s in seconds] for name, seconds in record["seconds"].items()}

    def put_timing(self, case: Case, seconds: dict[str, list[float]], steps: int) -> None:
        self._write(self._timing_key(case), {"seconds": seconds, "steps": steps})

    def _timing_key(self, case: Case) -> dict[str, Any]:
        return {"timing": [case.data, case.shape, case.kind], "version": self.versions[OURS]}

    def _write(self, key: dict[str, Any], result: dict[str, Any]) -> None:
        result = self._results[_name(key)] = _short(result)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = {"key": key, "result": result, "at": time.strftime("%Y-%m-%dT%H:%M:%S")}
        line = json.dumps(record, separators=(",", ":"))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _short(value: Any) -> Any:
    """Numbers of a result to six digits, which is more than seeds agree in."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _short(item) for name, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, list) else value


def _name(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def started_worker(python: str, clt_forge: str) -> AnsweringProcess:
    """One library in its process."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    environment["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernel wants a GPU
    paths = [clt_forge] if python != sys.executable else [str(ROOT)]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return AnsweringProcess([python, "-W", "ignore", str(WORKER)], environment)


def measure(worker: AnsweringProcess, cell: Cell, place: Place) -> dict[str, Any]:
    """Train to the end; `curve` has steps, FVU, L0 and the seconds of training so far."""
    started = worker.ask("task " + json.dumps(place.task(cell)))
    curve: list[dict[str, float]] = []
    done, seconds, cpu = 0, 0.0, 0.0
    for point in () if "error" in started else POINTS:
        steps = round(point * cell.steps)
        taken = worker.ask(f"steps {steps - done}")
        found = taken if "error" in taken else worker.ask("fvu")
        if "error" in found:
            return {"error": found["error"]}
        done, seconds, cpu = steps, seconds + taken["seconds"], cpu + taken["cpu"]
        curve.append({"steps": steps, **found, "seconds": seconds, "cpu": cpu})
    if "error" in started:
        return {"error": started["error"]}
    return {"fvu": curve[-1]["fvu"], "l0": curve[-1]["l0"], "rate": started["rate"], "cpu": cpu, "curve": curve}
