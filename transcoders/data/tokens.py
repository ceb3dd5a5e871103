"""Documents → rows of tokens, in an order that is the same each time, each pass with its place."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from transcoders.data.corpora import Corpus, CorpusSource, open_corpus
from transcoders.data.places import Pass, damaged, whole_number
from transcoders.errors import InputError, PromptError
from transcoders.language_model import LanguageModel

Boundaries = Literal["packed", "masked", "separate"]
"""What becomes of the ends of documents, see `TrainConfig.documents`."""

_DOCUMENTS_AT_ONCE = 256
_CHARACTERS_AT_ONCE = 2**20
_CHARACTERS_PER_TOKEN = 4


class Row(NamedTuple):
    """Token ids that go through the model side by side."""

    ids: list[int]
    lengths: tuple[int, ...]
    """Of the parts that are to be read as if each stood alone, from first to last; they add up to the row."""


@runtime_checkable
class Rows(Protocol):
    """Rows that can be read again and again, from the start or from a place."""

    def __call__(self, state: Mapping[str, Any] | None = None) -> Pass[Row]:
        """A pass from the first row, or from where another pass's `state()` says."""
        ...


@dataclass(frozen=True)
class CorpusRows:
    """`Rows` of the documents of a corpus that are trained on."""

    model: LanguageModel
    corpus: Corpus
    context: int
    """Tokens in a row."""
    separator: str | None = None
    """Text after each document; None for the model's end-of-text token."""
    boundaries: Boundaries = "packed"

    def __call__(self, state: Mapping[str, Any] | None = None) -> "RowPass":
        inner = None if state is None else state.get("documents")
        if state is not None and not isinstance(inner, Mapping):
            raise damaged("documents", inner, "an object")
        texts = self.corpus.training(inner)
        settings = {"context": self.context, "separator": self.separator, "boundaries": self.boundaries}
        return RowPass(self.model, texts, **settings, state=state)


class RowPass:
    """One pass over the rows of documents, which are tokenised some at a time.

    Its state is the place of the first of these, the tokens that were left over before them, and how many of the rows
    since have been given: going on tokenises only them again. `at_once` characters are tokenised together; where few
    rows are wanted, fewer documents need to be read.
    """

    def __init__(
        self,
        model: LanguageModel,
        documents: Iterable[str],
        *,
        context: int,
        separator: str | None = None,
        boundaries: Boundaries = "packed",
        state: Mapping[str, Any] | None = None,
        at_once: int = _CHARACTERS_AT_ONCE,
    ) -> None:
        if not 2 <= context <= model.context:
            raise InputError(
                f"Rows of {context} tokens do not suit {model.name}; give a context from 2 to {model.context}."
            )
        self._model = model.with_bos(model.adds_bos)  # asks the tokenizer once
        self._documents, self._context, self._separator = iter(documents), context, separator
        self._cut, self._at_once = _CUTS[boundaries], at_once
        self._rest: list[list[int]] = []
        self._rows: list[Row] = []
        self._given = 0
        if state is not None:
            self._go_on(state)
        else:
            self._mark()

    def __iter__(self) -> "RowPass":
        return self

    def __next__(self) -> Row:
        while self._given == len(self._rows):
            self._mark()
            if not self._read():
                raise StopIteration
        self._given += 1
        return self._rows[self._given - 1]

    def state(self) -> dict[str, Any]:
        """Where the next row comes from."""
        return {"documents": self._place, "rest": self._left, "row": self._given}

    def _mark(self) -> None:
        documents = self._documents
        self._place = documents.state() if isinstance(documents, Pass) else None
        self._left = self._rest
        self._rows, self._given = [], 0

    def _go_on(self, state: Mapping[str, Any]) -> None:
        rest = state.get("rest")
        if not isinstance(rest, list) or not all(isinstance(ids, list) for ids in rest):
            raise damaged("rest", rest, "lists of tokens")
        self._rest = rest
        self._mark()
        if (given := whole_number(state, "row")) > 0:
            self._read()
        if given > len(self._rows):
            raise damaged("row", given, f"at most {len(self._rows)}")
        self._given = given

    def _read(self) -> bool:
        """Cut the next documents into rows; whether there were any."""
        texts = _some(self._documents, self._at_once)
        if texts:
            tokens = _tokenised(self._model, texts, self._separator)
            self._rows, self._rest = self._cut(self._model, [*self._rest, *tokens], self._context)
        return bool(texts)


class TokenRows:
    """`Rows` of token ids that are there already."""

    def __init__(self, tokens: Int[Tensor, "row pos"]) -> None:
        self.tokens = tokens

    def __call__(self, state: Mapping[str, Any] | None = None) -> "TokenPass":
        return TokenPass(self.tokens, 0 if state is None else whole_number(state, "row"))


class TokenPass:
    """One pass over `TokenRows`."""

    def __init__(self, tokens: Int[Tensor, "row pos"], row: int) -> None:
        self._tokens, self._row = tokens, row

    def __iter__(self) -> "TokenPass":
        return self

    def __next__(self) -> Row:
        if self._row >= len(self._tokens):
            raise StopIteration
        self._row += 1
        return Row(self._tokens[self._row - 1].tolist(), (self._tokens.shape[1],))

    def state(self) -> dict[str, int]:
        return {"row": self._row}


