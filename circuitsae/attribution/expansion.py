"""Which features of a prompt get their row: every one, or the most influential found from the logits down."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from scipy import sparse

from circuitsae.attribution.engines import Engine
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
from circuitsae.graph.compact import RowBlock

ROUNDS = 6
"""Exploring ranks the features this many times: more is closer to the true ranking, less makes larger products."""

LOOK, LEAST_LOOKED_AT = 256, 2
"""To choose n features, the rows of n / 256 are looked at (of 2, if those are more)."""


@dataclass(frozen=True)
class Expansion:
    """The nodes of a graph, before its edges are known: features first, logits last."""

    nodes: tuple[Node, ...]
    n_features: int
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    n_layers: int
    provenance: Mapping[str, Any]
    edges_per_node: int | None = None

    @property
    def bias(self) -> np.ndarray:
        return np.array([node.kind is NodeKind.BIAS for node in self.nodes])

    def graph(self, weights: sparse.csr_array, rest: np.ndarray, inputs: np.ndarray | None) -> AttributionGraph:
        return AttributionGraph.build(
            self.nodes,
            weights,
            self.tokens,
            self.token_ids,
            self.n_layers,
            self.provenance,
            rest=rest,
            inputs=inputs,
        )


@dataclass(frozen=True)
class Rows:
    """Rows of a graph by node: an engine's rows, and for logits what the unembedding's bias adds."""

    engine: Engine
    nodes: np.ndarray
    """Which node each of the engine's targets is."""
    extra: np.ndarray
    """[target, extra], columns after the sources' that only logits have."""
    n_sources: int
    done: Callable[[int], Any]

    @property
    def columns(self) -> np.ndarray:
        """Which node each column of a block is."""
        return np.concatenate([self.engine.columns, self.n_sources + np.arange(self.extra.shape[1])])

    def every(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return self._by_node(self.engine.every_row())

    def of(self, targets: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of some of the engine's targets, by number."""
        return self._by_node(self.engine.rows(targets))

    def _by_node(self, found: Iterator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for targets, block in found:
            yield self.nodes[targets], np.concatenate([block, self.extra[targets].astype(block.dtype)], axis=1)
            self.done(len(targets))


def every_row(expansion: Expansion, rows: Rows, known: RowBlock | None = None) -> AttributionGraph:
    """The graph with all `rows`, and with those that are `known`."""
    n, bias, columns = len(expansion.nodes), expansion.bias[rows.columns], rows.columns
    rest, inputs = np.zeros(n), np.zeros(n)
    edges = EdgeBlocks()
    found = () if known is None else ((known.rows, known.edges.toarray()[:, columns]),)
    for nodes, block in chain(found, rows.every()):
        if expansion.edges_per_node is not None:
            block, rest[nodes], inputs[nodes] = keep_strongest(block, expansion.edges_per_node, bias)
        edges.add(nodes, columns, block)
    return expansion.graph(edges.to_csr(n), rest, None if expansion.edges_per_node is None else inputs)


def explored(expansion: Expansion, rows: Rows, at_most: int, unexplained: float) -> AttributionGraph:
    """The graph with rows of features from the logits down, until those without hold at most the share `unexplained`
    of the influence, or `at_most` have one. The others are merged into the error nodes.
    """
    explorer = _Explorer(expansion, rows)
    explorer.go(at_most, ROUNDS, unexplained)
    kept = explorer.influence.expanded[: expansion.n_features].copy()
    return merge_features(explorer.graph(), kept)


def looked_at(at_most: int) -> int:
    """How many features' rows are looked at to choose `at_most`."""
    return min(at_most, max(LEAST_LOOKED_AT, at_most // LOOK))


def first_look(expansion: Expansion, rows: Rows, at_most: int) -> tuple[np.ndarray, RowBlock]:
    """Numbers of the `at_most` features of most influence, in order, as far as the rows of the logits and of a few
    features tell; and these rows.
    """
    explorer = _Explorer(replace(expansion, edges_per_node=None), rows)
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

    def __init__(self, expansion: Expansion, rows: Rows) -> None:
        self._expansion, self._rows = expansion, rows
        nodes = expansion.nodes
        start = np.array([node.probability if node.kind is NodeKind.LOGIT else 0.0 for node in nodes])
        self.influence = LazyInfluence(np.array([node.layer for node in nodes]), start, expansion.bias)
        self._rest, self._inputs = np.zeros(len(nodes)), np.zeros(len(nodes))
        n_logits = sum(node.kind is NodeKind.LOGIT for node in nodes)
        self._add(expansion.n_features + np.arange(n_logits))

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
        expansion, columns = self._expansion, self._rows.columns
        for nodes, block in self._rows.of(wanted):
            whole = np.zeros((len(nodes), len(expansion.nodes)), dtype=block.dtype)
            whole[:, columns] = block
            inputs = None
            if expansion.edges_per_node is not None:
                whole, self._rest[nodes], inputs = keep_strongest(whole, expansion.edges_per_node, expansion.bias)
                self._inputs[nodes] = inputs
            self.influence.add_rows(nodes, whole, inputs)
