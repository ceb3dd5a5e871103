"""Reading ahead on another thread."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

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
