"""A graph made where its rows are found: influence and pruning on a device; only what is kept comes to the host.

Rows come from `device_sweep` in dense blocks and stay there. Figures of nodes are summed over them in float64, shares
of the influence are met there, and edges are copied once, as a compressed matrix.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor

from circuitsae.attribution.device_sweep import Block, DeviceSweep
from circuitsae.attribution.expansion import Expansion, FullSize, graph_of
from circuitsae.graph import AttributionGraph, NodeKind
from circuitsae.graph.compact import RowBlock, assemble
from circuitsae.graph.influence import reciprocal
from circuitsae.graph.nodes import node_columns
from circuitsae.graph.pruning import drop_dangling, strongest_nodes
from circuitsae.graph.sweep import Sums


def every_row(expansion: Expansion, sweep: DeviceSweep) -> AttributionGraph:
    """The graph with all rows of `sweep`; `expansion` says of which nodes."""
    found = _Found.by(expansion, sweep)
    everything = np.ones(len(expansion.nodes), dtype=bool)
    return found.graph(found.blocks(everything), everything)


def pruned(expansion: Expansion, sweep: DeviceSweep, nodes: float, edges: float) -> tuple[AttributionGraph, FullSize]:
    """`every_row`, pruned, and how large it was: of its edges only those that hold the share `edges` are copied."""
    found = _Found.by(expansion, sweep)
    kinds = node_columns(expansion.nodes)["kind"]
    kept = strongest_nodes(found.sums.influence, kinds, nodes)
    graph = found.graph(strongest_edges(found.figures.again(), list(found.blocks(kept)), edges), kept)
    return graph.keep(*drop_dangling(kinds[kept], graph.weights)), FullSize(len(kinds), found.sums.n_edges)


@dataclass
class DeviceInfluence:
    """I = wÂ + wÂ² + … over rows that come once, each after all that it influences; and sums of each row."""

    start: Float[Tensor, "node"]
    """w."""
    bias: Bool[Tensor, "node"]
    """Which are bias nodes."""
    error: Bool[Tensor, "node"]
    output: Float[Tensor, "node"] = field(init=False)
    """I + w, complete for the rows that have come; bias nodes have a part in it, and pass nothing on."""
    rows: Float[Tensor, "node 4"] = field(init=False)
    """Σ|weight| without biases, that from errors, `rest`, and the share of a row that passed by skip terms."""
    n_edges: Int[Tensor, ""] = field(init=False)

    def __post_init__(self) -> None:
        self.output = self.start.clone()
        self.rows = self.start.new_zeros(len(self.start), 4)
        self.n_edges = torch.zeros_like(self.start[0], dtype=torch.long)
        self._summed = torch.stack([~self.bias, self.error], dim=1).to(self.start)

    def again(self) -> "DeviceInfluence":
        """Of the same nodes, before any row has come."""
        return DeviceInfluence(self.start, self.bias, self.error)

    def add(self, block: Block, rest: Tensor | None = None, inputs: Tensor | None = None) -> None:
        """Take in the rows of a block; where it holds only a part of them, with their `rest` and whole `inputs`."""
        magnitude, summed = block.weights.abs().double(), self._summed[block.columns]
        sums = magnitude @ summed
        inputs = sums[:, 0] if inputs is None else inputs
        nothing = torch.zeros_like(inputs)
        bypassed = nothing if block.direct is None else _bypassed(block, block.direct, summed[:, 0])
        row = torch.stack([inputs, sums[:, 1], nothing if rest is None else rest, bypassed], dim=1)
        self.rows.index_copy_(0, block.nodes, row)
        self.n_edges += torch.count_nonzero(magnitude)
        shares = magnitude.mul_(_reciprocal(inputs)[:, None])
        for here in block.runs:
            self.output.index_add_(0, block.columns, self.output[block.nodes[here]] @ shares[here])


def _bypassed(
    block: Block, direct: Float[Tensor, "row column"], counted: Float[Tensor, "column"]
) -> Float[Tensor, "row"]:
    """Σ|past| / Σ(|past| + |weight − past|) of each row, over the columns that are `counted`."""
    direct = torch.where(block.weights == 0, 0, direct)
    past, beside = (part.abs().double() @ counted for part in (block.weights - direct, direct))
    return past * _reciprocal(past + beside)


def _reciprocal(total: Float[Tensor, "row"]) -> Float[Tensor, "row"]:
    return torch.where(total > 0, 1 / total, 0)


def strongest_of_rows(
    weights: Float[Tensor, "row column"], m: int, counted: Bool[Tensor, "column"]
) -> tuple[Float[Tensor, "row column"], Float[Tensor, "row"], Float[Tensor, "row"]]:
    """`circuitsae.graph.keep_strongest` on a device: weights, `rest`, and the sums of all magnitudes `counted`."""
    magnitude = weights.abs()
    inputs = magnitude.double() @ counted.double()
    if m >= weights.shape[1]:
        return weights, torch.zeros_like(inputs), inputs
    least = magnitude.topk(m, dim=1).values[:, -1:]
    strong, equal = magnitude > least, (magnitude == least) & (least > 0)
    strong |= equal & (equal.cumsum(1) <= m - strong.sum(1, keepdim=True))
    return torch.where(strong, weights, 0), torch.where(strong, 0, weights.double()).sum(1), inputs


# of the nodes that are kept


def strongest_edges(figures: DeviceInfluence, blocks: list[Block], share: float) -> Iterator[Block]:
    """The blocks with 0 for every edge that is none of those that hold the `share`, by Â[t, s]·(I+w)[t].

    `figures` are of these nodes alone, before any row has come.
    """
    for block in blocks:
        figures.add(block)
    factor = figures.output * _reciprocal(figures.rows[:, 0])
    scores = [block.weights.abs() * factor[block.nodes, None] for block in blocks]
    least = threshold(scores, [~figures.bias[block.columns] for block in blocks], share)
    for block, score in zip(blocks, scores, strict=True):
        yield block._replace(weights=torch.where((score >= least) & (score > 0), block.weights, 0))


def threshold(scores: list[Float[Tensor, "_ _"]], counted: list[Bool[Tensor, "_"]], share: float) -> Float[Tensor, ""]:
    """The smallest of the largest scores that together hold `share` of their sum, over the columns that are `counted`.

    `circuitsae.graph.pruning.threshold` with sums that are rounded. The bits of positive floats order like the floats:
    63 halvings of their range find the last value from which on enough is held, whatever the number of scores.
    """
    zero = torch.zeros((), dtype=torch.float64, device=scores[0].device) if scores else torch.zeros(())
    if not scores:
        return zero

    def held(least: Tensor) -> Tensor:
        parts = zip(scores, counted, strict=True)
        return torch.stack([torch.where((part >= least) & here, part, 0).sum() for part, here in parts]).sum()

    enough = share * held(zero)
    low, high = zero.view(torch.long), torch.full_like(zero, torch.inf).view(torch.long)
    for _ in range(63):
        middle = low + (high - low) // 2
        reached = held(middle.view(torch.float64)) >= enough
        low, high = torch.where(reached, middle, low), torch.where(reached, high, middle)
    return low.view(torch.float64)


class _Found(NamedTuple):
    """All rows of a prompt, on the device as far as there is room, and what they say of each node."""

    expansion: Expansion
    sweep: DeviceSweep
    figures: DeviceInfluence
    held: dict[int, Block]
    sums: Sums
    rest: np.ndarray
    bypassed: np.ndarray

    @classmethod
    def by(cls, expansion: Expansion, sweep: DeviceSweep) -> "_Found":
        columns, device = node_columns(expansion.nodes), sweep.targets.pos.device
        start, bias, error = columns["start"], *(columns["kind"] == kind for kind in (NodeKind.BIAS, NodeKind.ERROR))
        figures = DeviceInfluence(*(torch.from_numpy(x).to(device) for x in (start.astype(float), bias, error)))
        held, room, error = {}, sweep.memory.held, torch.zeros_like(figures.output[:1])
        for number, block in enumerate(sweep.blocks(sweep.all_targets)):
            if number == 0 and sweep.precision == "tf32":
                error = _error(sweep, block)
            stored, rest, inputs = _stored(block, expansion.edges_per_node, figures.bias)
            figures.add(stored, rest, inputs)
            if stored.n_bytes <= room:
                held[number], room = stored, room - stored.n_bytes
            expansion.done(len(block.layers))
        output, rows, n_edges, error = to_host(figures.output, figures.rows, figures.n_edges, error)
        if sweep.precision == "tf32":
            measured = {"precision": "tf32", "precision_error": float(error[0])}
            expansion = replace(expansion, provenance={**expansion.provenance, **measured})
        inputs, errors, rest, bypassed = rows.T
        sums = Sums(np.where(bias, np.nan, output - start), inputs, errors * reciprocal(inputs), int(n_edges))
        return cls(expansion, sweep, figures, held, sums, rest, bypassed)

    def blocks(self, kept: np.ndarray) -> Iterator[Block]:
        """The rows of the nodes kept, among these, in the order they came; what was not held is found again."""
        order, limit = self.sweep.all_targets, self.expansion.edges_per_node
        column_kept = kept[self.sweep.sources.node]
        columns = torch.from_numpy(np.flatnonzero(column_kept)).to(order.nodes)
        for number, part in enumerate(order.parts):
            rows = np.flatnonzero(kept[self.sweep.target_nodes[order.numbers[part.start : part.stop]]])
            block = self.held.pop(number, None)
            if block is None and len(rows):
                (again,) = self.sweep.blocks(order, [number])
                block, *_ = _stored(again, limit, self.figures.bias)
            if block is not None and len(rows):
                yield block.take(rows, columns[: int(column_kept[: len(block.columns)].sum())])

    def graph(self, blocks: Iterable[Block], kept: np.ndarray) -> AttributionGraph:
        """Of the nodes kept, with the edges of some blocks among them."""
        number = torch.from_numpy(np.cumsum(kept) - 1).to(self.figures.output.device)
        parts: list[list[sparse.csr_array]] = []
        for group in _groups(blocks, self.sweep.memory.held):
            values = [lambda block: block.weights] + ([self._past] if self.sweep.pairs else [])
            parts.append([compressed(group, value, number, int(kept.sum())) for value in values])
        weights, *past = (_together(list(found), int(kept.sum())) for found in zip(*parts, strict=True))
        return graph_of(self.expansion, kept, weights, self.rest, self.sums, past[0] if past else None, self.bypassed)

    def _past(self, block: Block) -> Float[Tensor, "row column"]:
        """What of each edge of a block passed by a skip term, without rounding errors where none lies between."""
        assert block.direct is not None
        read, written = (torch.from_numpy(x).to(block.nodes) for x in self.expansion.skips_below)
        crossing = read[block.nodes, None] > written[block.columns]
        return torch.where(crossing & (block.weights != 0), block.weights - block.direct, 0)


def _error(sweep: DeviceSweep, first: Block) -> Float[Tensor, "1"]:
    """‖A − A_float32‖ / ‖A_float32‖ of the first block, which has the logits and the last features before them."""
    (exact,) = replace(sweep, precision="float32").blocks(sweep.all_targets, [0])
    return ((first.weights - exact.weights).norm() / exact.weights.norm()).double()[None]


def _stored(block: Block, limit: int | None, bias: Bool[Tensor, "node"]) -> tuple[Block, Tensor | None, Tensor | None]:
    """What is stored of a block, and the `rest` and `inputs` of its rows where that is not all of it."""
    if limit is None:
        return block, None, None
    weights, rest, inputs = strongest_of_rows(block.weights, limit, ~bias[block.columns])
    return block._replace(weights=weights), rest, inputs


# to the host


def to_host(*tensors: Tensor) -> list[np.ndarray]:
    """Copies through pinned memory, for which the host waits once."""
    if not tensors[0].is_cuda:
        return [tensor.numpy() for tensor in tensors]
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return [copy.numpy() for copy in copies]


def compressed(
    blocks: list[Block], values: Callable[[Block], Tensor], number: Int[Tensor, "node"], n: int
) -> sparse.csr_array:
    """What is not 0 of the `values` [row, column] of blocks, as a matrix [n, n] of the nodes' `number`, on the host.

    Every row is written to its place, so that the host has nothing left to sort.
    """
    count = torch.zeros(n + 1, dtype=torch.long, device=number.device)
    for block in blocks:
        count[number[block.nodes] + 1] = torch.count_nonzero(values(block), dim=1)
    ends = count.cumsum(0)
    total = int(ends[-1])
    index = torch.int32 if max(total, n) < 2**31 else torch.int64
    data = torch.empty(total, dtype=values(blocks[0]).dtype, device=number.device)
    indices = torch.empty(total, dtype=index, device=number.device)
    for block in blocks:
        columns, order = number[block.columns].sort()
        found = values(block)[:, order]
        row, column = found.nonzero(as_tuple=True)
        counts = torch.count_nonzero(found, dim=1)
        begin = ends[number[block.nodes]] - counts.cumsum(0) + counts
        place = begin[row] + torch.arange(len(row), device=number.device)
        data[place], indices[place] = found[row, column], columns[column].to(index)
    return sparse.csr_array(tuple(to_host(data, indices, ends.to(index))), shape=(n, n))


def _groups(blocks: Iterable[Block], at_most: int) -> Iterator[list[Block]]:
    """Blocks that are on the device together: beyond so many bytes they leave it."""
    group: list[Block] = []
    for block in blocks:
        if group and sum(held.n_bytes for held in group) + block.n_bytes > at_most:
            yield group
            group = []
        group.append(block)
    if group:
        yield group


def _together(parts: list[sparse.csr_array], n: int) -> sparse.csr_array:
    """[n, n] with the rows of all parts."""
    return parts[0] if len(parts) == 1 else assemble([RowBlock(np.arange(n), part) for part in parts], n)
