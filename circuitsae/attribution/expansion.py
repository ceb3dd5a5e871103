"""Which features of a prompt get their row: every one, or the most influential found from the logits down."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
)

ROUNDS = 6
"""Lazy expansion ranks the features this many times: more is closer to the true ranking, less makes larger products."""


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
    extra: np.ndarray
    """[logit, extra], columns that only logits have."""
    n_sources: int
    """The extra columns follow the sources', then come the logits."""
    done: Callable[[int], Any]

    @property
    def columns(self) -> np.ndarray:
        """Which node each column of a block is."""
        return np.concatenate([self.engine.columns, self.n_sources + np.arange(self.extra.shape[1])])

    def every(self, n_features: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return self._by_node(self.engine.every_row(), n_features)

    def of(self, numbers: np.ndarray, n_features: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of targets by number: features, then logits."""
        return self._by_node(self.engine.rows(numbers), n_features)

    def _by_node(self, found: Iterator, n_features: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for numbers, block in found:
            logit = numbers >= n_features
            extra = np.zeros((len(numbers), self.extra.shape[1]), dtype=block.dtype)
            extra[logit] = self.extra[numbers[logit] - n_features]
            shift = self.n_sources + self.extra.shape[1] - n_features
            yield np.where(logit, numbers + shift, numbers), np.concatenate([block, extra], axis=1)
            self.done(int((~logit).sum()))


def every_row(expansion: Expansion, rows: Rows) -> AttributionGraph:
    """The graph with the rows of all active features."""
    n, bias, columns = len(expansion.nodes), expansion.bias[rows.columns], rows.columns
    rest, inputs = np.zeros(n), np.zeros(n)
    edges = EdgeBlocks()
    for nodes, block in rows.every(expansion.n_features):
        if expansion.edges_per_node is not None:
            block, rest[nodes], inputs[nodes] = keep_strongest(block, expansion.edges_per_node, bias)
        edges.add(nodes, columns, block)
    return expansion.graph(edges.to_csr(n), rest, None if expansion.edges_per_node is None else inputs)


def most_influential(expansion: Expansion, rows: Rows, at_most: int, unexplained: float) -> AttributionGraph:
    """The graph with the rows of `at_most` features: in each round those of most influence on what is known so far.

    Ends sooner once the features without a row hold no more than the share `unexplained` of the influence.
    """
    nodes, n_features = expansion.nodes, expansion.n_features
    feature = np.arange(len(nodes)) < n_features
    start = np.array([node.probability if node.kind is NodeKind.LOGIT else 0.0 for node in nodes])
    influence = LazyInfluence(np.array([node.layer for node in nodes]), start, expansion.bias)
    rest, inputs = np.zeros(len(nodes)), np.zeros(len(nodes))
    n_logits = int((start > 0).sum())
    wanted = n_features + np.arange(n_logits)
    while len(wanted):
        _add(influence, expansion, rows, wanted, rest, inputs)
        left = at_most - int(influence.expanded[:n_features].sum())
        if influence.unexplained(feature) <= unexplained:
            break
        ranked = np.where(influence.expanded[:n_features], 0.0, influence.current()[:n_features])
        most = np.argsort(-ranked, kind="stable")[: min(left, max(1, -(-at_most // ROUNDS)))]
        wanted = most[ranked[most] > 0]
    expanded = influence.expanded.copy()
    truncated = expansion.edges_per_node is not None
    graph = expansion.graph(influence.take_edges(), rest, inputs if truncated else None)
    return merge_features(graph, expanded[:n_features])


def _add(
    influence: LazyInfluence,
    expansion: Expansion,
    rows: Rows,
    wanted: np.ndarray,
    rest: np.ndarray,
    inputs: np.ndarray,
) -> None:
    n, columns, bias = len(expansion.nodes), rows.columns, expansion.bias
    for nodes, block in rows.of(wanted, expansion.n_features):
        whole = np.zeros((len(nodes), n), dtype=block.dtype)
        whole[:, columns] = block
        if expansion.edges_per_node is None:
            influence.add_rows(nodes, whole)
        else:
            whole, rest[nodes], inputs[nodes] = keep_strongest(whole, expansion.edges_per_node, bias)
            influence.add_rows(nodes, whole, inputs[nodes])
