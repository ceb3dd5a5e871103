"""How much of a graph hangs on where it was cut: in what share of many prunings each node and edge is kept.

    s(e) = (1 / B) Σ_b [e ∈ prune(graph, nodes_b, edges_b)]

over B pairs of shares. What is in every pruning (s = 1) is the strict consensus. A larger share keeps about what a
smaller one does and more, so that the consensus is close to the narrowest pruning, and s says how early an edge comes
in; it says nothing of other dictionaries, prompts or ways to attribute.

Source: Parekh 2026, "CIRCUS: Circuit Consensus under Uncertainty via Stability Ensembles" (arXiv 2603.00523).
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy import sparse

from circuitsae.graph.compact import shape
from circuitsae.graph.past import on_edges
from circuitsae.graph.pruning import check_shares, strongest_edges, strongest_nodes
from transcoders.errors import InputError

View = tuple[float, float]
"""The shares of a pruning: of the influence that nodes hold, and that edges between them do."""
VIEWS: tuple[View, ...] = tuple(product((0.6, 0.7, 0.8, 0.9), (0.8, 0.9, 0.95, 0.98)))


class Inclusion(NamedTuple):
    """Shares of the prunings."""

    nodes: np.ndarray
    """[node]"""
    edges: np.ndarray
    """[edge], in the order of `weights.data`."""


def inclusion(
    weights: sparse.csr_array, influence: np.ndarray, columns: Mapping[str, np.ndarray], views: Sequence[View] = VIEWS
) -> Inclusion:
    """In which share of `views` each node and edge of a graph is kept; `columns` are those of `node_columns`.

    Raises `InputError` for no views, and shares that are none.
    """
    if not views:
        raise InputError("A consensus needs prunings to be of; give at least one pair of shares (nodes, edges).")
    for nodes, edges in views:
        check_shares(nodes=nodes, edges=edges)
    n = len(influence)
    kept_nodes, kept_edges = np.zeros(n), sparse.csr_array((n, n))
    for rows, edges in _views(weights, influence, columns, views):
        kept_nodes[rows] += 1
        kept_edges = kept_edges + edges
    return Inclusion(kept_nodes / len(views), on_edges(sparse.csr_array(kept_edges), weights) / len(views))


def _views(
    weights: sparse.csr_array, influence: np.ndarray, columns: Mapping[str, np.ndarray], views: Iterable[View]
) -> Iterable[tuple[np.ndarray, sparse.csr_array]]:
    """Of each pruning the numbers of the nodes that it keeps, and a one for each edge [node, node]."""
    for share in sorted({nodes for nodes, _ in views}):
        rows = np.flatnonzero(strongest_nodes(influence, columns["kind"], share))
        part = sparse.csr_array(weights[rows][:, rows])
        own = {name: values[rows] for name, values in columns.items()}
        for edge_share in (edges for nodes, edges in views if nodes == share):
            mask, strong = strongest_edges(part, own, edge_share)
            found = strong.tocoo()
            ones = (np.ones(found.nnz), (rows[found.row], rows[found.col]))
            yield rows[mask], sparse.csr_array(sparse.coo_array(ones, shape=shape(weights)))
