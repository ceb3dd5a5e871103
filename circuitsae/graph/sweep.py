"""Influence and the strongest rows of a graph whose edges are too many to keep: every row is read once.

Influence while the rows of a graph are still being found.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple, cast

import numpy as np
from scipy import sparse

from circuitsae.graph.compact import (
    RowBlock,
    assemble,
    check_rows,
    edge_counts,
    magnitude_sums,
    nonzeros,
    row_blocks,
    shape,
)
from circuitsae.graph.influence import absolute_inputs, pass_on, reciprocal
from transcoders.errors import InputError


class LazyInfluence:
    """I = wÂ + wÂ² + … over the rows known so far, brought up to date by each batch of new rows.

    A known row t passes (I+w)_t·Â[t] on to its sources. What it has passed on is remembered; when new rows raise
    (I+w)_t, only the increase is passed on, layer by layer from the top. An update costs the rows that are new and
    those whose influence changed; others are not read. Sums are in float64, rows are kept sparse in their precision.

    layers: [node], the layer of each node; start: [node], w; bias: [node], which nodes are bias nodes.
    """

    def __init__(self, layers: np.ndarray, start: np.ndarray, bias: np.ndarray) -> None:
        self._layers, self._start, self._bias = np.asarray(layers), start.astype(np.float64), np.asarray(bias)
        self._output = self._start.copy()
        self._passed = np.zeros(len(self._start))
        self._scale = np.zeros(len(self._start))
        self._known: dict[int, list[RowBlock]] = defaultdict(list)
        self._taken = False
        self.expanded = np.zeros(len(self._start), dtype=bool)
        """[node], whose rows are known."""

    def add_rows(
        self, rows: np.ndarray, block: np.ndarray | sparse.csr_array, inputs: np.ndarray | None = None
    ) -> None:
        """Take in the signed weights [row, node] of the targets `rows`.

        inputs: [row], Σ|weight| of the whole rows without bias columns, where `block` holds only a part of them.
        Raises `InputError` where a row is known already, or the shapes do not fit.
        """
        rows = np.asarray(rows)
        self._check(rows, block)
        edges = block if isinstance(block, sparse.csr_array) else nonzeros(block, None, len(self._start))
        self._scale[rows] = reciprocal(absolute_inputs(edges, self._bias) if inputs is None else inputs)
        self.expanded[rows] = True
        for layer in np.unique(self._layers[rows]):
            here = np.flatnonzero(self._layers[rows] == layer)
            self._store(int(layer), RowBlock(rows[here], edges[here]))
        if len(rows):
            self._pass_on(int(self._layers[rows].max()))

    def current(self) -> np.ndarray:
        """[node], the influence of each node through the rows known so far; NaN for bias nodes."""
        influence = self._output - self._start
        influence[self._bias] = np.nan
        return influence

    def unexplained(self, features: np.ndarray) -> float:
        """The share of the influence on the nodes of the mask `features` that lies on those without a known row."""
        influence = self.current()
        total = influence[features].sum()
        return float(influence[features & ~self.expanded].sum() / total) if total > 0 else 0.0

    def take_edges(self) -> sparse.csr_array:
        """The weights [node, node] of all rows added; they are freed on the way, and no row can be added afterwards."""
        blocks = [block for layer in sorted(self._known) for block in self._known.pop(layer)]
        self._taken = True
        return assemble(blocks, len(self._start))

    def _check(self, rows: np.ndarray, block: np.ndarray | sparse.csr_array) -> None:
        if self._taken:
            raise InputError("The edges were taken already, no row can be added; start with a new LazyInfluence.")
        check_rows(rows, block)
        columns = cast(tuple[int, int], block.shape)[1]
        if columns != len(self._start):
            raise InputError(f"A block of {columns} columns does not fit {len(self._start)} nodes; give one each.")
        again = rows[self.expanded[rows]]
        if len(again):
            raise InputError(f"The row of node {again[0]} was added already; add each target once.")

    def _store(self, layer: int, block: RowBlock) -> None:
        """Keep the blocks of a layer few, each at least twice the next, at a logarithmic number of copies."""
        blocks = self._known[layer]
        while blocks and blocks[-1].edges.nnz < 2 * block.edges.nnz:
            last = blocks.pop()
            merged = sparse.csr_array(sparse.vstack([last.edges, block.edges], format="csr"))
            block = RowBlock(np.concatenate([last.rows, block.rows]), merged)
        blocks.append(block)

    def _pass_on(self, top: int) -> None:
        """Bring the sources of every row whose (I+w) has grown up to date, from layer `top` down."""
        for layer in sorted((known for known in self._known if known <= top), reverse=True):
            for rows, edges in self._known[layer]:
                grown = np.flatnonzero(self._output[rows] != self._passed[rows])
                for part, weights in row_blocks(edges, grown):
                    changed = rows[part]
                    increase = (self._output[changed] - self._passed[changed]) * self._scale[changed]
                    self._output += increase @ abs(weights)
                    self._passed[changed] = self._output[changed]


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
