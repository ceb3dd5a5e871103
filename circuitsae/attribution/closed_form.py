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
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.attribution.cost import choose_meeting_layer
from circuitsae.attribution.linear import Attention
from circuitsae.attribution.nodes import BroadcastSources, LocalSources, SourceVectors, TargetVectors, to_numpy

CARRIED_BYTES = 8 * 2**20
"""Of one batch of carried vectors; about four tensors of this size are alive at once."""

LEAST_CARRIED = 1024
"""Vectors a batch should carry for its matrix products to run at full speed."""


class ClosedForm:
    """Rows of the adjacency of one prompt, columns in the order of `sources`; `targets` are all that may be asked for.

    `share` is that of the targets whose rows will be asked for, where the meeting layer is to be chosen; 1: of all.
    """

    def __init__(
        self,
        sources: SourceVectors,
        targets: TargetVectors,
        *,
        meeting_layer: int | None = None,
        share: float = 1.0,
        batch_size: int | None = None,
    ) -> None:
        self.sources, self.targets, self.linear = sources, targets, sources.linear
        self.columns = sources.columns
        self.n_layers = len(self.linear.blocks)
        chosen = choose_meeting_layer(sources, targets, share=share) if meeting_layer is None else meeting_layer
        self.meeting_layer = chosen
        self._batch_size = batch_size
        self._below: list[_CarriedSources] | None = None
        _hold_freed_memory()

    def without_skips(self) -> "ClosedForm":
        """The same rows where no path takes a skip term."""
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
        found = batches(targets, targets.vector.shape[1], size=self._batch_size)
        for batch in reversed(found) if last_first else found:
            yield numbers[batch.cpu().numpy()], to_numpy(self.rows_of(targets.take(batch)))

    # targets, downwards

    def carry_targets(
        self, targets: TargetVectors, layers: np.ndarray, count: int, stop: int
    ) -> Float[Tensor, "target column"]:
        """Rows of targets sorted from the top layer down, none of `layers` below `stop`, all before position `count`.

        What the host must know is given, so that it never waits for the device on the way.
        """
        vectors = targets.vector.to(self.linear.dtype)
        G = vectors.new_zeros(len(layers), count, vectors.shape[1])
        A = vectors.new_zeros(len(layers), self.sources.n_columns)
        carried = _CarriedTargets(targets._replace(vector=vectors), layers, G, A)
        self._read(carried, self.n_layers)
        for layer in range(min(int(layers[0]), self.n_layers - 1), stop - 1, -1):
            block = self.linear.blocks[layer]
            carried.score_local(self.sources.local(layer))
            carried.score_broadcast(self.sources.broadcast_mlp[layer])
            through_skip = self._transpose_skip(carried, layer)
            if not block.parallel:
                self._read(carried, layer, through_skip)
            carried.score_broadcast(self.sources.broadcast_attention[layer])
            carried.attend(block.attention)
            if block.parallel:
                self._read(carried, layer, through_skip)
        if stop == 0:
            carried.score_local(self.sources.local(-1))
            carried.score_broadcast(self.sources.broadcast_embed)
        else:
            for sources in self._below or []:
                carried.meet(sources)
        return carried.A

    def _read(self, carried: "_CarriedTargets", layer: int, through_skip: Tensor | None = None) -> None:
        """What is read at `layer` (or by the unembedding): for targets above through its skip, for its own by W_enc.

        Those of its own join here: `G_t = normᵀ(W_enc[:, t])` at their position, where also the norm's bias is read.
        """
        if through_skip is not None:
            carried.G[: len(through_skip)] += through_skip
        joined = int(np.searchsorted(-carried.layers, -layer, side="right"))
        if joined > carried.joined:
            here = slice(carried.joined, joined)
            vectors, pos = carried.targets.vector[here], carried.targets.pos[here]
            norm = self.linear.final if layer == self.n_layers else self.linear.blocks[layer].read
            rows = torch.arange(carried.joined, joined, device=vectors.device)
            carried.G[rows, pos] += norm.transpose_at(vectors, pos)
            self._score_read_bias(carried.A[here], vectors, layer)
        carried.joined = joined

    def _transpose_skip(self, carried: "_CarriedTargets", layer: int) -> Float[Tensor, "row pos d_model"] | None:
        skip, block = self.sources.skips[layer], self.linear.blocks[layer]
        if skip is None or not carried.joined:
            return None
        G = carried.G[: carried.joined]
        written = G if block.write is None else block.write.transpose(G)
        return block.read.transpose(written @ skip.T)

    # sources, upwards

    def carry_sources(
        self, targets: TargetVectors | None = None
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
            for sources in self._below:
                sources.attend(block.attention)
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

    def _write(self, sources: "_CarriedSources", layer: int) -> None:
        """Add what the MLP of `layer` (or the embeddings) writes of these: new rows and (cross-layer) earlier ones."""
        joined = int(np.searchsorted(sources.layer, layer, side="right"))
        first = sources.joined if not self.sources.writes_again else 0
        if joined > first:
            vectors = self.sources.vectors(layer, sources.columns[first:joined])
            rows = torch.arange(first, joined, device=vectors.device)
            sources.X[rows, sources.at[first:joined]] += vectors
        sources.joined = joined

    def _write_skip(self, sources: "_CarriedSources", layer: int, read: Float[Tensor, "row pos d_model"]) -> None:
        skip, block = self.sources.skips[layer], self.linear.blocks[layer]
        if skip is not None and sources.joined:
            written = block.read.forward(read[: sources.joined], sources.first) @ skip
            written = written if block.write is None else block.write.forward(written, sources.first)
            sources.X[: sources.joined] += written

    def _score_reads(
        self, targets: TargetVectors, numbers: np.ndarray, layer: int, pos: int, read: list[Tensor]
    ) -> Float[Tensor, "target column"]:
        """Rows of targets at one place, of what the sources below have written there."""
        vector = targets.vector[torch.from_numpy(numbers).to(targets.vector.device)].to(self.linear.dtype)
        here = torch.full((len(numbers),), pos, device=vector.device)
        G = self.linear.blocks[layer].read.transpose_at(vector, here)
        A = vector.new_zeros(len(numbers), self.sources.n_columns)
        for sources, X in zip(self._below or [], read, strict=True):
            if sources.first <= pos and sources.joined:
                A[:, sources.column_index[: sources.joined]] += G @ X[: sources.joined, pos - sources.first].T
        self._score_read_bias(A, vector, layer)
        return A

    def _score_read_bias(self, A: Tensor, vector: Float[Tensor, "row d_model"], layer: int) -> None:
        if (found := self.sources.read_bias(layer)) is not None:
            column, bias = found
            A[:, column] += vector @ bias


@dataclass
class _CarriedTargets:
    """Targets being carried down; they join, in the order of their rows, at the layer that they read."""

    targets: TargetVectors
    layers: np.ndarray
    G: Float[Tensor, "row pos d_model"]
    """How each reads the stream where it has been carried to."""
    A: Float[Tensor, "row column"]
    """The edges scored so far."""
    joined: int = 0
    crossed: int = 0
    """Rows that have passed an attention; those after them are still at one position each."""

    def attend(self, attention: Attention) -> None:
        """`G += normᵀ( Σ_h A_hᵀ (G W_Oᵀ)_h W_V,hᵀ )`."""
        old, new = slice(self.crossed), slice(self.crossed, self.joined)
        if self.crossed:
            self.G[old] += attention.transpose(self.G[old])
        if self.joined > self.crossed:
            pos = self.targets.pos[new]
            fresh = self.G[torch.arange(self.crossed, self.joined, device=pos.device), pos]
            self.G[new] += attention.transpose_from(fresh, pos, self.G.shape[1])
        self.crossed = self.joined

    def score_local(self, sources: LocalSources) -> None:
        """One matrix product per position."""
        G, A = self.G[: self.joined], self.A[: self.joined]
        for place in sources.places:
            if place.pos < G.shape[1] and len(G):
                into = A[:, place.column : place.column + place.stop - place.start]
                into.addmm_(G[:, place.pos], sources.vectors[place.start : place.stop].T)

    def score_broadcast(self, sources: BroadcastSources) -> None:
        """One matrix product over all positions."""
        G = self.G[: self.joined]
        if len(sources.columns) and len(G):
            written = sources.vectors[:, : G.shape[1]]
            self.A[: self.joined, sources.columns] += G.flatten(1) @ written.flatten(1).T

    def meet(self, sources: "_CarriedSources") -> None:
        """`A[t, s] += Σ_q G_t(q) · X_s(q)`."""
        count = self.G.shape[1] - sources.first
        if count > 0:
            reads, wrote = self.G[:, sources.first :].flatten(1), sources.X[:, :count].flatten(1)
            self.A[:, sources.column_index] += reads @ wrote.T


@dataclass
class _CarriedSources:
    """Sources that write at positions from `first` on, being carried up; they join at the layer that they write at."""

    first: int
    columns: np.ndarray
    """Of each row; rows join in this order."""
    layer: np.ndarray
    at: Int[Tensor, "row"]
    """Of each row its position, from `first` on."""
    column_index: Int[Tensor, "row"]
    """`columns` where the tensors are: nothing is copied there inside the loops."""
    X: Float[Tensor, "row pos d_model"]
    """What each has written into the stream where it has been carried to."""
    joined: int = 0
    crossed: int = 0
    """Rows that have passed an attention; those after them are still at one position each."""

    @classmethod
    def nothing_yet(cls, sources: SourceVectors, columns: np.ndarray, first: int) -> "_CarriedSources":
        """Of some columns, at the positions from `first` on."""
        errors = sources.trace.errors
        X = torch.zeros(
            len(columns), errors.shape[1] - first, errors.shape[2], dtype=sources.linear.dtype, device=errors.device
        )
        at = torch.from_numpy((sources.pos[columns] - first).clip(0)).to(errors.device)
        return cls(first, columns, sources.layer[columns], at, torch.from_numpy(columns).to(errors.device), X)

    def attend(self, attention: Attention) -> None:
        """`X += Σ_h A_h norm(X) W_V,h W_O,h`."""
        old, new = slice(self.crossed), slice(self.crossed, self.joined)
        if self.crossed:
            self.X[old] += attention.forward(self.X[old], self.first)
        if self.joined > self.crossed:
            at = self.at[new]
            fresh = self.X[torch.arange(self.crossed, self.joined, device=at.device), at]
            self.X[new] += attention.forward_from(fresh, at + self.first, self.first)
        self.crossed = self.joined

    def write_everywhere(self, written: BroadcastSources) -> None:
        """Add what broadcast sources, which are rows of these, write."""
        for column, vectors in zip(written.columns.tolist(), written.vectors, strict=True):
            self.X[int(np.flatnonzero(self.columns == column)[0])] += vectors


def _local_blocks(sources: SourceVectors, meeting_layer: int) -> list[_CarriedSources]:
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
        blocks.append(_CarriedSources.nothing_yet(sources, columns, int(pos[start])))
        start = stop
    return blocks


def _broadcast(sources: SourceVectors, meeting_layer: int) -> _CarriedSources:
    """Those below the meeting layer that write at many positions; all count as joined and crossed from the start."""
    broadcast = np.arange(sources.n_local, sources.n_columns)
    carried = _CarriedSources.nothing_yet(sources, broadcast[sources.layer[broadcast] < meeting_layer], 0)
    carried.joined = carried.crossed = len(carried.columns)
    return carried


def _by_place(targets: TargetVectors) -> dict[int, dict[int, np.ndarray]]:
    """Numbers of the targets at each layer and position."""
    found: dict[int, dict[int, list[int]]] = {}
    for number, (layer, pos) in enumerate(zip(targets.layer.tolist(), targets.pos.tolist(), strict=True)):
        found.setdefault(layer, {}).setdefault(pos, []).append(number)
    return {layer: {pos: np.array(rows) for pos, rows in at.items()} for layer, at in found.items()}


def batches(targets: TargetVectors, width: int, *, size: int | None = None) -> list[Tensor]:
    """Numbers of targets in batches that are carried together: near in position, and within `CARRIED_BYTES`.

    `width` is d_model. A batch carries as many positions as its last target has before it, so it spans few, unless
    there are so few targets that larger products make up for the zeros.
    """
    order = np.lexsort((-targets.layer.cpu().numpy(), targets.pos.cpu().numpy()))
    pos = targets.pos.cpu().numpy()[order]
    most = CARRIED_BYTES // (width * max(4, targets.vector.element_size()))  # carried in float32 at least
    found, start = [], 0
    while start < len(order):
        span = int(pos[start]) + 1
        enough = span + span // 16
        stop = int(np.searchsorted(pos, span))
        while stop < len(order) and (span < enough or (stop - start) * span < LEAST_CARRIED):
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
