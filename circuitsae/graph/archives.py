"""Arrays in npz files of strangers: what the headers say is checked before anything is unpacked."""

import hashlib
import math
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy

from circuitsae.graph.checking import MalformedError, shown


class ArrayHeader(NamedTuple):
    """What a member of an archive says of its array, before it is unpacked."""

    shape: tuple[int, ...]
    dtype: np.dtype
    start: int
    """Bytes of the header."""
    size: int
    """Bytes of the member, unpacked."""

    def check_size(self, name: str) -> None:
        """Raises `MalformedError` unless the member has the bytes that its shape and type take."""
        if min(self.shape, default=0) < 0 or self.size != self.start + math.prod(self.shape) * self.dtype.itemsize:
            raise MalformedError(f"{name} has {self.size:,} bytes, which do not fit {shown(str(self.shape))} numbers")


@contextmanager
def opened_archive(path: Path, largest: int, digest: str | None = None) -> Iterator[zipfile.ZipFile]:
    """The archive in a file of at most `largest` bytes; whatever is wrong with it raises `MalformedError`.

    digest: the SHA-256 that the file must have.
    """
    try:
        if (size := path.stat().st_size) > largest:
            raise MalformedError(f"{path.name} has {size:,} bytes, more than the {largest:,} that it can need")
        with path.open("rb") as file:
            if digest is not None and hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise MalformedError(f"{path.name} was changed, or not written together with graph.json")
            with zipfile.ZipFile(file) as archive:
                yield archive
    except MalformedError:
        raise
    except (
        *(OSError, EOFError, KeyError, ValueError, SyntaxError, RuntimeError, tokenize.TokenError),
        *(zipfile.BadZipFile, zlib.error),
    ) as error:
        said = " ".join((str(error) or type(error).__name__).split())
        raise MalformedError(f"{path.name} cannot be read ({said[:200]})") from error


def array_names(archive: zipfile.ZipFile) -> list[str]:
    """The names of the arrays, each once."""
    return list(dict.fromkeys(name.removesuffix(".npy") for name in archive.namelist()))


def array_header(archive: zipfile.ZipFile, name: str) -> ArrayHeader:
    """The header of an array, read without unpacking more than that."""
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise MalformedError(f"{shown(name)} is packed in a way that NumPy does not write")
    with archive.open(member) as file, warnings.catch_warnings(action="ignore"):
        version = npy.read_magic(file)
        if version != (1, 0):
            raise MalformedError(f"{shown(name)} is an array of version {version}; expected (1, 0)")
        shape, _, dtype = npy.read_array_header_1_0(file)
        return ArrayHeader(shape, dtype, file.tell(), member.file_size)


def unpacked(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array whose header was found fit. Never unpickles."""
    with archive.open(f"{name}.npy") as file:
        return npy.read_array(file, allow_pickle=False)
