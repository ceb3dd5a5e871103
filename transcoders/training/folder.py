"""One training at a time in a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from transcoders.errors import InputError
from transcoders.files import write_error

_LOCK = ".training.lock"


@contextmanager
def alone_in(folder: Path | None) -> Iterator[None]:
    """Make the folder and hold its lock, which a process that ends or is killed gives back; None for no folder.

    The same thread may hold it several times over. `InputError` where another training has it.
    """
    if folder is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.resolve() / _LOCK, timeout=0, is_singleton=True)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"Another training is running in {folder}; wait for its end, or give another output folder."
        ) from error
    except NotImplementedError:  # a network file system without locks
        yield
        return
    except OSError as error:
        raise write_error(folder, error) from error
    try:
        yield
    finally:
        lock.release()
