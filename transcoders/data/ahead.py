"""Reading ahead on another thread, and copying ahead on another of a device's streams."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor

T = TypeVar("T")
Item = TypeVar("Item")


def read_ahead(read: Callable[[Item], T], items: Iterable[Item], *, most: int) -> Generator[T, None, None]:
    """`map(read, items)`, where one other thread reads up to `most` of them before they are asked for.

    `read` is called for one item at a time, in order; what it raises is raised where its item is asked for.
    """
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(1, "read-ahead")
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Copies:
    """Copies of the host's tensors on a device, made when they are asked for; on a processor the tensors themselves."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def of(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """One after the other."""
        for tensor in tensors:
            yield tensor.to(self.device)


class QueuedCopies(Copies):
    """The same on a GPU, on a stream of its own: the next copy is under way while the one before it is used."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)

    def of(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        begun: deque[tuple[Tensor, Any]] = deque()
        for tensor in tensors:
            begun.append(self._begin(tensor))
            if len(begun) > 1:
                yield self._ready(*begun.popleft())
        while begun:
            yield self._ready(*begun.popleft())

    def _begin(self, tensor: Shaped[Tensor, "..."]) -> tuple[Shaped[Tensor, "..."], Any]:
        """From pinned memory, which torch keeps until the copy is made; the host waits for nothing."""
        with torch.cuda.stream(self._stream):
            copy = tensor.pin_memory().to(self.device, non_blocking=True)
            made = torch.cuda.Event()
            made.record(self._stream)
        return copy, made

    def _ready(self, copy: Shaped[Tensor, "..."], made: Any) -> Shaped[Tensor, "..."]:
        """What follows on the device waits for the copy, and its memory lasts until that is done."""
        using = torch.cuda.current_stream(self.device)
        using.wait_event(made)
        copy.record_stream(using)
        return copy


def copies_to(device: torch.device) -> Copies:
    """Those that suit a device."""
    return QueuedCopies(device) if device.type == "cuda" else Copies(device)
