"""Edges in compact form: sparse row blocks, the strongest edges of a row with the exact remainder, few copies."""

from collections.abc import Iterator
from typing import NamedTuple, cast

import numpy as np
from scipy import sparse

from transcoders.errors import InputError

BLOCK = 2**20
"""Numbers that a pass over all edges holds at a time in float64."""


class RowBlock(NamedTuple):
    """Some rows of a graph's weights; row `i` of `edges` belongs to node `rows[i]`."""

    rows: np.ndarray
    edges: sparse.csr_array


def shape(weights: sparse.csr_array) -> tuple[int, int]:
    """The shape, for type checkers that do not find it in scipy."""
    return cast(tuple[int, int], weights.shape)


def edge_counts(weights: sparse.csr_array) -> np.ndarray:
    """How many edges each row has."""
    return np.diff(weights.indptr)


def row_blocks(weights: sparse.csr_array, rows: np.ndarray | None = None) -> Iterator[RowBlock]:
    """`rows` of `weights` (default: all, in order) in float64, about `BLOCK` edges at a time."""
    rows = np.arange(shape(weights)[0]) if rows is None else rows
    ends = np.cumsum(edge_counts(weights)[rows], dtype=np.int64)
    cuts = np.searchsorted(ends, np.arange(BLOCK, ends[-1] if len(ends) else 0, BLOCK))
    for part in np.split(rows, np.unique(cuts)):
        if len(part):
            yield RowBlock(part, weights[part].astype(np.float64))


def row_sums(weights: sparse.csr_array) -> np.ndarray:
    """Σ_s weights[t, s] of each row in float64."""
    total = np.zeros(shape(weights)[0])
    for rows, edges in row_blocks(weights):
        total[rows] = edges.sum(axis=1)
    return total


def magnitude_sums(weights: sparse.csr_array, columns: np.ndarray) -> np.ndarray:
    """Σ_s |weights[t, s]|·columns[s, k] in float64, [node, k]."""
    total = np.zeros((shape(weights)[0], columns.shape[1]))
    for rows, edges in row_blocks(weights):
        total[rows] = abs(edges) @ columns.astype(np.float64)
    return total


def select_edges(edges: sparse.csr_array, chosen: np.ndarray) -> sparse.csr_array:
    """The edges for which `chosen` [edge], in the order of `edges.data`, is true."""
    places = np.flatnonzero(chosen)
    indptr = np.searchsorted(places, edges.indptr).astype(edges.indptr.dtype)
    return sparse.csr_array((edges.data[places], edges.indices[places], indptr), shape=edges.shape)


