"""Keeping freed memory for the next step.

Choosing the number of threads by a quick trial. Whether work on a device is queued, and reading what it comes to later.
"""

import ctypes
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache

import torch
from jaxtyping import Int
from torch import Tensor

from transcoders.errors import InputError

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


def queued(x: Tensor) -> bool:
    """Whether work on a tensor's device is queued: to read a value, or to ask how many there are, is to wait for all.

    Code that asks this has a form that leaves values where they are. Ask it as `host.queued`, so that tests can make
    the processor take that form too.
    """
    return x.device.type != "cpu"


class Arriving:
    """A whole number on its way from a device to the host, which waits for it only where it reads too early."""

    def __init__(self, number: Int[Tensor, ""]) -> None:
        cuda = number.device.type == "cuda"
        self._copy = number.to("cpu", non_blocking=cuda)
        self._there = torch.cuda.Event() if cuda else None
        if self._there is not None:
            self._there.record(torch.cuda.current_stream(number.device))

    def read(self) -> int:
        if self._there is not None:
            self._there.synchronize()
        return int(self._copy)


def release_freed_memory() -> None:
    """Give freed memory that the C library keeps back to the system; between stages that hold different things.

    Where there is no glibc nothing happens. Values are never affected.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def quickest_threads(
    work: Callable[[], object], *, candidates: Sequence[int] | None = None, rounds: int = 3, keep: bool = True
) -> int:
    """The number of threads with which `work()` is quickest; set for the process where `keep`.

    More threads are not always better: on a machine that others use too, threads wait for one another. `work` should
    be one step of what follows. Candidates (default: powers of two up to torch's present number) take turns, so that
    a change of the machine's load meets all alike; the median of the rounds decides, and of equals the smaller.
    """
    before = torch.get_num_threads()
    candidates = sorted(set(_powers_up_to(before) if candidates is None else candidates))
    if not candidates or candidates[0] < 1 or rounds < 1:
        raise InputError(f"A trial needs thread counts of at least 1 and rounds; got {candidates} and {rounds} rounds.")
    if len(candidates) == 1:
        quickest = candidates[0]
    else:
        times: dict[int, list[float]] = {n: [] for n in candidates}
        for turn in range(rounds + 1):
            for n in candidates:
                torch.set_num_threads(n)
                start = time.perf_counter()
                work()
                if turn > 0:  # the first turn warms up
                    times[n].append(time.perf_counter() - start)
        medians = {n: statistics.median(seconds) for n, seconds in times.items()}
        quickest = min(candidates, key=medians.__getitem__)
        logger.info("seconds a step by number of threads: %s", {n: round(s, 4) for n, s in medians.items()})
    torch.set_num_threads(quickest if keep else before)
    return quickest


def _powers_up_to(limit: int) -> list[int]:
    powers = [2**i for i in range(limit.bit_length()) if 2**i <= limit]
    return powers if powers[-1] == limit else [*powers, limit]
