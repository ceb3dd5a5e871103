"""From which size of a model on an accelerator is faster than this machine's CPU, and which kernels suit each.

Three kinds of work are done at four sizes on the CPU and on each accelerator: the products of a graph's hops, the
activations of a dictionary, a step of the trainer. Between the largest size at which the CPU is faster and the next the
crossover is their geometric mean. On every device a step of the trainer with sparse kernels (Triton's on CUDA) is held
against the same with dense products, over densities and over widths. A pass over a model is timed with few rows and
with many: what it costs whatever its rows is saved where rows share it (`circuitsae.interventions.passes`).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from transcoders.bridge import move
from transcoders.devices import WORKS, Line, Work, accelerators
from transcoders.random_models import random_model
from transcoders.training.config import SAEConfig
from transcoders.training.step import Run


@dataclass(frozen=True)
class Shape:
    """A model and its dictionaries."""

    layers: int
    d: int
    features: int

    @property
    def parameters(self) -> float:
        """Of the blocks: 12 d² each."""
        return 12.0 * self.layers * self.d**2


SHAPES = (Shape(2, 64, 512), Shape(4, 128, 1024), Shape(8, 256, 2048), Shape(12, 768, 4096))
TOKENS, TARGETS, BATCH, K = 20, 64, 256, 16
WIDTH, DENSE = 2048, (8, 32, 64, 128, 256, 512)
"""Features, and how many of them are active, for the density from which dense products are faster."""
WIDTHS = (256, 512, 1024, 2048)
PASS, FEW, MANY = Shape(4, 256, 0), 1, 1024
"""The model of a pass, and rows of it."""
_ROUNDS, _LONG = 3, 0.5
_NO_WIDTH = 2**31
"""Features of a layer that no dictionary has: sparse kernels are never taken."""


def tune(
    shapes: Sequence[Shape] = SHAPES, *, say: Callable[[str], object] = lambda _: None
) -> dict[torch.device, Line]:
    """A measured line for the CPU and for every accelerator, those that auto does not choose included."""
    cpu, others = torch.device("cpu"), accelerators()
    seconds: dict[torch.device, dict[Work, list[float]]] = {}
    for device in (cpu, *others) if others else ():
        say(f"work of {len(shapes)} sizes on {device}")
        seconds[device] = {work: [_seconds(_WORKS[work](shape, device), device) for shape in shapes] for work in WORKS}
    sizes, found = [shape.parameters for shape in shapes], {}
    for device in (cpu, *others):
        say(f"sparse and dense kernels on {device}")
        least: dict[Work, float] = {}
        for work in WORKS if device != cpu else ():
            least[work] = crossover(sizes, _faster(seconds[cpu][work], seconds[device][work]))
        say(f"passes of few and of many rows on {device}")
        found[device] = replace(
            _kernels(device), parameters=least, launch_work=_launch_work(device), measured=time.strftime("%Y-%m-%d")
        )
    return found


def crossover(sizes: Sequence[float], faster: Sequence[bool]) -> float:
    """The size from which on something is faster: 0 where it always was, infinite where it was not at the largest."""
    slower = [number for number, wins in enumerate(faster) if not wins]
    if not slower:
        return 0.0
    last = slower[-1]
    return math.inf if last + 1 == len(sizes) else math.sqrt(sizes[last] * sizes[last + 1])


def _faster(cpu: Sequence[float], other: Sequence[float]) -> list[bool]:
    return [theirs < ours for ours, theirs in zip(cpu, other, strict=True)]


def _kernels(device: torch.device) -> Line:
    """Where a step with sparse kernels is faster than one with dense products."""
    dense = [_dense_is_faster(SAEConfig(features=WIDTH, k=k, **_STEP), device) for k in DENSE]
    below = crossover([k / WIDTH for k in DENSE], dense)
    sparse = [not _dense_is_faster(SAEConfig(features=width, k=K, **_STEP), device) for width in WIDTHS]
    least = crossover([float(width) for width in WIDTHS], sparse)
    return Line(
        sparse_below=min(below, 1.0) if any(not one for one in dense) else 0.0,
        sparse_from=1 if least == 0 else _NO_WIDTH if math.isinf(least) else round(least),
    )


@torch.no_grad()
def _launch_work(device: torch.device) -> float:
    """Of seconds(rows) = a + b · rows, the products of a / b rows in a block."""
    model = random_model(n_layers=PASS.layers, d_model=PASS.d)
    move(model, device)
    seconds = {}
    for rows in (FEW, MANY):
        tokens = torch.zeros(rows, TOKENS, dtype=torch.long, device=device)
        seconds[rows] = _seconds(lambda tokens=tokens: model.run_to_unembedding(tokens), device)
    return _fixed(seconds[FEW], seconds[MANY]) * TOKENS * PASS.parameters / PASS.layers


def _fixed(few: float, many: float) -> float:
    """Rows that take as long as a pass without any."""
    each = (many - few) / (MANY - FEW)
    return max(few / each - FEW, 0.0) if each > 0 else float(MANY)


_STEP = {"activation": "topk", "batch": BATCH, "tokens": BATCH * 1000}


def _dense_is_faster(config: SAEConfig, device: torch.device) -> bool:
    ways = []
    for kernels in ("sparse", "dense"):
        changed = SAEConfig(**{**vars(config), "kernels": kernels})
        ways.append(_seconds(_steps(changed, 256, 1, device), device))
    return ways[1] < ways[0]


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The least of some rounds after one that warms up; of long work, of one round alone."""
    taken = [_once(work, device) for _ in range(2)]
    if min(taken) < _LONG:
        taken += [_once(work, device) for _ in range(_ROUNDS)]
    return min(taken[1:])


def _once(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - start


def _drawn(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def _hops(shape: Shape, device: torch.device) -> Callable[[], object]:
    """As many hops as a graph has layers, and in each the scores of its writers."""
    targets, read, write = (_drawn(n, shape.d, device=device) for n in (TARGETS, shape.d, shape.d))
    writers = _drawn(K * TOKENS, shape.d, device=device)

    @torch.no_grad()
    def work() -> list[torch.Tensor]:
        carried, scores = targets, []
        for _ in range(shape.layers):
            scores.append(carried @ writers.T)
            carried = (carried + carried @ read @ write) / shape.d
        return scores

    return work


def _encode(shape: Shape, device: torch.device) -> Callable[[], object]:
    x, W_enc = _drawn(BATCH, shape.d, device=device), _drawn(shape.d, shape.features, device=device)

    @torch.no_grad()
    def work() -> object:
        return [(x @ W_enc).relu().topk(K).values for _ in range(shape.layers)]

    return work


def _step(shape: Shape, device: torch.device) -> Callable[[], object]:
    return _steps(SAEConfig(features=shape.features, k=K, **_STEP), shape.d, shape.layers, device)


def _steps(config: SAEConfig, d: int, layers: int, device: torch.device) -> Callable[[], object]:
    """A step of the trainer, one after the other."""
    x = _drawn(config.batch, layers, d, device=device)
    run, done = Run.start(config, x, x), iter(range(config.steps))
    return lambda: run.step(next(done), x, x, measure=False)


_WORKS: Mapping[Work, Callable[[Shape, torch.device], Callable[[], object]]] = {
    "attribution": _hops, "training": _step, "encode": _encode,
}  # fmt: skip
