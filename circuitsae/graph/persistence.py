"""Which nodes and edges of a graph are found again in graphs of the same prompt by other dictionaries.

    a node, or a supernode U             I(U) = Σ_{u∈U} I_u
    an edge, between supernodes or not   Â(S → T) = Σ_{t∈T} I_t Σ_{s∈S} A[t, s] / inputs[t]  /  Σ_{t∈T} I_t
    how alike two of such numbers are    r(x, y) = max(0, min(x / y, y / x))

G(U) are the nodes of another graph that stand for U. U is found again where r(I(U), I(G(U))) ≥ 1/2 (or neither has any
influence), an edge where r(Â(S → T), Â(G(S) → G(T))) ≥ 1/2: the same sign, within a factor of two. Shares and not
weights are compared, since the unit of a weight is that of its target's pre-activation, which other dictionaries choose
otherwise. What is no feature (tokens, logits, errors, biases) stands for itself, and is found again where it is there.
The persistence is the share of the other graphs in which it is found; chance is the same with the features of a layer
and position of the other graph exchanged at random.

Source: what is asked, Paulo & Belrose 2025, *Sparse Autoencoders Trained on the Same Data Learn Different Features*,
and Leask et al. 2025, *Sparse Autoencoders Do Not Find Canonical Units of Analysis*; the scores are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from scipy import sparse

from circuitsae.graph.compact import edge_counts, shape
from circuitsae.graph.grouping import Supernode, places
from circuitsae.graph.influence import reciprocal
from circuitsae.graph.nodes import Node, NodeKind
from circuitsae.graph.past import on_edges
from transcoders.errors import InputError

FACTOR = 2.0
"""By which influence and share may differ."""
SHUFFLES = 20
"""Exchanges that chance is the mean of."""
GROUP_COLUMNS = ("layer", "index", "other")
"""Of a table of groups: a feature, and the number of one of those of its layer that stand for it elsewhere."""
_FRAME = ("what", "count", "persistence", "chance", "weighted", "weighted_chance")
_ROUNDING = 1e-9


@runtime_checkable
class WholeGraph(Protocol):
    """What is asked of an `AttributionGraph`."""

    @property
    def nodes(self) -> tuple[Node, ...]: ...
    @property
    def weights(self) -> sparse.csr_array: ...
    @property
    def inputs(self) -> np.ndarray: ...
    @property
    def influence(self) -> np.ndarray: ...
    @property
    def start(self) -> np.ndarray: ...
    @property
    def token_ids(self) -> tuple[int, ...]: ...
    @property
    def n_layers(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Persistence:
    """Shares of the other dictionaries."""

    dictionaries: tuple[str, ...]
    """Names of the others."""
    nodes: np.ndarray
    """[node], in which share of the others it is found again."""
    edges: np.ndarray
    """[edge], in the order of `weights.data`."""
    nodes_chance: np.ndarray
    """[node], the same with features exchanged."""
    edges_chance: np.ndarray
    """[edge]"""

    def part(self, rows: np.ndarray, weights: sparse.csr_array, left: sparse.csr_array) -> "Persistence":
        """Of the nodes in some `rows` and the edges that are `left` between them; `weights`: of the whole graph."""

        def edges(values: np.ndarray) -> np.ndarray:
            of_all = sparse.csr_array((values, weights.indices, weights.indptr), shape=weights.shape)
            return on_edges(sparse.csr_array(of_all[rows][:, rows]), left)

        return Persistence(
            self.dictionaries, self.nodes[rows], edges(self.edges), self.nodes_chance[rows], edges(self.edges_chance)
        )


class Other(NamedTuple):
    """The graph of the same prompt by other dictionaries, in full, and which features there stand for which here."""

    name: str
    graph: WholeGraph
    groups: pd.DataFrame
    """`layer`, `index`, `other`, a row for each member of each group: `transcoders.evaluation.counterparts`."""


class UnitPersistence(NamedTuple):
    """Supernodes in the place of their members."""

    nodes: pd.DataFrame
    """`id`, `members` (how many), `influence`, `persistence`, `chance`."""
    edges: pd.DataFrame
    """`source`, `target`, `share` (signed), `score` = |share|·(I+w) of the target, `persistence`, `chance`."""


def persistence_in(
    graph: WholeGraph, others: Sequence[Other], *, shuffles: int = SHUFFLES, seed: int = 0
) -> Persistence:
    """In which of the others each node and edge is found again; the equations are the module's.

    The others are full graphs, so that what is not found was not pruned away; this one may be pruned.
    Raises `InputError` without others, and for one of another prompt or model.
    """
    alone = sparse.csr_array(sparse.eye_array(len(graph.nodes), format="csr"))
    return _persistence(graph, alone, _shares(graph), others, shuffles, seed)


def persistence_of_units(
    graph: WholeGraph,
    supernodes: Sequence[Supernode],
    others: Sequence[Other],
    *,
    shuffles: int = SHUFFLES,
    seed: int = 0,
) -> UnitPersistence:
    """The same with supernodes in the place of their members, and the nodes in none as they are.

    Errors as in `persistence_in`, and those of `AttributionGraph.group`.
    """
    into, names = places([node.id for node in graph.nodes], supernodes)
    n = len(into)
    members = sparse.csr_array((np.ones(n), (into, np.arange(n))), shape=(len(names), n))
    importance = _importance(graph)
    own = _between(members, _shares(graph), importance)
    own.setdiag(0)
    own.eliminate_zeros()
    found = _persistence(graph, members, own, others, shuffles, seed)
    target = np.repeat(np.arange(len(names)), edge_counts(own))
    ids = np.array(names, dtype=object)
    nodes = {"id": ids, "members": members.sum(axis=1).astype(int), "influence": members @ _influence(graph)}
    edges = {"source": ids[own.indices], "target": ids[target], "share": own.data}
    edges["score"] = np.abs(own.data) * (members @ importance)[target]
    return UnitPersistence(
        pd.DataFrame(nodes | {"persistence": found.nodes, "chance": found.nodes_chance}),
        pd.DataFrame(edges | {"persistence": found.edges, "chance": found.edges_chance}),
    )


def ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`r(x, y) = max(0, min(x / y, y / x))`: 1 for equal numbers, 0 where the sign differs or one of them is 0."""
    small, large = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    return np.divide(small, large, out=np.zeros(len(x)), where=(x * y > 0) & (large > 0))


