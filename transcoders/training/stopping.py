"""Ctrl-C, and the SIGTERM with which Slurm and Kubernetes announce the end: heard between two steps."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from signal import SIG_DFL, SIGINT, SIGTERM, Signals, default_int_handler, getsignal, signal
from types import FrameType

from transcoders.errors import Stopped

_HEARD = (SIGINT, SIGTERM)
_OURS_TO_TAKE = (SIG_DFL, default_int_handler)
"""What a program that has not thought of a signal does with it."""


class StopRequest:
    """Whether the process was asked to stop, and by which signal."""

    number: Signals | None = None

    def stopped(self, message: str) -> Stopped:
        """The exception to raise, once what there is has been kept."""
        assert self.number is not None
        return Stopped(message, self.number)


@contextmanager
def stop_requests(heard: bool = True) -> Iterator[StopRequest]:
    """The first SIGINT or SIGTERM in the block is noted; a second one acts at once, as signals ever did.

    Handlers that a program has of its own stay. Signals reach the main thread alone; in others nothing is heard.
    """
    request, earlier = StopRequest(), {}

    def restore() -> None:
        while earlier:
            signal(*earlier.popitem())

    def note(number: int, frame: FrameType | None) -> None:
        request.number = Signals(number)
        restore()

    if heard and threading.current_thread() is threading.main_thread():
        for number in _HEARD:
            if getsignal(number) in _OURS_TO_TAKE:
                earlier[number] = signal(number, note)
    try:
        yield request
    finally:
        restore()
