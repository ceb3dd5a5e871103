"""Two processes train what one does: to rounding, in three ways of sharing the work."""

import re
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed_cases import (
    CASES,
    COMMON,
    D,
    first_part,
    killed_at,
    model_source,
    second_part,
    source_of,
    spoilt,
    stopped_at,
    trained,
    trained_on_store,
    trained_on_text,
)
from tests.ranks import on_ranks
from tests.small_stores import rows_of, small_model
from transcoders import write_activations
from transcoders.errors import FileFormatError, InputError
from transcoders.formats.files import read_tensors
from transcoders.formats.one_by_one import write_one_by_one
from transcoders.training import CLTConfig, SAEConfig, Trainer, TranscoderConfig
from transcoders.training.distributed import ALONE, World, device_of_rank
from transcoders.training.split import Split
from transcoders.training.stopping import StopRequest

WAYS = [(how, name) for how in ("data", "layers", "features") for name in CASES if (how, name[:3]) != ("layers", "clt")]


@pytest.fixture(scope="module")
def alone():
    return dict(zip(CASES, trained(ALONE, list(CASES.values())), strict=True))


@pytest.fixture(scope="module")
def together():
    first, second = on_ranks(trained, [replace(CASES[name], parallel=how) for how, name in WAYS])
    return dict(zip(WAYS, zip(first, second, strict=True), strict=True))


