"""What the workers of `gpu.py` measure: seconds with the device waited for, and the most memory it held.

They run in environments of other packages too, so nothing of ours is imported here.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import answer


def wait(device: str) -> None:
    """Until the device has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def timed(work: Callable[[], Any], device: str, *, rounds: int, at_most: float = 10.0) -> dict[str, float]:
    """Median seconds after one call that warms up (two, of short work), for `at_most` seconds or so.

    `peak_mb`: of a CUDA device, above what was held before; absent elsewhere.
    """
    on_cuda = device.startswith("cuda")
    held = torch.cuda.memory_allocated() if on_cuda else 0
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    first = _once(work, device)
    if first < 1:
        _once(work, device)
    taken: list[float] = []
    while not taken or (len(taken) < rounds and time.perf_counter() - start < at_most):
        taken.append(_once(work, device))
    found = {"seconds": statistics.median(taken), "first": first, "rounds": len(taken)}
    return found | ({"peak_mb": (torch.cuda.max_memory_allocated() - held) / 2**20} if on_cuda else {})


def _once(work: Callable[[], Any], device: str) -> float:
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def machine_rates(device: str, *, tiny: bool) -> dict[str, float]:
    """Bytes a second of a large copy, read and write counted, and operations a second of a large product, by dtype."""
    n, d = (2**22, 512) if tiny else (2**30, 8192)
    source = torch.ones(n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = timed(lambda: target.copy_(source), device, rounds=20, at_most=3)["seconds"]
    rates = {"bandwidth": 2 * n / copied}
    for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        left, right = (torch.randn(d, d, device=device).to(dtype) for _ in range(2))
        product = torch.empty_like(left)
        taken = timed(lambda a=left, b=right, c=product: torch.mm(a, b, out=c), device, rounds=20, at_most=3)
        rates[name] = 2 * d**3 / taken["seconds"]
    return rates


def serve(answers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Answer each line of the input, a task as JSON, by the function of its kind; a failure is an answer too."""
    for line in sys.stdin:
        task = json.loads(line)
        try:
            answer(**answers[task["kind"]](task))
        except Exception as error:  # a tool's failure is a result: the parent writes it down and goes on
            answer(error=f"{type(error).__name__}: {error}"[:400])
        if task["device"].startswith("cuda"):
            torch.cuda.empty_cache()
