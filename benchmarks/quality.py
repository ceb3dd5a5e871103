r"""Does a dictionary trained here explain as much as a peer's at equal steps, and how soon does it get there?

Every kind against every library that has it, on the same batches in the same order, everything at the library's own
defaults but the learning rate, of which a peer has the best of its default and three more, and ours its default.

    python benchmarks/quality.py --budget-minutes 60 [--only small topk] [--steps 500 3000] [--clt-forge CHECKOUT/src]
    python benchmarks/quality.py --timing [--only small]      # seconds of a step, all libraries in turns
    python benchmarks/quality.py --budget-minutes 0           # the tables alone

Peers run in the environments that `python -m benchmarks.interop.run` makes; one that is not there is left out. What has
been measured stays in results/quality_cells.jsonl, which belongs to the repository: the whole takes days of a core, so
a run may be stopped at any time and goes on where it was, on another machine too. Ours are measured anew when
`transcoders` has changed.
"""

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import tyro
from answers import AnsweringProcess
from quality_cases import OURS, PEERS, STEPS, Case, Cell, cases
from quality_cells import Cells, Place, measure, started_worker
from quality_plan import Plan
from quality_table import write_tables

CACHE = Path("~/.cache/circuitsae-quality").expanduser()
CELLS = Path(__file__).parent / "results" / "quality_cells.jsonl"
SHARED = Path(__file__).parents[2] / "shared" / "data"
COST = {"circuitsae": 1.0, "sparsify": 2.0, "sparsify-adam": 2.0, "oracle": 3.0}
"""Of a step, against ours; of others 4."""


@dataclass
class Options:
    """What to measure."""

    budget_minutes: float = 10.0
    """No cell is begun after it."""
    only: list[str] = field(default_factory=list)
    """Words that a cell must have: small, large, synthetic, tinystories, a kind, a library."""
    libraries: list[str] = field(default_factory=lambda: [OURS, *PEERS])
    """Whose cells."""
    steps: list[int] = field(default_factory=lambda: list(STEPS))
    """Lengths of the runs: some of 500, 3000 and 12000."""
    seeds: int = 3
    """Of first weights and the order of the data."""
    timing: bool = False
    """Measure the seconds of a step instead of FVU."""
    retry: bool = False
    """Run again what failed."""
    rounds: int = 10
    """Turns of every library in a timing."""
    cache: Path = CACHE
    """Where data are kept."""
    cells: Path = CELLS
    """What has been measured, a line for each cell."""
    model: Path = SHARED / "models" / "tinystories-656k"
    """The small Llama."""
    corpus: Path = SHARED / "corpora" / "tiny_stories_944k.txt"
    """What it reads."""
    version: str = ""
    """Whose cells count as ours: twelve digits of `git rev-parse COMMIT:transcoders`; default, that of the files here.
    With an earlier one nothing of ours is measured."""
    clt_forge: str = ""
    """The `src` of a checkout of CLT-Forge, which is on no package index; after a `:` a folder with zstandard."""


