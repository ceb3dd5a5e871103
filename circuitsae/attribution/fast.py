"""The fast engine: rows of the adjacency in closed form, by matrix products only.

Targets are carried down the layers and sources are carried up; they meet at a cut, the stream before block `cut`:

    A[t, s] = Σ_q G_t(q) · X_s(q)        G_t: how t reads the stream at the cut,   X_s: what s has written there

and every edge on one side of the cut is scored on the way. Carrying only targets (`cut` = 0) is the textbook way,
`O(targets · L/2 · T · d²)`; with the cut in the middle both sides travel a quarter of the layers on average, which
halves the work and changes no result: all paths are still summed exactly.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.attribution.linear import LinearModel
from circuitsae.attribution.targets import Readers
from circuitsae.attribution.writers import Narrow, Wide, Writers

CARRIED_BYTES = 8 * 2**20
"""Of one batch of carried vectors; about four tensors of this size are alive at once."""

LEAST_CARRIED = 1024
"""Vectors a batch should carry for its matrix products to run at full speed."""


@dataclass
class _Sources:
    """Sources of the lower layers that write at positions from `first` on, being carried up."""

    first: int
    columns: np.ndarray
    """Of each row; rows join in this order."""
    layer: np.ndarray
    at: Int[Tensor, "row"]
    """Of each row its position, from `first` on."""
    column_index: Int[Tensor, "row"]
    """`columns` where the tensors are: nothing is copied there inside the loops."""
    stream: Float[Tensor, "row pos d_model"]
    joined: int = 0
    crossed: int = 0
    """Rows that have passed an attention; those after them are still at one position each."""
    wide: bool = False
    """Whether these sources write at many positions; then all rows count as joined and crossed from the start."""


class FastRows:
    """Rows of the adjacency of one prompt, columns in the order of `writers`."""

    def __init__(self, writers: Writers, *, cut: int = 0) -> None:
        self.writers = writers
        self.linear: LinearModel = writers.linear
        self.cut = cut
        self.n_layers = len(self.linear.blocks)
        skips = (writers.dictionaries.skip(layer) for layer in range(self.n_layers))
        self._skips = [None if skip is None else skip.detach().to(self.linear.dtype) for skip in skips]
        self._lower: list[_Sources] = []
        _hold_freed_memory()

    # sources, upwards

    def climb(self, targets: Readers | None = None) -> Iterator[tuple[np.ndarray, Float[Tensor, "target column"]]]:
        """Carry the sources of layers below the cut up to it; on the way, yield the rows of `targets` there.

        Each item: numbers of some targets, and their rows. Targets at or above the cut are passed over.
        """
        if self.cut == 0:
            return
        self._lower = _narrow_blocks(self.writers, self.cut)
        for sources in self._lower:
            self._join(sources, -1)
        self._lower.append(_wide_block(self.writers, self.cut))
        self._add_wide(self._lower[-1], self.writers.wide_embed)
        place = None if targets is None else _by_place(targets)
        for layer in range(self.cut):
            block = self.linear.blocks[layer]
            before = [s.stream[: s.joined].clone() for s in self._lower] if block.parallel else None
            for sources in self._lower:
                self._attend(sources, layer)
            read = before or [s.stream for s in self._lower]
            if targets is not None and place is not None:
                for pos, rows in place.get(layer, {}).items():
                    yield rows, self._score_up(targets, rows, layer, pos, read)
            for sources, reading in zip(self._lower, read, strict=True):
                self._write(sources, layer, reading)

    def _attend(self, sources: _Sources, layer: int) -> None:
        attention, stream = self.linear.blocks[layer].attention, sources.stream
        crossed, joined = sources.crossed, sources.joined
        if crossed:
            stream[:crossed] += attention.forward(stream[:crossed], sources.first)
        if joined > crossed:
            at = sources.at[crossed:joined]
            fresh = stream[torch.arange(crossed, joined, device=stream.device), at]
            stream[crossed:joined] += attention.forward_from(fresh, at + sources.first, sources.first)
        sources.crossed = joined
        if sources.wide:
            self._add_wide(sources, self.writers.wide_attention[layer])

    def _write(self, sources: _Sources, layer: int, read: Float[Tensor, "row pos d_model"]) -> None:
        skip, block = self._skips[layer], self.linear.blocks[layer]
        if skip is not None and sources.joined:
            written = block.before_mlp.forward(read[: sources.joined], sources.first) @ skip
            written = written if block.after_mlp is None else block.after_mlp.forward(written, sources.first)
            sources.stream[: sources.joined] += written
        if sources.wide:
            self._add_wide(sources, self.writers.wide_mlp[layer])
        else:
            self._join(sources, layer)

    def _join(self, sources: _Sources, layer: int) -> None:
        """Add what the rows' sources write at `layer`, new rows and (cross-layer) earlier ones."""
        joined = int(np.searchsorted(sources.layer, layer, side="right"))
        first = sources.joined if not self.writers.writes_again else 0
        if joined > first:
            vectors = self.writers.vectors(layer, sources.columns[first:joined])
            rows = torch.arange(first, joined, device=vectors.device)
            sources.stream[rows, sources.at[first:joined]] += vectors
        sources.joined = joined

    def _add_wide(self, sources: _Sources, wide: Wide) -> None:
        for column, vectors in zip(wide.columns.tolist(), wide.vectors, strict=True):
            sources.stream[int(np.flatnonzero(sources.columns == column)[0])] += vectors

    def _score_up(
        self, targets: Readers, rows: np.ndarray, layer: int, pos: int, read: list[Tensor]
    ) -> Float[Tensor, "target column"]:
        vector = targets.vector[torch.from_numpy(rows).to(targets.vector.device)].to(self.linear.dtype)
        here = torch.full((len(rows),), pos, device=vector.device)
        reader = self.linear.blocks[layer].before_mlp.transpose_at(vector, here)
        out = vector.new_zeros(len(rows), self.writers.n_columns)
        for sources, stream in zip(self._lower, read, strict=True):
            if sources.first <= pos and sources.joined:
                out[:, sources.column_index[: sources.joined]] += (
                    reader @ stream[: sources.joined, pos - sources.first].T
                )
        self._score_read_bias(out, vector, layer)
        return out

    # targets, downwards

    def rows(self, targets: Readers) -> Float[Tensor, "target column"]:
        """The rows of any targets of one prompt; those below the cut are carried to the embeddings."""
        order = torch.argsort(targets.layer, descending=True, stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        sorted_targets = targets.take(order)
        above = int((targets.layer >= self.cut).sum())
        layers, count = sorted_targets.layer.cpu().numpy(), int(targets.pos.max()) + 1
        parts = []
        if above:
            parts.append(self.descend(sorted_targets.take(slice(above)), layers[:above], count, self.cut))
        if above < len(order):
            parts.append(self.descend(sorted_targets.take(slice(above, None)), layers[above:], count, 0))
        return torch.cat(parts)[back]

    def descend(self, targets: Readers, layers: np.ndarray, count: int, stop: int) -> Float[Tensor, "target column"]:
        """Rows of targets sorted from the top layer down, none of `layers` below `stop`, all before position `count`.

        What the host must know is given, so that it never waits for the device on the way.
        """
        vectors = targets.vector.to(self.linear.dtype)
        G = vectors.new_zeros(len(layers), count, vectors.shape[1])
        out = vectors.new_zeros(len(layers), self.writers.n_columns)
        joined = crossed = 0

        def join(layer: int) -> int:
            until = int(np.searchsorted(-layers, -layer, side="right"))
            if until > joined:
                here = slice(joined, until)
                norm = self.linear.final if layer == self.n_layers else self.linear.blocks[layer].before_mlp
                rows = torch.arange(joined, until, device=G.device)
                G[rows, targets.pos[here]] += norm.transpose_at(vectors[here], targets.pos[here])
                self._score_read_bias(out[here], vectors[here], layer)
            return until

        joined = join(self.n_layers)
        for layer in range(min(int(layers[0]), self.n_layers - 1), stop - 1, -1):
            block = self.linear.blocks[layer]
            self._score_narrow(out[:joined], G[:joined], self.writers.narrow(layer))
            self._score_wide(out[:joined], G[:joined], self.writers.wide_mlp[layer])
            skipped = self._skip_down(G[:joined], layer)
            if not block.parallel:
                if skipped is not None:
                    G[:joined] += skipped
                joined = join(layer)
            self._score_wide(out[:joined], G[:joined], self.writers.wide_attention[layer])
            if joined > crossed:
                fresh = G[torch.arange(crossed, joined, device=G.device), targets.pos[crossed:joined]]
                hop = block.attention.transpose_from(fresh, targets.pos[crossed:joined], count)
            if crossed:
                G[:crossed] += block.attention.transpose(G[:crossed])
            if joined > crossed:
                G[crossed:joined] += hop  # pyright: ignore[reportPossiblyUnboundVariable]
            crossed = joined
            if block.parallel:
                if skipped is not None:
                    G[: len(skipped)] += skipped
                joined = join(layer)
        if stop == 0:
            self._score_narrow(out, G, self.writers.narrow(-1))
            self._score_wide(out, G, self.writers.wide_embed)
        else:
            self._meet(out, G)
        return out

    def _meet(self, out: Float[Tensor, "row column"], G: Float[Tensor, "row pos d_model"]) -> None:
        """Score the lower sources at the cut."""
        for sources in self._lower:
            count = G.shape[1] - sources.first
            if count > 0:
                reads, wrote = G[:, sources.first :].flatten(1), sources.stream[:, :count].flatten(1)
                out[:, sources.column_index] += reads @ wrote.T

    def _skip_down(self, G: Float[Tensor, "row pos d_model"], layer: int) -> Float[Tensor, "row pos d_model"] | None:
        skip, block = self._skips[layer], self.linear.blocks[layer]
        if skip is None or not len(G):
            return None
        written = G if block.after_mlp is None else block.after_mlp.transpose(G)
        return block.before_mlp.transpose(written @ skip.T)

    def _score_narrow(self, out: Tensor, G: Float[Tensor, "row pos d_model"], narrow: Narrow) -> None:
        for place in narrow.places:
            if place.pos < G.shape[1] and len(G):
                into = out[:, place.column : place.column + place.stop - place.start]
                into.addmm_(G[:, place.pos], narrow.vectors[place.start : place.stop].T)

    def _score_wide(self, out: Tensor, G: Float[Tensor, "row pos d_model"], wide: Wide) -> None:
        if len(wide.columns) and len(G):
            out[:, wide.columns] += G.flatten(1) @ wide.vectors[:, : G.shape[1]].flatten(1).T

    def _score_read_bias(self, out: Tensor, vector: Float[Tensor, "row d_model"], layer: int) -> None:
        if (found := self.writers.read_bias(layer)) is not None:
            column, bias = found
            out[:, column] += vector @ bias


def batches(targets: Readers, width: int, *, size: int | None = None) -> list[Tensor]:
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


def _narrow_blocks(writers: Writers, cut: int) -> list[_Sources]:
    lower = np.flatnonzero(writers.layer[: writers.n_narrow] < cut)
    n_positions = writers.trace.n_positions
    width = writers.trace.errors.shape[-1]
    blocks, start = [], 0
    pos = writers.pos[lower]
    while start < len(lower):
        left = n_positions - int(pos[start])
        stop = int(np.searchsorted(pos, pos[start] + 1 + left // 16, side="left"))
        most = max(1, CARRIED_BYTES // (left * width * writers.linear.dtype.itemsize))
        stop = min(stop, start + most)
        columns = lower[start:stop]
        columns = columns[np.argsort(writers.layer[columns], kind="stable")]
        blocks.append(_empty(writers, columns, int(pos[start])))
        start = stop
    return blocks


def _wide_block(writers: Writers, cut: int) -> _Sources:
    wide = np.arange(writers.n_narrow, writers.n_columns)
    sources = _empty(writers, wide[writers.layer[wide] < cut], 0)
    sources.wide, sources.joined, sources.crossed = True, len(sources.columns), len(sources.columns)
    return sources


def _empty(writers: Writers, columns: np.ndarray, first: int) -> _Sources:
    errors = writers.trace.errors
    stream = torch.zeros(
        len(columns), errors.shape[1] - first, errors.shape[2], dtype=writers.linear.dtype, device=errors.device
    )
    at = torch.from_numpy((writers.pos[columns] - first).clip(0)).to(errors.device)
    return _Sources(first, columns, writers.layer[columns], at, torch.from_numpy(columns).to(errors.device), stream)


def _by_place(targets: Readers) -> dict[int, dict[int, np.ndarray]]:
    """Numbers of the targets at each layer and position."""
    found: dict[int, dict[int, list[int]]] = {}
    for number, (layer, pos) in enumerate(zip(targets.layer.tolist(), targets.pos.tolist(), strict=True)):
        found.setdefault(layer, {}).setdefault(pos, []).append(number)
    return {layer: {pos: np.array(rows) for pos, rows in at.items()} for layer, at in found.items()}