def keep_strongest(
    weights: np.ndarray, m: int, bias: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `m` strongest entries of each row, and what the row held beside them.

    weights: [row, source], signed. bias: [source], the columns that are bias nodes.
    Returns the weights with all but the `m` largest |weight| of each row set to 0 (among equals the first columns
    stay), `rest` [row] = Σ of the signed weights left out, `absolute` [row] = Σ|weight| of the whole row over the
    columns that are no bias, both summed in float64: the `rest` and `inputs` of `AttributionGraph`.
    """
    if m < 1:
        raise InputError(f"keep_strongest: m={m} keeps no edge; give at least 1.")
    magnitude = np.abs(weights)
    counted = True if bias is None else ~bias
    absolute = np.asarray(np.sum(magnitude, axis=1, dtype=np.float64, where=counted))
    n = weights.shape[1]
    if m >= n:
        return weights, np.zeros(len(weights)), absolute
    least = np.partition(magnitude, n - m, axis=1)[:, n - m, None]
    strong = magnitude > least
    short = m - strong.sum(axis=1)
    for row in np.flatnonzero(least[:, 0] > 0):
        strong[row, np.flatnonzero(magnitude[row] == least[row])[: short[row]]] = True
    rest = np.asarray(np.sum(weights, axis=1, dtype=np.float64, where=~strong))
    return np.where(strong, weights, weights.dtype.type(0)), rest, absolute


def nonzeros(block: np.ndarray, columns: np.ndarray | None, n: int) -> sparse.csr_array:
    """The entries of a dense block that are not 0, as [row, n]; `columns` says where its columns lie among the n."""
    columns = np.arange(block.shape[1]) if columns is None else np.asarray(columns)
    columns = columns.astype(sparse.get_index_dtype(maxval=n))
    data, indices = [block[:0].ravel()], [columns[:0]]
    for row in block:
        # Row by row through positions: a mask copies half-full rows ten times slower.
        there = np.flatnonzero(row != 0)
        data.append(row[there])
        indices.append(columns[there])
    ends = np.cumsum([len(row) for row in data])
    indptr = ends.astype(sparse.get_index_dtype(maxval=max(n, int(ends[-1]))))
    return sparse.csr_array((np.concatenate(data), np.concatenate(indices), indptr), shape=(len(block), n))


def assemble(blocks: list[RowBlock], n: int) -> sparse.csr_array:
    """The [n, n] weights that `blocks` hold together; the list is emptied on the way, to free each block in turn."""
    counts = np.zeros(n, dtype=np.int64)
    for rows, edges in blocks:
        counts[rows] += edge_counts(edges)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    index = sparse.get_index_dtype(maxval=max(n, int(indptr[-1])))
    data = np.empty(indptr[-1], dtype=np.result_type(*{edges.dtype for _, edges in blocks} or {np.float64}))
    indices = np.empty(indptr[-1], dtype=index)
    free = indptr[:-1].copy()
    blocks.reverse()
    while blocks:
        rows, edges = blocks.pop()
        shift = free[rows] - edges.indptr[:-1]
        place = slice(shift[0], shift[0] + edges.nnz) if len(np.unique(shift)) == 1 else _places(edges, shift)
        data[place], indices[place] = edges.data, edges.indices
        free[rows] += edge_counts(edges)
    weights = sparse.csr_array((data, indices, indptr.astype(index)), shape=(n, n))
    if not weights.has_sorted_indices:
        weights.sort_indices()
    return weights


def _places(edges: sparse.csr_array, shift: np.ndarray) -> np.ndarray:
    place = np.repeat(shift, edge_counts(edges))
    place += np.arange(edges.nnz)
    return place


class EdgeBlocks:
    """Edges as they are computed, block by block; only what is not 0 is stored, 8 bytes each in float32."""

    def __init__(self) -> None:
        self._blocks: list[RowBlock] = []

    @property
    def nnz(self) -> int:
        """Edges stored so far."""
        return sum(edges.nnz for _, edges in self._blocks)

    def add(self, rows: np.ndarray, columns: np.ndarray | None, block: np.ndarray) -> None:
        """Store a dense block of signed weights in its own precision.

        rows: [target], which node each row of the block is, each at most once. columns: [source], the same for its
        columns; None where they are the nodes 0, 1, …. A row may come in several blocks with other columns each.
        Raises `InputError` where the shapes do not fit.
        """
        rows = np.asarray(rows)
        check_rows(rows, block)
        if columns is not None and len(columns) != block.shape[1]:
            raise InputError(
                f"A block of {block.shape[1]} columns came with {len(columns)} column numbers; give one each."
            )
        width = block.shape[1] if columns is None else int(np.max(columns, initial=-1)) + 1
        self._blocks.append(RowBlock(rows, nonzeros(block, columns, width)))

    def to_csr(self, n: int) -> sparse.csr_array:
        """The weights [n, n] of all blocks. The blocks are freed one by one, and this object is empty afterwards.

        Raises `InputError` where a block reaches beyond `n` nodes or an edge was added twice.
        """
        largest = max((max(np.max(r, initial=-1) + 1, shape(e)[1]) for r, e in self._blocks), default=0)
        if largest > n:
            raise InputError(
                f"The blocks hold edges of {largest} nodes, more than n={n}; give the number of all nodes."
            )
        weights = assemble(self._blocks, n)
        if not weights.has_canonical_format:
            raise InputError("An edge was added twice; add each pair of row and column once.")
        return weights


def check_rows(rows: np.ndarray, block: np.ndarray | sparse.csr_array) -> None:
    """Raises `InputError` unless there is one node for each row of the block, each once."""
    size = cast(tuple[int, ...], block.shape)
    if len(size) != 2 or rows.shape != size[:1]:
        raise InputError(f"A block of shape {size} came with {rows.shape} row numbers; give one for each row.")
    if len(np.unique(rows)) != len(rows):
        raise InputError("A row number occurs twice in one block; give each target once.")
