"""What a worker measures of itself: processor time, memory above a baseline, and the machine's matrix rate."""

import ctypes
import gc
import json
import re
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ANSWER = "@@"
"""Marks our lines of output among those that libraries print."""

AGAIN_BELOW = 30.0


def answer(**values: Any) -> None:
    print(ANSWER + json.dumps(values), flush=True)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def matrix_rate(rows: int, d: int, dtype: torch.dtype, repeats: int = 5) -> list[float]:
    """FLOP/s of `[rows, d] @ [d, d]`, by processor time, of each repeat."""
    left, right = torch.randn(rows, d, dtype=dtype), torch.randn(d, d, dtype=dtype)
    out = torch.empty_like(left)
    times = max(1, int(2e10 / (2 * rows * d * d)))
    rates = []
    for _ in range(repeats + 1):
        start = cpu_seconds()
        for _ in range(times):
            torch.mm(left, right, out=out)
        rates.append(times * 2 * rows * d * d / max(cpu_seconds() - start, 1e-9))
    return rates[1:]


def touch(module: torch.nn.Module) -> None:
    """Read every weight, so that those mapped from a file count as loaded."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim:
            tensor.detach()[..., ::256].sum()


def measure(rows: int, d: int, dtype: torch.dtype, work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work()` returns, with its seconds, its peak of memory above what is held before, and the matrix rate.

    Work of less than `AGAIN_BELOW` seconds is done three times: the first says the memory, the least the seconds. The
    first also waits for the pages it takes, which cost half a second here, as much for little work as for much.
    """
    rates = matrix_rate(rows, d, dtype)
    held = begin_peak()
    result, seconds = _timed(work)
    peak = peak_mb() - held
    if seconds["cpu"] < AGAIN_BELOW:
        seconds = min((seconds, *(_timed(work)[1] for _ in range(2))), key=lambda taken: taken["cpu"])
    rates += matrix_rate(rows, d, dtype)
    return result, {**seconds, "peak_mb": peak, "held_mb": held, "rate": statistics.median(rates)}


def begin_peak() -> float:
    """Let the peak of memory start anew; MB that are held now."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS") / 2**20


def peak_mb() -> float:
    """Most MB held since `begin_peak`."""
    return _status("VmHWM") / 2**20


def _timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    cpu, wall = cpu_seconds(), time.perf_counter()
    result = work()
    return result, {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall}


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
