"""The default method: a cheap score, exact re-scoring where it counts or cannot be trusted, then greedy pruning."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from circuitsae.components.circuit import Judge
from circuitsae.components.exact import exact_edges
from circuitsae.components.gradients import atp_star, eap, eap_ig, eap_ig_activations
from circuitsae.components.network import Edge
from circuitsae.components.problem import BATCH_TOKENS, Problems, parts_of
from circuitsae.components.scores import Scores
from transcoders.errors import CheckFailedError, InputError

CHEAP: dict[str, Callable[..., Scores]] = {
    "eap": eap,
    "eap-ig": eap_ig,
    "eap-ig-activations": eap_ig_activations,
    "atp*": atp_star,
}
"""The first-order methods by name."""

VANISHED = 1e-6
"""An estimate below this share of the metric's whole range tells nothing: its gradient has vanished."""


@dataclass(frozen=True)
class Rescored:
    """Edge scores, exact for those that were patched."""

    scores: Scores
    cheap: Scores
    patched: frozenset[Edge]
    """Edges whose score is exact: the best by the cheap score, and all whose estimate had vanished."""
    vanished: int
    """Edges whose estimate had vanished although patching them changes what their reader writes."""

    @property
    def fell_back(self) -> bool:
        """Whether gradients failed: at least half of the patched runs were for vanished estimates."""
        return 0 < self.scores.patches <= 2 * self.vanished


@torch.no_grad()
def score_edges(
    problems: Problems,
    *,
    cheap: str = "eap-ig",
    rescore: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Rescored:
    """Score every edge cheaply; patch exactly the best `rescore` (default: a tenth) and those with vanished gradients.

    A first-order score of (almost) zero means no effect, or a gradient that vanished: a saturated softmax, a dead
    ReLU, a metric at its optimum. Such edges are patched exactly. Most cost little: where patching changes nothing in
    the reader itself, no further run is made. `scores.patches` counts the runs that were.
    """
    if cheap not in CHEAP:
        raise InputError(f"Unknown method {cheap!r}; use one of {', '.join(map(repr, CHEAP))}.")
    with torch.enable_grad():
        estimate = CHEAP[cheap](problems, batch_tokens=batch_tokens)
    edges = estimate.edges
    count = -(-len(edges) // 10) if rescore is None else rescore
    blind = estimate.largest <= VANISHED * _range(problems, batch_tokens)
    seen = [edge for edge, dark in zip(edges, blind.tolist(), strict=True) if not dark]
    rank = {item: place for place, item in enumerate(estimate.ranked())}
    best = sorted(seen, key=rank.__getitem__)[:count]
    unseen = [edge for edge, dark in zip(edges, blind.tolist(), strict=True) if dark]
    values, patches, vanished = estimate.values.clone(), 0, 0
    place = {edge: index for index, edge in enumerate(edges)}
    for chosen in (best, unseen):
        if chosen:
            exact = exact_edges(problems, chosen, batch_tokens=batch_tokens)
            values[:, [place[edge] for edge in chosen]] = exact.values
            patches += exact.patches
            vanished = exact.patches if chosen is unseen else vanished
    scores = replace(estimate, values=values, method=f"{estimate.method}, re-scored", patches=patches)
    return Rescored(scores, estimate, frozenset(best) | frozenset(unseen), vanished)


def _range(problems: Problems, batch_tokens: int) -> float:
    """The largest change of the metric in any example when all embeddings are ablated; 1 where there is none."""
    changes: list[float] = []
    for part in parts_of(problems, batch_tokens):
        change = part.delta[: 1 + part.graph.positional].sum(0)
        final = part.network.run(part.clean.layers[0].before + change)
        changes.append(float(part.effects(final[None]).abs().max()))
    largest = float(torch.tensor([0.0, *changes]).max())
    if not math.isfinite(largest):
        raise CheckFailedError(
            f"The metric of an example changes by {largest} when all embeddings are ablated; expected a finite number, "
            "so look for weights beyond the precision, and try float64."
        )
    return largest or 1.0


@dataclass(frozen=True)
class Discovery:
    """A circuit and how it was found."""

    circuit: frozenset[Edge]
    faithfulness: float
    scored: Rescored
    n_edges: int
    runs: int
    """Runs of candidate circuits, over all examples."""

    @property
    def nodes(self) -> tuple[str, ...]:
        """Components in the circuit, in the model's order of edges."""
        return tuple(dict.fromkeys(edge.writer for edge in sorted(self.circuit, key=_order)))


def _order(edge: Edge) -> tuple[float, bool, str]:
    layer = edge.writer[1:].split(".")[0]
    return (float(layer) if layer.isdigit() else -1.0, edge.writer.startswith("m"), edge.writer)


def find_circuit(
    problems: Problems,
    *,
    target: float = 0.95,
    cheap: str = "eap-ig",
    rescore: int | None = None,
    scored: Rescored | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Discovery:
    """The smallest circuit found whose faithfulness lies within `1 − target` of 1.

    1. `score_edges`. 2. The fewest best edges that reach the target. 3. Edges are taken out again, weakest first and in
    blocks that shrink to single edges, as long as the target holds. What no longer lies on a path goes as well.
    Raises `InputError` for a target outside 0 to 1.
    """
    if not 0 < target < 1:
        raise InputError(f"The target is a faithfulness between 0 and 1; got {target}.")
    parts = list(parts_of(problems, batch_tokens))
    scored = scored or score_edges(parts, cheap=cheap, rescore=rescore, batch_tokens=batch_tokens)
    judge = Judge(parts, batch_tokens=batch_tokens)
    ranked = [edge for edge in scored.scores.ranked() if isinstance(edge, Edge)]
    start = _fewest(judge, ranked, 1 - target)
    circuit = _prune(judge, start, {edge: place for place, edge in enumerate(ranked)}, 1 - target)
    return Discovery(circuit, float(judge.faithfulness([circuit])[0]), scored, len(judge.graph.edges), judge.runs)


def _fewest(judge: Judge, ranked: list[Edge], tolerance: float) -> frozenset[Edge]:
    """The best edges, as few as reach the target: sizes on a grid, then by bisection below the first that does."""
    sizes = sorted({min(len(ranked), round(2 ** (k / 2))) for k in range(2 * len(ranked).bit_length() + 1)})
    values = judge.faithfulness([judge.graph.connected(ranked[:size]) for size in sizes])
    high = next(s for s, f in zip(sizes, values.tolist(), strict=True) if abs(1 - f) <= tolerance or s == len(ranked))
    low = max((size for size in sizes if size < high), default=0)
    while high - low > 1:
        middle = (low + high) // 2
        f = float(judge.faithfulness([judge.graph.connected(ranked[:middle])])[0])
        low, high = (low, middle) if abs(1 - f) <= tolerance else (middle, high)
    return judge.graph.connected(ranked[:high])


def _prune(judge: Judge, circuit: frozenset[Edge], rank: dict[Edge, int], tolerance: float) -> frozenset[Edge]:
    size = max(1, len(circuit) // 4)
    while True:
        before = len(circuit)
        weakest = sorted(circuit, key=rank.__getitem__, reverse=True)
        for start in range(0, len(weakest), size):
            trial = judge.graph.connected(circuit - set(weakest[start : start + size]))
            if len(trial) < len(circuit) and abs(1 - float(judge.faithfulness([trial])[0])) <= tolerance:
                circuit = trial
        if size == 1 and len(circuit) == before:
            return circuit
        size = max(1, size // 2)
