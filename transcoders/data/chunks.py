"""Rows, pass after pass without an end, taken some at a time as tensors."""

import logging
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from transcoders.data.places import damaged, whole_number
from transcoders.data.tokens import Row, Rows, stacked
from transcoders.errors import InputError
from transcoders.files import short_hash
from transcoders.language_model import LanguageModel
from transcoders.sites import Site

logger = logging.getLogger(__name__)


class Chunk(NamedTuple):
    """Rows whose activations are shuffled together."""

    number: int
    first_row: int
    """How many rows came before, in all passes."""
    tokens: Int[Tensor, "row pos"]
    positions: Int[Tensor, "row pos"]
    """Of each token in its part of the row, see `Row`; −1 where a shorter row is filled up."""


class Chunks:
    """Endless chunks, each of as many rows as hold `tokens` tokens at positions from `first` on."""

    def __init__(self, rows: Rows, *, tokens: int, first: int = 1, state: Mapping[str, Any] | None = None) -> None:
        self._rows, self._tokens, self._first = rows, tokens, first
        self._number, self._n_rows, where = 0, 0, None
        self._hash = self._hash_before = ""
        if state is not None:
            self._hash = self._hash_before = str(state.get("hash_before", ""))
            self._number, self._n_rows = whole_number(state, "chunk"), whole_number(state, "row")
            where = state.get("rows")
            if not isinstance(where, Mapping):
                raise damaged("rows", where, "an object")
        self._pass, self._in_pass = rows(where), None if where else 0
        self._place = self._now()

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        self._place = self._now()
        number, first_row, rows, room = self._number, self._n_rows, [], self._tokens
        while room > 0:
            rows.append(row := self._next_row())
            room -= sum(max(0, length - self._first) for length in row.lengths)
        self._number, self._n_rows = number + 1, first_row + len(rows)
        self._hash_before = self._hash
        self._hash = short_hash([self._hash, *(f"{row.ids}{row.lengths}" for row in rows)])
        return Chunk(number, first_row, *stacked(rows))

    def state(self) -> dict[str, Any]:
        """Where the last chunk begins, as JSON; `chunk` is its number, `hash` that of all rows up to its end."""
        return {**self._place, "hash_before": self._hash_before, "hash": self._hash}

    def _now(self) -> dict[str, Any]:
        return {"chunk": self._number, "row": self._n_rows, "rows": self._pass.state()}

    def _next_row(self) -> Row:
        while (row := next(self._pass, None)) is None:
            if self._in_pass == 0:
                raise no_row()
            logger.info("the corpus has been read to its end; reading it again")
            self._pass, self._in_pass = self._rows(), 0
        self._in_pass = 1
        return row


def no_row() -> InputError:
    return InputError(
        "The corpus has no row of tokens left; give more text, or one that can be read again. Its first document, and "
        "every twentieth after it, is held out."
    )


_PROBES = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-5}
_PROBE = 1e-3


@torch.no_grad()
def require_masked(model: LanguageModel, context: int) -> None:
    """`InputError` unless the documents in a row of `context` tokens can be kept from seeing one another.

    Parts of different lengths are run in one row and each by itself; the last layer's output must be the same.
    """
    lengths = [length for length in (1, context // 4, context - 1 - context // 4) if length > 0]
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(model.d_vocab, (length,), generator=generator).tolist() for length in lengths]
    row = Row(list(chain.from_iterable(parts)), tuple(lengths))
    tokens, positions = (side.to(model.device) for side in stacked([row]))
    last = Site(model.n_layers - 1, "resid_post")
    alone = [model.activations(torch.tensor([part], device=model.device), [last])[last][0] for part in parts]
    expected = torch.cat(alone)
    try:
        found = model.activations(tokens, [last], positions=positions)[last][0]
        far = float((found - expected).abs().max() / expected.abs().max())
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        logger.debug("%s with a mask: %s", model.name, error)
        far = float("inf")
    if not far <= _PROBES.get(model.dtype, _PROBE):
        raise InputError(
            f"In {model.name} documents in a row of {context} tokens cannot be kept from seeing one another: it has "
            'positions or windows of its own. Give documents="separate" (a document a row), or "packed".'
        )
