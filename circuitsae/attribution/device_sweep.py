"""The closed form for a device: few large products, and nothing on the way that waits for the device.

    A[t, s] = Σ_q G_t(q) · X_s(q)        all targets are carried down to the embeddings, thousands at once

What `closed_form` does in blocks that fit a cache, position by position, is here done in blocks that fill a device,
with a number of operations per layer and block that does not depend on the prompt: what is written at one position each
in a layer is scored by one batched product, for which the sources of each position are padded to those of the fullest.
All index tensors are moved to the device before the sweep. Targets come from the last position to the first, at a
position from the top layer down, so that whatever influences a row has come before it.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.attribution.carried import CarriedTargets
from circuitsae.attribution.linear import Norm
from circuitsae.attribution.nodes import BroadcastSources, SourceVectors, Targets, TargetVectors, to_numpy
from circuitsae.attribution.responding import Responding
from transcoders.devices import free_memory

ON_DEVICE = frozenset({"cuda"})
"""Kinds of devices that are swept in blocks that fill them; on MPS there is no float64."""

BLOCK_BYTES = 2**30
"""What is alive at most while a block is carried: its products are as fast as they get long before."""

LEAST_CARRIED = 2**14
"""Vectors a block should carry before it ends early: it carries zeros where its last target has positions before it."""

TENSORS_ALIVE = 6
"""Of the size of the carried block, within an attention."""

COPIES_SUMMED = 6
"""Of the size of a block's edges, where they are summed in float64."""


ProductPrecision = Literal["float32", "tf32"]
"""How matrix products of float32 are done: in full, or by tensor cores with ten bits of mantissa, summed in float32."""


def fills_device(device: torch.device) -> bool:
    """Whether the closed form on this device is `DeviceSweep`; else it is `ClosedForm`."""
    return device.type in ON_DEVICE


