"""Documents of plain text files, read in pieces: memory is that of the largest document, whatever the file's size.

A place in a file is the byte at which its next document begins, so that a pass goes on from there without reading
what came before.
"""

import gzip
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

from transcoders.data.places import whole_number
from transcoders.errors import FileFormatError, InputError

END_OF_TEXT = "<|endoftext|>"
BLANK_LINE = "\n\n"

_BLOCK = 2**20
_MARK = re.compile(re.escape(END_OF_TEXT.encode()))
# Two or more line ends, of which \r\n is one; written so that the search leaps from one to the next.
_BLANK = re.compile(rb"\n(?>\r\n|\r|\n)+|\r\n?+(?>\r\n|\r|\n)+")
_BOM = "\ufeff"


class TextFiles:
    """The documents of files, one file after the other: cut at `<|endoftext|>` where any has it, else at blank lines.

    Files may be compressed (.gz, .zst); UTF-8 is expected, and `FileFormatError` names the byte that is not.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.marked = any(_contains(path, END_OF_TEXT.encode()) for path in self.paths)
        self.size = sum(path.stat().st_size for path in self.paths)

    @property
    def separator(self) -> str | None:
        """What stands between documents; None for the model's end-of-text token."""
        return None if self.marked else BLANK_LINE

    def __call__(self, state: Mapping[str, Any] | None = None) -> "TextPass":
        """A pass from the first document, or from where another's `state()` says; `InputError` for other files."""
        if state is None:
            return TextPass(self, 0, 0)
        if (size := whole_number(state, "size")) != self.size:
            raise InputError(
                f"{_named(self.paths)} now has {self.size:,} bytes, and had {size:,} when it was read before; "
                "give the same text to go on."
            )
        return TextPass(self, whole_number(state, "file"), whole_number(state, "byte"))


class TextPass:
    """One pass over the documents of `TextFiles`."""

    def __init__(self, files: TextFiles, file: int, byte: int) -> None:
        self._files, self._file, self._byte = files, file, byte
        self._documents = self._read()

    def __iter__(self) -> "TextPass":
        return self

    def __next__(self) -> str:
        return next(self._documents)

    def state(self) -> dict[str, int]:
        """Where the next document begins."""
        return {"file": self._file, "byte": self._byte, "size": self._files.size}

    def _read(self) -> Iterator[str]:
        end = _MARK if self._files.marked else _BLANK
        for number in range(self._file, len(self._files.paths)):
            path = self._files.paths[number]
            for piece, after in _pieces(path, end, self._byte):
                text = _decoded(path, piece, at=self._byte)
                self._byte = after
                if text:
                    yield text
            self._file, self._byte = number + 1, 0


def _named(paths: Sequence[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"The folder of {paths[0]}"


def _pieces(path: Path, end: re.Pattern[bytes], start: int) -> Iterator[tuple[bytes, int]]:
    """What stands between the matches of `end`, each with the byte at which the next one begins."""
    with _opened(path) as file:
        file.seek(start)
        held, looked = b"", 0
        while block := file.read(max(_BLOCK, len(held))):  # doubling, so that a long document is not copied too often
            held += block
            at = 0
            for match in end.finditer(held, looked):
                start += match.end() - at
                yield held[at : match.start()], start
                at = match.end()
            held = held[at:]
            looked = max(0, len(held) - len(END_OF_TEXT))  # half of what ends it may be there
        yield held, start + len(held)


def _decoded(path: Path, piece: bytes, *, at: int) -> str:
    try:
        text = piece.decode()
    except UnicodeDecodeError as error:
        raise FileFormatError(
            f"{path} is not UTF-8: byte {at + error.start:,} is 0x{piece[error.start]:02x}; convert it to UTF-8."
        ) from error
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.removeprefix(_BOM).strip() if at == 0 else text.strip()


def _contains(path: Path, mark: bytes) -> bool:
    with _opened(path) as file:
        tail = b""
        while block := file.read(_BLOCK):
            if mark in tail + block:
                return True
            tail = (tail + block)[1 - len(mark) :]
    return False


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file as they were before compression; `FileFormatError` where they cannot be had."""
    open_file = {".gz": gzip.open, ".zst": zstandard.open}.get(path.suffix.lower(), open)
    try:
        with open_file(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise FileFormatError(f"{path} cannot be read ({error}); give a whole file that this user may read.") from error