def close(found, expected, name):
    scale = max(1e-3, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize(("how", "name"), WAYS, ids=lambda x: x)
def test_two_ranks_come_to_what_a_single_process_does(alone, together, how, name):
    expected, (first, second) = alone[name], together[how, name]
    assert first["tensors"].keys() == expected["tensors"].keys()
    assert not second["tensors"]
    for key, tensor in expected["tensors"].items():
        close(first["tensors"][key], tensor, key)
    for each in (first, second):
        assert each["record"]["sparse"] == expected["record"]["sparse"]
        assert each["record"]["controller"] == pytest.approx(expected["record"]["controller"], rel=1e-5)
        for key, value in expected["metrics"].items():
            assert each["metrics"][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
        for key, tensor in expected["dictionaries"].items():
            close(each["dictionaries"][key], tensor, key)


TEXT = [
    TranscoderConfig(
        activation="batchtopk",
        parallel=how,
        outliers=2.2,
        skip=True,
        derivative=0.5,
        **{**COMMON, "context": 9, "tokens": 64 * 14},
    )
    for how in ("data", "layers", "features")
]


def test_rows_of_text_are_run_apart_and_batches_stay_what_they_are():
    source = model_source(TEXT[0])
    assert source.outliers(source.sites(TEXT[0])[1]).share > 0  # some tokens are left out
    (expected,) = trained_on_text(ALONE, TEXT[:1])
    for first, _ in zip(*on_ranks(trained_on_text, TEXT), strict=True):
        for key, tensor in expected["tensors"].items():
            close(first["tensors"][key], tensor, key)


def test_a_store_is_shared_as_text_is(tmp_path):
    write_activations(small_model(), rows_of(40), tmp_path, sites=("resid_post",), progress=False)
    configs = [
        SAEConfig(activation="topk", parallel=how, context=17, **{**COMMON, "tokens": 64 * 14})
        for how in ("data", "layers")
    ]
    (expected,) = trained_on_store(ALONE, configs[:1], tmp_path)
    for first in on_ranks(trained_on_store, configs, tmp_path)[0]:
        for key, tensor in expected["tensors"].items():
            close(first["tensors"][key], tensor, key)


def test_layers_and_features_are_held_by_one_rank_each(together):
    whole = together["data", "sae-gated"][0]["memory"]["trainee.W_enc"]
    assert [each["memory"]["trainee.W_enc"] for each in together["layers", "sae-gated"]] == [whole / 3, 2 * whole / 3]
    for how in ("features",):
        assert [each["memory"]["optimizer.W_enc.exp_avg"] for each in together[how, "sae-gated"]] == [whole / 2] * 2
        assert [each["memory"]["trainee.W_dec.0"] for each in together[how, "clt-jumprelu"]] == [24 * 3 * D * 4 / 2] * 2


@pytest.mark.parametrize(
    ("before", "after"), [("data", "features"), ("features", "alone"), ("alone", "layers"), ("layers", "data")]
)
def test_a_run_goes_on_among_other_ranks(tmp_path, alone, before, after):
    name = "plt-jumprelu"
    config = replace(CASES[name], checkpoint_every=5)

    def on(how, function, *more):
        if how == "alone":
            return function(ALONE, config, tmp_path, *more)
        return on_ranks(function, replace(config, parallel=how), tmp_path, *more)[0]

    on(before, first_part, 5)
    result = on(after, second_part)
    for key, tensor in alone[name]["tensors"].items():
        close(result["tensors"][key], tensor, key)
    loaded = load_file(tmp_path / "weights.safetensors")
    for key, tensor in result["dictionaries"].items():
        assert np.array_equal(loaded[key.removeprefix("dictionaries.")].numpy(), tensor), key


def test_ranks_that_share_features_read_factors_multiplied_out(tmp_path, alone):
    name = "clt-low-rank-topk"
    config = replace(CASES[name], parallel="features", checkpoint_every=4)
    on_ranks(first_part, config, tmp_path, 4)
    for each in on_ranks(second_part, config, tmp_path):
        for key, tensor in alone[name]["dictionaries"].items():
            np.testing.assert_allclose(each["dictionaries"][key], tensor, rtol=1e-3, atol=1e-4, err_msg=key)
        whole = alone[name]["memory"]
        assert each["memory"]["trainee.W_dec.0"] == whole["trainee.W_dec.0"] / 2
        assert each["memory"]["trainee.W_later.0"] == whole["trainee.W_later.0"]


@pytest.mark.parametrize("how", ["data", "features"])
def test_a_killed_rank_ends_the_run_and_both_go_on_to_the_very_weights(tmp_path, how):
    config = replace(CASES["clt-batchtopk-sparse"], parallel=how, checkpoint_every=3)
    (unbroken,) = on_ranks(trained, [config])[0]
    word, silence = on_ranks(killed_at, config, tmp_path, 4)
    assert silence is None
    assert re.match(r"Training stopped at step 4: Rank 0 of 2 no longer hears the others", word)
    assert f"The last good checkpoint is {tmp_path}/checkpoint-00000003, from which `resume`" in word
    resumed, _ = on_ranks(second_part, config, tmp_path)
    for key, tensor in unbroken["tensors"].items():
        assert np.array_equal(resumed["tensors"][key], tensor), key


def test_all_ranks_stop_where_one_is_asked_to(tmp_path, alone):
    name = "clt-batchtopk-sparse"
    config = replace(CASES[name], parallel="features")
    words = on_ranks(stopped_at, config, tmp_path, 3)
    assert all(re.match(r"143: Training stopped after step 4 of 8\. .*checkpoint-00000004", word) for word in words)
    for key, tensor in on_ranks(second_part, config, tmp_path)[0]["tensors"].items():
        close(tensor, alone[name]["tensors"][key], key)


def test_what_is_not_finite_on_one_rank_stops_all_at_one_step():
    config = replace(CASES["sae-topk-dense"], parallel="data", tokens=64 * 30)
    words = on_ranks(spoilt, config)
    assert all(re.search(r"step 1\d: the activations at 1.resid_post are not finite", word) for word in words)
    assert sum("row" in word for word in words) == 1


def test_sharing_that_cannot_be_is_refused():
    world = World(0, 5)
    with pytest.raises(InputError, match="5 ranks cannot share 24 features evenly"):
        Trainer(source_of(CASES["clt-jumprelu"]), [replace(CASES["clt-jumprelu"], parallel="features")], world=world)
    with pytest.raises(InputError, match="5 ranks cannot share 3 layers"):
        Trainer(source_of(CASES["sae-gated"]), [replace(CASES["sae-gated"], parallel="layers")], world=world)
    with pytest.raises(InputError, match="layers that know nothing of each other"):
        CLTConfig(parallel="layers")
    with pytest.raises(InputError, match="None of a batch's 2 tokens is with rank 0 of 5"):
        Split(world, "data").share_of(0, 2)


def test_a_process_of_torchrun_has_its_own_gpu(monkeypatch):
    assert device_of_rank("cuda:1") == "cuda:1"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (device_of_rank("cuda"), device_of_rank("cpu")) == ("cuda:1", "cpu")
    with pytest.raises(InputError, match="give the device 'cuda'; got 'cuda:1'"):
        device_of_rank("cuda:1")


def test_tensors_written_one_by_one_are_a_safetensors_file(tmp_path):
    tensors = {
        "b": torch.randn(3, 2),
        "n": torch.arange(5),
        "a": torch.randn(4, 3).T,
        "s": torch.tensor(2.5),
        "f": torch.ones(2, dtype=torch.bool),
        "h": torch.randn(3).bfloat16(),
        "e": torch.zeros(0, 4),
    }
    path = tmp_path / "x.safetensors"
    write_one_by_one(path, {name: t.to("meta") for name, t in tensors.items()}, iter(tensors.values()))
    for found in (load_file(path), read_tensors(path)[0]):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(FileFormatError, match="is damaged"):
        read_tensors(path)
    with pytest.raises(InputError, match=r"b was to be \[1\]"):
        write_one_by_one(tmp_path / "y", {"b": torch.empty(1)}, [tensors["b"]])
    assert not (tmp_path / "y").exists()


def test_a_signal_that_comes_while_the_ranks_agree_is_heard_at_the_next_step():
    request = StopRequest()

    class Late:
        size = 2

        def least(self, x):
            request.number = request.number or signal.SIGINT
            return x

    trainer = SimpleNamespace(split=SimpleNamespace(world=Late()))
    agreed = [Trainer._agreed(trainer, request) for _ in range(2)]  # pyright: ignore[reportArgumentType]
    assert agreed == [False, True]
    assert request.number is signal.SIGINT
