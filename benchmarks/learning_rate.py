"""Claim: a higher learning rate than the earlier default explains more of every kind, or is level, until latents die.

One row for each rate: FVU, L0 and dead latents on held-out vectors after a run that was planned for that many steps,
and the difference from the rate that was the default before (4e-3 up to 512 features, 2e-3 at 2,048, 8.2e-4 at 12,288),
all from the same first weights and the same order of the data. The default is now 8e-3 up to 512 features, 3e-3 at
2,048, 8.7e-4 at 12,288. Means over seeds, with 95 % intervals where there are several. Kinds with a penalty are steered
to L0 = k (`target_l0`); a CLT is JumpReLU. Data and shapes are those of `quality.py`; `smollm2` is layer 10 of
SmolLM2-135M as `derivative.py` keeps it, a transcoder without the derivative in its loss.

    python benchmarks/learning_rate.py [--only transcoder tinystories] [--steps 500] [--seeds 3] [--work FOLDER]
    python benchmarks/learning_rate.py --budget-minutes 0    # the table alone

What is done is kept under --work, so that a run that was killed goes on.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch
import tyro
from machine import write_table
from quality import CACHE, SHARED
from quality_data import HELD_OUT, files
from quality_table import T_95
from safetensors.torch import load_file
from torch import Tensor
from trained_sets import KINDS, sparsity

from circuitsae.commands.shared import counts
from transcoders.evaluation.statistics import Statistics
from transcoders.kernels import keep_freed_memory
from transcoders.training import train

BATCH = 1024
SMOLLM2 = Path("~/.cache/circuitsae-derivative/layer-10.safetensors").expanduser()
"""Of layer 10, as `derivative.py` collects it; left out where it is not there."""
KIND_NAMES = {
    "topk": "SAE TopK", "batchtopk": "SAE BatchTopK", "jumprelu": "SAE JumpReLU, tanh", "gated": "SAE Gated",
    "l1": "SAE ReLU, L1", "transcoder": "transcoder TopK", "skip": "transcoder TopK, skip", "clt": "CLT JumpReLU, tanh",
}  # fmt: skip
"""As `quality.py` calls them, and as `trained_sets.py` does."""
LAYERS = {"clt": 2}
DATA = ("tinystories", "synthetic")


class Run(NamedTuple):
    """One training."""

    data: str
    d: int
    features: int
    k: int
    kind: str
    steps: int
    rate: float
    seed: int


@dataclass(frozen=True)
class Sweep:
    """Rates to compare, the earlier default first."""

    kinds: tuple[str, ...]
    steps: int
    rates: tuple[float, ...]
    seeds: int
    data: tuple[str, ...] = DATA
    shape: tuple[int, int, int] = (128, 512, 8)
    """d, features, k."""

    def runs(self, seeds: int) -> Iterator[Run]:
        for seed in range(min(seeds, self.seeds)):
            for kind in self.kinds:
                for data in self.data:
                    for rate in self.rates:
                        yield Run(data, *self.shape, kind, self.steps, rate, seed)


RANKED, PENALISED = ("topk", "transcoder", "skip", "batchtopk"), ("jumprelu", "gated", "l1", "clt")
SWEEPS = (
    Sweep(RANKED, 500, (4e-3, 6e-3, 8e-3, 1.2e-2, 1.6e-2), 3),
    Sweep(PENALISED, 500, (4e-3, 6e-3, 8e-3), 3),
    Sweep(("topk", "transcoder"), 500, (2e-3, 3e-3, 4e-3, 8e-3), 1, shape=(128, 2048, 8)),
    Sweep(("skip",), 500, (2e-3, 3e-3, 4e-3, 8e-3), 1, data=("smollm2",), shape=(576, 2048, 32)),
    Sweep(("topk",), 500, (8.2e-4, 1.6e-3, 3.3e-3), 1, data=("synthetic",), shape=(768, 12288, 32)),
    Sweep(RANKED, 3000, (4e-3, 8e-3), 3),
    Sweep(PENALISED, 3000, (4e-3, 8e-3), 3),
    Sweep(("topk", "transcoder", "skip"), 12000, (4e-3, 8e-3), 1),
)


@dataclass
class Options:
    """What to measure."""

    budget_minutes: float = 10.0
    """No run is begun after it."""
    only: list[str] = field(default_factory=list)
    """Words that a run must have: a kind, tinystories, synthetic."""
    steps: list[int] = field(default_factory=lambda: sorted({sweep.steps for sweep in SWEEPS}))
    """Lengths of the runs."""
    features: list[int] = field(default_factory=lambda: sorted({sweep.shape[1] for sweep in SWEEPS}))
    """Widths of the dictionaries."""
    seeds: int = 3
    """At most so many of each."""
    work: Path = Path("runs/learning-rate")
    """Where results are kept."""
    cache: Path = CACHE
    """Where data are kept."""
    threads: int = 1
    """Threads of torch."""


def vectors(run: Run, cache: Path) -> list[Tensor]:
    """Reads, and writes where they are something else."""
    if run.data == "smollm2":
        found = load_file(SMOLLM2)
        return [
            torch.cat([found[f"{part}.{side}"] for part in ("train", "held_out")])[:, 0] for side in ("reads", "writes")
        ]
    paths = files(
        cache / "data", run.data, run.kind, run.d, model=SHARED / "models" / "tinystories-656k",
        corpus=SHARED / "corpora" / "tiny_stories_944k.txt",
    )  # fmt: skip
    return [torch.from_numpy(np.load(path, allow_pickle=False)) for path in paths if path is not None]


def measured(run: Run, cache: Path) -> dict[str, float]:
    """Train and measure: FVU, L0 and the share of dead latents on the vectors held out, means over layers."""
    sides = vectors(run, cache)
    config_class, settings = KINDS[KIND_NAMES[run.kind]]
    config = config_class(
        features=run.features, batch=BATCH, tokens=BATCH * run.steps, lr=run.rate, seed=run.seed, **settings,
        **sparsity(KIND_NAMES[run.kind], run.k, LAYERS.get(run.kind, 1)),
    )  # fmt: skip
    shown = [side[:-HELD_OUT] for side in sides]
    statistics = Statistics(train(None, (shown[0], shown[1]) if len(shown) > 1 else shown[0], config, progress=False))
    held_out = [side[-HELD_OUT:].reshape(HELD_OUT, -1, run.d).split(2048) for side in (sides[0], sides[-1])]
    with torch.no_grad():
        for reads, writes in zip(*held_out, strict=True):
            statistics.update(reads, writes)
    return {"fvu": mean(statistics.fvu), "l0": mean(statistics.l0), "dead": mean(statistics.dead)}


class Done:
    """What has been measured, a line of JSON for each run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.found = {Run(**record["run"]): record["found"] for record in map(json.loads, lines)}

    def put(self, run: Run, found: dict[str, float]) -> None:
        self.found[run] = found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": run._asdict(), "found": found}) + "\n")


