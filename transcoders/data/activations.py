"""Rows of tokens → shuffled batches of activations."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from transcoders.data.ahead import sent, work_on
from transcoders.data.chunks import Chunk, Chunks
from transcoders.data.outliers import groups_of, over, positions_of
from transcoders.data.places import whole_number
from transcoders.data.tokens import Rows
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel
from transcoders.sites import Site


class ActivationBatch(NamedTuple):
    """What the layers read and write at the same tokens."""

    reads: Float[Tensor, "batch layer d_model"]
    writes: Float[Tensor, "batch layer d_model"]


@torch.no_grad()
def sites_of(
    model: LanguageModel,
    rows: Int[Tensor, "row pos"],
    reads: Sequence[Site],
    writes: Sequence[Site],
    *,
    first: int = 1,
    limits: Mapping[Site, float] = MappingProxyType({}),
    positions: Int[Tensor, "row pos"] | None = None,
) -> ActivationBatch:
    """Activations at all sites from one forward pass per group of rows, at the positions from `first` on.

    Position 0 is left out by default: its activations are outliers in most models. So are tokens whose norm at a site
    exceeds its limit. Layers after the last site are not computed. `positions`: of each token in its part of the row,
    as a `Chunk` has them, where parts are to be read each by itself; columns unless given.
    """
    sites = [*reads, *writes]
    positions = positions_of(rows) if positions is None else positions
    n = int((positions >= first).sum())
    found = torch.empty(n, len(sites), _width(model, sites), dtype=model.dtype, device=model.device)
    places = torch.arange(n, device=model.device)
    massive = fill(model, rows, positions, sites, first, limits, found, places)
    if bool(massive.any()):
        found = found[~massive]
    return ActivationBatch(found[:, : len(reads)], found[:, len(reads) :])


def _width(model: LanguageModel, sites: Sequence[Site]) -> int:
    widths = sorted({model.width(site) for site in sites})
    if len(widths) > 1:
        raise InputError(f"Sites that are read together have one width; got widths {widths}. Take them one by one.")
    return widths[0] if widths else model.d_model


def fill(
    model: LanguageModel,
    rows: Int[Tensor, "row pos"],
    positions: Int[Tensor, "row pos"],
    sites: Sequence[Site],
    first: int,
    limits: Mapping[Site, float],
    buffer: Float[Tensor, "slot site d_model"],
    places: Int[Tensor, "token"],
) -> Bool[Tensor, "token"]:
    """Put the activations of each token from `first` on into its place; which places hold a token over a limit.

    Rows and positions of the host are best: what it asks of these makes no device wait.
    """
    massive = torch.zeros(len(places), dtype=torch.bool, device=buffer.device)
    order = {}
    for number, site in enumerate(sites):
        order.setdefault(site, []).append(number)
    done = 0
    for group in groups_of(rows, positions, buffer.device):
        late = sent(group.late(first), buffer.device)
        here = places[done : (done := done + len(late))]

        def see(site: Site, value: Tensor, here: Tensor = here, late: Tensor = late) -> None:
            value = value.flatten(0, 1)[late]
            for number in order[site]:
                buffer[:, number].index_copy_(0, here, value)
            massive[here] |= over(value, limits.get(site))

        group.visit(model, sites, see)
    return massive


class _Filled(NamedTuple):
    """A chunk whose activations are in a buffer, or on their way there."""

    chunk: Chunk
    place: dict[str, Any]
    """Where it begins, as `Chunks.state` says."""
    tokens: Int[Tensor, "token"]
    """Which one each place of the buffer has."""
    buffer: Float[Tensor, "slot site d_model"]
    massive: Bool[Tensor, "token"]
    """Tokens over a limit; on the host, once it is made."""
    made: Any
    """What `Work` knows it by."""


class ActivationStream:
    """Endless shuffled batches of activations, a function of the rows, the limits and the seed alone.

    Works chunk by chunk: takes rows, runs the model on them, puts each token in its place of a shuffled order, and
    deals them out. Left out are the `first` positions of each row, tokens whose norm at a site exceeds its limit, and
    the tokens of a chunk that do not fill a batch. One buffer holds a chunk, and a batch is a view of it, which lasts
    until the next batch is asked for. On a GPU a second buffer is filled meanwhile.
    """

    def __init__(
        self,
        model: LanguageModel,
        rows: Rows,
        *,
        reads: Sequence[Site],
        writes: Sequence[Site],
        batch: int,
        chunk_tokens: int,
        seed: int,
        first: int = 1,
        limits: Mapping[Site, float] = MappingProxyType({}),
        state: Mapping[str, Any] | None = None,
        foreseen: int = 0,
    ) -> None:
        """`rows`: a new pass over them begins when one ends. `state`: where to go on.

        `foreseen`: how many chunks will be asked for, as far as is known; on a GPU the model runs on the next one of
        these while one is dealt out.
        """
        self.model, self.reads, self.writes = model, tuple(reads), tuple(writes)
        self.batch, self.chunk_tokens, self.seed = batch, chunk_tokens, seed
        self.first, self.limits = first, dict(limits)
        self.batch_in_chunk = 0 if state is None else whole_number(state, "batch_in_chunk")
        self._chunks = Chunks(rows, tokens=chunk_tokens, first=first, state=state)
        self._place = self._chunks.state()
        self._width = _width(model, [*reads, *writes])
        self._work, self._foreseen = work_on(model.device), foreseen

    def state(self) -> dict[str, Any]:
        """Where the next batch comes from, as JSON."""
        limits = {str(site): limit for site, limit in self.limits.items()}
        return {**self._place, "batch_in_chunk": self.batch_in_chunk} | ({"limits": limits} if limits else {})

    def __iter__(self) -> Iterator[ActivationBatch]:
        for filled in self._filled():
            for number in range(self.batch_in_chunk, self._take(filled) // self.batch):
                self.batch_in_chunk += 1
                dealt = filled.buffer[number * self.batch : (number + 1) * self.batch]
                yield ActivationBatch(dealt[:, : len(self.reads)], dealt[:, len(self.reads) :])
            self.batch_in_chunk = 0

    @property
    def chunk(self) -> Chunk:
        """The rows that the last batch is from."""
        return self._chunk

    def place(self, row: int) -> str:
        """Where a row of the last batch comes from, for messages."""
        return self._place_of(int(self._tokens[(self.batch_in_chunk - 1) * self.batch + row]))

    def _place_of(self, token: int) -> str:
        text_row, position = (self._chunk.positions >= self.first).nonzero()[token].tolist()
        return f"position {position} of row {self._chunk.first_row + text_row} of the text"

    def _filled(self) -> Iterator[_Filled]:
        """Chunk after chunk; on a GPU the next one is begun before one is dealt out."""
        buffers = deque(self._room_for(0) for _ in range(1 + self._work.ahead))
        begun: deque[_Filled] = deque()
        while True:
            current = begun.popleft() if begun else self._begin(buffers)
            if self._work.ahead and current.chunk.number + 1 < self._foreseen:
                begun.append(self._begin(buffers))
            yield current

    def _begin(self, buffers: deque[Tensor]) -> _Filled:
        """Have the next chunk put into the buffer that was used longest ago."""
        chunk = next(self._chunks)
        tokens = self._order(chunk, int((chunk.positions >= self.first).sum()))
        buffer = buffers.popleft()
        if len(buffer) < len(tokens):  # the longest row may be the last: room for it once and for all
            buffer = self._room_for(max(len(tokens), self.chunk_tokens + chunk.tokens.shape[1]))
        buffers.append(buffer)
        massive, made = self._work.begin(lambda: self._fill(buffer, chunk, tokens), buffer)
        return _Filled(chunk, self._chunks.state(), tokens, buffer, massive, made)

    @torch.no_grad()
    def _fill(
        self, buffer: Float[Tensor, "slot site d_model"], chunk: Chunk, tokens: Int[Tensor, "token"]
    ) -> Bool[Tensor, "token"]:
        """Put a chunk into the buffer, in the order it is dealt in; which tokens are over a limit."""
        places = sent(torch.argsort(tokens), buffer.device)
        sites = [*self.reads, *self.writes]
        massive = fill(self.model, chunk.tokens, chunk.positions, sites, self.first, self.limits, buffer, places)
        return massive.to("cpu", non_blocking=massive.is_cuda)

    def _take(self, filled: _Filled) -> int:
        """Make a chunk the one that is dealt out; how many tokens it has."""
        self._chunk, self._place, self._tokens = filled.chunk, filled.place, filled.tokens
        self._work.ready(filled.made)
        kept = n_tokens = len(filled.tokens)
        if self.limits:
            self._work.there(filled.made)
            kept = close_gaps(filled.massive, filled.buffer, filled.tokens)
        self._require_batch(filled.chunk, n_tokens, kept)
        return kept

    def _order(self, chunk: Chunk, n_tokens: int) -> Int[Tensor, "slot"]:
        """Which token each place of a chunk has."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + chunk.number)
        return torch.randperm(n_tokens, generator=generator)

    def _require_batch(self, chunk: Chunk, n_tokens: int, kept: int) -> None:
        if kept < self.batch:
            without = f" without {n_tokens - kept} that are outliers" if kept < n_tokens else ""
            rows, length = chunk.tokens.shape
            raise InputError(
                f"{rows} rows of {length} tokens{without} do not fill one batch of {self.batch}; give more text, or a "
                "smaller batch."
            )

    def _room_for(self, tokens: int) -> Float[Tensor, "slot site d_model"]:
        sites = len(self.reads) + len(self.writes)
        return torch.empty(tokens, sites, self._width, dtype=self.model.dtype, device=self.model.device)


def close_gaps(gone: Bool[Tensor, "slot"], *tables: Shaped[Tensor, "_ ..."]) -> int:
    """Put the last rows of each table that stay, in place, where rows are gone; how many stay."""
    stay = len(gone) - int(gone.sum())
    holes, movers = gone[:stay].nonzero().squeeze(1), (~gone[stay:]).nonzero().squeeze(1) + stay
    for table in tables:
        table[sent(holes, table.device)] = table[sent(movers, table.device)]
    return stay
