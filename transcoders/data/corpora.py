"""Texts to train and to measure on: a local file, a data set of the hub, or documents given one by one."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transcoders.errors import InputError
from transcoders.hub import first_line, folder_or_name

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