def measure(given: Options, done: Done) -> None:
    """First one seed of everything, then the next."""
    until = time.monotonic() + 60 * given.budget_minutes
    for seeds in range(1, given.seeds + 1):
        for sweep in SWEEPS:
            for run in sweep.runs(seeds):
                wanted = run.steps in given.steps and run.features in given.features
                wanted = wanted and (run.data != "smollm2" or SMOLLM2.exists())
                if run in done.found or not wanted or not set(given.only) <= {run.kind, run.data}:
                    continue
                if time.monotonic() >= until:
                    return
                began = time.process_time()
                done.put(run, found := measured(run, given.cache))
                shown = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
                print(f"{tuple(run)}: {shown}, {time.process_time() - began:.0f} s of the processor", flush=True)


def spread(values: Sequence[float], sign: str = "") -> str:
    """The mean, with the half-width of its 95 % interval where there are seeds for one."""
    if len(values) < 2:
        return f"{values[0]:{sign}.4f}"
    half = T_95[len(values)] * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):{sign}.4f} ± {half:.4f}"


def rows(done: Done) -> Iterator[list[str]]:
    for sweep in SWEEPS:
        for kind in sweep.kinds:
            for data in sweep.data:
                d, features, k = sweep.shape
                first = Run(data, d, features, k, kind, sweep.steps, sweep.rates[0], 0)
                for rate in sweep.rates:
                    yield from _row(done, first._replace(rate=rate), sweep)


def _row(done: Done, run: Run, sweep: Sweep) -> Iterator[list[str]]:
    pairs = [
        (found, earlier)
        for seed in range(sweep.seeds)
        if (found := done.found.get(run._replace(seed=seed))) is not None
        and (earlier := done.found.get(run._replace(seed=seed, rate=sweep.rates[0]))) is not None
    ]
    if pairs:
        better = [found["fvu"] - earlier["fvu"] for found, earlier in pairs]
        l0, dead = (mean(found[name] for found, _ in pairs) for name in ("l0", "dead"))
        yield [
            run.kind, run.data, f"{run.d}, {run.features:,}, {run.k}", f"{run.steps:,}", f"{run.rate:g}",
            str(len(pairs)), spread([found["fvu"] for found, _ in pairs]),
            "" if run.rate == sweep.rates[0] else spread(better, "+"), f"{l0:.2f}", f"{dead:.1%}",
        ]  # fmt: skip


COLUMNS = (
    "kind", "data", "d, width, k", "steps", "rate", "seeds", "FVU", "less the first rate's", "L0", "dead",
)  # fmt: skip


def main(given: Options) -> None:
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    done = Done(given.work / "done.jsonl")
    measure(given, done)
    print(write_table("learning_rate", f"{str(__doc__).strip()}\n\nBatch {BATCH:,}.", COLUMNS, list(rows(done))))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, registry=counts()))
