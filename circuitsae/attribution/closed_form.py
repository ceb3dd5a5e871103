"""The closed form: rows of the adjacency by matrix products only.

    A[t, s] = (what s writes) · P(place of s → place of t) · (how t reads)

P, the sum over all paths through frozen attention and norms, is never formed. Targets are carried down the layers and
sources are carried up; they meet in the stream before block `meeting_layer`:

    A[t, s] = Σ_q G_t(q) · X_s(q)        G_t: how t reads the stream there,   X_s: what s has written there

and every edge on one side is scored on the way. Carrying only targets (`meeting_layer` = 0) is the textbook way,
`O(targets · L/2 · T · d²)`; where they meet in the middle both sides travel a quarter of the layers on average, which
halves the work and changes no result: all paths are still summed exactly.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.attribution.carried import CarriedSources, CarriedTargets, score_read_bias
from circuitsae.attribution.cost import choose_meeting_layer
from circuitsae.attribution.nodes import SourceVectors, Targets, TargetVectors, to_numpy
from circuitsae.attribution.responding import Responding

CARRIED_BYTES = 8 * 2**20
"""Of one batch of carried vectors; about four tensors of this size are alive at once."""

LEAST_CARRIED = 1024
"""Vectors a batch should carry for its matrix products to run at full speed."""


class ClosedForm:
    """Rows of the adjacency of one prompt, columns in the order of `sources`; `targets` are all that may be asked for.

    `share` is that of the targets whose rows will be asked for, where the meeting layer is to be chosen; 1: of all.
    With `responds` errors answer, and skip terms are a part of that: targets alone are carried, as what features read
    is known once all that they write is.
    """

    def __init__(
        self,
        sources: SourceVectors,
        targets: Targets,
        *,
        meeting_layer: int | None = None,
        share: float = 1.0,
        batch_size: int | None = None,
        responds: Responding | None = None,
    ) -> None:
        sources, meeting_layer = (sources, meeting_layer) if responds is None else (sources.without_skips(), 0)
        self.sources, self.targets, self.linear, self.responds = sources, targets, sources.linear, responds
        self.columns = sources.columns
        self.n_layers = len(self.linear.blocks)
        chosen = choose_meeting_layer(sources, targets, share=share) if meeting_layer is None else meeting_layer
        self.meeting_layer = chosen
        self._batch_size = batch_size
        self._below: list[CarriedSources] | None = None
        _hold_freed_memory()

    def without_skips(self) -> "ClosedForm":
        """The same rows where no path takes a skip term, and errors are held."""
        return ClosedForm(
            self.sources.without_skips(),
            self.targets,
            meeting_layer=self.meeting_layer,
            batch_size=self._batch_size,
        )

    def every_row(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers of targets and their rows, in blocks, until all have come."""
        for numbers, block in self.carry_sources(self.targets):
            yield numbers, to_numpy(block)
        above = np.flatnonzero(self.targets.layer.cpu().numpy() >= self.meeting_layer)
        yield from self._in_batches(above, last_first=True)

    def rows(self, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same of some targets, in any order."""
        if self._below is None:
            for _ in self.carry_sources():
                raise AssertionError("carrying sources past no targets yields nothing")
        yield from self._in_batches(numbers)

    def rows_of(self, targets: TargetVectors) -> Float[Tensor, "target column"]:
        """The rows of any targets of the prompt in one batch; those below the meeting layer go to the embeddings."""
        order = torch.argsort(targets.layer, descending=True, stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        from_top = targets.take(order)
        above = int((targets.layer >= self.meeting_layer).sum())
        layers, count = from_top.layer.cpu().numpy(), int(targets.pos.max()) + 1
        parts = []
        if above:
            parts.append(self.carry_targets(from_top.take(slice(above)), layers[:above], count, self.meeting_layer))
        if above < len(order):
            parts.append(self.carry_targets(from_top.take(slice(above, None)), layers[above:], count, 0))
        return torch.cat(parts)[back]

    def _in_batches(self, numbers: np.ndarray, *, last_first: bool = False) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        targets = self.targets.take(torch.from_numpy(numbers).to(self.targets.pos.device))
        found = batches(targets, targets.vector.shape[1], size=self._batch_size, recomputed=self.linear.recomputed)
        for batch in reversed(found) if last_first else found:
            yield numbers[batch.cpu().numpy()], to_numpy(self.rows_of(targets.take(batch)))

    # targets, downwards

    def carry_targets(
        self, targets: TargetVectors, layers: np.ndarray, count: int, stop: int
    ) -> Float[Tensor, "target column"]:
        """Rows of targets sorted from the top layer down, none of `layers` below `stop`, all before position `count`.

        What the host must know is given, so that it never waits for the device on the way.
        """
        n_columns = self.sources.n_columns
        carried = CarriedTargets.nothing_yet(self.sources, targets, layers, count, n_columns, responds=self.responds)
        carried.carry_down(stop)
        if stop > 0:
            for sources in self._below or []:
                carried.meet(sources)
        return carried.A

    # sources, upwards

    def carry_sources(
        self, targets: Targets | None = None
    ) -> Iterator[tuple[np.ndarray, Float[Tensor, "target column"]]]:
        """Carry the sources below the meeting layer up to it; on the way, yield the rows of `targets` there.

        Each item: numbers of some targets, and their rows. Targets at or above the meeting layer are passed over.
        """
        self._below = []
        if self.meeting_layer == 0:
            return
        local, broadcast = _local_blocks(self.sources, self.meeting_layer), _broadcast(self.sources, self.meeting_layer)
        self._below = [*local, broadcast]
        for sources in local:
            self._write(sources, -1)
        broadcast.write_everywhere(self.sources.broadcast_embed)
        read_at = {} if targets is None else _by_place(targets)
        for layer in range(self.meeting_layer):
            block = self.linear.blocks[layer]
            before = [s.X[: s.joined].clone() for s in self._below] if block.parallel else None
            attention = block.attention
            for sources in self._below:
                sources.attend(attention)
            del attention
            broadcast.write_everywhere(self.sources.broadcast_attention[layer])
            read = before or [s.X for s in self._below]
            for pos, numbers in read_at.get(layer, {}).items():
                assert targets is not None
                yield numbers, self._score_reads(targets, numbers, layer, pos, read)
            for sources, X in zip(self._below, read, strict=True):
                self._write_skip(sources, layer, X)
            for sources in local:
                self._write(sources, layer)
            broadcast.write_everywhere(self.sources.broadcast_mlp[layer])

    def _write(self, sources: CarriedSources, layer: int) -> None:
        """Add what the MLP of `layer` (or the embeddings) writes of these: new rows and (cross-layer) earlier ones."""
        joined = int(np.searchsorted(sources.layer, layer, side="right"))
        first = sources.joined if not self.sources.writes_again else 0
        if joined > first:
            vectors = self.sources.vectors(layer, sources.columns[first:joined])
            rows = torch.arange(first, joined, device=vectors.device)
            sources.X[rows, sources.at[first:joined]] += vectors
        sources.joined = joined

    def _write_skip(self, sources: CarriedSources, layer: int, read: Float[Tensor, "row pos d_model"]) -> None:
        skip, block = self.sources.skips[layer], self.linear.blocks[layer]
        if skip is not None and sources.joined:
            written = block.read.forward(read[: sources.joined], sources.first) @ skip
            written = written if block.write is None else block.write.forward(written, sources.first)
            sources.X[: sources.joined] += written

    def _score_reads(
        self, targets: Targets, numbers: np.ndarray, layer: int, pos: int, read: list[Tensor]
    ) -> Float[Tensor, "target column"]:
        """Rows of targets at one place, of what the sources below have written there."""
        vector = targets.take(torch.from_numpy(numbers).to(targets.pos.device)).vector.to(self.linear.dtype)
        here = torch.full((len(numbers),), pos, device=vector.device)
        G = self.linear.blocks[layer].read.transpose_at(vector, here)
        A = vector.new_zeros(len(numbers), self.sources.n_columns)
        for sources, X in zip(self._below or [], read, strict=True):
            if sources.first <= pos and sources.joined:
                A[:, sources.column_index[: sources.joined]] += G @ X[: sources.joined, pos - sources.first].T
        score_read_bias(self.sources, A, vector, layer)
        return A


def _local_blocks(sources: SourceVectors, meeting_layer: int) -> list[CarriedSources]:
    """Those below the meeting layer that write at one position, near in position, within `CARRIED_BYTES` each."""
    below = np.flatnonzero(sources.layer[: sources.n_local] < meeting_layer)
    n_positions, width = sources.trace.n_positions, sources.trace.errors.shape[-1]
    blocks, start = [], 0
    pos = sources.pos[below]
    while start < len(below):
        left = n_positions - int(pos[start])
        stop = int(np.searchsorted(pos, pos[start] + 1 + left // 16, side="left"))
        most = max(1, CARRIED_BYTES // (left * width * sources.linear.dtype.itemsize))
        stop = min(stop, start + most)
        columns = below[start:stop]
        columns = columns[np.argsort(sources.layer[columns], kind="stable")]
        blocks.append(CarriedSources.nothing_yet(sources, columns, int(pos[start])))
        start = stop
    return blocks


def _broadcast(sources: SourceVectors, meeting_layer: int) -> CarriedSources:
    """Those below the meeting layer that write at many positions; all count as joined and crossed from the start."""
    broadcast = np.arange(sources.n_local, sources.n_columns)
    carried = CarriedSources.nothing_yet(sources, broadcast[sources.layer[broadcast] < meeting_layer], 0)
    carried.joined = carried.crossed = len(carried.columns)
    return carried


def _by_place(targets: Targets) -> dict[int, dict[int, np.ndarray]]:
    """Numbers of the targets at each layer and position."""
    found: dict[int, dict[int, list[int]]] = {}
    for number, (layer, pos) in enumerate(zip(targets.layer.tolist(), targets.pos.tolist(), strict=True)):
        found.setdefault(layer, {}).setdefault(pos, []).append(number)
    return {layer: {pos: np.array(rows) for pos, rows in at.items()} for layer, at in found.items()}


def batches(targets: TargetVectors, width: int, *, size: int | None = None, recomputed: int = 0) -> list[Tensor]:
    """Numbers of targets in batches that are carried together: near in position, and within `CARRIED_BYTES`.

    `width` is d_model. A batch carries as many positions as its last target has before it, so it spans few, unless
    there are so few targets that larger products make up for the zeros. Where it has patterns `recomputed` of so many
    bytes in each layer, it takes as much memory as one of them, and half of it at least, so that there are few batches.
    """
    order = np.lexsort((-targets.layer.cpu().numpy(), targets.pos.cpu().numpy()))
    pos = targets.pos.cpu().numpy()[order]
    vector_bytes = width * max(4, targets.vector.element_size())  # carried in float32 at least
    most = max(CARRIED_BYTES, recomputed) // vector_bytes
    least = max(LEAST_CARRIED, recomputed // (2 * vector_bytes))
    found, start = [], 0
    while start < len(order):
        span = int(pos[start]) + 1
        enough = span + span // 16
        stop = int(np.searchsorted(pos, span))
        while stop < len(order) and (span < enough or (stop - start) * span < least):
            span = int(pos[stop]) + 1
            stop = int(np.searchsorted(pos, span))
        stop = max(start + 1, min(stop, start + (size or most // span)))
        found.append(torch.from_numpy(order[start:stop].copy()).to(targets.pos.device))
        start = stop
    return found


def _hold_freed_memory() -> None:
    """Let glibc keep up to 64 MiB of freed memory for the process: to fault in the pages of every batch anew takes a
    twentieth of the time. Its limit is twice the largest block freed so far, of those below 32 MiB.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")
