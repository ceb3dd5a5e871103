"""Training in the device's form, on the processor: no step waits, launches do not grow, results are the processor's."""

import json
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.device import Tape, device_form
from transcoders import random_model
from transcoders.data.chunks import Chunk
from transcoders.devices import Line
from transcoders.errors import NotFiniteError
from transcoders.sites import Site
from transcoders.training import CLTConfig, SAEConfig, TranscoderConfig
from transcoders.training.batches import ModelSource, VectorSource
from transcoders.training.config import TrainConfig, compares_at
from transcoders.training.derivative import Nudges, derivative_loss
from transcoders.training.distributed import ALONE
from transcoders.training.revival import DeadCounter
from transcoders.training.step import Run
from transcoders.training.trainer import Trainer

BATCH, D_MODEL = 32, 8
COMMON: dict[str, Any] = {"features": 24, "batch": BATCH, "tokens": BATCH * 200, "k": 3, "lr": 1e-2}
KINDS = (SAEConfig, TranscoderConfig, CLTConfig)
SETTINGS: list[dict[str, Any]] = [
    {"activation": "topk"},
    {"activation": "batchtopk", "k_start": 2.0},
    {"activation": "jumprelu"},
    {"activation": "jumprelu", "penalty": "l0", "target_l0": 4.0},
    {"activation": "relu", "ema": 0.9},
    {"activation": "relu", "penalty": "p_anneal", "p_start": 0.0, "decay": 0.9, "target_l0": 4.0},
    {"activation": "gated"},
    {"activation": "topk", "matryoshka": (0.25, 1.0), "aligned": True},
    {"activation": "jumprelu", "precision": "bf16"},
    {"activation": "topk", "remedy": "ghost"},
]
NAMES = ["-".join(str(value) for value in settings.values()) for settings in SETTINGS]


def vectors(n: int = BATCH * 40, layers: int = 3, *, seed: int = 0):
    return torch.randn(n, layers, D_MODEL, generator=torch.Generator().manual_seed(seed))


def started(config: TrainConfig, layers: int = 3) -> tuple[Run, list[tuple[torch.Tensor, torch.Tensor]]]:
    x = vectors(layers=layers)
    y = x if config.kind == "sae" else vectors(layers=layers, seed=1)
    run = Run.start(config, x, y)
    with torch.no_grad():
        for bias in (run.weights.b_enc, *(p for n, p in run.weights.named_parameters() if n == "activation.b_mag")):
            bias[0, :3] -= 4.0  # dead
    return run, list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def stepped(run: Run, batches: list[tuple[torch.Tensor, torch.Tensor]], steps: range, *, measure: bool = False) -> Run:
    for step in steps:
        run.step(step, *batches[step % len(batches)], measure=measure)
    return run


def taped(config: TrainConfig, layers: int = 3, steps: int = 4) -> Tape:
    """So many steps after the first ones, in which the optimizer makes its moments."""
    with device_form():
        run, batches = started(config, layers)
        stepped(run, batches, range(2))
        with Tape() as tape:
            stepped(run, batches, range(2, 2 + steps))
    return tape


@pytest.fixture
def always_sparse(monkeypatch):
    """`auto` finds sparse kernels faster whatever there is to do, where it may take them."""
    line = Line(sparse_below=2.0, sparse_from=1)
    monkeypatch.setattr("transcoders.training.part.line_of", lambda device: line)


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_the_device(kind, settings):
    assert taped(kind(kernels="dense", resample_every=1000, **COMMON, **settings)).waits == []


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize("kind", KINDS)
def test_nor_does_one_that_touches_only_the_features_that_were_ranked(kind, activation):
    for shares in ((), (0.5, 1.0)):
        config = kind(kernels="sparse", activation=activation, matryoshka=shares, resample_every=1000, **COMMON)
        assert taped(config).waits == []


@pytest.mark.parametrize("kind", KINDS)
def test_other_sparse_steps_wait_where_they_are_asked_for(kind):
    """How many features are active is known to no host beforehand."""
    assert taped(kind(kernels="sparse", activation="jumprelu", **COMMON)).waits


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_that_auto_chooses_waits(kind, settings, always_sparse):
    """With dead latents that are revived, clipped gradients, averaged weights and a skip term."""
    more = {"remedy": "auxiliary", "dead_after": BATCH, "k_aux": 2, "clip": 0.5, "ema": 0.9}
    config = kind(**COMMON, **more | settings | ({} if kind is SAEConfig else {"skip": True}))
    with device_form():
        run, batches = started(config)
        with Tape() as tape:
            stepped(run, batches, range(22), measure=True)
    assert tape.waits == []
    assert bool(run.counter.dead.any())
    assert all(part.sparse == config.ranks for part in run.parts)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu", "gated"])
