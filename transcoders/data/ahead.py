"""Reading ahead on another thread, and copying or working ahead on another of a device's streams."""

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


def sent(tensor: Shaped[Tensor, "..."], device: torch.device) -> Shaped[Tensor, "..."]:
    """A host's tensor on a device, for which the host does not wait: it is copied from pinned memory."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


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
        """Torch keeps the pinned memory until the copy is made."""
        with torch.cuda.stream(self._stream):
            copy = sent(tensor, self.device)
            made = torch.cuda.Event()
            made.record(self._stream)
        return copy, made

    def _ready(self, copy: Shaped[Tensor, "..."], made: Any) -> Shaped[Tensor, "..."]:
        """What follows on the device waits for the copy, and its memory lasts until that is done."""
        using = torch.cuda.current_stream(self.device)
        using.wait_event(made)
        copy.record_stream(using)
        return copy


class Work:
    """What is made on a device, in the order in which it is asked for."""

    ahead = 0
    """Pieces that are worth beginning before the one before them has been used."""

    def begin(self, make: Callable[[], T], *written: Tensor) -> tuple[T, Any]:
        """What `make` gives, and what says when it is made; `written`: what it is put into."""
        return make(), None

    def ready(self, made: Any) -> None:
        """What is asked of the device from now on finds it made."""

    def there(self, made: Any) -> None:
        """The host waits until it is made."""


class WorkBeside(Work):
    """The same on a GPU, on a stream of its own: beside what is asked for later, and after all that was before."""

    ahead = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def begin(self, make: Callable[[], T], *written: Tensor) -> tuple[T, Any]:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # it may be written to what is still read
        with torch.cuda.stream(self._stream):
            result = make()
            made = torch.cuda.Event()
            made.record(self._stream)
        for tensor in written:  # its memory lasts until it is made, though nobody may wait for that any more
            tensor.record_stream(self._stream)
        return result, made

    def ready(self, made: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(made)

    def there(self, made: Any) -> None:
        made.synchronize()


def work_on(device: torch.device) -> Work:
    """That which suits a device."""
    return WorkBeside(device) if device.type == "cuda" else Work()


def copies_to(device: torch.device) -> Copies:
    """Those that suit a device."""
    return QueuedCopies(device) if device.type == "cuda" else Copies(device)