def persistence_frame(graph: WholeGraph, found: Persistence) -> pd.DataFrame:
    """What of a graph is found again: `what`, `count`, `persistence`, `chance`, and weighted by influence.

    Of features, of edges by the kinds of their ends, and of each the fewest that hold half of the influence. The
    influence of an edge is its score in pruning, Â[t, s]·(I+w)[t].
    """
    kinds, importance = np.array([str(node.kind) for node in graph.nodes]), _importance(graph)
    target = np.repeat(np.arange(len(kinds)), edge_counts(graph.weights))
    source, score = graph.weights.indices, np.abs(_shares(graph).data) * importance[target]
    feature = kinds == NodeKind.FEATURE
    beside = np.isin(kinds[source], (NodeKind.TOKEN, NodeKind.ERROR))
    nodes = found.nodes, found.nodes_chance, _influence(graph)
    edges = found.edges, found.edges_chance, score
    rows = []
    for what, of, mask in (
        ("features", nodes, feature),
        ("feature → feature", edges, feature[source] & feature[target]),
        ("feature → logit", edges, feature[source] & (kinds[target] == NodeKind.LOGIT)),
        ("token or error → feature", edges, feature[target] & beside),
    ):
        for name, part in ((what, mask), (f"{what}, top half", strongest_half(of[2], mask))):
            rows.append((name, int(part.sum()), *_means(*(values[part] for values in of))))
    return pd.DataFrame(rows, columns=list(_FRAME))


