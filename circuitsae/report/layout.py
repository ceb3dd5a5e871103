"""Where each node of a graph is drawn: a grid of cells (position × layer), nodes stacked inside a cell by influence.

One unit is one node slot, in x as in y. A column is as wide as its fullest cell needs, a row as high, so no two nodes
share a place. Position 0 starts at x = 0; nodes that are constant over positions stand in a column left of it.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import pandas as pd

_GAP_X, _GAP_Y = 0.6, 0.9
_ASPECT = 1.6
_NARROWEST = 0.75
_MAX_DEPTH = 12
_KIND_RANK = {"logit": 0, "token": 0, "feature": 0, "error": 1, "bias": 2}

Cell = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Band:
    """A row or a column of the grid."""

    label: str
    start: float
    end: float

    @property
    def centre(self) -> float:
        return (self.start + self.end) / 2


@dataclass(frozen=True, slots=True)
class Layout:
    x: list[float]
    y: list[float]
    columns: list[Band]
    """One per token position."""
    rows: list[Band]
    """Embeddings, the layers, logits: from the bottom."""
    bias_column: Band | None
    """Left of the first position, when some node has no position."""


def arrange(nodes: pd.DataFrame, labels: list[str], n_layers: int) -> Layout:
    """Place every node. `nodes` has the columns of `nodes_frame()`; `labels` is one text per token position."""
    cells = _cells(nodes)
    placed = {cell: rows for cell, rows in cells.items() if cell[1] >= 0}
    depths = _depths(placed, len(labels), n_layers)
    columns = _columns(placed, depths, labels)
    rows = _rows(depths, n_layers)
    bias_column = Band("biases", -_GAP_X - 1.4, -_GAP_X) if len(placed) < len(cells) else None

    x, y = [0.0] * len(nodes), [0.0] * len(nodes)
    for (layer, pos), members in cells.items():
        row = rows[layer + 1]
        if pos < 0:
            assert bias_column is not None
            step = (row.end - row.start) / len(members)
            for rank, node in enumerate(members):
                x[node], y[node] = bias_column.centre, row.end - (rank + 0.5) * step
            continue
        depth = depths[layer]
        stacks = math.ceil(len(members) / depth)
        height = min(len(members), depth)
        for rank, node in enumerate(members):
            stack, place = divmod(rank, depth)
            x[node] = columns[pos].centre + stack - (stacks - 1) / 2
            y[node] = row.centre + (height - 1) / 2 - place
    return Layout(x, y, columns, rows, bias_column)


def _cells(nodes: pd.DataFrame) -> dict[Cell, list[int]]:
    """Row numbers of the nodes of each (layer, position): features by influence, then the error, then biases."""
    ids, kinds = nodes["id"].tolist(), nodes["kind"].tolist()
    influence, probability = nodes["influence"].tolist(), nodes["probability"].tolist()

    def rank(row: int) -> tuple[int, float, str]:
        strength = probability[row] if kinds[row] == "logit" else influence[row]
        return _KIND_RANK[kinds[row]], math.inf if math.isnan(strength) else -strength, ids[row]

    cells: dict[Cell, list[int]] = defaultdict(list)
    layers, positions = nodes["layer"].tolist(), nodes["pos"].tolist()
    for row in sorted(range(len(nodes)), key=rank):
        cells[int(layers[row]), int(positions[row])].append(row)
    return dict(cells)


def _depths(cells: dict[Cell, list[int]], n_positions: int, n_layers: int) -> dict[int, int]:
    """Slots per row: the stack height that leaves the most room around a node, on a page of the usual shape."""
    fullest: dict[int, int] = defaultdict(lambda: 1)
    for (layer, _), members in cells.items():
        fullest[layer] = max(fullest[layer], len(members))

    def depths(limit: int) -> dict[int, int]:
        capped = {layer: min(limit, fullest[layer]) for layer in range(-1, n_layers)}
        return capped | {n_layers: min(_MAX_DEPTH, fullest[n_layers])}

    def room(limit: int) -> float:
        tried = depths(limit)
        stacks = _stacks(cells, tried, n_positions)
        width = sum(stacks) + _GAP_X * n_positions
        height = sum(tried.values()) + _GAP_Y * len(tried)
        return min(_ASPECT / width, 1 / height)

    return depths(max(range(1, _MAX_DEPTH + 1), key=room))


def _stacks(cells: dict[Cell, list[int]], depths: dict[int, int], n_positions: int) -> list[int]:
    stacks = [1] * n_positions
    for (layer, pos), members in cells.items():
        stacks[pos] = max(stacks[pos], math.ceil(len(members) / depths[layer]))
    return stacks


def _columns(cells: dict[Cell, list[int]], depths: dict[int, int], labels: list[str]) -> list[Band]:
    widths = [stacks + _GAP_X for stacks in _stacks(cells, depths, len(labels))]
    narrowest = _NARROWEST * sum(widths) / max(len(widths), 1)  # room for the token below an empty column
    bands: list[Band] = []
    start = 0.0
    for label, width in zip(labels, widths, strict=True):
        bands.append(Band(label, start, start + max(width, narrowest)))
        start = bands[-1].end
    return bands


def _rows(depths: dict[int, int], n_layers: int) -> list[Band]:
    bands: list[Band] = []
    start = 0.0
    for layer in range(-1, n_layers + 1):
        label = "tokens" if layer < 0 else "logits" if layer == n_layers else f"L{layer}"
        bands.append(Band(label, start, start + depths[layer] + _GAP_Y))
        start = bands[-1].end
    return bands
