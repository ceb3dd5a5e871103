"""Rows of tokens → shuffled batches of activations."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.errors import InputError
from transcoders.language_model import LanguageModel
from transcoders.sites import Site

logger = logging.getLogger(__name__)

_TOKENS_AT_ONCE = 4096


class ActivationBatch(NamedTuple):
    """What the layers read and write at the same tokens."""

    reads: Float[Tensor, "batch layer d_model"]
    writes: Float[Tensor, "batch layer d_model"]


@torch.no_grad()
def sites_of(
    model: LanguageModel, rows: Int[Tensor, "row pos"], reads: Sequence[Site], writes: Sequence[Site], *, first: int = 1
) -> ActivationBatch:
    """Activations at all sites from one forward pass per group of rows, at the positions from `first` on.

    Position 0 is left out by default: its activations are outliers in most models. Layers after the last site are not
    computed.
    """
    batches = []
    for group in rows.split(max(1, _TOKENS_AT_ONCE // rows.shape[1])):
        cache = model.activations(group, {*reads, *writes})
        tensors = [_side([cache[s][:, first:].flatten(0, 1) for s in sites], model) for sites in (reads, writes)]
        batches.append(tensors)
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
        rows: Callable[[], Iterator[Sequence[int]]],
        *,
        reads: Sequence[Site],
        writes: Sequence[Site],
        batch: int,
        chunk_rows: int,
        seed: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """`rows` opens a pass over the token rows; it is called again when a pass ends. `state`: where to go on."""
        self.model, self.reads, self.writes = model, tuple(reads), tuple(writes)
        self.batch, self.chunk_rows, self.seed = batch, chunk_rows, seed
        self.chunk, self.batch_in_chunk = (0, 0) if state is None else (state["chunk"], state["batch_in_chunk"])
        self._chunks = _chunks(rows, chunk_rows)

    def state(self) -> dict[str, Any]:
        """Where the next batch comes from, as JSON."""
        return {"chunk": self.chunk, "batch_in_chunk": self.batch_in_chunk}

    def __iter__(self) -> Iterator[ActivationBatch]:
        for _ in range(self.chunk):  # resuming: rows are cheap, the model is not run on them
            next(self._chunks)
        while True:
            reads, writes = self._next_activations()
            self._n_tokens = len(reads)
            order = self._order(len(reads)).to(reads.device)
            for picked in order.split(self.batch)[self.batch_in_chunk : len(order) // self.batch]:
                self.batch_in_chunk += 1
                yield ActivationBatch(reads[picked], writes[picked] if writes.shape[1] else writes)
            self.chunk, self.batch_in_chunk = self.chunk + 1, 0

    def place(self, row: int) -> str:
        """Where a row of the last batch comes from, for messages."""
        token = int(self._order(self._n_tokens)[(self.batch_in_chunk - 1) * self.batch + row])
        positions = self._n_tokens // self._n_rows
        text_row = self.chunk * self.chunk_rows + token // positions
        return f"position {token % positions + 1} of row {text_row} of the text"

    def _next_activations(self) -> ActivationBatch:
        rows = torch.tensor(next(self._chunks), device=self.model.device)
        self._n_rows = len(rows)
        activations = sites_of(self.model, rows, self.reads, self.writes)
        if len(activations.reads) < self.batch:
            raise InputError(
                f"{len(rows)} rows of {rows.shape[1]} tokens do not fill one batch of {self.batch}; "
                "give more text, or a smaller batch."
            )
        return activations

    def _order(self, n: int) -> Int[Tensor, "token"]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.chunk)
        return torch.randperm(n, generator=generator)


def _chunks(rows: Callable[[], Iterator[Sequence[int]]], chunk_rows: int) -> Iterator[list[Sequence[int]]]:
    """Chunks of rows, pass after pass without a break."""
    endless = _endless(rows)
    while True:
        yield list(islice(endless, chunk_rows))


def _endless(rows: Callable[[], Iterator[Sequence[int]]]) -> Iterator[Sequence[int]]:
    while True:
        n_rows = 0
        for row in rows():
            yield row
            n_rows += 1
        if n_rows == 0:
            raise InputError("The corpus has no row of tokens left; give more text, or one that can be read again.")
        logger.info("the corpus has been read to its end (%d rows); reading it again", n_rows)
