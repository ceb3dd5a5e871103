"""Batches go to a device in order, each copy begun before the one before it is used; a processor has them as they are.

Without a GPU its streams are played by objects that take down what is asked of them.
"""

from contextlib import contextmanager

import pytest
import torch

from transcoders.data.ahead import Copies, QueuedCopies, copies_to

CPU = torch.device("cpu")


class Streams:
    """What torch.cuda has of streams and events, taken down."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        log, self.current = self.log, object()

        class Event:
            made = 0

            def __init__(self) -> None:
                self.number = Event.made
                Event.made += 1

            def record(self, stream: object) -> None:
                log.append(f"copied {self.number}")

        class Using:
            def wait_event(self, event: Event) -> None:
                log.append(f"waits {event.number}")

        @contextmanager
        def on(stream: object):
            yield

        patch.setattr(torch.cuda, "Stream", lambda device: object())
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", on)
        patch.setattr(torch.cuda, "current_stream", lambda device: Using())
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(f"lasts {int(tensor[0])}"))


def batches(n: int):
    return [torch.full((2,), i) for i in range(n)]


def test_a_processor_has_them_as_they_are():
    copies = copies_to(CPU)
    assert type(copies) is Copies
    given = batches(3)
    assert all(copy is batch for copy, batch in zip(copies.of(given), given, strict=True))


def test_each_copy_is_begun_before_the_one_before_it_is_used(monkeypatch):
    streams = Streams(monkeypatch)
    for copy in QueuedCopies(CPU).of(iter(batches(3))):
        streams.log.append(f"used {int(copy[0])}")
    assert streams.log == [
        "copied 0", "copied 1", "waits 0", "lasts 0", "used 0", "copied 2", "waits 1", "lasts 1", "used 1",
        "waits 2", "lasts 2", "used 2",
    ]  # fmt: skip


@pytest.mark.parametrize("n", [0, 1])
def test_few_are_handed_out_too(monkeypatch, n):
    Streams(monkeypatch)
    assert len(list(QueuedCopies(CPU).of(batches(n)))) == n


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_has_the_same_numbers():
    device, given = torch.device("cuda"), [torch.randn(1000, 300) for _ in range(5)]
    sums = [float((copy * 2).sum()) for copy in copies_to(device).of(given)]
    assert sums == pytest.approx([float((batch * 2).sum()) for batch in given], rel=1e-4)
