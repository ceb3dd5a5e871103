"""Documents → rows of tokens of equal length.

Texts to train and to measure on: a local file, a data set of the hub, or documents given one by one.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from transcoders.errors import InputError, PromptError
from transcoders.hub import first_line, folder_or_name
from transcoders.language_model import LanguageModel

HELD_OUT_EVERY = 20
"""One document in this many is never trained on."""

_END_OF_TEXT = "<|endoftext|>"
_BLANK_LINE = "\n\n"


@dataclass(frozen=True)
class Corpus:
    """Documents under a name, split once and for all: every twentieth document is held out."""

    name: str
    documents: Callable[[], Iterator[str]]
    """A fresh pass over all documents, always in the same order."""
    separator: str | None = None
    """What stands between them in the source; None for the model's end-of-text token."""

    def separator_or(self, given: str | None) -> str | None:
        """The separator that was given, or the corpus's own."""
        return self.separator if given is None else given

    def training(self) -> Iterator[str]:
        return (text for i, text in enumerate(self.documents()) if i % HELD_OUT_EVERY)

    def held_out(self) -> Iterator[str]:
        return (text for i, text in enumerate(self.documents()) if not i % HELD_OUT_EVERY)


CorpusSource = Corpus | str | Path | Iterable[str]


def open_corpus(source: CorpusSource) -> Corpus:
    """The corpus that `source` names: a text file, a data set of the hub, or documents.

    A text file is cut at `<|endoftext|>` where it has that mark, at blank lines otherwise. A generator can be read
    only once; give a list, or a `Corpus`, where several passes are needed.

    Raises `InputError` for a file that is not there, and where the hub cannot be asked for what is not here.
    """
    if isinstance(source, Corpus):
        return source
    if isinstance(source, Path) or (isinstance(source, str) and _looks_local(source)):
        path = Path(source).expanduser()
        if not path.is_file():
            raise InputError(f"There is no text file at {path}; give a text file, or the name of a hub data set.")
        mark = _END_OF_TEXT if _END_OF_TEXT in path.read_text(encoding="utf-8") else _BLANK_LINE
        return Corpus(
            path.name, lambda: _file_documents(path, mark), separator=None if mark == _END_OF_TEXT else _BLANK_LINE
        )
    if isinstance(source, str):
        instead = "check the name and the network, or give a text file"
        place = folder_or_name(source, f"The data set {source!r}", InputError, instead, "dataset")
        return Corpus(source, lambda: _hub_documents(source, str(place)))
    return Corpus("documents", lambda: iter(source))


def _looks_local(source: str) -> bool:
    # A hub name has at most one slash and no suffix; anything else was meant as a path.
    return Path(source).expanduser().exists() or source.startswith((".", "/", "~")) or source.endswith(".txt")


def _file_documents(path: Path, mark: str) -> Iterator[str]:
    return (piece.strip() for piece in path.read_text(encoding="utf-8").split(mark) if piece.strip())


def _hub_documents(name: str, place: str) -> Iterator[str]:
    from datasets import load_dataset

    logging.getLogger(__name__).info("streaming %s from the hub", name)
    try:
        rows = load_dataset(place, split="train", streaming=True)
        for row in rows:
            yield row["text"]  # pyright: ignore[reportArgumentType, reportCallIssue]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"Could not read the data set {name!r} ({first_line(error)}); check the name, the network, and that it has "
            "a 'train' split with a 'text' column."
        ) from error


_DOCUMENTS_AT_ONCE = 256


def pack_rows(
    model: LanguageModel, documents: Iterable[str], *, context: int, separator: str | None = None
) -> Iterator[list[int]]:
    """Rows of exactly `context` token ids cut from the documents end to end; a last, shorter row is dropped.

    Every row begins with BOS where the model `adds_bos`. Between documents stands `separator`, or the tokenizer's
    end-of-text token where that is None.
    """
    if not 2 <= context <= model.context:
        raise InputError(
            f"Rows of {context} tokens do not suit {model.name}; give a context from 2 to {model.context}."
        )
    model = model.with_bos(model.adds_bos)  # asks the tokenizer once
    pending: list[int] = []
    for ids in _tokenised(model, documents, separator):
        pending += ids
        start = 0
        while len(row := model.begun(pending[start : start + context])) >= context:
            yield row[:context]
            start += 2 * context - len(row)
        pending = pending[start:]


def take_rows(
    model: LanguageModel, documents: Iterable[str], *, rows: int, context: int, separator: str | None = None
) -> Int[Tensor, "row pos"]:
    """At most `rows` packed rows as one tensor on the model's device; `InputError` where there is not a single one."""
    packed = list(islice(pack_rows(model, documents, context=context, separator=separator), rows))
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


def _tokenised(model: LanguageModel, documents: Iterable[str], separator: str | None) -> Iterator[list[int]]:
    """The tokens of each document with what separates it from the next."""
    if not model.has_tokenizer:
        raise PromptError(f"{model.name} has no tokenizer; give rows of token ids instead of text.")
    tokenizer = model.tokenizer
    end = [tokenizer.eos_token_id] if separator is None and tokenizer.eos_token_id is not None else []
    stream = iter(documents)
    while batch := list(islice(stream, _DOCUMENTS_AT_ONCE)):
        texts = [text + (separator or "") for text in batch]
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            yield ids + end
