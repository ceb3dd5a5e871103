r"""Claim: a TopK or BatchTopK SAE trains faster here than with the specialist libraries, on the same data and batches.

Every library runs in its own environment and process; they take turns, a few steps each, in alternating order, so that
a change of the machine's load meets all alike. Reported: medians over the rounds, and ratios within rounds.

    python benchmarks/training.py --peer-python sae-lens=/venvs/sae-lens/bin/python \
        --peer-python sparsify=/venvs/sparsify/bin/python --peer-python dictionary-learning=/venvs/dl/bin/python

Without a flag a peer is looked for in the environment this runs in, and left out where it is not installed.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from machine import write_table

WORKER = Path(__file__).parent / "workers" / "sae_worker.py"
MODULES = {"sae-lens": "sae_lens", "sparsify": "sparsify", "dictionary-learning": "dictionary_learning"}
SHAPES = {"small": (128, 512, 8), "large": (768, 12288, 32)}
RATES = {"small": (1e-3, 2e-3, 4e-3), "large": (3e-4,)}
"""Learning rates that everybody tries; the large shape is trained too shortly for a choice to mean anything."""
HELD_OUT = 4096
ANSWER = "@@"


@dataclass
class Options:
    """What to measure."""

    peer_python: list[str] = field(default_factory=list)
    """`name=python`: the interpreter of the environment where a peer is installed; may be repeated."""
    shapes: list[str] = field(default_factory=lambda: list(SHAPES))
    """small: d 128, width 512, k 8; large: d 768, width 12,288, k 32."""
    kinds: list[str] = field(default_factory=lambda: ["topk", "batchtopk"])
    """Kinds of dictionary."""
    batch: int = 1024
    """Samples a step."""
    rounds: int = 5
    """Turns of every library."""
    steps: int = 0
    """Steps a turn; 0 for as many as the shape needs to be timed."""
    threads: int = 2
    """The most threads; everybody uses the number a trial finds best."""
    kernels: bool = False
    """Also the least step that can be made of the kernels, without the trainer."""
    seed: int = 0
    """Of data, batches and first weights."""
    name: str = "training"
    """Of the table in results/."""


class Worker:
    """One library in its process."""

    def __init__(self, python: str, task: dict[str, Any], folder: Path) -> None:
        path = folder / f"{task['library']}.json"
        path.write_text(json.dumps(task))
        self.library = task["library"]
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "WANDB_MODE": "disabled"}
        self.errors = (folder / f"{task['library']}.err").open("w+")
        self.process = subprocess.Popen(
            [python, "-W", "ignore", str(WORKER), str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment,
        )  # fmt: skip
        self.started = self._answer()

    def ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        self.errors.seek(0)
        raise RuntimeError(f"{self.library} stopped:\n{self.errors.read()[-2000:]}")

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.errors.close()


def synthetic(d: int, seed: int, n: int = 32768) -> np.ndarray:
    """Sums of a few of 4 d known directions, firing by Zipf's law, plus a little noise; mean square one."""
    generator = np.random.default_rng(seed)
    directions = generator.standard_normal((4 * d, d)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    share = 1 / np.arange(1, 4 * d + 1)
    share *= 2 * np.sqrt(d) / 3 / share.sum()
    fires = generator.random((n, 4 * d), dtype=np.float32) < np.minimum(share, 0.5).astype(np.float32)
    x = (fires * generator.gamma(4, 0.25, fires.shape).astype(np.float32)) @ directions
    x += 0.05 * generator.standard_normal(x.shape).astype(np.float32) / np.sqrt(d)
    return x / np.sqrt(np.square(x).mean(dtype=np.float64)).astype(np.float32)


def pythons(options: Options) -> dict[str, str]:
    """The interpreter of every library that can be run."""
    given = dict(item.split("=", 1) for item in options.peer_python)
    if unknown := set(given) - set(MODULES):
        raise SystemExit(f"Unknown peers {sorted(unknown)}; there are {', '.join(MODULES)}.")
    here = {peer: sys.executable for peer, module in MODULES.items() if find_spec(module)}
    ours = {"circuitsae": sys.executable} | ({"kernels": sys.executable} if options.kernels else {})
    return ours | here | given


@dataclass(frozen=True)
class Measured:
    """One library at one learning rate."""

    threads: int
    seconds: list[float]
    """Of each of its turns."""
    fvu: float
    rate: float


def measure(options: Options, kind: str, shape: str, folder: Path) -> list[list[object]]:
    """Rows of the table: library, threads, samples/s, ours against it, held-out FVU at its best learning rate."""
    found: dict[str, list[Measured]] = {}
    for rate in RATES[shape]:
        for library, measured in _at_rate(options, kind, shape, folder, rate).items():
            found.setdefault(library, []).append(measured)
    ours = [s for m in found["circuitsae"] for s in m.seconds]
    d, width, k = SHAPES[shape]
    rows: list[list[object]] = []
    for library, runs in found.items():
        own = [s for m in runs for s in m.seconds]
        best = min(runs, key=lambda m: m.fvu)
        ratio = statistics.median(theirs / mine for theirs, mine in zip(own, ours, strict=True))
        per_second = _steps(options, shape) * options.batch / statistics.median(own)
        threads = "/".join(sorted({str(m.threads) for m in runs}))
        shaped = f"{d}, {width:,}, {k}"
        rows.append(
            [shaped, kind, library, threads, f"{per_second:,.0f}", f"{ratio:.2f}×", f"{best.fvu:.3f}", f"{best.rate:g}"]
        )
        print(*rows[-1], sep="\t", flush=True)
    return rows


def _steps(options: Options, shape: str) -> int:
    return options.steps or {"small": 100, "large": 4}[shape]


def _at_rate(options: Options, kind: str, shape: str, folder: Path, rate: float) -> dict[str, Measured]:
    (d, width, k), steps = SHAPES[shape], _steps(options, shape)
    data = folder / f"{shape}.npy"
    if not data.exists():
        np.save(data, synthetic(d, options.seed))
    trial = max(1, steps // 3)
    common = {
        "kind": kind, "d": d, "width": width, "k": k, "batch": options.batch, "threads": options.threads,
        "data": str(data), "held_out": HELD_OUT, "seed": options.seed, "lr": rate,
        "trial": trial, "steps": 2 + 2 * options.threads * trial + steps * options.rounds,
    }  # fmt: skip
    seconds: dict[str, list[float]] = {}
    with ExitStack() as stack:
        workers = []
        for library, python in pythons(options).items():
            worker = Worker(python, {**common, "library": library}, folder)
            stack.callback(worker.stop)
            if "missing" not in worker.started:
                workers.append(worker)
        for turn in range(options.rounds):
            for worker in workers if turn % 2 == 0 else workers[::-1]:
                seconds.setdefault(worker.library, []).append(worker.ask(f"steps {steps}")["seconds"])
        return {
            w.library: Measured(w.started["threads"], seconds[w.library], w.ask("fvu")["fvu"], rate) for w in workers
        }


def main() -> None:
    options = tyro.cli(Options)
    columns = ["d, width, k", "kind", "library", "threads", "samples/s", "ours is faster by", "FVU", "at rate"]
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            r for shape in options.shapes for kind in options.kinds for r in measure(options, kind, shape, Path(folder))
        ]
    claim = str(__doc__).strip().splitlines()[0] + f" Batch {options.batch}; same steps, data and order for all."
    claim += " FVU: held out, after these few steps, at the best of the learning rates that all tried."
    print(write_table(options.name, claim, columns, rows))


if __name__ == "__main__":
    main()
