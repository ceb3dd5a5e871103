"""The rows of `gpu.py`: which work, with which tool, in which order; what each is measured against."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attribution_cases import Case, small

from transcoders.training.config import CLTConfig, SAEConfig, TrainConfig
from transcoders.training.cost import training_cost

OURS, TRACER, SPARSIFY, FORGE = "circuitsae", "circuit-tracer", "sparsify", "clt-forge"


@dataclass(frozen=True)
class Row:
    """One figure: a piece of work done by one tool."""

    work: str
    tool: str
    kind: str
    """Of the worker's answer: graph, pocket, validate or step."""
    task: Mapping[str, Any] = field(hash=False)
    case: Case | None = None
    goal: str = ""
    """Of ours, as issue 22 states it."""
    here: bool = False
    """On the CPU, whatever device is measured."""
    cost: tuple[float, float] | None = field(default=None, compare=False)
    """Operations and bytes of a step; of graphs the worker's counts."""


def rows(tiny: bool, checkout: bool) -> list[Row]:
    """In the order in which they are measured: ours, then those of the peers."""
    short = _case(tiny, tokens=20, kind="plt")
    across, long = _case(tiny, tokens=20, kind="clt"), _case(tiny, tokens=128, kind="plt")
    graphs = [
        (f"attribution, per-layer transcoders, {short.tokens} tokens", short, "≤ .06 s"),
        (f"attribution, CLT, {across.tokens} tokens", across, "≤ .09 s"),
        (f"attribution, per-layer transcoders, {long.tokens} tokens", long, "≤ 1.0 s, ≤ 2 GB"),
    ]
    found = [Row(work, OURS, "graph", {}, case, goal) for work, case, goal in graphs]
    found += [
        Row("pocket model, one prompt", OURS, "pocket", {}, goal="not above the CPU"),
        Row("pocket model, one prompt, on the CPU", OURS, "pocket", {}, here=True),
    ]
    edges = 10 if tiny else 100
    found += [
        Row(f"validate {edges} edges, {case.tokens} tokens", OURS, "validate", {"edges": edges}, case, goal)
        for case, goal in ((short, "≤ .5 s"), (long, "≤ 2 s"))
    ]
    found += _steps(tiny)
    found += [Row(work, TRACER, "graph", {"batch_size": 512}, case) for work, case, _ in graphs]
    sae, clt = _sae(tiny), _clt(tiny, "jumprelu", 4096)
    found.append(Row(_spoken(sae), SPARSIFY, "step", _peer_task(sae, 1, _wide(tiny), "topk")))
    if checkout:
        found.append(Row(_spoken(clt), FORGE, "step", _peer_task(clt, _layers(tiny), _wide(tiny), "clt")))
    return found


def _case(tiny: bool, **changes: Any) -> Case:
    if not tiny:
        return Case(**changes)
    sizes: dict[str, Any] = {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_vocab": 64, "features": 64, "active": 4}
    return small(**{**sizes, **changes, "tokens": 12 if changes["tokens"] > 20 else 6})


def _wide(tiny: bool) -> int:
    return 32 if tiny else 768


def _layers(tiny: bool) -> int:
    return 2 if tiny else 12


def _steps(tiny: bool) -> list[Row]:
    """Steps of the trainer, on activations that lie on the device."""
    sae, step = _sae(tiny), []
    clt = [(_clt(tiny, "topk", 4096), "≤ 6 ms (bf16)"), (_clt(tiny, "batchtopk", 8192), "≤ 15 ms")]
    clt.append((_clt(tiny, "jumprelu", 4096), "≤ 10 ms"))
    for config, layers, goal in ((sae, 1, "≤ 2.0 ms"), *((config, _layers(tiny), goal) for config, goal in clt)):
        for precision in ("float32", "bf16"):
            task = {
                "class": type(config).__name__, "layers": layers, "d": _wide(tiny),
                "config": _stated(config) | {"precision": precision},
            }  # fmt: skip
            work = f"{_spoken(config)}{', bf16' if precision == 'bf16' else ''}"
            step.append(Row(work, OURS, "step", task, None, goal, cost=_cost(config, layers, _wide(tiny))))
    return step


def _sae(tiny: bool) -> SAEConfig:
    width, k, batch = (128, 4, 64) if tiny else (12288, 32, 4096)
    return SAEConfig(activation="topk", features=width, k=k, batch=batch, tokens=batch * 10_000)


def _clt(tiny: bool, activation: Any, features: int) -> CLTConfig:
    features, batch, k = (64, 32, 8) if tiny else (features, 2048, 16 * 12)
    return CLTConfig(activation=activation, features=features, k=k, batch=batch, tokens=batch * 10_000)


def _stated(config: TrainConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("activation", "features", "k", "batch", "tokens")}


def _cost(config: TrainConfig, layers: int, d: int) -> tuple[float, float]:
    """Operations of a step that touches active features only, and the bytes of its update."""
    cost = training_cost(config, n_layers=layers, d_model=d)
    return cost.sparse_flops * config.batch, float(cost.update)


def _spoken(config: TrainConfig) -> str:
    named = {"topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU"}[config.activation]
    width = f"{config.features:,}"
    if config.kind == "sae":
        return f"SAE {named} step, {width} features, k {config.k}, batch {config.batch:,}"
    return f"CLT {named} step, {width} features a layer, batch {config.batch:,}"


def _peer_task(config: TrainConfig, layers: int, d: int, kind: str) -> dict[str, Any]:
    """As `quality_libraries` take it."""
    return {
        "kind": kind, "d": d, "layers": layers, "width": config.features, "k": config.k, "batch": config.batch,
        "steps": config.steps, "rate": None, "seed": 0, "settings": {},
    }  # fmt: skip
