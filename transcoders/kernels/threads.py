"""Choosing the number of threads by a quick trial."""

import logging
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from transcoders.errors import InputError

logger = logging.getLogger(__name__)


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