def stacked(rows: Sequence[Row]) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
    """Tokens, and the position of each in its part of the row; shorter rows are filled up, at position −1."""
    width = max(len(row.ids) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    positions = torch.full_like(tokens, -1)
    for number, row in enumerate(rows):
        tokens[number, : len(row.ids)] = torch.tensor(row.ids)
        positions[number, : len(row.ids)] = torch.cat([torch.arange(length) for length in row.lengths])
    return tokens, positions


def pack_rows(
    model: LanguageModel, documents: Iterable[str], *, context: int, separator: str | None = None
) -> Iterator[list[int]]:
    """Rows of exactly `context` token ids cut from the documents end to end; a last, shorter row is dropped.

    Every row begins with BOS where the model `adds_bos`. Between documents stands `separator`, or the tokenizer's
    end-of-text token where that is None.
    """
    return (row.ids for row in RowPass(model, documents, context=context, separator=separator))


def take_rows(
    model: LanguageModel, documents: Iterable[str], *, rows: int, context: int, separator: str | None = None
) -> Int[Tensor, "row pos"]:
    """At most `rows` packed rows as one tensor on the model's device; `InputError` where there is not a single one."""
    at_once = min(_CHARACTERS_AT_ONCE, _CHARACTERS_PER_TOKEN * rows * context)
    passed = RowPass(model, documents, context=context, separator=separator, at_once=at_once)
    packed = [row.ids for row in islice(passed, rows)]
    if not packed:
        raise InputError(f"The documents do not fill a single row of {context} tokens; give more text.")
    return torch.tensor(packed, device=model.device)


def held_out_rows(
    model: LanguageModel, corpus: CorpusSource, *, tokens: int, context: int, separator: str | None = None
) -> Int[Tensor, "row pos"]:
    """Rows of about `tokens` tokens from the documents of `corpus` that `train` leaves out; no row for no token."""
    if tokens < 1:
        return torch.empty(0, context, dtype=torch.int64, device=model.device)
    context = min(context, model.context)
    opened = open_corpus(corpus)
    rows, separator = -(-tokens // context), opened.separator_or(separator)
    return take_rows(model, opened.held_out(), rows=rows, context=context, separator=separator)


# tokens of documents


def _some(documents: Iterator[str], room: int) -> list[str]:
    """The next documents, until they fill a room of so many characters; at least one."""
    texts: list[str] = []
    while room > 0 and len(texts) < _DOCUMENTS_AT_ONCE and (text := next(documents, None)) is not None:
        texts.append(text)
        room -= len(text)
    return texts


def _tokenised(model: LanguageModel, texts: Sequence[str], separator: str | None) -> Iterator[list[int]]:
    """The tokens of each text with what separates it from the next."""
    if not model.has_tokenizer:
        raise PromptError(f"{model.name} has no tokenizer; give rows of token ids instead of text.")
    tokenizer = model.tokenizer
    end = [tokenizer.eos_token_id] if separator is None and tokenizer.eos_token_id is not None else []
    for ids in tokenizer([text + (separator or "") for text in texts], add_special_tokens=False)["input_ids"]:
        yield ids + end


# rows of tokens


def _packed(model: LanguageModel, documents: Sequence[list[int]], context: int) -> tuple[list[Row], list[list[int]]]:
    """Rows cut from the documents end to end, and what is left for the next."""
    ids = list(chain.from_iterable(documents))
    rows, at = [], 0
    while len(row := model.begun(ids[at : at + context])) >= context:
        rows.append(Row(row[:context], (context,)))
        at += 2 * context - len(row)
    return rows, [ids[at:]]


def _masked(model: LanguageModel, documents: Sequence[list[int]], context: int) -> tuple[list[Row], list[list[int]]]:
    """Full rows of parts that each begin as a text does; a document that does not fit is gone on with in the next."""
    rows: list[Row] = []
    row, lengths, inside = [], [], []
    for ids in documents:
        at = 0
        while at < len(ids):
            part, after = _part(model, ids, at, context - len(row))
            row, lengths = row + part, [*lengths, len(part)]
            inside.append(ids[at:after])
            at = after
            if len(row) == context:
                rows.append(Row(row, tuple(lengths)))
                row, lengths, inside = [], [], []
    return rows, inside


def _separate(model: LanguageModel, documents: Sequence[list[int]], context: int) -> tuple[list[Row], list[list[int]]]:
    """A row for each document, and further ones where it is longer; what has a single token is left out."""
    rows: list[Row] = []
    for ids in documents:
        at = 0
        while at < len(ids):
            part, at = _part(model, ids, at, context)
            rows += [Row(part, (len(part),))] if len(part) > 1 else []
    return rows, []


def _part(model: LanguageModel, ids: list[int], at: int, room: int) -> tuple[list[int], int]:
    """At most `room` tokens from `ids[at]` on, begun as a text is, and where the next ones are."""
    wanted = ids[at : at + room]
    begun = model.begun(wanted)
    part = begun[:room]
    return part, at + len(part) - (len(begun) - len(wanted))


_Cut = Callable[[LanguageModel, Sequence[list[int]], int], tuple[list[Row], list[list[int]]]]
_CUTS: dict[Boundaries, _Cut] = {"packed": _packed, "masked": _masked, "separate": _separate}