def unit_frame(
    graph: WholeGraph,
    supernodes: Sequence[Supernode],
    others: Sequence[Other],
    *,
    shuffles: int = SHUFFLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Whether features persist more where they are put together; columns as in `persistence_frame`.

    Rows: the members each alone, the supernodes, and as many of the same sizes made of features of the same layers and
    positions at random; of each the nodes, and the edges that begin or end there. Errors as in `persistence_of_units`.
    """
    rows = []
    drawn = _drawn_anew(graph, supernodes, np.random.default_rng(seed))
    members = [name for one in supernodes for name in one.members]
    for what, units, marked in (
        ("members, each alone", (), members),
        ("together", supernodes, [one.name for one in supernodes]),
        ("together at random", drawn, [one.name for one in drawn]),
    ):
        found = persistence_of_units(graph, units, others, shuffles=shuffles, seed=seed)
        nodes = found.nodes[found.nodes["id"].isin(marked)]
        edges = found.edges[found.edges["source"].isin(marked) | found.edges["target"].isin(marked)]
        for name, part, weight in ((what, nodes, "influence"), (f"{what}: their edges", edges, "score")):
            rows.append((name, len(part), *_means(*(np.asarray(part[c]) for c in ("persistence", "chance", weight)))))
    return pd.DataFrame(rows, columns=list(_FRAME))


def _drawn_anew(graph: WholeGraph, supernodes: Sequence[Supernode], rng: np.random.Generator) -> list[Supernode]:
    """The supernodes with the features of each layer and position in another order."""
    ids, drawn = [node.id for node in graph.nodes], {}
    for rows in _places_of_features(graph):
        drawn |= {ids[row]: ids[other] for row, other in zip(rows, rng.permutation(rows), strict=True)}
    return [replace(one, members=tuple(drawn.get(name, name) for name in one.members)) for one in supernodes]


def strongest_half(weight: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A mask of the fewest of the masked that hold half of their weight."""
    rows = np.flatnonzero(mask)
    rows = rows[np.argsort(-weight[rows], kind="stable")]
    held = np.cumsum(weight[rows])
    chosen = np.zeros(len(mask), dtype=bool)
    if len(rows):
        chosen[rows[: int(np.searchsorted(held, held[-1] / 2)) + 1]] = True
    return chosen


def _means(found: np.ndarray, chance: np.ndarray, weight: np.ndarray) -> tuple[float, float, float, float]:
    """Of what is found and of chance, the means, and the means weighted."""
    if not len(found):
        return np.nan, np.nan, np.nan, np.nan
    weight = weight if weight.sum() > 0 else np.ones(len(found))
    weighted = [float(np.average(values, weights=weight)) for values in (found, chance)]
    return float(found.mean()), float(chance.mean()), weighted[0], weighted[1]


class _Here(NamedTuple):
    """What is looked for in the other graphs."""

    influence: np.ndarray
    """[unit]"""
    itself: np.ndarray
    """[unit], whether it holds no feature, and so stands for itself."""
    edges: sparse.csr_array
    """[unit, unit], signed shares."""


class _There(NamedTuple):
    """Where it is looked for."""

    influence: np.ndarray
    """[node]"""
    importance: np.ndarray
    shares: sparse.csr_array
    """[node, node], signed."""

    def holds(self, here: _Here, stands: sparse.csr_array) -> tuple[np.ndarray, np.ndarray]:
        """Which units and edges of `here` are found again, given which nodes stand for which unit [unit, node]."""
        there, heard = np.diff(stands.indptr) > 0, stands @ self.influence
        alike = ratio(here.influence, heard) * FACTOR >= 1 - _ROUNDING
        nodes = there & (here.itself | alike | ((here.influence == 0) & (heard == 0)))
        shares = on_edges(_between(stands, self.shares, self.importance), here.edges)
        return nodes, ratio(here.edges.data, shares) * FACTOR >= 1 - _ROUNDING


def _persistence(
    graph: WholeGraph,
    members: sparse.csr_array,
    edges: sparse.csr_array,
    others: Sequence[Other],
    shuffles: int,
    seed: int,
) -> Persistence:
    """Of the units whose `members` [unit, node] are given, and the edges that `edges` [unit, unit] stores."""
    if not others:
        raise InputError("Persistence needs graphs by other dictionaries; give at least one.")
    rng = np.random.default_rng(seed)
    itself = np.asarray(members @ _features(graph).astype(float)) == 0
    here = _Here(members @ _influence(graph), itself, edges)
    sums = [np.zeros(len(values)) for values in (here.influence, edges.data) * 2]
    for other in others:
        _require_same_prompt(graph, other)
        there = _There(_influence(other.graph), _importance(other.graph), _shares(other.graph))
        stands, place = _ones(members @ _stand_for(graph, other)), _places_of_features(other.graph)
        draws = [there.holds(here, _exchanged(stands, place, rng)) for _ in range(shuffles)]
        for total, value in zip(sums[:2], there.holds(here, stands), strict=True):
            total += value
        for total, values in zip(sums[2:], zip(*draws, strict=True), strict=False):
            total += np.mean(values, axis=0)
    return Persistence(tuple(one.name for one in others), *(total / len(others) for total in sums))


def _require_same_prompt(graph: WholeGraph, other: Other) -> None:
    sides = [(one.token_ids, one.n_layers) for one in (graph, other.graph)]
    if sides[0] != sides[1]:
        raise InputError(
            f"The graph by {other.name} is of {len(sides[1][0])} tokens in {sides[1][1]} layers, and this one of "
            f"{len(sides[0][0])} in {sides[0][1]}, or of other tokens; give graphs of one prompt and model."
        )
    if missing := [name for name in GROUP_COLUMNS if name not in other.groups]:
        raise InputError(f"The groups of {other.name} lack {', '.join(missing)}; expected {', '.join(GROUP_COLUMNS)}.")


def _stand_for(graph: WholeGraph, other: Other) -> sparse.csr_array:
    """[node, other node]: a feature's group where it is active at the feature's position, and anything else itself."""
    own, theirs = _table(graph), _table(other.graph)
    features = own[own["feature"]].merge(other.groups[list(GROUP_COLUMNS)], on=["layer", "index"])
    found = features.merge(
        theirs[theirs["feature"]], left_on=["layer", "other", "pos"], right_on=["layer", "index", "pos"]
    )
    beside = own[~own["feature"]].merge(theirs[~theirs["feature"]], on="id")
    rows = np.concatenate([found["row_x"], beside["row_x"]]).astype(int)
    columns = np.concatenate([found["row_y"], beside["row_y"]]).astype(int)
    size = (len(graph.nodes), len(other.graph.nodes))
    return sparse.csr_array(sparse.coo_array((np.ones(len(rows)), (rows, columns)), shape=size))


def _table(graph: WholeGraph) -> pd.DataFrame:
    columns = {name: [getattr(node, name) for node in graph.nodes] for name in ("id", "layer", "index", "pos")}
    return pd.DataFrame(columns | {"feature": _features(graph), "row": np.arange(len(graph.nodes))})


def _places_of_features(graph: WholeGraph) -> list[np.ndarray]:
    """The rows of the features of each layer and position."""
    table = _table(graph)
    return [np.asarray(part["row"]) for _, part in table[table["feature"]].groupby(["layer", "pos"])]


def _exchanged(
    stands: sparse.csr_array, places_of_features: Sequence[np.ndarray], rng: np.random.Generator
) -> sparse.csr_array:
    """The same with the other graph's features of each place in another order."""
    order = np.arange(shape(stands)[1])
    for rows in places_of_features:
        order[rows] = rng.permutation(rows)
    return sparse.csr_array((stands.data, order[stands.indices], stands.indptr), shape=stands.shape)


def _between(members: sparse.csr_array, shares: sparse.csr_array, importance: np.ndarray) -> sparse.csr_array:
    """Â between units [unit, unit] from that between nodes: summed over sources, a mean over targets by importance."""
    least = _ROUNDING * (importance.max(initial=0.0) or 1.0)  # members without influence count alike
    weight = members.data * (importance[members.indices] + least)
    mean = sparse.csr_array((weight, members.indices, members.indptr), shape=members.shape)
    mean = sparse.csr_array(sparse.diags_array(reciprocal(mean.sum(axis=1))) @ mean)
    return sparse.csr_array(mean @ shares @ members.T)


def _ones(counts: sparse.csr_array) -> sparse.csr_array:
    made = sparse.csr_array(counts)
    return sparse.csr_array((np.ones_like(made.data), made.indices, made.indptr), shape=made.shape)


def _shares(graph: WholeGraph) -> sparse.csr_array:
    """The shares of all edges with the sign of their weights, in the order of these."""
    data = graph.weights.data * np.repeat(reciprocal(graph.inputs), edge_counts(graph.weights))
    return sparse.csr_array((data, graph.weights.indices, graph.weights.indptr), shape=graph.weights.shape)


def _influence(graph: WholeGraph) -> np.ndarray:
    return np.nan_to_num(graph.influence)


def _importance(graph: WholeGraph) -> np.ndarray:
    return _influence(graph) + graph.start


def _features(graph: WholeGraph) -> np.ndarray:
    return np.array([node.kind is NodeKind.FEATURE for node in graph.nodes])
