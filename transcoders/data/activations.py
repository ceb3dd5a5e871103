"""Rows of tokens → shuffled batches of activations."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.data.chunks import Chunks
from transcoders.data.places import whole_number
from transcoders.data.tokens import Rows
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel
from transcoders.sites import Site

_TOKENS_AT_ONCE = 4096


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
    positions: Int[Tensor, "row pos"] | None = None,
) -> ActivationBatch:
    """Activations at all sites from one forward pass per group of rows, at the positions from `first` on.

    Position 0 is left out by default: its activations are outliers in most models. Layers after the last site are not
    computed. `positions`: of each token in its part of the row (`Chunk`), where parts are to be read each by itself;
    columns without them.
    """
    if positions is None:
        positions = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    at_once = max(1, _TOKENS_AT_ONCE // rows.shape[1])
    batches = []
    for group, places in zip(rows.split(at_once), positions.split(at_once), strict=True):
        width = int((places >= 0).sum(dim=1).max())  # what only fills up rows is not run
        group, places = group[:, :width], places[:, :width]
        several = bool((places[:, 1:] == 0).any())
        cache = model.activations(group, {*reads, *writes}, positions=places if several else None)
        kept = places >= first
        batches.append([_side([cache[s][kept] for s in sites], model) for sites in (reads, writes)])
    return ActivationBatch(*(torch.cat(side) for side in zip(*batches, strict=True)))


def _side(
    activations: Sequence[Float[Tensor, "token d_model"]], model: LanguageModel
) -> Float[Tensor, "token layer d_model"]:
    if not activations:
        return torch.empty(0, 0, model.d_model, device=model.device, dtype=model.dtype)
    widths = sorted({x.shape[-1] for x in activations})
    if len(widths) > 1:
        raise InputError(f"Sites that are read together have one width; got widths {widths}. Take them one by one.")
    return torch.stack(list(activations), dim=1)


class ActivationStream:
    """Endless shuffled batches of activations, a function of the rows and the seed alone.

    Works chunk by chunk: takes rows, runs the model on them, shuffles all their tokens, and deals them out. The tokens
    of a chunk that do not fill a batch are dropped.
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
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """`rows`: a new pass over them begins when one ends. `state`: where to go on."""
        self.model, self.reads, self.writes = model, tuple(reads), tuple(writes)
        self.batch, self.seed = batch, seed
        self.batch_in_chunk = 0 if state is None else whole_number(state, "batch_in_chunk")
        self._chunks = Chunks(rows, tokens=chunk_tokens, state=state)

    def state(self) -> dict[str, Any]:
        """Where the next batch comes from, as JSON."""
        return {**self._chunks.state(), "batch_in_chunk": self.batch_in_chunk}

    def __iter__(self) -> Iterator[ActivationBatch]:
        for chunk in self._chunks:
            self._chunk = chunk
            reads, writes = self._activations()
            order = self._order(len(reads)).to(reads.device)
            for picked in order.split(self.batch)[self.batch_in_chunk : len(order) // self.batch]:
                self.batch_in_chunk += 1
                yield ActivationBatch(reads[picked], writes[picked] if writes.shape[1] else writes)
            self.batch_in_chunk = 0

    def place(self, row: int) -> str:
        """Where a row of the last batch comes from, for messages."""
        places = (self._chunk.positions >= 1).nonzero()
        token = self._order(len(places))[(self.batch_in_chunk - 1) * self.batch + row]
        text_row, position = places[token].tolist()
        return f"position {position} of row {self._chunk.first_row + text_row} of the text"

    def _activations(self) -> ActivationBatch:
        rows, positions = self._chunk.tokens.to(self.model.device), self._chunk.positions.to(self.model.device)
        activations = sites_of(self.model, rows, self.reads, self.writes, positions=positions)
        if len(activations.reads) < self.batch:
            raise InputError(
                f"{len(rows)} rows of {rows.shape[1]} tokens do not fill one batch of {self.batch}; "
                "give more text, or a smaller batch."
            )
        return activations

    def _order(self, n: int) -> Int[Tensor, "token"]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._chunk.number)
        return torch.randperm(n, generator=generator)
