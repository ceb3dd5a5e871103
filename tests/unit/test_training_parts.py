"""Layers that know nothing of each other train as they would alone, however many take a step together."""

import weakref
from typing import Any

import pytest
import torch

from transcoders.training import SAEConfig, TranscoderConfig
from transcoders.training.batches import VectorSource
from transcoders.training.part import Part, layers_at_once
from transcoders.training.step import Run
from transcoders.training.trainer import Trainer

COMMON: dict[str, Any] = {"features": 24, "batch": 64, "tokens": 64 * 12, "k": 3, "dead_after": 100, "lr": 1e-2}
ACTIVATIONS = [
    {"activation": "topk", "k_aux": 4},
    {"activation": "batchtopk", "kernels": "sparse"},
    {"activation": "jumprelu", "target_l0": 4.0},
    {"activation": "jumprelu", "remedy": "resample", "resample_every": 4},
    {"activation": "gated"},
    {"activation": "topk", "remedy": "ghost"},
    {"activation": "relu", "penalty": "p_anneal", "ema": 0.9},
]


def vectors(n: int, layers: int = 3, d: int = 8, *, seed: int = 0):
    x = torch.randn(n, layers, d, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor([1.0, 40.0, 0.1])[:layers, None]


def trained(config, **options):
    x = vectors(600)
    data = (x, None) if config.kind == "sae" else (x, vectors(600, seed=1))
    trainer = Trainer(VectorSource(*data, seed=0), [config], **options)
    trainer.run(progress=False)
    return trainer


@pytest.mark.parametrize("settings", ACTIVATIONS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("kind", [SAEConfig, TranscoderConfig])
def test_the_result_is_the_same_however_many_layers_take_a_step_together(kind, settings):
    if settings.get("remedy") == "resample":
        settings = {**settings, "resample_every": 1000}  # draws by the part's own generator
    whole, *others = (trained(kind(layers_at_once=n, **COMMON, **settings)).runs[0] for n in (3, 2, 1))
    assert [len(run.parts) for run in (whole, *others)] == [1, 2, 3]
    for run in others:
        for name, tensor in whole.tensors().items():
            torch.testing.assert_close(run.tensors()[name], tensor, rtol=2e-4, atol=1e-5, msg=name)
        assert run.metrics(12)["fvu_per_layer"] == pytest.approx(whole.metrics(12)["fvu_per_layer"], rel=1e-3)
        assert run.metrics(12)["l0_per_layer"] == pytest.approx(whole.metrics(12)["l0_per_layer"], rel=1e-3)


@pytest.mark.parametrize("settings", ACTIVATIONS, ids=lambda s: "-".join(map(str, s.values())))
def test_a_run_in_parts_goes_on_to_the_very_weights(tmp_path, settings):
    config = SAEConfig(layers_at_once=2, checkpoint_every=7, **COMMON, **settings)
    unbroken = trained(config).runs[0].tensors()
    Trainer(VectorSource(vectors(600), None, seed=0), [config], out=tmp_path).run(until=7, progress=False)
    resumed = trained(config, out=tmp_path, resume=True).runs[0].tensors()
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())


def test_a_layer_is_not_slowed_by_anothers_gradient():
    x = vectors(64, 2)
    config = SAEConfig(activation="relu", penalty="l1", clip=0.01, normalise="none", **COMMON)
    spiked = x.clone()
    spiked[:, 1] *= 1e4
    moved = []
    for batch in (x, spiked):
        run = Run.start(config, x, x)
        run.step(0, batch, batch)
        moved.append({name: value.clone() for name, value in run.tensors().items()})
    for name in ("trainee.W_enc", "trainee.b_dec", "optimizer.W_enc.exp_avg"):
        assert torch.equal(moved[0][name][0], moved[1][name][0])
        assert not torch.equal(moved[0][name][1], moved[1][name][1])
    norm = sum(float(moved[1][f"optimizer.{name}.exp_avg"][1].square().sum()) for name in ("W_enc", "b_enc", "b_dec"))
    norm += float(moved[1]["optimizer.W_dec.1.exp_avg"].square().sum())
    assert norm**0.5 == pytest.approx((1 - config.betas[0]) * config.clip, rel=1e-3)


def test_gradients_of_a_part_are_freed_before_the_next_one_has_any():
    x = vectors(64)
    run = Run.start(SAEConfig(activation="topk", layers_at_once=1, **COMMON), x, x)
    run.step(0, x, x)
    assert all(p.grad is None for part in run.parts for p in part.weights.parameters())
    assert run.parts[2].weights.W_enc.data_ptr() == run.weights.W_enc[2].data_ptr()


def test_parts_are_as_large_as_memory_allows():
    config = TranscoderConfig(features=2048, batch=512)
    per_layer = 4 * (2 * 2048 * 576 + 3 * 512 * 2048)
    assert layers_at_once(config, 576, 30, torch.device("cpu")) == 2**26 // per_layer == 3
    assert layers_at_once(config, 576, 30, torch.device("cuda")) == 30
    assert layers_at_once(TranscoderConfig(features=2**20), 4096, 30, torch.device("cpu")) == 1


def test_features_of_a_part_are_let_go_before_the_next_one_has_any(monkeypatch):
    """Also where the step is measured, which needs them of all layers."""
    seen: list[Any] = []
    step = Part.step

    def watched(self, *arguments, **options):
        assert not [each for each in seen if each() is not None]
        result = step(self, *arguments, **options)
        seen.append(weakref.ref(result.code))
        return result

    monkeypatch.setattr(Part, "step", watched)
    for settings in ACTIVATIONS:
        seen.clear()
        run = Run.start(SAEConfig(layers_at_once=1, **COMMON, **settings), vectors(64), vectors(64))
        run.step(0, vectors(64), vectors(64))
        assert len(seen) == 3
        assert run.metrics(1)["l0"] > 0