class Bench:
    """The cells of the rows that were asked for."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.place = Place(options.cache, options.model, options.corpus, options.clt_forge)
        self.libraries = [name for name in options.libraries if self.place.python(name) is not None]
        versions = {name: self.place.version(name) for name in (OURS, *PEERS)}
        if options.version:
            versions |= dict.fromkeys((OURS, "oracle"), options.version)
            self.libraries = [name for name in self.libraries if name not in (OURS, "oracle")]
        self.cells = Cells(options.cells, versions, retry=options.retry)
        self.plan = Plan(self.cells, options.seeds)
        self.until = time.monotonic() + 60 * options.budget_minutes

    def run(self) -> None:
        """Length by length, cheapest cells first; one library's process at a time."""
        worker, running = None, ""
        while time.monotonic() < self.until and (cells := self._next(running)):
            for cell in cells:
                if time.monotonic() >= self.until:
                    break
                if running != cell.library or worker is None:
                    if worker is not None:
                        worker.stop()
                    worker, running = self._worker(cell.library), cell.library
                result = measure(worker, cell, self.place)
                self.cells.put(cell, result)
                print(_line(cell, result), flush=True)
                if "the process ended" in result.get("error", ""):
                    worker.stop()
                    worker, running = None, ""
        if worker is not None:
            worker.stop()

    def time_steps(self) -> None:
        """Seconds of a step: all libraries of a row in turns, so that the machine's load meets all alike."""
        for case in cases():
            libraries = [n for n in (OURS, *case.peers) if n in self.libraries and self._asked(case, n, strict=False)]
            if time.monotonic() < self.until and len(libraries) > 1 and not self.cells.timing(case):
                self._time(case, libraries)

    def _time(self, case: Case, libraries: list[str]) -> None:
        steps = STEPS[0] // self.options.rounds if case.shape == "small" else 2
        seconds: dict[str, list[float]] = {}
        with ExitStack() as stack:
            workers = {}
            for name in libraries:
                if (cell := self._timed_cell(case, name)) is None:
                    continue
                worker = self._worker(name)
                stack.callback(worker.stop)
                if "error" not in worker.ask("task " + json.dumps(self.place.task(cell))):
                    workers[name] = worker
                    worker.ask("steps 1")
            for turn in range(self.options.rounds):
                for name in workers if turn % 2 == 0 else reversed(workers):
                    seconds.setdefault(name, []).append(workers[name].ask(f"steps {steps}")["seconds"])
        self.cells.put_timing(case, seconds, steps)
        shown = ", ".join(f"{name} {1000 * median(s) / steps:.1f} ms" for name, s in seconds.items())
        print(f"{case.data} {case.shape} {case.kind}: {shown}", flush=True)

    def _timed_cell(self, case: Case, library: str) -> Cell | None:
        if library != OURS:
            return self.plan.default(case, library, STEPS[0])
        found = (self.plan.ours(case, STEPS[0], peer, against=STEPS[0]) for peer in case.peers)
        return next((cells[0] for cells in found if cells), None)

    def _next(self, running: str) -> list[Cell]:
        """The cheapest library's cells of the shortest runs that are missing; of the one that is running first."""
        options = []
        for case in cases():
            for steps in self.options.steps:
                for library in (OURS, *case.peers):
                    if (
                        library in self.libraries
                        and self._asked(case, library)
                        and (found := self.plan.missing(case, library, steps))
                    ):
                        cost = steps * (1 if case.shape == "small" else 100)
                        options.append((cost, library != running, COST.get(library, 4.0), found))
        return min(options, key=lambda option: option[:3])[3] if options else []

    def _asked(self, case: Case, library: str, *, strict: bool = True) -> bool:
        words = {case.data, case.shape, case.kind} | ({library} if strict else {*self.libraries})
        return set(self.options.only) <= words

    def _worker(self, library: str) -> AnsweringProcess:
        python = self.place.python(library)
        assert python is not None
        return started_worker(python, self.options.clt_forge)


def _line(cell: Cell, result: dict[str, object]) -> str:
    case, rate = cell.case, "default" if cell.rate is None else f"{cell.rate:g}"
    what = f"{case.data} {case.shape} {case.kind} {cell.library} {cell.steps} rate {rate} seed {cell.seed}"
    what += "".join(f" {key} {value}" for key, value in cell.settings)
    if "error" in result:
        return f"{what}: {result['error']}"
    return f"{what}: FVU {result['fvu']:.4f}, L0 {result['l0']:.2f}, {result['cpu']:.1f} s of the processor"


def main() -> None:
    options = tyro.cli(Options)
    bench = Bench(options)
    if options.timing:
        bench.time_steps()
    else:
        bench.run()
    print(write_tables(bench.cells, bench.plan))


if __name__ == "__main__":
    main()