@pytest.mark.parametrize("kind", [TranscoderConfig, CLTConfig])
def test_no_step_with_the_derivative_in_its_loss_waits(kind, activation, always_sparse, read_model, rows):
    config = kind(
        activation=activation, derivative=0.5, derivative_from=0.0, skip=True, remedy="auxiliary", buffer_mb=1, **COMMON
    )  # fmt: skip
    with device_form():
        trainer = Trainer(ModelSource(read_model, rows, config), [config])
        trainer.run(until=1, progress=False)
        with Tape() as tape:
            trainer.run(until=4, progress=False)
        assert compares_at(config, 3)
    assert len(tape.waits) == 1
    assert "watch.py" in tape.waits[0]  # the look for numbers that are not finite, at the end


@pytest.fixture(scope="module")
def read_model():
    return random_model(n_layers=2, d_model=D_MODEL, n_heads=2, d_vocab=30, context=16, seed=1)


@pytest.fixture(scope="module")
def rows():
    return torch.randint(0, 30, (40, 16), generator=torch.Generator().manual_seed(0))


def test_a_checkpoint_of_a_processor_goes_on_without_waiting(always_sparse):
    config = SAEConfig(activation="relu", **COMMON)
    run, batches = started(config)
    stepped(run, batches, range(2))
    (part,) = run.parts
    assert part.sparse
    for form, sparse in ((nullcontext(), True), (device_form(), False)):
        with form:
            part.take_kernels(True)
            assert part.sparse == sparse