class Memory(NamedTuple):
    """Bytes that a sweep may take."""

    block: int
    """While a block of targets is carried."""
    held: int
    """For the edges of blocks that are found; those beyond are found again, or come to the host on the way."""

    @classmethod
    def of(cls, device: torch.device) -> "Memory":
        """A part of what is free on a CUDA device now; as much as the largest block for others."""
        if device.type != "cuda":
            return cls(BLOCK_BYTES, BLOCK_BYTES)
        free = free_memory(device, BLOCK_BYTES)
        return cls(min(BLOCK_BYTES, free // 4), free // 2)


class LocalTable(NamedTuple):
    """What is written at one position each in one layer, by position."""

    vectors: Float[Tensor, "source_and_zero d_model"]
    """The last is 0."""
    slots: Int[Tensor, "pos slot"]
    """Of each position its sources, and that last one where there are fewer than at the fullest."""
    place: Int[Tensor, "source"]
    """Where among the slots of all positions each lies."""
    columns: Int[Tensor, "source"]
    """Of a row."""
    before: np.ndarray
    """[pos + 1], how many lie before each position."""

    @classmethod
    def of(cls, vectors: Float[Tensor, "source d_model"], pos: np.ndarray, columns: np.ndarray, n_positions: int):
        """Of sources with ascending positions."""
        counts = np.bincount(pos, minlength=n_positions)
        before = np.concatenate([[0], np.cumsum(counts)])
        slot = np.arange(len(pos)) - before[pos]
        slots = np.full((n_positions, max(1, counts.max())), len(pos))
        slots[pos, slot] = np.arange(len(pos))
        indices = (slots, pos * slots.shape[1] + slot, columns)
        at_position, place, at = (torch.from_numpy(x).to(vectors.device) for x in indices)
        return cls(torch.cat([vectors, vectors.new_zeros(1, vectors.shape[1])]), at_position, place, at, before)

    def score(self, G: Float[Tensor, "row pos d_model"], A: Float[Tensor, "row column"]) -> None:
        """Add to the edges `A` of rows that read the stream as `G` says: one batched product over all positions."""
        count = G.shape[1]
        if len(G) and (n := int(self.before[count])):
            products = torch.bmm(self.vectors[self.slots[:count]], G.permute(1, 2, 0)).flatten(0, 1)  # pos·slot row
            A.index_add_(1, self.columns[:n], products[self.place[:n]].T)


class DeviceSources:
    """The sources of a prompt as tables on its device.

    Columns of a row: biases of the unembedding, then the broadcast sources, then the local ones in the order of
    `SourceVectors`, by position: a row of a target at position p needs the first `n_columns(p + 1)`.
    """

    def __init__(self, sources: SourceVectors, n_extra: int) -> None:
        self.linear, self.skips = sources.linear, sources.skips
        self._sources, self._n_extra = sources, n_extra
        n_local, first = sources.n_local, len(sources.columns) - sources.n_local + n_extra
        self.n_first = first
        self.node = np.concatenate([sources.n_columns + np.arange(n_extra), np.roll(sources.columns, first - n_extra)])
        """[column], the number of its node; biases of the unembedding come after all sources."""
        self._local_pos, n_positions = sources.pos[:n_local], sources.trace.n_positions
        self._tables: dict[int, LocalTable] = {}
        for layer in range(-1, len(self.linear.blocks)):
            columns = sources.local_columns(layer)
            vectors = sources.vectors(layer, columns)
            self._tables[layer] = LocalTable.of(vectors, sources.pos[columns], first + columns, n_positions)
        self.broadcast_mlp = [self._shifted(found) for found in sources.broadcast_mlp]
        self.broadcast_attention = [self._shifted(found) for found in sources.broadcast_attention]
        self.broadcast_embed = self._shifted(sources.broadcast_embed)

    def without_skips(self) -> "DeviceSources":
        """These sources where no path takes a skip term."""
        other = copy.copy(self)
        other._sources = self._sources.without_skips()
        other.skips = other._sources.skips
        other.broadcast_mlp = [self._shifted(found) for found in other._sources.broadcast_mlp]
        return other

    @property
    def widest(self) -> int:
        """Slots of the fullest position."""
        return max(table.slots.shape[1] for table in self._tables.values())

    def n_columns(self, count: int) -> int:
        """Of a row of targets before position `count`."""
        return self.n_first + int(np.searchsorted(self._local_pos, count))

    def local(self, layer: int) -> LocalTable:
        """What is written at one position each by the MLP of `layer`, or by the embeddings (layer −1)."""
        return self._tables[layer]

    def read_bias(self, layer: int, norm: Norm | None = None) -> tuple[int, Float[Tensor, "d_model"]] | None:
        found = self._sources.read_bias(layer, norm)
        return None if found is None else (found[0] + self._shift, found[1])

    @property
    def _shift(self) -> int:
        return self._n_extra - self._sources.n_local

    def _shifted(self, found: BroadcastSources) -> BroadcastSources:
        by_position = found.vectors.permute(1, 2, 0).contiguous()  # of some positions no copy is made
        return BroadcastSources(found.columns + self._shift, by_position.permute(2, 0, 1))


class Block(NamedTuple):
    """Rows of some targets, sorted from the top layer down, and their columns."""

    layers: np.ndarray
    """[row], of each target."""
    nodes: Int[Tensor, "row"]
    """Which node each row is."""
    columns: Int[Tensor, "column"]
    """Which node each column is."""
    weights: Float[Tensor, "row column"]
    direct: Float[Tensor, "row column"] | None
    """The same where no path takes a skip term; None where that was not asked for."""

    @property
    def runs(self) -> list[slice]:
        """The rows of each layer, the top one first."""
        cuts = [0, *(np.flatnonzero(np.diff(self.layers)) + 1).tolist(), len(self.layers)]
        return [slice(*ends) for ends in pairwise(cuts)]

    @property
    def n_bytes(self) -> int:
        one = self.weights.numel() * self.weights.element_size()
        return one if self.direct is None else 2 * one

    def take(self, rows: np.ndarray, columns: Int[Tensor, "k"]) -> "Block":
        """Some of its rows, and of its columns."""
        if (len(rows), len(columns)) == self.weights.shape:
            return self
        index = torch.from_numpy(rows).to(columns)
        weights, direct = (
            None if part is None else part.index_select(1, columns).index_select(0, index)
            for part in (self.weights, self.direct)
        )
        assert weights is not None
        return Block(self.layers[rows], self.nodes[index], self.columns[columns], weights, direct)


@dataclass(frozen=True)
class Part:
    """Which targets of an order make a block, and how many positions they are carried at."""

    start: int
    stop: int
    count: int


class Order(NamedTuple):
    """Targets in the order in which they are carried, on the device, and the blocks that they make."""

    numbers: np.ndarray
    layers: np.ndarray
    targets: TargetVectors
    nodes: Int[Tensor, "target"]
    extra: Float[Tensor, "target extra"]
    columns: Int[Tensor, "column"]
    """Which node each column of a row is."""
    parts: Sequence[Part]


@dataclass(frozen=True, kw_only=True)
class DeviceSweep:
    """Rows of the adjacency of one prompt, found block by block where its model is.

    target_nodes: [target], which node each is. extra: [target, extra], what biases of the unembedding add to each.
    pairs: whether blocks have their rows without skip terms too.
    """

    sources: DeviceSources
    targets: Targets
    target_nodes: np.ndarray
    extra: Float[Tensor, "target extra"]
    responds: Responding | None = None
    pairs: bool = False
    batch_size: int | None = None
    memory: Memory
    precision: ProductPrecision | None = None
    """None: as torch is set."""

    @property
    def columns(self) -> np.ndarray:
        """Number among the sources' nodes of each column that `rows` gives."""
        return self.sources.node[self.extra.shape[1] :]

    def every_row(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return self.rows(np.arange(len(self.target_nodes)))

    def rows(self, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers of targets and their rows, on the host."""
        n_extra = self.extra.shape[1]
        order = self.order(numbers)
        for part, block in zip(order.parts, replace(self, pairs=False).blocks(order), strict=True):
            numbers = order.numbers[part.start : part.stop]
            missing = len(self.sources.node) - block.weights.shape[1]
            yield numbers, to_numpy(torch.nn.functional.pad(block.weights, (0, missing))[:, n_extra:])

    def without_skips(self) -> "DeviceSweep":
        """The same rows where no path takes a skip term, and errors are held."""
        return replace(self, sources=self.sources.without_skips(), responds=None, pairs=False)

    @cached_property
    def all_targets(self) -> Order:
        return self.order(np.arange(len(self.target_nodes)))

    def order(self, numbers: np.ndarray) -> Order:
        """Some targets, as they are carried. Here alone the host reads what the device has, and moves indices there."""
        layer, pos = (x.cpu().numpy()[numbers] for x in (self.targets.layer, self.targets.pos))
        last_first = np.lexsort((-layer, -pos))
        layer, pos = layer[last_first], pos[last_first]
        parts = self._parts(pos)
        for part in parts:  # a block's rows join from the top layer down
            here = slice(part.start, part.stop)
            inside = np.argsort(-layer[here], kind="stable")
            last_first[here], layer[here] = last_first[here][inside], layer[here][inside]
        numbers = numbers[last_first]
        index = torch.from_numpy(numbers).to(self.targets.pos.device)
        targets = self.targets.take(index)
        targets = targets._replace(vector=targets.vector.to(self.sources.linear.dtype))
        nodes, columns = (torch.from_numpy(x).to(index) for x in (self.target_nodes[numbers], self.sources.node))
        return Order(numbers, layer, targets, nodes, self.extra[index].to(targets.vector), columns, parts)

    def blocks(self, order: Order, which: Sequence[int] | None = None) -> Iterator[Block]:
        """The blocks of an order (default: all), with the same numbers whenever they are found."""
        for part in order.parts if which is None else [order.parts[i] for i in which]:
            here, layers = slice(part.start, part.stop), order.layers[part.start : part.stop]
            rows = self._carried(order.targets.take(here), layers, part.count).unflatten(0, (len(layers), -1))
            rows[:, :, : order.extra.shape[1]] = order.extra[here, None]
            direct = rows[:, 1] if self.pairs else None
            yield Block(layers, order.nodes[here], order.columns[: rows.shape[2]], rows[:, 0], direct)

    def _carried(self, targets: TargetVectors, layers: np.ndarray, count: int) -> Float[Tensor, "row column"]:
        """Rows of targets before position `count`; with `pairs` two of each, the second without skip terms."""
        every = 1 + self.pairs
        if self.pairs:
            targets, layers = TargetVectors(*(x.repeat_interleave(2, dim=0) for x in targets)), layers.repeat(2)
        n_columns = self.sources.n_columns(count)
        carried = CarriedTargets.nothing_yet(self.sources, targets, layers, count, n_columns, every, self.responds)
        with products_in(self.precision):
            carried.carry_down(0)
        return carried.A

    def _parts(self, pos: np.ndarray) -> list[Part]:
        """Blocks of targets with descending positions: within the memory, and near in position once they are large."""
        parts, start = [], 0
        while start < len(pos):
            count = int(pos[start]) + 1
            most = self.batch_size or max(1, self.memory.block // self._row_bytes(count))
            enough = start + -(-LEAST_CARRIED // count)
            far = int(np.searchsorted(-pos, -(count - 1 - count // 8), side="right"))
            stop = min(start + most, max(far, enough), len(pos))
            parts.append(Part(start, stop, count))
            start = stop
        return parts

    def _row_bytes(self, count: int) -> int:
        """Of one target that is carried at the first `count` positions."""
        carried = count * (TENSORS_ALIVE * self.sources.linear.embed.shape[1] + self.sources.widest)
        summed = COPIES_SUMMED * self.sources.n_columns(count)
        return (1 + self.pairs) * self.sources.linear.dtype.itemsize * (carried + summed)


@contextmanager
def products_in(precision: ProductPrecision | None) -> Iterator[None]:
    """Whether products of float32 may be done in TF32, where a device has it."""
    if precision is None:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
