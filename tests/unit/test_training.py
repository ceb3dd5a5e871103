"""The training loop on a tiny random model: it learns, it resumes to the bit, it leaves whole files."""

import json
from typing import Any

import pytest
import torch

from transcoders import (
    CLTConfig,
    SAEConfig,
    TranscoderConfig,
    evaluate,
    held_out_rows,
    load_dictionaries,
    load_model,
    random_model,
    train,
)
from transcoders.errors import InputError
from transcoders.training import ModelSource, Trainer

CONTEXT = 17
COMMON: dict[str, Any] = {
    "features": 48,
    "batch": 128,
    "context": CONTEXT,
    "buffer_mb": 1,
    "k": 12,
    "dead_after": 3000,
    "log_every": 10,
}


@pytest.fixture(scope="module")
def model():
    return random_model(n_layers=2, d_model=16, n_heads=2, d_vocab=30, context=32, seed=1)


def token_rows(n, seed):
    return torch.randint(0, 30, (n, CONTEXT), generator=torch.Generator().manual_seed(seed))


ROWS, HELD_OUT = token_rows(300, 0), token_rows(30, 1)

KINDS = [
    *(CLTConfig(activation=a, tokens=12_800, lr=8e-3, sparsity=1e-2, **COMMON) for a in ("relu", "jumprelu", "topk")),
    TranscoderConfig(tokens=12_800, lr=8e-3, sparsity=1e-2, **COMMON),
    TranscoderConfig(tokens=12_800, lr=8e-3, sparsity=1e-2, skip=True, activation="topk", **COMMON),
    SAEConfig(tokens=12_800, lr=8e-3, sparsity=1e-2, activation="topk", site="resid_post", **COMMON),
]


def trainer_of(model, rows, config, **options):
    return Trainer(ModelSource(model, rows, config), [config], **options)


def metrics_of(folder):
    """All of the lines but what is measured with a clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "data_wait"} for line in lines]


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("config", KINDS, ids=lambda c: f"{c.kind}-{c.activation}")
def test_training_reduces_the_unexplained_variance(model, config):
    trainer = trainer_of(model, ROWS, config)
    before = evaluate(model, trainer.finish()[0], HELD_OUT)
    trainer.run(progress=False)
    after = evaluate(model, trainer.finish()[0], HELD_OUT)
    assert after.fvu < 0.55
    assert after.fvu < 0.6 * before.fvu
    assert after.l0 < 0.6 * config.features
    if config.activation == "topk":
        assert after.l0 <= config.k / (2 if config.kind == "clt" else 1) + 1e-6


def test_more_sparsity_means_fewer_features(model):
    l0 = []
    for sparsity in (1e-4, 3e-2):
        config = CLTConfig(tokens=6_400, lr=8e-3, sparsity=sparsity, **COMMON)
        l0.append(evaluate(model, train(model, ROWS, config, progress=False), HELD_OUT).l0)
    assert l0[1] < 0.7 * l0[0]


def test_the_same_seed_gives_the_same_dictionaries_and_another_seed_others(model):
    results = [train(model, ROWS, CLTConfig(tokens=2_000, seed=seed, **COMMON), progress=False) for seed in (0, 0, 1)]
    assert same_weights(results[0], results[1])
    assert not same_weights(results[0], results[2])


@pytest.mark.parametrize(
    "config",
    [
        CLTConfig(tokens=4_000, checkpoint_every=10, **COMMON),
        CLTConfig(tokens=4_000, checkpoint_every=10, activation="topk", **{**COMMON, "dead_after": 256, "k": 2}),
        TranscoderConfig(tokens=4_000, checkpoint_every=10, skip=True, **COMMON),
        SAEConfig(tokens=4_000, checkpoint_every=10, activation="relu", **COMMON),
    ],
    ids=lambda c: f"{c.kind}-{c.activation}",
)
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(model, config, tmp_path):
    unbroken = train(model, ROWS, config, progress=False, out=tmp_path / "a")
    trainer_of(model, ROWS, config, out=tmp_path / "b").run(until=17, progress=False)  # 7 steps after a checkpoint
    resumed = train(model, ROWS, config, progress=False, out=tmp_path / "b", resume=True)
    assert same_weights(unbroken, resumed)
    a, b = (metrics_of(tmp_path / run) for run in "ab")
    assert a == b


def test_a_run_of_other_settings_is_not_resumed(model, tmp_path):
    config = CLTConfig(tokens=4_000, lr=2e-3, checkpoint_every=10, **COMMON)
    train(model, ROWS, config, progress=False, out=tmp_path)
    with pytest.raises(InputError, match="belongs to another run: its lr is 0.002, this run's 0.5"):
        train(model, ROWS, CLTConfig(tokens=4_000, lr=0.5, **COMMON), progress=False, out=tmp_path, resume=True)
    other = random_model(n_layers=2, d_model=16, n_heads=2, d_vocab=30, context=32, seed=9)
    with pytest.raises(InputError, match="its model"):
        train(other, ROWS, config, progress=False, out=tmp_path, resume=True)


def test_the_output_folder_holds_metrics_a_checkpoint_and_the_result(model, tmp_path):
    config = CLTConfig(tokens=4_000, checkpoint_every=10, **COMMON)
    result = train(model, ROWS, config, progress=False, out=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30, 31]
    assert {"fvu", "l0", "dead", "learning_rate", "sparsity_weight"} <= set(lines[0])
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-00000020", "checkpoint-00000030"]
    assert not list(tmp_path.rglob("*.tmp"))
    loaded = load_dictionaries(tmp_path)
    assert same_weights(loaded, result)
    assert loaded.provenance.fingerprint == model.fingerprint()
    assert loaded.provenance.tokens == 31 * 128
    assert loaded.provenance.config["kind"] == "clt"
    loaded.check_fits(model)


def test_training_does_not_touch_the_model(model):
    before = model.fingerprint()
    train(model, ROWS, CLTConfig(tokens=2_000, **COMMON), progress=False)
    assert model.fingerprint() == before
    assert not any(p.requires_grad for p in model.bridge.parameters())


def test_a_fresh_run_does_not_mistake_an_earlier_runs_checkpoint_for_its_own(model, tmp_path):
    train(model, ROWS, CLTConfig(tokens=4_000, checkpoint_every=10, **COMMON), progress=False, out=tmp_path)
    config = CLTConfig(tokens=4_000, checkpoint_every=10, seed=5, **COMMON)
    trainer_of(model, ROWS, config, out=tmp_path).run(until=15, progress=False)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000010"]
    resumed = train(model, ROWS, config, progress=False, out=tmp_path, resume=True)
    assert same_weights(resumed, train(model, ROWS, config, progress=False))


def test_training_on_text_with_a_real_model(shared):
    stories = load_model(shared / "data/models/tinystories-656k")
    corpus = shared / "data/corpora/tiny_stories_944k.txt"
    config = CLTConfig(features=64, tokens=1_000, batch=100, context=32, buffer_mb=1)
    clt = train(stories, corpus, config, progress=False)
    assert clt.provenance.corpus == "tiny_stories_944k.txt"
    evaluation = evaluate(stories, clt, held_out_rows(stories, corpus, tokens=64, context=32))
    assert evaluation.tokens == 2 * 31
    assert 0 < evaluation.fvu < 1.5
