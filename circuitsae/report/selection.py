"""Which part of a graph is drawn first, and what enters the picture when more is asked for.

A picture D is a set of nodes and edges. What it holds is measured along whole paths: every unit of influence on the
logits comes from a token or an error, along edges whose shares Â multiply, and counts where all of its edges are drawn,

    share(D) = Σ_{leaf ∈ D} (wÂ_D + wÂ_D² + …)[leaf] / Σ w

with Â_D[t, s] = Â[t, s] of the graph where the edge is drawn and 0 elsewhere, w the logits' probabilities (1 of what
else is explained), tokens and errors the leaves. What pruning cut from a graph is in the sum of w and in no picture.

Pictures are nested. From everything down, each leaves out the nodes and edges through which the least flows of what is
still drawn, (w + wÂ_D + …)[t] · Â[t, s] · R_D[s] for an edge, R_D how much of what a node reads leads back to tokens,
or with less weight to errors or to a feature that is drawn (`MISSED`, `ALONE`). What is on no whole path goes first:
no picture has a loose end. Edges that a test found null or reversed count less in this order (`DOUBT`), not in the
share.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

MOST_NODES, MOST_EDGES = 60, 150
"""Of the first picture."""
DOUBT = 0.25
"""What the weight of an edge is multiplied by in the order where a test found it null or reversed."""
_DOUBTED = ("null", "reversed")
MISSED = 0.25
"""The same for paths from an error: what the dictionaries miss says little of how the answer comes about."""
ALONE = 0.25
"""The same for paths that begin at a feature, whose own inputs are in no drawing: it may matter for the logits all the
same, and then its strongest inputs are drawn with it."""
_ALWAYS = 5
"""Logits that stay in every picture, most probable first."""
_STEP, _SMALLER = 0.9, 0.85
_MOST_STEPS = 200
_FEWEST_EDGES = 8


@dataclass(frozen=True)
class Flow:
    """The edges of a graph as influence flows along them, sorted by the layer of their target; sources are below it."""

    source: np.ndarray
    target: np.ndarray
    share: np.ndarray
    """[edge], Â."""
    layer: np.ndarray
    start: np.ndarray
    """[node], w."""
    leaf: np.ndarray
    """[node], tokens and errors; in the order of the pictures, what they count for."""

    def keep(self, edges: np.ndarray) -> "Flow":
        """With the edges of a mask, or numbered."""
        return replace(self, source=self.source[edges], target=self.target[edges], share=self.share[edges])

    def _blocks(self) -> list[slice]:
        layers = self.layer[self.target]
        ends = np.flatnonzero(np.diff(layers)) + 1
        return [slice(int(a), int(b)) for a, b in zip([0, *ends], [*ends, len(layers)], strict=True)]

    def outputs(self) -> np.ndarray:
        """[node], w + wÂ + wÂ² + …: how much of what the logits get passes a node."""
        total = self.start.astype(float)
        for part in reversed(self._blocks()):
            flow = total[self.target[part]] * self.share[part]
            total += np.bincount(self.source[part], flow, minlength=len(total))
        return total

    def reached(self, alone: float = 0.0) -> np.ndarray:
        """[node], R: `leaf` of a leaf; of others `alone` + (1 − `alone`) · ΣÂ·R over their inputs."""
        total = np.where(self.leaf > 0, self.leaf, alone)
        for part in self._blocks():
            flow = total[self.source[part]] * self.share[part] * (1 - alone)
            total += np.bincount(self.target[part], flow, minlength=len(total))
        return total

    def held(self) -> float:
        """Σ of the outputs of leaves over Σ w."""
        total = self.start.sum()
        return float(self.outputs() @ (self.leaf > 0) / total) if total > 0 else 0.0


@dataclass(frozen=True)
class Selection:
    """Nested pictures by number, 0 the smallest, the last everything."""

    nodes: np.ndarray
    """[node], the first picture that each is in."""
    edges: np.ndarray
    """[edge], the same; an edge is drawn where its ends are."""
    shares: list[float]
    """share(D) by picture, ascending; the last is what the graph holds at all."""
    first: int
    """The largest picture of at most `MOST_NODES` nodes and `MOST_EDGES` edges, biases beside."""

    def strongest(self, most: int) -> np.ndarray:
        """Rows of the `most` edges that enter first, ascending."""
        return np.sort(np.argsort(self.edges, kind="stable")[:most])


def select(nodes: pd.DataFrame, edges: pd.DataFrame, verdicts: Sequence[str | None] | None = None) -> Selection:
    """The pictures of a graph. `nodes` and `edges` are its tables, `verdicts` what tests found of each edge, if any.

    Bias nodes take no part in the sums; an edge from one is in a picture where what flows along it is as much as along
    the weakest other edge.
    """
    flow, order = _flow(nodes, edges)
    bias = (nodes["kind"] == "bias").to_numpy()
    doubt = np.where(np.isin(np.array(list(verdicts or [None] * len(edges)), dtype=object), _DOUBTED), DOUBT, 1.0)
    from_bias = bias[flow.source]
    rounds = _rounds(flow.keep(~from_bias), doubt[order][~from_bias])
    others, biases = np.flatnonzero(~from_bias), np.flatnonzero(from_bias)

    last_node = np.zeros(len(nodes), dtype=int)
    last_edge = np.zeros(len(edges), dtype=int)
    shares, sizes = [], []
    for number, (alive, kept, output, least) in enumerate(rounds):
        last_node[alive] = last_edge[order[others[kept]]] = number
        if number:
            along = output[flow.target[biases]] * flow.share[biases]
            biases = biases[alive[flow.target[biases]] & (along >= least)]
        last_edge[order[biases]] = number
        last_node[flow.source[biases]] = number
        shares.append(flow.keep(others[kept]).held())
        sizes.append((int((alive & ~bias).sum()), len(kept)))
    last = len(shares) - 1
    fitting = [n for n, (n_nodes, n_edges) in enumerate(sizes) if n_nodes <= MOST_NODES and n_edges <= MOST_EDGES]
    return Selection(last - last_node, last - last_edge, shares[::-1], last - min(fitting, default=last))


def _flow(nodes: pd.DataFrame, edges: pd.DataFrame) -> tuple[Flow, np.ndarray]:
    """The edges sorted by the layer of their target, and the rows they had."""
    row_of = pd.Index(nodes["id"])
    source, target = (row_of.get_indexer(pd.Index(edges[end])) for end in ("source", "target"))
    layer = nodes["layer"].to_numpy(int)
    order = np.argsort(layer[target], kind="stable")
    start = nodes["probability"].where(nodes["kind"] == "logit", 0.0).fillna(0.0).to_numpy(float)
    if "explained" in nodes:
        start = np.where(nodes["explained"].to_numpy(bool), 1.0, start)
    if not start.any():  # tables that name no target: what nothing reads
        start = np.isin(np.arange(len(nodes)), target) & ~np.isin(np.arange(len(nodes)), source)
    share = np.nan_to_num(edges["share"].to_numpy(float))
    kind = nodes["kind"].to_numpy()
    leaf = np.where(kind == "token", 1.0, np.where(kind == "error", MISSED, 0.0))
    return Flow(source[order], target[order], share[order], layer, start.astype(float), leaf), order


_Round = tuple[np.ndarray, np.ndarray, np.ndarray, float]


def _rounds(flow: Flow, doubt: np.ndarray) -> Iterator[_Round]:
    """From everything down: nodes drawn [node], rows of the edges drawn, outputs [node], the least along an edge."""
    doubted = replace(flow, share=flow.share * doubt)
    always = _always(flow.start)
    kept = np.arange(len(flow.source))
    yield np.ones(len(flow.start), dtype=bool), kept, doubted.outputs(), 0.0
    alive, kept, through, along, output = _settle(doubted, kept, always)
    if not len(kept):
        return
    yield alive, kept, output, float(along.min())
    for most_nodes, most_edges in _sizes(int(alive.sum()), len(kept)):
        rank = np.where(always, np.inf, through)
        strong = np.zeros_like(alive)
        strong[np.argsort(-rank, kind="stable")[:most_nodes]] = True
        inside = strong[flow.source[kept]] & strong[flow.target[kept]]
        kept, along = kept[inside], along[inside]
        kept = np.sort(kept[np.argsort(-along, kind="stable")[:most_edges]])
        alive, kept, through, along, output = _settle(doubted, kept, always)
        if not len(kept):
            return
        yield alive, kept, output, float(along.min())


def _settle(flow: Flow, kept: np.ndarray, always: np.ndarray):
    """What lies on a whole path of these edges: nodes, edges, what flows through each node and along each edge."""
    drawn = flow.keep(kept)
    output, reached, whole = drawn.outputs(), drawn.reached(ALONE), drawn.reached() > 0
    through = np.where(whole, output * reached, 0.0)
    along = output[drawn.target] * drawn.share * reached[drawn.source]
    used = (along > 0) & whole[drawn.source]
    return always | (through > 0), kept[used], through, along[used], output


def _always(start: np.ndarray) -> np.ndarray:
    chosen = np.zeros(len(start), dtype=bool)
    chosen[np.argsort(-start, kind="stable")[:_ALWAYS]] = True
    return chosen & (start > 0)


def _between(number: int, least: int, part: float) -> int:
    return round(number * (least / number) ** part) if number > least else number


def _sizes(n_nodes: int, n_edges: int) -> Iterator[tuple[int, int]]:
    """Numbers of nodes and edges of each picture, downwards: both reach the limits of the first one at once."""
    far = max(n_nodes / MOST_NODES, n_edges / MOST_EDGES, 1.0)
    steps = min(math.ceil(math.log(far) / -math.log(_STEP)), _MOST_STEPS)
    for step in range(1, steps + 1):
        yield _between(n_nodes, MOST_NODES, step / steps), _between(n_edges, MOST_EDGES, step / steps)
    nodes, edges = min(n_nodes, MOST_NODES), min(n_edges, MOST_EDGES)
    while edges > _FEWEST_EDGES:
        nodes, edges = math.ceil(nodes * _SMALLER), int(edges * _SMALLER)
        yield nodes, edges
