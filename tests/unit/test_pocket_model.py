"""Training is resumable to the bit, the recipe runs, and the embedded model does what its page promises."""

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from circuitsae.pocket import MODEL_DIR
from circuitsae.pocket.prompts import DEMONSTRATION
from examples.pocket import measure, recipe
from examples.pocket.sparse import MIRRORED, train_all, write_section
from examples.pocket.tokenizer import load_tokenizer
from examples.pocket.train import TrainConfig, learning_rate, scaled, train
from transcoders import load_dictionaries


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, local_files_only=True).eval()


def _weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_a_resumed_run_equals_an_unbroken_one(tmp_path, tokenizer):
    config = recipe.quick_config(steps=6)
    whole = _weights(train(config, tokenizer, tmp_path / "a.safetensors", progress=False))
    train(config, tokenizer, tmp_path / "b.safetensors", progress=False, stop_at=5)  # last checkpoint at 4
    resumed = _weights(train(config, tokenizer, tmp_path / "b.safetensors", progress=False))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    ends = [load_file(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_a_checkpoint_of_another_config_is_refused(tmp_path, tokenizer):
    train(recipe.quick_config(steps=2), tokenizer, tmp_path / "a.safetensors", progress=False)
    with pytest.raises(ValueError, match="another run"):
        train(recipe.quick_config(steps=4), tokenizer, tmp_path / "a.safetensors", progress=False)


def test_training_leaves_the_global_generator_alone(tmp_path, tokenizer):
    before = torch.random.get_rng_state()
    train(recipe.quick_config(steps=1), tokenizer, tmp_path / "a.safetensors", progress=False)
    assert torch.equal(before, torch.random.get_rng_state())


def test_schedule_rises_stays_falls_and_tails_off():
    config = TrainConfig()
    rates = [learning_rate(config, step) for step in range(config.steps)]
    assert max(rates) == config.learning_rate == rates[config.warmup] == rates[config.decay_from]
    assert rates[0] < rates[config.warmup // 2]
    falls = [before - after for before, after in pairwise(rates[config.decay_from :])]
    assert min(falls) > 0
    assert falls[0] > 2 * falls[-1]
    assert rates[-1] == pytest.approx(falls[-1])


@pytest.mark.parametrize("steps", [1, 2, 7, 540, 20_000])
def test_scaled_schedules_stay_positive(steps):
    config = scaled(TrainConfig(), steps)
    assert all(learning_rate(config, step) >= 0 for step in range(steps))


def test_quick_recipe_writes_a_loadable_model_and_its_page(tmp_path):
    threads = torch.get_num_threads()
    recipe.main(["--quick", "--stage", "model", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")])
    torch.set_num_threads(threads)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", local_files_only=True)
    assert loaded.config.n_layer == 1
    record = json.loads((tmp_path / "out" / "model" / recipe.MEASUREMENTS).read_text())
    assert record["training"]["steps"] == 4
    assert "held-out cities" in (tmp_path / "out" / "pocket.md").read_text()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_quick_recipe_trains_every_kind_in_its_stages(tmp_path):
    results = train_all(MODEL_DIR, tmp_path / "out", tmp_path / "work", quick=True, progress=False)
    assert [(kind.name, len(kind.stages)) for kind in results] == [("clt", 1), ("plt", 2), ("sae", 1)]
    written = {kind.name: load_dictionaries(tmp_path / "out" / kind.name).provenance.config for kind in results}
    assert written["plt"]["refined"]["mirror"] == written["clt"]["refined"]["mirror"] == MIRRORED
    assert "start" in written["plt"]
    assert "refined" not in written["sae"]
    again = train_all(MODEL_DIR, tmp_path / "again", tmp_path / "work", quick=True, progress=False)
    assert [kind.evaluation.fvu for kind in again] == [kind.evaluation.fvu for kind in results]
    write_section(tmp_path / "pocket.md", results)
    assert (tmp_path / "pocket.md").read_text().count("M tokens") == 3


def test_the_embedded_model_is_small_float32_gpt2(model):
    assert model.config.model_type == "gpt2"
    assert model.config.n_positions == 512
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert (MODEL_DIR / "model.safetensors").stat().st_size < 12e6


def test_demonstration(model, tokenizer):
    logits = measure.final_logits(model, tokenizer, [DEMONSTRATION])[0]
    assert tokenizer.decode([int(logits.argmax())]) == " Mary"


def test_the_embedded_model_meets_its_promises(model, tokenizer):
    behaviours = measure.measure(model, tokenizer, n=200, seed=1)
    assert behaviours.shortfalls() == []
    recorded = json.loads((MODEL_DIR / recipe.MEASUREMENTS).read_text())["behaviours"]
    assert behaviours.two_hop_held_out == pytest.approx(recorded["two_hop_held_out"], abs=0.03)


def test_a_word_of_several_tokens_is_named_in_the_error(tokenizer):
    with pytest.raises(ValueError, match="antidisestablishment"):
        measure.single_ids(tokenizer, [" antidisestablishment"])
