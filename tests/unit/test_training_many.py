"""Several dictionaries over one stream, training on vectors, and what is not computed."""

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch

import transcoders
from transcoders import (
    CLTConfig,
    SAEConfig,
    TranscoderConfig,
    load_dictionaries,
    random_model,
    train,
)
from transcoders.errors import InputError
from transcoders.sites import Site
from transcoders.training import ModelSource, Trainer, VectorSource

CONTEXT = 17
COMMON: dict[str, Any] = {
    "features": 24,
    "batch": 64,
    "tokens": 2_000,
    "context": CONTEXT,
    "buffer_mb": 1,
    "k": 4,
    "log_every": 10,
}
CONFIGS = [
    CLTConfig(activation="batchtopk", checkpoint_every=10, **COMMON),
    TranscoderConfig(activation="gated", skip=True, **COMMON),
    SAEConfig(activation="jumprelu", target_l0=4.0, **COMMON),
    SAEConfig(activation="relu", penalty="p_anneal", site="resid_mid", ema=0.9, **COMMON),
]


@pytest.fixture(scope="module")
def model():
    return random_model(n_layers=2, d_model=16, n_heads=2, d_vocab=30, context=32, seed=1)


ROWS = torch.randint(0, 30, (60, CONTEXT), generator=torch.Generator().manual_seed(0))


