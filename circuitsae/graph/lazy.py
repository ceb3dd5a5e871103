"""Influence while the rows of a graph are still being found."""

from collections import defaultdict
from typing import cast

import numpy as np
from scipy import sparse

from circuitsae.graph.compact import RowBlock, assemble, check_rows, nonzeros, row_blocks
from circuitsae.graph.influence import absolute_inputs, reciprocal
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
