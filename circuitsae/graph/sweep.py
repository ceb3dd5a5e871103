"""Influence and the strongest rows of a graph whose edges are too many to keep: every row is read once."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import sparse

from circuitsae.graph.compact import RowBlock, check_rows, edge_counts, magnitude_sums, shape
from circuitsae.graph.influence import pass_on, reciprocal
from transcoders.errors import InputError

HELD_BYTES = 64 * 2**20
"""Rows of most influence are held up to this size, so that few have to be computed again."""


class Sums(NamedTuple):
    """What a graph says of each node over all of its edges."""

    influence: np.ndarray
    """[node]; NaN for bias nodes."""
    inputs: np.ndarray
    """[node], Σ|weight| over the sources that are no bias."""
    error_share: np.ndarray
    """[node], the part of `inputs` that comes from errors."""
    n_edges: int


class InfluenceSweep:
    """I = wÂ + wÂ² + …, as `node_influence` has it, over rows that come once and are dropped.

    A row passes on its (I+w)_t·Â[t] as soon as nothing can be added to (I+w)_t: when all targets at its own and at
    later positions have come, from the top layer down. So rows may come in any order, and where they come from the
    last position to the first only those of about one position wait.

    columns: of the nodes, as `node_columns` gives them. targets: [node], which nodes have a row. held: bytes of rows of
    most influence that `held_rows` may still know at the end.
    """

    def __init__(self, columns: Mapping[str, np.ndarray], targets: np.ndarray, *, held: int = HELD_BYTES) -> None:
        self._layers, self._pos, self._start = (columns[name] for name in ("layer", "pos", "start"))
        self._bias, error = columns["kind"] == "bias", columns["kind"] == "error"
        self._summed = np.stack([~self._bias, error], axis=1)
        self._missing = targets.copy()
        self._left = np.bincount(self._pos[targets], minlength=1)
        self._output = self._start.astype(np.float64)
        self._inputs, self._errors = np.zeros(len(targets)), np.zeros(len(targets))
        self._waiting: list[RowBlock] = []
        self._strongest = _Strongest(held)
        self._n_edges = 0

    def add(self, rows: np.ndarray, edges: sparse.csr_array, inputs: np.ndarray | None = None) -> None:
        """Take in the signed weights [row, node] of the targets `rows`.

        inputs: [row], Σ|weight| of the whole rows without bias columns, where `edges` are only a part of them.
        Raises `InputError` for a row that is not awaited, or shapes that do not fit.
        """
        check_rows(rows, edges)
        if shape(edges)[1] != len(self._missing):
            raise InputError(f"A block of {shape(edges)[1]} columns does not fit {len(self._missing)} nodes.")
        if not self._missing[rows].all():
            raise InputError(f"The row of node {rows[~self._missing[rows]][0]} is not awaited; add each target once.")
        sums = magnitude_sums(edges, self._summed)
        self._inputs[rows] = sums[:, 0] if inputs is None else inputs
        self._errors[rows] = sums[:, 1]
        self._n_edges += edges.nnz
        self._missing[rows] = False
        np.subtract.at(self._left, self._pos[rows], 1)
        self._waiting.append(RowBlock(rows, edges))
        self._pass_on(after=int(np.max(np.flatnonzero(self._left), initial=-1)))

    def sums(self) -> Sums:
        """Raises `InputError` where a row has not come."""
        if self._missing.any():
            raise InputError(f"The row of node {np.flatnonzero(self._missing)[0]} has not come; add every target.")
        influence = self._output - self._start
        influence[self._bias] = np.nan
        return Sums(influence, self._inputs, self._errors * reciprocal(self._inputs), self._n_edges)

    def held_rows(self) -> list[RowBlock]:
        """Whole rows of most influence, as many as were allowed."""
        return self._strongest.blocks

    def _pass_on(self, after: int) -> None:
        """Pass on all rows that wait at positions beyond `after`."""
        ready = [self._pos[rows] > after for rows, _ in self._waiting]
        parts = [_part(block, here) for block, here in zip(self._waiting, ready, strict=True) if here.any()]
        if not parts:
            return
        self._waiting = [_part(block, ~here) for block, here in zip(self._waiting, ready, strict=True) if ~here.all()]
        scale = reciprocal(self._inputs)
        for layer in np.unique(np.concatenate([self._layers[rows] for rows, _ in parts]))[::-1]:
            for rows, edges in parts:
                pass_on(self._output, scale, rows, edges, np.flatnonzero(self._layers[rows] == layer))
        for block in parts:
            self._strongest.add(block, self._output[block.rows])


class _Strongest:
    """Rows of most influence, within a number of bytes."""

    def __init__(self, allowed: int) -> None:
        self.blocks: list[RowBlock] = []
        self._influence: list[np.ndarray] = []
        self._allowed, self._held, self._least = allowed, 0, -np.inf

    def add(self, block: RowBlock, influence: np.ndarray) -> None:
        strong = influence > self._least
        if strong.any():
            self._store(_part(block, strong), influence[strong])
            if self._held > self._allowed:
                self._drop_weakest()

    def _store(self, block: RowBlock, influence: np.ndarray) -> None:
        self.blocks.append(block)
        self._influence.append(influence)
        self._held += _size(block.edges)

    def _drop_weakest(self) -> None:
        """Down to half of what is allowed, so that it is seldom done."""
        influence = np.concatenate(self._influence)
        sizes = np.concatenate([edge_counts(edges) for _, edges in self.blocks]) * _size_of_edge(self.blocks[0].edges)
        order = np.argsort(-influence, kind="stable")
        fits = np.cumsum(sizes[order]) <= self._allowed // 2
        self._least = influence[order[fits.sum()]] if not fits.all() else self._least
        blocks, of_each = self.blocks, self._influence
        self.blocks, self._influence, self._held = [], [], 0
        for block, values in zip(blocks, of_each, strict=True):
            if (strong := values > self._least).any():
                self._store(_part(block, strong), values[strong])


def _part(block: RowBlock, which: np.ndarray) -> RowBlock:
    if which.all():
        return block
    return RowBlock(block.rows[which], block.edges[np.flatnonzero(which)])


def _size(edges: sparse.csr_array) -> int:
    return edges.nnz * _size_of_edge(edges)


def _size_of_edge(edges: sparse.csr_array) -> int:
    return edges.data.itemsize + edges.indices.itemsize
