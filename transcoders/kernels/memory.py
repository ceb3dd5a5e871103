"""Keeping freed memory for the next step, or giving it back."""

import ctypes
import logging
import sys
from contextlib import suppress
from functools import cache

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KEEP_BYTES = 2**31 - 1
_GROW_BYTES = 2**26


@cache
def keep_freed_memory() -> bool:
    """Ask the C library to reuse freed memory instead of returning it to the system; whether it could be asked.

    A training step frees and takes again gradients and pre-activations of tens of megabytes. By default each of these
    is given back to the system and taken anew page by page, which costs several times more than computing the
    gradient of a decoder does. The setting holds for the whole process, whose peak memory stays what it was; it exists
    with glibc (Linux), and elsewhere nothing happens. Values are never affected.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        logger.debug("this C library has no mallopt; memory is managed as it is by default")
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _KEEP_BYTES, _M_TOP_PAD: _GROW_BYTES}
    return all(mallopt(name, value) == 1 for name, value in settings.items())


def release_freed_memory() -> None:
    """Give freed memory that the C library keeps back to the system; between stages that hold different things.

    Where there is no glibc nothing happens. Values are never affected.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