def test_directions_are_the_processors_with_zeros_where_it_leaves_tokens_out(read_model, rows):
    config = TranscoderConfig(activation="topk", derivative=1.0, **COMMON)
    read, written = ([Site(layer, kind) for layer in range(2)] for kind in ("mlp_in", "mlp_out"))
    chunk = Chunk(0, 0, rows, torch.arange(16).expand_as(rows))
    norms = Nudges(read_model, read, written, [config]).of(0, chunk).reads[1].norm(dim=-1)
    nudges = Nudges(read_model, read, written, [config], limits={read[1]: float(norms.median())})
    here = nudges.of(0, chunk)
    with device_form():
        there = nudges.of(0, chunk)
    kept = there.reads.any(dim=2).any(dim=0)
    assert 0 < int(kept.sum()) < len(kept)
    for side, whole in zip(here, there, strict=True):
        assert torch.equal(side, whole[:, kept])
    run, _ = started(config, layers=2)
    found = [derivative_loss(run.weights, given, config) for given in (here, there)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_processors(kind, settings):
    """Also where latents are dead, which the device's form revives by masks."""
    config = kind(kernels="dense", dead_after=BATCH, k_aux=2, **COMMON, **{"remedy": "auxiliary"} | settings)
    here, batches = started(config)
    stepped(here, batches, range(8), measure=True)
    assert bool(here.counter.dead.any())
    there, _ = started(config)
    with device_form():
        stepped(there, batches, range(8), measure=True)
    rtol, atol = (2e-2, 2e-2) if config.precision == "bf16" else (1e-3, 1e-5)
    for name, tensor in there.tensors().items():
        torch.testing.assert_close(tensor, here.tensors()[name], msg=name, rtol=rtol, atol=atol)
    assert there.metrics(8)["loss"] == pytest.approx(here.metrics(8)["loss"], rel=1e-2)
    assert there.controller.state() == pytest.approx(here.controller.state(), rel=1e-2)


@pytest.mark.parametrize("shares", [(), (0.5, 1.0)])
@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize("kind", [TranscoderConfig, CLTConfig])
def test_sparse_steps_are_the_processors(kind, activation, shares):
    config = kind(kernels="sparse", remedy="none", activation=activation, matryoshka=shares, **COMMON)
    here, batches = started(config)
    there, _ = started(config)
    stepped(here, batches, range(6))
    with device_form():
        stepped(there, batches, range(6))
    for name, tensor in there.tensors().items():
        torch.testing.assert_close(tensor, here.tensors()[name], msg=name, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_adds_as_many_launches_as_any_other(kind, activation):
    config = kind(kernels="dense", activation=activation, resample_every=1000, layers_at_once=8, **COMMON)
    launches = [taped(config, layers, steps=1).launches for layers in (2, 3, 4, 5)]
    added = {after - before for before, after in pairwise(launches)}
    assert len(added) == 1
    assert added.pop() <= 14


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_all_layers_are_clipped_at_once_as_the_processor_clips_them(kind):
    run, batches = started(kind(activation="jumprelu", kernels="dense", clip=0.01, **COMMON))
    (part,) = run.parts
    part.optimizer.step = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    found = []
    for form in (nullcontext(), device_form()):
        with form:
            stepped(run, batches, range(1))
        found.append([[g.clone() for side in layer for g in side] for layer in run.weights.gradients()])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-9)
    norms = [torch.cat([g.flatten() for g in layer]).norm() for layer in found[1]]
    whole = torch.stack(norms).norm() if kind is CLTConfig else torch.stack(norms).amax()
    assert float(whole) == pytest.approx(0.01, rel=1e-3)


def test_figures_are_read_where_they_are_logged_alone(tmp_path):
    config = SAEConfig(activation="jumprelu", target_l0=4.0, log_every=5, dead_after=10**6, **COMMON)
    trainer = Trainer(VectorSource(vectors(), None, seed=0), [config], out=tmp_path)
    with device_form():
        trainer.run(until=1, progress=False)
        waits = []
        for until in (4, 5, 9):  # each ends with one look for numbers that are not finite
            with Tape() as tape:
                trainer.run(until=until, progress=False)
            waits.append(len(tape.waits))
    assert waits[0] == waits[2] == 1
    assert waits[1] > 1
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [5]


def test_a_number_that_is_not_finite_is_named_with_its_step_when_figures_are_read_and_before_anything_is_saved(
    tmp_path,
):
    x = vectors(BATCH * 10)
    first = VectorSource(x, None, seed=0)
    config = SAEConfig(activation="topk", log_every=8, checkpoint_every=6, **COMMON)
    x[first._order(0, len(x))[3 * BATCH + 4], 1] = torch.nan
    source = VectorSource(x, None, seed=0)
    source.sample = lambda sites, tokens: vectors(BATCH * 4)[:, [site.layer for site in sites]]
    trainer = Trainer(source, [config], out=tmp_path)
    with device_form(), pytest.raises(NotFiniteError, match=r"step 4: the activations at 1\.resid_post"):
        trainer.run(progress=False)
    assert trainer.step == 6
    assert not list(tmp_path.glob("*00006*"))


def test_a_counter_on_a_device_never_misses_a_dead_latent_and_never_waits():
    generator = torch.Generator().manual_seed(0)
    counter = DeadCounter(torch.zeros(2, 5, dtype=torch.int64), dead_after=400)
    said, dead = [], []
    with device_form():
        for step in range(300):
            fired = torch.rand(2, 5, generator=generator) < 0.3
            if 100 < step < 150:
                fired[0, 3] = False
            with Tape() as tape:
                said.append(counter.any(ALONE))
                counter.update(fired, tokens=10)
            assert tape.waits == []
            dead.append(bool(counter.dead.any()))
    missed = [step for step in range(1, 300) if dead[step - 1] and not said[step]]
    assert sum(dead) > 5
    assert missed == []
    assert sum(said) < 40


def test_the_tape_knows_what_waits():
    x, mask = torch.randn(4, 3), torch.tensor([True, False, True, True])
    waiting = [
        lambda: float(x.sum()), lambda: bool(mask.any()), lambda: x.tolist(), lambda: x.numpy(), lambda: x.cpu(),
        lambda: x[mask], lambda: x.nonzero(), lambda: mask.long().bincount(), lambda: x.masked_select(x > 0),
        lambda: x.unique(), lambda: torch.equal(x, x), lambda: torch.tensor([1.0, 2.0]), lambda: x.clone()[:, [0, 2]],
        lambda: x.repeat_interleave(mask.long() + 1, 0),
    ]  # fmt: skip
    for ask in waiting:
        with Tape() as tape:
            ask()
        assert tape.waits, ask
    with Tape() as tape:
        y = torch.where(x > 0, x, 0.0).masked_fill(mask[:, None], 1.0) @ x.T
        y.topk(2).values.sum().add_(1)
        x.repeat_interleave(mask.long() + 1, 0, output_size=7)
    assert tape.waits == []
    assert tape.counts()["mm"] == 1
    assert tape.operations[0].bytes == x.numel() * (4 + 1)