def vectors(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same_weights(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Counting:
    """Counts the passes over a model."""

    def __init__(self, model, monkeypatch):
        self.calls = 0
        original = model.bridge.run_with_hooks

        def counted(*args, **kwargs):
            self.calls += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(model.bridge, "run_with_hooks", counted)


@pytest.mark.parametrize("configs", [CONFIGS[:2], [CONFIGS[2], SAEConfig(activation="topk", **COMMON)]])
def test_each_of_many_is_what_it_would_be_alone(model, configs):
    together = train(model, ROWS, configs, progress=False)
    assert [d.kind for d in together] == [config.kind for config in configs]
    for config, result in zip(configs, together, strict=True):
        assert same_weights(result, train(model, ROWS, config, progress=False))


def test_many_cost_one_pass_over_the_model(model, monkeypatch):
    counting = Counting(model, monkeypatch)
    train(model, ROWS, CONFIGS[0], progress=False)
    alone, counting.calls = counting.calls, 0
    train(model, ROWS, CONFIGS[:2], progress=False)  # of the same sites
    assert counting.calls == alone > 0


def test_layers_after_the_last_site_are_not_computed(model):
    reached = []
    hooks = [
        model.bridge.blocks[1].hook_in.register_forward_hook(lambda *_: reached.append("layer 1")),
        model.bridge.unembed.register_forward_hook(lambda *_: reached.append("logits")),
    ]
    try:
        expected = model.run(ROWS[:2], [Site(0, "mlp_out")])[1]
        assert reached == ["layer 1", "logits"]
        reached.clear()
        found = model.activations(ROWS[:2], [Site(0, "mlp_in"), Site(0, "mlp_out")])
        assert reached == []
        torch.testing.assert_close(found[Site(0, "mlp_out")], expected[Site(0, "mlp_out")])
        model.activations(ROWS[:2], [Site(1, "resid_post")])
        assert reached == ["layer 1"]
    finally:
        for hook in hooks:
            hook.remove()
    assert not any(point.fwd_hooks for point in model.bridge.hook_dict.values())


def test_many_are_resumed_together_to_the_bit(model, tmp_path):
    unbroken = train(model, ROWS, CONFIGS, progress=False, out=tmp_path / "a")
    source = ModelSource(model, ROWS, CONFIGS[0])
    Trainer(source, CONFIGS, out=tmp_path / "b").run(until=17, progress=False)
    resumed = train(model, ROWS, CONFIGS, progress=False, out=tmp_path / "b", resume=True)
    assert all(same_weights(a, b) for a, b in zip(unbroken, resumed, strict=True))
    names = ["clt-batchtopk", "plt-gated-1", "sae-jumprelu-2", "sae-relu-3"]
    for name, dictionaries in zip(names, resumed, strict=True):
        assert same_weights(load_dictionaries(tmp_path / "b" / name), dictionaries)
        texts = [(tmp_path / run / name / "metrics.jsonl").read_text() for run in "ab"]
        assert texts[0] == texts[1]
        assert {"fvu", "l0", "alignment"} <= set(json.loads(texts[0].splitlines()[0]))


def test_names_and_shared_settings_are_checked(model):
    with pytest.raises(InputError, match="share their batch; got .*'64'.*'65'"):
        train(model, ROWS, [CONFIGS[0], SAEConfig(**{**COMMON, "batch": 65})], progress=False)
    with pytest.raises(InputError, match="nothing to train"):
        train(model, ROWS, [], progress=False)
    with pytest.raises(InputError, match="as many names"):
        train(model, ROWS, CONFIGS[:2], names=["a", "a"], progress=False)


# vectors


def test_vectors_train_a_dictionary_that_reconstructs_them():
    directions = torch.nn.functional.normalize(vectors(24, 16), dim=1)
    x = (torch.rand(4000, 24, generator=torch.Generator().manual_seed(1)) < 0.1).float() @ directions
    config = SAEConfig(activation="topk", **{**COMMON, "tokens": 20_000, "lr": 1e-2})
    sae: Any = train(None, x, config, progress=False)
    assert float((x - sae[0](x)).square().sum() / (x - x.mean(0)).square().sum()) < 0.15


def test_vectors_come_as_one_layer_as_many_as_pairs_or_in_chunks():
    config = SAEConfig(activation="topk", **COMMON)
    x = vectors(300, 16)
    plain = train(None, x, config, progress=False)
    assert plain.n_layers == 1
    assert plain.provenance.model == "vectors"
    assert plain.provenance.fingerprint is None
    assert same_weights(plain, train(None, x[:, None], config, progress=False))
    assert same_weights(plain, train(None, lambda chunk: x, config, progress=False))
    assert not same_weights(plain, train(None, lambda chunk: vectors(300, 16, seed=chunk), config, progress=False))
    pair = train(None, (vectors(300, 3, 16), vectors(300, 3, 16, seed=1)), CLTConfig(**COMMON), progress=False)
    assert (pair.kind, pair.n_layers) == ("clt", 3)
    results = train(None, x, [config, SAEConfig(activation="relu", **COMMON)], progress=False)
    assert same_weights(results[0], plain)


def test_training_on_vectors_is_resumed_to_the_bit(tmp_path):
    config = SAEConfig(activation="batchtopk", checkpoint_every=7, ema=0.5, **COMMON)
    x = vectors(300, 16)
    unbroken = train(None, x, config, progress=False)
    Trainer(VectorSource(x, None, seed=0), [config], out=tmp_path).run(until=11, progress=False)
    assert same_weights(unbroken, train(None, x, config, progress=False, out=tmp_path, resume=True))


def test_vectors_that_cannot_be_used_are_refused():
    config = SAEConfig(**COMMON)
    with pytest.raises(InputError, match=r"got \[10\]"):
        train(None, vectors(10), config, progress=False)
    with pytest.raises(InputError, match="30 vectors do not fill one batch of 64"):
        train(None, vectors(30, 16), config, progress=False)
    with pytest.raises(InputError, match="takes reads and writes; got vectors alone"):
        train(None, vectors(100, 16), CLTConfig(**COMMON), progress=False)
    with pytest.raises(InputError, match="one shape"):
        train(None, (vectors(100, 16), vectors(100, 8)), CLTConfig(**COMMON), progress=False)
    for text in ("text.txt", ROWS):
        with pytest.raises(InputError, match="Without a model, vectors are trained on"):
            train(None, text, config, progress=False)  # pyright: ignore[reportArgumentType, reportCallIssue]


@pytest.mark.parametrize("given", [vectors(100, 16), lambda chunk: vectors(100, 16)], ids=["tensor", "function"])
def test_a_model_does_not_read_vectors(model, given):
    with pytest.raises(InputError, match="A model reads text or rows of tokens; .* Give None for the model"):
        train(model, given, SAEConfig(**COMMON), progress=False)


def test_names_of_earlier_releases_warn_and_do_the_same(model):
    config = SAEConfig(activation="topk", **COMMON)
    x = vectors(300, 16)
    on_model, on_vectors = train(model, ROWS, config, progress=False), train(None, x, config, progress=False)
    with pytest.warns(DeprecationWarning, match=r"train_many\(model, corpus, configs\) is train\("):
        (one,) = transcoders.train_many(model, ROWS, [config], names=["a"], progress=False)
    assert same_weights(one, on_model)
    with pytest.warns(DeprecationWarning, match=r"train\(None, vectors, config\)"):
        assert same_weights(transcoders.train_on(x, config, progress=False), on_vectors)
    with pytest.warns(DeprecationWarning, match=r"train\(None, vectors, configs\)"):
        assert same_weights(transcoders.train_many_on(x, [config], progress=False)[0], on_vectors)


# kernels, precision, averages


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "gated", "relu"])
def test_training_with_sparse_kernels_is_training_with_dense_ones(activation):
    x, y = vectors(400, 2, 16), vectors(400, 2, 16, seed=1)
    results: list[Any] = []
    for kernels in ("dense", "sparse"):
        config = CLTConfig(activation=activation, kernels=kernels, matryoshka=(0.5, 1.0), **COMMON)
        results.append(train(None, (x, y), config, progress=False))
    for a, b in zip(results[0].state_dict().values(), results[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_kernels_are_chosen_by_the_measured_density():
    x = vectors(600, 16)
    settings: dict[str, Any] = {
        **COMMON,
        "features": 1024,
        "target_l0": 4.0,
        "tokens": 6_400,
        "bandwidth": 0.01,
        "lr": 1e-2,
    }
    trainer = Trainer(VectorSource(x, None, seed=0), [SAEConfig(activation="jumprelu", start_l0=400.0, **settings)])
    assert not trainer.runs[0].parts[0].sparse
    trainer.run(progress=False)
    assert trainer.runs[0].parts[0].sparse
    ranked = SAEConfig(activation="topk", **{**COMMON, "features": 1024})
    assert Trainer(VectorSource(x, None, seed=0), [ranked]).runs[0].parts[0].sparse


def test_the_running_mean_of_the_weights_is_handed_out():
    x = vectors(300, 16)
    config = SAEConfig(activation="relu", ema=0.8, normalise="none", **COMMON)
    trainer = Trainer(VectorSource(x, None, seed=0), [config])
    mean = trainer.runs[0].weights.W_enc.detach().clone()
    for step in range(1, 6):
        trainer.run(until=step, progress=False)
        mean = 0.8 * mean + 0.2 * trainer.runs[0].weights.W_enc.detach()
    last = trainer.runs[0].weights.W_enc.detach().clone()
    saes: Any = trainer.finish()[0]
    torch.testing.assert_close(saes[0].W_enc, mean[0].T)
    assert torch.equal(trainer.runs[0].weights.W_enc, last)
    assert not torch.allclose(mean, last)


COMPILED = """
import torch
from transcoders import SAEConfig, train
x = torch.randn(3000, 16)
common = dict(activation="jumprelu", features=24, batch=64, tokens=3200)
one, other = (train(None, x, SAEConfig(compile=c, **common), progress=False)[0] for c in (False, True))
torch.testing.assert_close(one.W_enc, other.W_enc, rtol=1e-3, atol=1e-4)
torch.testing.assert_close(one.activation.threshold, other.activation.threshold, rtol=1e-3, atol=1e-4)
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_training_is_training():
    # In a process of its own: the tests' checks of shapes cannot be compiled.
    result = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
