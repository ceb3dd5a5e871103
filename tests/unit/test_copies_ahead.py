"""Batches go to a device in order, each copy begun before the one before it is used; a processor has them as they are.

And the model runs on the next chunk while one is dealt out.

Without a GPU its streams are played by objects that take down what is asked of them.
"""

import json
from contextlib import contextmanager
from itertools import islice

import pytest
import torch

from tests.device import Tape, device_form
from transcoders import random_model
from transcoders.data import ActivationStream
from transcoders.data.ahead import Copies, QueuedCopies, WorkBeside, copies_to
from transcoders.data.tokens import TokenRows
from transcoders.sites import Site
from transcoders.training import SAEConfig
from transcoders.training.batches import ModelSource

CPU = torch.device("cpu")


def named(tensor: torch.Tensor) -> str:
    return str(int(tensor[0])) if tensor.ndim == 1 else "buffer"


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

            def synchronize(self) -> None:
                log.append(f"read {self.number}")

        class Beside:
            def wait_stream(self, stream: object) -> None:
                log.append("after what was asked")

        class Using:
            def wait_event(self, event: Event) -> None:
                log.append(f"waits {event.number}")

        @contextmanager
        def on(stream: object):
            yield

        patch.setattr(torch.cuda, "Stream", lambda device: Beside())
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", on)
        patch.setattr(torch.cuda, "current_stream", lambda device: Using())
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(f"lasts {named(tensor)}"))


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


# the model, a chunk ahead


def stream_of(model, *, beside: bool, **options):
    sites = [Site(layer, kind) for layer in range(2) for kind in ("mlp_in", "mlp_out")]
    rows = TokenRows(torch.randint(0, 50, (30, 9), generator=torch.Generator().manual_seed(0)))
    stream = ActivationStream(model, rows, reads=sites, writes=(), batch=12, chunk_tokens=40, seed=0, **options)
    if beside:
        stream._work = WorkBeside(CPU)
    return stream


@pytest.fixture(scope="module")
def model():
    return random_model(n_layers=2, d_model=8, n_heads=2, d_vocab=50, context=16)


def test_the_model_runs_on_the_next_chunk_beside_the_steps_on_one(monkeypatch, model):
    streams = Streams(monkeypatch)
    log = streams.log
    run = model.visit
    monkeypatch.setattr(model, "visit", lambda *args, **named: (log.append("model"), run(*args, **named)))
    dealt = iter(stream_of(model, beside=True, foreseen=3))
    for _ in range(9):
        next(dealt)
        log.append("step")
    begun = ["after what was asked", "model", "copied {}", "lasts buffer"]
    three = ["step"] * 3
    expected = [
        *begun,
        *begun,
        "waits 0",
        *three,
        *begun,
        "waits 1",
        *three,
        "waits 2",
        *three,
    ]  # the last: none is begun
    numbers = iter("012")
    assert log == [line.format(next(numbers)) if "{}" in line else line for line in expected]
    next(dealt)
    assert log[-5:] == ["after what was asked", "model", "copied 3", "lasts buffer", "waits 3"]


@pytest.mark.parametrize("limited", [False, True])
def test_batches_and_places_are_those_of_one_chunk_after_the_other(monkeypatch, model, limited):
    norms = next(iter(stream_of(model, beside=False))).reads[:, 1].norm(dim=1)
    options = {"limits": {Site(0, "mlp_out"): float(norms.sort().values[-2])}} if limited else {}
    plain = stream_of(model, beside=False, **options)
    streams = Streams(monkeypatch)
    ahead = stream_of(model, beside=True, foreseen=100, **options)
    for number, (expected, found) in enumerate(islice(zip(plain, ahead, strict=False), 20)):
        assert torch.equal(expected.reads, found.reads), number
        assert json.dumps(plain.state()) == json.dumps(ahead.state())
        assert plain.place(3) == ahead.place(3)
        assert torch.equal(plain.chunk.tokens, ahead.chunk.tokens)
    assert any(line.startswith("read") for line in streams.log) == limited
    state = json.loads(json.dumps(ahead.state()))
    resumed = (stream_of(model, beside=beside, foreseen=100, **options, state=state) for beside in (False, True))
    for expected, found in islice(zip(*resumed, strict=False), 6):
        assert torch.equal(expected.reads, found.reads)


def test_a_chunk_is_begun_without_a_wait(model):
    stream = stream_of(model, beside=False, limits={Site(0, "mlp_out"): 1.0})
    chunk = next(stream._chunks)
    with device_form(), Tape() as tape:
        stream._fill(stream._room_for(40), chunk, stream._order(chunk, 40))
    assert tape.waits == []
    assert tape.counts()["index_copy_"] == 4


def test_a_run_foresees_the_chunks_of_all_its_steps(model):
    rows = torch.randint(0, 50, (40, 16), generator=torch.Generator().manual_seed(0))
    for steps, foreseen in ((3, 1), (400, 100)):
        config = SAEConfig(features=8, k=2, batch=8, tokens=8 * steps, buffer_mb=1, outliers=0.0)
        source = ModelSource(model, rows, config)
        source._bytes_per_token = lambda sites: 2**20 // 45  # three rows of 15 tokens fit
        sites = source.sites(config)[0]
        stream = source.open(sites, batch=8)
        assert stream._foreseen == -(-steps // (stream.chunk_tokens // 8))
        assert (stream._foreseen == 1) == (foreseen == 1)
        assert source._stream(sites, batch=8, buffer_mb=0, limits={}, state=None)._foreseen == 0
        used = source.buffer_bytes(sites, 8)
        source.device = torch.device("cuda")
        assert source.buffer_bytes(sites, 8) == (used if foreseen == 1 else 2 * used)


def test_in_bfloat16_the_model_gives_what_its_layers_read_up_to_the_last_that_is_asked(model):
    coarse = random_model(n_layers=2, d_model=8, n_heads=2, d_vocab=50, context=16).to("bfloat16")
    calls = []
    coarse.bridge.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    rows = TokenRows(torch.randint(0, 50, (30, 9), generator=torch.Generator().manual_seed(0)))
    streams = [
        ActivationStream(m, rows, reads=[Site(0, "mlp_out")], writes=(), batch=12, chunk_tokens=40, seed=0)
        for m in (model, coarse)
    ]
    fine, found = (next(iter(stream)).reads for stream in streams)
    assert found.dtype == torch.bfloat16
    assert calls == []
    torch.testing.assert_close(found.float(), fine, rtol=5e-2, atol=5e-2 * float(fine.abs().max()))
    assert not torch.equal(found.float(), fine)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_has_the_same_numbers():
    device, given = torch.device("cuda"), [torch.randn(1000, 300) for _ in range(5)]
    sums = [float((copy * 2).sum()) for copy in copies_to(device).of(given)]
    assert sums == pytest.approx([float((batch * 2).sum()) for batch in given], rel=1e-4)
