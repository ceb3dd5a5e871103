"""Which features of a prompt get their row: every one, or the most influential found from the logits down."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from scipy import sparse

from circuitsae.attribution.nodes import Endpoints
from circuitsae.graph import (
    AttributionGraph,
    EdgeBlocks,
    LazyInfluence,
    Node,
    NodeKind,
    keep_strongest,
    merge_features,
    merge_matrix,
)
from circuitsae.graph.compact import RowBlock, assemble, edge_counts, nonzeros, select_edges
from circuitsae.graph.influence import cumulative, scores
from circuitsae.graph.nodes import node_columns
from circuitsae.graph.past import past_share, past_skips
from circuitsae.graph.pruning import strongest_nodes
from circuitsae.graph.sweep import HELD_BYTES, InfluenceSweep, Sums

ROUNDS = 6
"""Exploring ranks the features this many times: more is closer to the true ranking, less makes larger products."""

LOOK, LEAST_LOOKED_AT = 256, 2
"""To choose n features, the rows of n / 256 are looked at (of 2, if those are more)."""


@runtime_checkable
class Engine(Protocol):
    """Rows of the adjacency of one prompt. Targets are all that may be asked for; they are named by number."""

    @property
    def columns(self) -> np.ndarray:
        """Number among the sources' nodes of each column of a row."""
        ...

    def every_row(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers of targets and their rows, as far as it costs nothing from the last position to the first."""
        ...

    def rows(self, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same of some targets, in any order. Those of a block that was found before are found the same."""
        ...


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """A graph whose rows are still to be found: its nodes (features first, logits last), and how to find the rows."""

    engine: Engine
    without_skips: Engine | None
    """The same rows where no path takes a skip term and errors are held; None where that is how they are."""
    ends: Endpoints
    provenance: Mapping[str, Any]
    edges_per_node: int | None
    responds: bool = False
    """Whether errors answer; they pass features as a skip term does."""
    done: Callable[[int], Any]
    """Is told of every block how many rows it had."""

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        return self.ends.nodes

    @property
    def n_features(self) -> int:
        return self.ends.n_features

    @cached_property
    def bias(self) -> np.ndarray:
        return np.array([node.kind is NodeKind.BIAS for node in self.nodes])

    @cached_property
    def columns(self) -> np.ndarray:
        """Which node each column of a block is: an engine's, and those after them that only logits have."""
        n_extra = self.ends.unembedding_bias.shape[1]
        return np.concatenate([self.engine.columns, len(self.ends.sources) + np.arange(n_extra)])

    def every_row(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Nodes and their rows, in blocks."""
        return self._by_node(self.engine.every_row())

    def rows(self, targets: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same of some of the engine's targets, by number."""
        return self._by_node(self.engine.rows(targets))

    def _by_node(self, found: Iterator[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for targets, block in found:
            extra = self.ends.unembedding_bias[targets].astype(block.dtype)
            yield self.ends.target_nodes[targets], np.concatenate([block, extra], axis=1)
            self.done(len(targets))

    def past(self, weights: sparse.csr_array, nodes: np.ndarray) -> sparse.csr_array | None:
        """What of `weights` [k, k] between these `nodes` [k], by number, passed by a skip term; one more sweep."""
        if (direct := self.direct) is None:
            return None
        number, place = (np.full(len(self.nodes), -1) for _ in range(2))
        number[self.ends.target_nodes], place[nodes] = np.arange(len(self.ends.target_nodes)), np.arange(len(nodes))
        wanted = number[nodes[edge_counts(weights) > 0]]
        every = 2 * len(wanted) > len(self.ends.target_nodes)  # each of them costs less where all are found

        def rows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for found, block in direct.every_row() if every else direct.rows(wanted):
                here = place[found] >= 0
                yield place[found[here]], self.with_all_columns(block[here])[:, nodes]

        return self._crossing(past_skips(weights, rows()), nodes)

    def _crossing(self, past: sparse.csr_array, nodes: np.ndarray) -> sparse.csr_array:
        """Without the rounding errors of edges that no skip term lies between."""
        read, written = (below[nodes] for below in self.skips_below)
        return select_edges(past, np.repeat(read, edge_counts(past)) > written[past.indices])

    @cached_property
    def skips_below(self) -> tuple[np.ndarray, np.ndarray]:
        """[node] both: how many skip terms lie below where each reads, and below where it has written first."""
        dictionaries, layer = self.ends.model.dictionaries, np.array([node.layer for node in self.nodes])
        passes = [self.responds or dictionaries.skip(at) is not None for at in range(dictionaries.n_layers)]
        below = np.cumsum([0, *passes])
        written = layer + ~self.bias  # attention adds its biases before the layer's own term reads
        return below[layer.clip(0)], below[written.clip(0, dictionaries.n_layers)]

    @cached_property
    def direct(self) -> "Expansion | None":
        """The same rows where no path takes a skip term."""
        engine = self.without_skips
        return None if engine is None else replace(self, engine=engine, done=lambda _: None)

    def with_all_columns(self, block: np.ndarray) -> np.ndarray:
        """Rows [row, node] of rows [row, column]."""
        whole = np.zeros((len(block), len(self.nodes)), dtype=block.dtype)
        whole[:, self.columns] = block
        return whole

    def graph(self, weights: sparse.csr_array, rest: np.ndarray, inputs: np.ndarray | None) -> AttributionGraph:
        trace, model = self.ends.trace, self.ends.model.model
        return AttributionGraph.build(
            self.nodes,
            weights,
            trace.token_strings,
            tuple(trace.tokens.tolist()),
            model.n_layers,
            self.provenance,
            rest=rest,
            inputs=inputs,
            past=self.past(weights, np.arange(len(self.nodes))),
        )


class FullSize(NamedTuple):
    """How large a graph was before it was pruned."""

    nodes: int
    edges: int


def every_row(expansion: Expansion, known: RowBlock | None = None) -> AttributionGraph:
    """The graph with all rows, those that are `known` and those still to be found."""
    n, columns = len(expansion.nodes), expansion.columns
    rest, inputs = np.zeros(n), np.zeros(n)
    edges = EdgeBlocks()
    for nodes, block in _with_known(expansion, known):
        block, rest[nodes], found = _stored(expansion, block, columns)
        inputs[nodes] = 0.0 if found is None else found
        edges.add(nodes, columns, block)
    return expansion.graph(edges.to_csr(n), rest, None if expansion.edges_per_node is None else inputs)


def pruned(
    expansion: Expansion, nodes: float, edges: float, known: RowBlock | None = None
) -> tuple[AttributionGraph, FullSize]:
    """`every_row`, pruned, without ever holding all edges: a sweep finds the nodes to keep, then only the edges
    between these are stored, of rows that the sweep still holds or that are computed once more.
    """
    columns = node_columns(expansion.nodes)
    kind = columns["kind"]
    targets = (kind == NodeKind.LOGIT) | (kind == NodeKind.FEATURE)
    # Of a long prompt rows are dear, and another pattern's memory is there for them.
    sweep = InfluenceSweep(columns, targets, held=max(HELD_BYTES, expansion.ends.trace.frozen.recomputed))
    order = np.argsort(expansion.columns)  # by node: sums run in this order
    by_node = expansion.columns[order]
    rest, bypassed, places = np.zeros(len(targets)), np.zeros(len(targets)), []

    def sparse_rows(block: np.ndarray) -> sparse.csr_array:
        return nonzeros(block[:, order], by_node, len(targets))

    for found, block, direct in _with_direct(expansion, known):
        block, rest[found], inputs = _stored(expansion, block, expansion.columns)
        if direct is not None:
            bypassed[found] = _past_share(block, np.where(block == 0, 0, direct), expansion.bias[expansion.columns])
        sweep.add(found, sparse_rows(block), inputs)
        places.append(found)
    sums = sweep.sums()
    kept = strongest_nodes(sums.influence, kind, nodes)
    held = sweep.held_rows()
    wanted = kept & targets
    wanted[np.concatenate([block.rows for block in held]) if held else []] = False
    blocks = [_inside(block, kept) for block in held]
    for found, block in _found_again(expansion, known, places, wanted):
        block, *_ = _stored(expansion, block, expansion.columns)
        again = np.flatnonzero(wanted[found])
        blocks.append(_inside(RowBlock(found[again], sparse_rows(block[again])), kept))
    weights = assemble(blocks, int(kept.sum()))
    past = expansion.past(weights, np.flatnonzero(kept))
    inside = graph_of(expansion, kept, weights, rest, sums, past, bypassed)
    return inside.prune_edges(edges), FullSize(len(expansion.nodes), sums.n_edges)


def _with_known(expansion: Expansion, known: RowBlock | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if known is not None:
        yield known.rows, known.edges[:, expansion.columns].toarray()
    yield from expansion.every_row()


def _with_direct(
    expansion: Expansion, known: RowBlock | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """`_with_known`, with the same rows where no path takes a skip term; None where there is none."""
    if expansion.direct is None:
        yield from ((found, block, None) for found, block in _with_known(expansion, known))
        return
    both = zip(_with_known(expansion, known), expansion.direct.every_row(), strict=True)
    for (found, block), (same, direct) in both:
        assert np.array_equal(found, same)
        yield found, block, direct


def _past_share(block: np.ndarray, direct: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """[row], what `row_shares` gives of dense rows and their parts without skip terms."""
    past, beside = (np.sum(np.abs(part, dtype=np.float64), axis=1, where=~bias) for part in (block - direct, direct))
    return past_share(past, past + beside)


def _found_again(
    expansion: Expansion, known: RowBlock | None, places: list[np.ndarray], wanted: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The blocks that have a row that is wanted, as they were found at first: in whole, so that they round the same."""
    silent, number = replace(expansion, done=lambda _: None), np.full(len(wanted), -1)
    targets = expansion.ends.target_nodes
    number[targets] = np.arange(len(targets))
    for found in places:
        if not wanted[found].any():
            continue
        if known is not None and found is known.rows:
            yield known.rows, known.edges[:, expansion.columns].toarray()
        else:
            yield from silent.rows(number[found])


def _stored(
    expansion: Expansion, block: np.ndarray, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray | float, np.ndarray | None]:
    """What is stored of a block, and the `rest` and `inputs` of its rows."""
    if expansion.edges_per_node is None:
        return block, 0.0, None
    return keep_strongest(block, expansion.edges_per_node, expansion.bias[columns])


def _inside(block: RowBlock, kept: np.ndarray) -> RowBlock:
    """The part of some rows among the nodes kept, by their numbers there."""
    here, number = np.flatnonzero(kept[block.rows]), np.cumsum(kept) - 1
    return RowBlock(number[block.rows[here]], sparse.csr_array(block.edges[here][:, np.flatnonzero(kept)]))


def graph_of(
    expansion: Expansion,
    kept: np.ndarray,
    weights: sparse.csr_array,
    rest: np.ndarray,
    sums: Sums,
    past: sparse.csr_array | None,
    bypassed: np.ndarray,
) -> AttributionGraph:
    """The graph of the nodes `kept`, with what their full graph says of them; `weights` and `past` are of these alone.

    bypassed: [node], the part of each row that passed by skip terms.
    """
    trace, columns = expansion.ends.trace, node_columns(expansion.nodes)
    token, logit, bias, error = (
        columns["kind"] == kind for kind in (NodeKind.TOKEN, NodeKind.LOGIT, NodeKind.BIAS, NodeKind.ERROR)
    )
    return AttributionGraph(
        nodes=tuple(expansion.nodes[row] for row in np.flatnonzero(kept)),
        weights=weights,
        rest=rest[kept],
        influence=sums.influence[kept],
        inputs=sums.inputs[kept],
        cumulative=cumulative(sums.influence, always=token | logit | bias)[kept],
        scores=scores(
            sums.error_share, sums.influence, columns["start"], token, error, None if past is None else bypassed
        ),
        tokens=trace.token_strings,
        token_ids=tuple(trace.tokens.tolist()),
        n_layers=expansion.ends.model.model.n_layers,
        provenance=dict(expansion.provenance),
        past=past,
    )


def explored(expansion: Expansion, at_most: int, unexplained: float) -> AttributionGraph:
    """The graph with rows of features from the logits down, until those without hold at most the share `unexplained`
    of the influence, or `at_most` have one. The others are merged into the error nodes.
    """
    explorer = _Explorer(expansion)
    explorer.go(at_most, ROUNDS, unexplained)
    kept = explorer.influence.expanded[: expansion.n_features].copy()
    return merge_features(explorer.graph(), kept)


def looked_at(at_most: int) -> int:
    """How many features' rows are looked at to choose `at_most`."""
    return min(at_most, max(LEAST_LOOKED_AT, at_most // LOOK))


def first_look(expansion: Expansion, at_most: int) -> tuple[np.ndarray, RowBlock]:
    """Numbers of the `at_most` features of most influence, in order, as far as the rows of the logits and of a few
    features tell; and these rows.
    """
    explorer = _Explorer(replace(expansion, edges_per_node=None))
    explorer.go(looked_at(at_most), rounds=1)
    influence = explorer.influence.current()[: expansion.n_features]
    most = np.argsort(-influence, kind="stable")[:at_most]
    seen = np.flatnonzero(explorer.influence.expanded)
    return np.sort(most[influence[most] > 0]), RowBlock(seen, explorer.influence.take_edges()[seen])


def with_only(features: np.ndarray, known: RowBlock, expansion: Expansion) -> RowBlock:
    """Known rows among the nodes that are left with these features: what the others write is error of their layer."""
    dropped = np.setdiff1d(np.arange(expansion.n_features), features)
    left = np.delete(np.arange(len(expansion.nodes)), dropped)
    kept = np.flatnonzero(~np.isin(known.rows, dropped))
    merged = known.edges[kept].astype(np.float64) @ merge_matrix(expansion.nodes, dropped)
    return RowBlock(np.searchsorted(left, known.rows[kept]), merged.astype(known.edges.dtype))


class _Explorer:
    """Rows found from the logits down, and the influence through them."""

    def __init__(self, expansion: Expansion) -> None:
        self._expansion = expansion
        nodes = expansion.nodes
        start = np.array([node.start for node in nodes])
        self.influence = LazyInfluence(np.array([node.layer for node in nodes]), start, expansion.bias)
        self._rest, self._inputs = np.zeros(len(nodes)), np.zeros(len(nodes))
        self._add(np.arange(expansion.n_features, len(expansion.ends.target_nodes)))

    def go(self, at_most: int, rounds: int, unexplained: float = 0.0) -> None:
        """Add the rows of `at_most` features in rounds, in each those of most influence on what is known so far."""
        n_features, influence = self._expansion.n_features, self.influence
        feature = np.arange(len(self._expansion.nodes)) < n_features
        left = at_most
        while left and influence.unexplained(feature) > unexplained:
            ranked = np.where(influence.expanded[:n_features], 0.0, influence.current()[:n_features])
            most = np.argsort(-ranked, kind="stable")[: min(left, -(-at_most // rounds))]
            wanted = most[ranked[most] > 0]
            self._add(wanted)
            left = left - len(wanted) if len(wanted) else 0

    def graph(self) -> AttributionGraph:
        """Of all nodes; features without a row have no inputs."""
        truncated = self._expansion.edges_per_node is not None
        return self._expansion.graph(self.influence.take_edges(), self._rest, self._inputs if truncated else None)

    def _add(self, wanted: np.ndarray) -> None:
        expansion = self._expansion
        for nodes, block in expansion.rows(wanted):
            whole = expansion.with_all_columns(block)
            inputs = None
            if expansion.edges_per_node is not None:
                whole, self._rest[nodes], inputs = keep_strongest(whole, expansion.edges_per_node, expansion.bias)
                self._inputs[nodes] = inputs
            self.influence.add_rows(nodes, whole, inputs)
