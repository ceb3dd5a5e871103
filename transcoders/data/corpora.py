"""Texts to train and to measure on: files and folders, data sets of the hub, documents given one by one."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from transcoders.data.places import Pass, damaged, whole_number
from transcoders.data.records import Records, Where
from transcoders.data.text_files import TextFiles
from transcoders.errors import InputError
from transcoders.files import lasting
from transcoders.hub import folder_or_name

HELD_OUT_EVERY = 20
"""One document in this many is never trained on."""

_BUILDERS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet"}
_TEXT = (".txt", ".text", "")
_COMPRESSED = (".gz", ".zst")
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "state.json")
_SUFFIXES = ", ".join(dict.fromkeys([".txt", *_BUILDERS]))


@dataclass(frozen=True)
class Corpus:
    """Documents under a name, split once and for all: every twentieth document is held out."""

    name: str
    documents: Callable[..., Iterator[str]]
    """A fresh pass over all documents, always in the same order. Where its iterators have a `state()`, it also takes
    such a state, to go on from there; others are gone on with by passing over what was read."""
    separator: str | None = None
    """What stands between them in the source; None for the model's end-of-text token."""
    place: Mapping[str, str] | None = None
    """What `open_corpus` takes to open it again: a `source`, local ones by their full path, and what was chosen of it.
    Empty for the text that a model brings along; None for documents, which have no place."""

    def separator_or(self, given: str | None) -> str | None:
        """The separator that was given, or the corpus's own."""
        return self.separator if given is None else given

    def training(self, state: Mapping[str, Any] | None = None) -> "SplitPass":
        """The documents that are trained on, from the first, or from where another such pass's `state()` says."""
        return SplitPass(self.documents, state, held_out=False)

    def held_out(self, state: Mapping[str, Any] | None = None) -> "SplitPass":
        """The documents that are not, in the same way."""
        return SplitPass(self.documents, state, held_out=True)


class SplitPass:
    """One pass over one side of a corpus's split."""

    def __init__(
        self, documents: Callable[..., Iterator[str]], state: Mapping[str, Any] | None, *, held_out: bool
    ) -> None:
        self._held_out = held_out
        self.n_read = 0 if state is None else whole_number(state, "document")
        source = None if state is None else state.get("source")
        if source is None:
            self._documents = iter(documents())
            next(islice(self._documents, self.n_read, self.n_read), None)
        elif isinstance(source, Mapping):
            self._documents = documents(source)
        else:
            raise damaged("source", source, "an object")

    def __iter__(self) -> "SplitPass":
        return self

    def __next__(self) -> str:
        while True:
            text = next(self._documents)
            self.n_read += 1
            if ((self.n_read - 1) % HELD_OUT_EVERY == 0) == self._held_out:
                return text

    def state(self) -> dict[str, Any]:
        """How many documents were read, and where the source says that the next one is."""
        inner = self._documents.state() if isinstance(self._documents, Pass) else None
        return {"document": self.n_read} | ({} if inner is None else {"source": inner})


CorpusSource = Corpus | str | Path | Iterable[str]


def open_corpus(
    source: CorpusSource,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    column: str = "text",
) -> Corpus:
    """The corpus that `source` names, read as a stream: memory does not grow with it.

    * A text file (.txt, or no suffix), or a folder of them: cut at `<|endoftext|>` where there is that mark, at blank
      lines otherwise.
    * JSON lines, a JSON list of objects, or parquet, or a folder of them: a document is the text in `column`. Both
      kinds may be compressed (.gz, .zst).
    * The name of a data set of the hub: its `config` ("en" of "allenai/c4"), `split`, `revision` and `column`.
    * Documents themselves. A generator can be read only once; give a list, or a `Corpus`, where several passes are
      needed.

    Raises `InputError` for what is not there or empty, naming the configurations, splits or columns that are, and where
    the hub cannot be asked for what is not here; `FileFormatError` for text that is not UTF-8.
    """
    if not isinstance(source, str | Path):
        _refuse({"config": config, "split": split, "revision": revision, "column": column}, "documents")
        return source if isinstance(source, Corpus) else Corpus("documents", lambda: iter(source))
    if isinstance(source, Path) or _looks_local(source):
        found, place = _local(Path(source).expanduser(), config, split, revision, column), lasting(source)
    else:
        found, place = _of_hub(source, config, split, revision, column), source
    chosen = {"config": config, "split": split, "revision": revision, "column": column}
    chosen = {name: value for name, value in chosen.items() if value is not None and value != _DEFAULTS[name]}
    return replace(found, place={"source": place, **chosen})


