"""What of a graph's edges passed by a skip term of the dictionaries, and so past all features.

    A = A_0 + past        A_0: the same edges where no path takes a skip term, only attention and the residual stream

Both parts add up as edges do: over the members of a supernode, over features that are merged into an error.
"""

from collections.abc import Iterable

import numpy as np
from scipy import sparse

from circuitsae.graph.compact import edge_counts, magnitude_sums, select_edges, shape


def past_skips(weights: sparse.csr_array, rows: Iterable[tuple[np.ndarray, np.ndarray]]) -> sparse.csr_array:
    """`weights` [node, node] less their parts without skip terms, of the edges that there are.

    rows: numbers of nodes, and of each its A_0 [row, node]; rows that do not come have nothing past the features.
    """
    data = np.zeros_like(weights.data)
    for nodes, block in rows:
        for node, without in zip(nodes.tolist(), block, strict=True):
            here = slice(weights.indptr[node], weights.indptr[node + 1])
            data[here] = weights.data[here] - without[weights.indices[here]]
    return _nonzero(data, weights)


def on_edges(past: sparse.csr_array, weights: sparse.csr_array) -> np.ndarray:
    """[edge], `past` of each edge in the order of `weights.data`."""
    found = np.zeros(len(weights.data), dtype=past.dtype)
    row_of = np.zeros(shape(weights)[1], dtype=past.dtype)
    for node in np.flatnonzero(edge_counts(past)).tolist():
        here, edges = (slice(*of.indptr[node : node + 2]) for of in (past, weights))
        row_of[past.indices[here]] = past.data[here]
        found[edges] = row_of[weights.indices[edges]]
        row_of[past.indices[here]] = 0
    return found


def of_edges(past: sparse.csr_array, weights: sparse.csr_array) -> sparse.csr_array:
    """The part of `past` [node, node] that is of the edges of `weights`."""
    return _nonzero(on_edges(past, weights), weights)


def past_share(past: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """|past| / (|past| + |weight − past|): the ratio to the weight, where both parts have one sign; 0 of nothing."""
    beside = np.abs(past, dtype=np.float64)
    whole = beside + np.abs(np.asarray(weight, dtype=np.float64) - past)
    return np.divide(beside, whole, out=np.zeros_like(whole), where=whole > 0)


def row_shares(weights: sparse.csr_array, past: sparse.csr_array, bias: np.ndarray) -> np.ndarray:
    """[node], Σ_s |past| / Σ_s (|past| + |weight − past|) of each row, bias nodes left out; 0 for empty rows."""
    without = sparse.csr_array((weights.data - on_edges(past, weights), weights.indices, weights.indptr), weights.shape)
    beside, direct = (magnitude_sums(part, ~bias[:, None])[:, 0] for part in (past, without))
    return past_share(beside, beside + direct)


def _nonzero(data: np.ndarray, weights: sparse.csr_array) -> sparse.csr_array:
    there = sparse.csr_array((data, weights.indices, weights.indptr), shape=weights.shape)
    return select_edges(there, data != 0)
