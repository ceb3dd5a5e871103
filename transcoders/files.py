"""The one writer of files and the one hash.

Whatever is written appears under its name whole or not at all: it is written beside its place under a name of its own,
forced to the disk, and renamed. An error, Ctrl-C included, leaves what was there before and removes the rest. What the
system refuses (a full disk, a folder that may not be written to, a file where a folder should be) becomes a
`WriteError` of one sentence.

    write_file(path, content)               one file: bytes, text, or a function that writes to an open file
    with new_file(path) as temporary:       one file, for code that wants a path to write to
    with new_files(folder) as temporary:    files that belong together, moved into `folder` at the end
    settle(folder)                          before reading such files: what a kill left of that move is done
    with new_folder(folder) as temporary:   a folder that takes the place of `folder` at the end
    remove_folder(folder)                   gone at once, however long it takes to delete
    with claimed(folder) as mine:           before long work: the folder can be written to, and no other process will
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from transcoders.errors import WriteError

try:
    import fcntl
except ImportError:  # Windows has no locks for folders
    fcntl = None

Content = bytes | memoryview | str | Callable[[BinaryIO], object]

_CLAIM = ".claimed.lock"
_DAY = 24 * 60 * 60
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{32}\.tmp", re.DOTALL)
_WHOLE = ".whole"
"""Suffix of a folder whose files, all of them, belong to the folder that it is in."""
_WITHOUT = ".without.json"
"""In such a folder: names of files that go."""


def write_file(path: Path, content: Content) -> None:
    with new_file(path) as temporary, temporary.open("wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    write_file(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """An empty file beside `path`; at the end of the block it takes that name. Parents are made where needed."""
    with _place(path) as path, _parents(path.parent):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():  # a pipe or a device is written to as it is
            yield path
            return
        temporary = _temporary(path)
        try:
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # some libraries write 0600
            _force(temporary)
            temporary.replace(path)
            _force_names(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def new_files(folder: Path, without: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary folder; at the end of the block its files, at any depth, are moved into `folder`, which keeps others.

    Of those it loses the ones named by `without`, which belong to files that are replaced. Once all is on the disk, the
    set is there for good: a kill while it is moved leaves the rest to the next `new_files`, `settle` or `undisturbed`.
    Two processes do not move theirs at the same time.
    """
    with _place(folder) as folder, _parents(folder):
        temporary = _temporary(folder / "files")
        whole = temporary.with_suffix(_WHOLE)
        try:
            temporary.mkdir()
            yield temporary
            if names := list(without):
                (temporary / _WITHOUT).write_text(json.dumps(names))
            for file in _files(temporary):
                _force(file)
            with _locked(folder, shared=False):
                _settle(folder)
                temporary.replace(whole)
                _force_names(folder)
                _move_in(folder, whole)
        except OSError:
            shutil.rmtree(whole, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def settle(folder: Path) -> None:
    """Move in what a killed `new_files` left behind, all of it; nothing to do almost always.

    Where the folder may not be written to, it stays as it is.
    """
    if any(_wholes(folder)):
        with suppress(OSError), _locked(folder, shared=False):
            _settle(folder)


@contextmanager
def undisturbed(folder: Path) -> Iterator[None]:
    """No `new_files` moves its files into `folder` meanwhile: for reading files that belong together."""
    settle(folder)
    with _locked(folder, shared=True):
        yield


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`; at the end of the block it takes its place, and the earlier one is removed.

    A kill between the two renames leaves both under temporary names; nothing is lost.
    """
    with _place(folder) as folder, _parents(folder.parent):
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        temporary, earlier = _temporary(folder), _temporary(folder)
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _force(file)
            if folder.is_dir():
                folder.replace(earlier)
            try:
                temporary.replace(folder)
            except BaseException:
                if earlier.exists():
                    earlier.replace(folder)
                raise
            _force_names(folder.parent)
        finally:
            for stale in (temporary, earlier):
                shutil.rmtree(stale, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """A kill in between leaves it whole, or under a temporary name; never a part of it under its own."""
    with _place(folder) as place:
        stale = _temporary(place)
        place.replace(stale)
        shutil.rmtree(stale, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder that no other process writes to."""
    for left in folder.iterdir() if folder.is_dir() else ():
        if _TEMPORARY.fullmatch(left.name):
            _remove(left)


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Make the folder and hold it, until the block ends or the process is killed; False where another one holds it.

    Where nothing is written in the block, everything is left as it was.
    """
    made: list[Path] = []
    lock: FileLock | None = None
    try:
        with _place(folder) as place:
            made += [path for path in (place, *place.parents) if not path.exists()]
            place.mkdir(parents=True, exist_ok=True)
            lock = FileLock(place / _CLAIM, timeout=0)
            try:
                lock.acquire()
            except Timeout:
                lock = None
            except NotImplementedError:
                pass  # a network file system without locks
        yield lock is not None
    finally:
        if lock is not None:
            with suppress(OSError):
                Path(lock.lock_file).unlink()
            lock.release()
        for path in made:
            with suppress(OSError):  # something was written there
                path.rmdir()


def lasting(name: str | Path) -> str:
    """A local place by its full path, so that it is found from anywhere; a hub name as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else str(name)


def short_hash(parts: Iterable[bytes | str]) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of all parts, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:16]


def file_hash(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_error(path: Path, error: OSError) -> WriteError:
    """What the system refused, in a sentence."""
    return WriteError(f"Cannot write {path}: {_reason(path, error)}.")


@contextmanager
def _place(path: Path) -> Iterator[Path]:
    """Where `path` is written, and every refusal in a sentence: that of the outermost block, whose name was given.

    What a symbolic link points to is replaced, not the link.
    """
    try:
        linked = path.is_symlink() and (path.is_file() or path.is_dir())
        yield Path(os.path.realpath(path)) if linked else path
    except WriteError as error:
        raise (write_error(path, error.__cause__) if isinstance(error.__cause__, OSError) else error) from error
    except OSError as error:
        raise write_error(path, error) from error


def _reason(path: Path, error: OSError) -> str:
    folder = next((p for p in (path, *path.parents) if _is_dir(p)), path.parent)
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"the disk with {folder} is full; make room, or write to another place"
        case errno.EFBIG:
            return "the file would be larger than the system allows; write to another place"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"{folder} may not be written to; write to another place, or change its permissions"
        case errno.EEXIST | errno.ENOTDIR:
            there = next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), path)
            return f"{there} is a file, but a folder is needed there; write to another place, or move the file away"
        case errno.EISDIR:
            return "a folder has that name; give a file's name"
        case errno.ENAMETOOLONG:
            return "its name is too long; give a shorter one"
        case _:
            return f"{error.strerror or error} (in {folder}); write to another place"


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make `folder` and the folders above it; those that were made are removed again where the block fails."""
    made: list[Path] = []
    try:
        for parent in reversed([folder, *folder.parents]):
            if not parent.is_dir():
                parent.mkdir(exist_ok=True)
                made.append(parent)
        yield
    except BaseException:
        for parent in reversed(made):
            with suppress(OSError):  # not empty: another process has written there
                parent.rmdir()
        raise


def _temporary(path: Path) -> Path:
    """A name beside `path` that nobody else has."""
    _sweep(path.parent.absolute())
    return path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}.tmp")


def _remove(left: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


@cache
def _sweep(folder: Path) -> None:
    """Remove what killed processes left in a folder more than a day ago."""
    for left in folder.iterdir():
        with suppress(OSError):
            if _TEMPORARY.fullmatch(left.name) and time.time() - left.stat().st_mtime > _DAY:
                _remove(left)


def _wholes(folder: Path) -> Iterator[Path]:
    return folder.glob(f".files.*{_WHOLE}")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _settle(folder: Path) -> None:
    """With the folder locked."""
    for whole in sorted(_wholes(folder), key=lambda path: path.stat().st_mtime_ns):
        _move_in(folder, whole)


def _move_in(folder: Path, whole: Path) -> None:
    """Done twice, or the rest of it after a kill, it comes to the same."""
    without, changed = whole / _WITHOUT, {folder}
    for name in json.loads(without.read_text()) if without.is_file() else ():
        (folder / name).unlink(missing_ok=True)
    for file in _files(whole):
        if file != without:
            place = folder / file.relative_to(whole)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
            changed.add(place.parent)
    for inner in changed:
        _force_names(inner)
    shutil.rmtree(whole, ignore_errors=True)


def _force(file: Path) -> None:
    """Wait until a file is on the disk."""
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())


def _force_names(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can be asked to."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _locked(folder: Path, *, shared: bool) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network file system without locks
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