_DEFAULTS = {"config": None, "split": "train", "revision": None, "column": "text"}


def _refuse(given: Mapping[str, str | None], what: str) -> None:
    """Raises `InputError` for the first setting that was given and has no meaning for `what`."""
    for name, value in given.items():
        if value != _DEFAULTS[name]:
            raise InputError(f"{name} = {value!r} has no meaning for {what}; leave it out.")


def _looks_local(source: str) -> bool:
    # A hub name has at most one slash and no suffix; anything else was meant as a path.
    path = Path(source).expanduser()
    known = _kind(path) is not None and path.suffix != ""
    return path.exists() or source.startswith((".", "/", "~")) or known or source.count("/") > 1


def _kind(path: Path) -> str | None:
    """How a file is read: "text", or by which builder; None for a suffix that says neither."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    return "text" if last in _TEXT else _BUILDERS.get(last)


def _local(path: Path, config: str | None, split: str, revision: str | None, column: str) -> Corpus:
    if path.is_dir():
        return _folder(path, config, split, revision, column)
    if not path.is_file():
        raise InputError(f"There is no text file at {path}; give a text file, or the name of a hub data set.")
    _refuse({"config": config, "split": split, "revision": revision}, f"the file {path}")
    kind = _kind(path)
    if kind is None:
        raise InputError(
            f"{path} cannot be read for its suffix {path.suffix!r}; expected {_SUFFIXES}, each also with .gz or .zst. "
            "Give a file of plain text the suffix .txt."
        )
    if kind == "text":
        _refuse({"column": column}, f"the text file {path}")
        return _of_text(path, [path])
    records = Records(Where(str(path), kind, files=(str(path.resolve()),), column=column))
    return Corpus(_name(path.name, column=column), records)


def _folder(path: Path, config: str | None, split: str, revision: str | None, column: str) -> Corpus:
    files = _files_of_text(path)
    kinds = {_kind(file): file for file in files}
    if not kinds:
        raise InputError(f"The folder {path} has no file of text; expected {_SUFFIXES}, each also with .gz or .zst.")
    if len(kinds) > 1:
        found = " and ".join(str(file.relative_to(path)) for file in kinds.values())
        raise InputError(f"The folder {path} mixes kinds of files ({found}); give it files of one kind.")
    _refuse({"revision": revision}, f"the folder {path}")
    if "text" in kinds:
        _refuse({"config": config, "split": split, "column": column}, f"the folder of text files {path}")
        return _of_text(path, files)
    records = Records(Where(str(path), str(path.resolve()), config, split, column=column))
    return Corpus(_name(path.resolve().name, config=config, split=split, column=column), records)


def _files_of_text(folder: Path) -> list[Path]:
    """Files that can be read, in order; what is hidden, has no suffix, or describes a data set is none."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix and file.is_file() and _kind(file) is not None and file.name not in _DESCRIPTIONS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )  # fmt: skip


def _of_text(path: Path, files: list[Path]) -> Corpus:
    documents = TextFiles(files)
    if next(documents(), None) is None:
        raise InputError(f"{path} is empty; give text.")
    return Corpus(path.resolve().name, documents, documents.separator)


def _of_hub(name: str, config: str | None, split: str, revision: str | None, column: str) -> Corpus:
    instead = "check the name and the network, or give a text file"
    what = f"The data set {name!r}" if revision is None else f"The revision {revision!r} of the data set {name!r}"
    place = folder_or_name(name, what, InputError, instead, "dataset", revision)
    asked = revision if place == name else None  # what lies here is of that revision
    full = _name(name, config=config, split=split, revision=revision, column=column)
    return Corpus(full, Records(Where(name, str(place), config, split, asked, column=column)))


def _name(name: str, **settings: str | None) -> str:
    """A name that tells this corpus from others of the same source."""
    said = [f"{key} {value}" for key, value in settings.items() if value != _DEFAULTS[key]]
    return f"{name} ({', '.join(said)})" if said else name
