"""Gemma Scope 2's files, written here by their published layout, against the definition in dense float64."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.contracts.formats.dense import assert_attributes, assert_golden, golden
from tests.contracts.formats.gemma import D, N, arrays, assert_is, assert_same, build, draw, inputs, load, oracle
from transcoders import load_dictionaries, random_dictionaries, save_dictionaries
from transcoders.dictionaries import CrossLayerTranscoder, MappedDictionaries
from transcoders.errors import DictionaryError, FileFormatError, InputError
from transcoders.formats import list_dictionaries

HOOKS = {
    "resid_post": ("output",) * 2,
    "attn_out": ("self_attn.o_proj.input",) * 2,
    "mlp_out": ("post_feedforward_layernorm.output",) * 2,
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}
SITES = {
    "resid_post": ("resid_post", "resid_post"),
    "attn_out": ("attn_z", "attn_z"),
    "mlp_out": ("mlp_added", "mlp_added"),
    "transcoder": ("mlp_in", "mlp_added"),
}


def tensors(seed, affine=False, d=D, n=N):
    found = {name.replace("W_", "w_"): torch.as_tensor(value) for name, value in arrays(seed, d, n).items()}
    return found | ({"affine_skip_connection": torch.as_tensor(draw(seed + 5, d, d))} if affine else {})


def settings(site, layer, **changes):
    hooks = {
        f"hf_hook_point_{side}": f"model.layers.{layer}.{hook}"
        for side, hook in zip(("in", "out"), HOOKS[site], strict=True)
    }
    record = {"model_name": "google/gemma-3-270m-pt", "architecture": "jump_relu", "width": N, "l0": 20, **hooks}
    return record | {"affine_connection": False, "type": "sae"} | changes


def folder(root, place, stored, config=None):
    (root / place).mkdir(parents=True)
    save_file(stored, root / place / "params.safetensors")
    if config is not None:
        (root / place / "config.json").write_text(json.dumps(config))
    return stored


@pytest.mark.parametrize("with_settings", [True, False])
@pytest.mark.parametrize("site", HOOKS)
def test_the_folder_and_the_settings_say_where_they_read(tmp_path, site, with_settings):
    affine = site == "transcoder"
    place = f"gemma-scope-2-270m-pt/{site}_all/layer_1_width_16k_l0_small" + "_affine" * affine
    config = settings(site, 1, affine_connection=affine) if with_settings else None
    stored = folder(tmp_path, place, tensors(3, affine), config)
    for path in (tmp_path / place.split("/")[0], tmp_path / place):
        loaded = load(path)
        assert (str(loaded.reads[1]), str(loaded.writes[1])) == tuple(f"1.{kind}" for kind in SITES[site])
        assert (loaded.provenance.model, loaded.provenance.bos) == ("google/gemma-3-270m", True)
        assert_is(loaded[1], stored)
    assert_is(load(tmp_path / place / "params.safetensors")[1], stored)


def test_a_folder_by_another_name_is_told_by_its_settings(tmp_path):
    stored = folder(tmp_path, "mine", tensors(4), settings("mlp_out", 2))
    for path in (tmp_path / "mine", tmp_path / "mine/params.safetensors"):
        assert str(load(path).reads[2]) == "2.mlp_added"
        assert_is(load(path)[2], stored)
    (tmp_path / "mine/config.json").unlink()
    with pytest.raises(InputError, match="say it with site"):
        load(tmp_path / "mine")
    assert_is(load(tmp_path / "mine", site="resid_post", layers=5)[5], stored)


def test_what_is_chosen_from_a_repository(hub):
    root = hub("google/gemma-scope-2-1b-it")
    stored = {}
    for layer in (0, 1):
        for place in (
            "resid_post_all/layer_{}_width_16k_l0_small", "resid_post_all/layer_{}_width_262k_l0_small",
            "resid_post/layer_{}_width_16k_l0_medium_seed_1", "transcoder_all/layer_{}_width_16k_l0_big",
            "transcoder_all/layer_{}_width_16k_l0_big_affine",
        ):  # fmt: skip
            name = place.format(layer)
            stored[name] = folder(root, name, tensors(len(stored) * 10, "affine" in name))
    name, offers = list_dictionaries("google/gemma-scope-2-1b-it")
    assert name == "gemma-scope-2"
    assert {o.variant for o in offers} == {
        "resid_post_all/small", "resid_post/medium_seed_1", "transcoder_all/big", "transcoder_all/big_affine"
    }  # fmt: skip
    chosen = load("google/gemma-scope-2-1b-it", site="mlp_in", variant="transcoder_all/big_affine")
    for layer in (0, 1):
        assert_is(chosen[layer], stored[f"transcoder_all/layer_{layer}_width_16k_l0_big_affine"])
    assert (chosen.provenance.model, chosen.provenance.first) == ("google/gemma-3-1b-it", 4)
    chosen = load("google/gemma-scope-2-1b-it/resid_post_all", width="262k")
    assert_is(chosen[1], stored["resid_post_all/layer_1_width_262k_l0_small"])
    assert chosen.provenance.first == 1
    chosen = load("google/gemma-scope-2-1b-it/transcoder_all", variant="big", layers=1)
    assert_is(chosen[1], stored["transcoder_all/layer_1_width_16k_l0_big"])
    with pytest.raises(InputError, match=r"more than one kind \(plt, sae\)"):
        load("google/gemma-scope-2-1b-it")


def cross_layer(root, n_layers=3, affine=True, config=True):
    place = root / ("gemma-scope-2-270m-pt/clt/width_262k_l0_medium" + "_affine" * affine)
    place.mkdir(parents=True)
    stored = []
    for layer in range(n_layers):
        weights = tensors(layer * 10, affine)
        weights["w_dec"] = torch.as_tensor(draw(layer * 10 + 6, N, n_layers, D))
        save_file(weights, place / f"params_layer_{layer}.safetensors")
        stored.append(weights)
    if config:
        record = settings("transcoder", "{all}", type="clt", affine_connection=affine)
        (place / "config.json").write_text(json.dumps(record))
    return stored


def cross_layer_oracle(stored, x):
    w = [{name: value.double() for name, value in weights.items()} for weights in stored]
    a = []
    for layer, weights in enumerate(w):
        h = x[layer] @ weights["w_enc"] + weights["b_enc"]
        a.append(torch.relu(h) * (h > weights["threshold"]))
    y = []
    for target, weights in enumerate(w):
        written = sum(a[layer] @ w[layer]["w_dec"][:, target] for layer in range(target + 1)) + weights["b_dec"]
        y.append(written + x[target] @ weights["affine_skip_connection"])
    return torch.stack(a), torch.stack(y)


@pytest.mark.parametrize("decoders", ["memory", "mapped"])
@pytest.mark.parametrize("with_settings", [True, False])
def test_a_cross_layer_transcoder(tmp_path, with_settings, decoders):
    stored = cross_layer(tmp_path, config=with_settings)
    x = torch.as_tensor(draw(7, 3, 6, D)).double()
    a, y = cross_layer_oracle(stored, x)
    loaded = load(tmp_path / "gemma-scope-2-270m-pt", decoders=decoders)
    assert isinstance(loaded, MappedDictionaries if decoders == "mapped" else CrossLayerTranscoder)
    assert (str(loaded.reads[2]), str(loaded.writes[2])) == ("2.mlp_in", "2.mlp_added")
    assert loaded.provenance.model == "google/gemma-3-270m"
    features = loaded.encode(x)
    dense = torch.zeros(3, 6, N, dtype=torch.float64).index_put(tuple(features.index.T), features.value)
    torch.testing.assert_close(dense, a, atol=1e-12, rtol=0)
    torch.testing.assert_close(loaded.reconstruct(features, x), y, atol=1e-12, rtol=0)


def test_mapped_decoders_of_single_layers(tmp_path):
    stored = folder(tmp_path, "transcoder_all/layer_1_width_16k_l0_small", tensors(3))
    mapped = load(tmp_path, decoders="mapped")
    x = torch.stack([inputs(), inputs()])
    features = mapped.encode(x)
    torch.testing.assert_close(mapped.reconstruct(features, x)[1], oracle(stored, x[1])[1], atol=1e-12, rtol=0)
    assert mapped.n_features(0) == 0


def test_a_layer_that_is_missing_is_named(tmp_path):
    cross_layer(tmp_path)
    place = tmp_path / "gemma-scope-2-270m-pt/clt/width_262k_l0_medium_affine"
    (place / "params_layer_1.safetensors").unlink()
    with pytest.raises(FileFormatError, match="no params_layer_1"):
        load(tmp_path)


def test_a_crosscoder_is_refused_by_name(tmp_path):
    place = tmp_path / "crosscoder/layer_5_9_12_15_width_65k_l0_medium"
    place.mkdir(parents=True)
    save_file(tensors(1), place / "params_layer_0.safetensors")
    assert [offer.kind for offer in list_dictionaries(tmp_path)[1]] == ["crosscoder"]
    with pytest.raises(InputError, match="holds a crosscoder"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "topk"}, "architecture: 'jump_relu' was expected"),
        ({"hf_hook_point_in": "model.layers.1.mlp.gate_proj.output"}, "no place this package reads"),
        ({"hf_hook_point_in": 3}, "hf_hook_point_in"),
        ({"hf_hook_point_in": "model.layers.2.pre_feedforward_layernorm.output"}, r"folder of 1\.mlp_in.*2\.mlp_in"),
        ({"affine_connection": True}, "lacks affine_skip_connection"),
        ({"model_name": [1]}, "model_name"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, changes, message):
    folder(tmp_path, "transcoder_all/layer_1_width_16k_l0_small", tensors(3), settings("transcoder", 1, **changes))
    with pytest.raises(FileFormatError, match=message) as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


# attribution


@pytest.mark.parametrize("kind", ["transcoders", "clt"])
def test_edges_add_up_to_what_is_read(tmp_path, kind):
    for layer in (0, 1):
        weights = tensors(layer * 10, True, d=16)
        if kind == "transcoders":
            folder(tmp_path, f"transcoder_all/layer_{layer}_width_16k_l0_big_affine", weights)
        else:
            weights["w_dec"] = torch.as_tensor(draw(layer, N, 2, 16, scale=0.2))
            (tmp_path / "clt/width_1k_l0_big").mkdir(parents=True, exist_ok=True)
            save_file(weights, tmp_path / f"clt/width_1k_l0_big/params_layer_{layer}.safetensors")
    assert_attributes(load(tmp_path), "gemma3")


# the peer itself


@pytest.mark.parametrize("variant", golden("gemma_scope", "two_*"), ids=lambda path: path.name)
def test_files_that_saelens_reads(variant):
    assert_golden(variant, next((variant / "files").glob("*/*")))


# writing


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize(
    "case",
    [
        {"kind": "sae"}, {"kind": "sae", "centred": True}, {"kind": "plt"}, {"kind": "plt", "skip": True},
        {"kind": "clt"}, {"kind": "clt", "skip": True},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_saved_comes_back(tmp_path, case, activation):
    original = build(**case, activation=activation)
    save_dictionaries(original, tmp_path, format="gemma-scope-2")
    for decoders in ("memory", "mapped"):
        loaded = load_dictionaries(tmp_path, decoders=decoders)
        assert_same(loaded, original)
        assert loaded.provenance.model == "random"


def test_a_second_set_takes_the_place_of_the_first(tmp_path):
    save_dictionaries(build(kind="sae"), tmp_path, format="gemma-scope-2")
    smaller = random_dictionaries("clt", n_layers=2, d_model=D, features=24, seed=3).requires_grad_(False)
    save_dictionaries(smaller, tmp_path, format="gemma-scope-2")
    assert_same(load_dictionaries(tmp_path), smaller)


def test_matrices_are_stored_as_asked_for(tmp_path):
    original: Any = build(kind="clt", activation="jumprelu")
    save_dictionaries(original, tmp_path, format="gemma-scope-2", storage_dtype=torch.bfloat16)
    loaded: Any = load_dictionaries(tmp_path)
    assert torch.equal(loaded.activation.threshold, original.activation.threshold)
    torch.testing.assert_close(loaded.W_dec[1], original.W_dec[1], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", ["plt", "clt", "sae"])
def test_topk_is_refused(tmp_path, kind):
    with pytest.raises(DictionaryError, match="not TopK"):
        save_dictionaries(build(kind=kind, activation="topk"), tmp_path / "out", format="gemma-scope-2")
    assert not (tmp_path / "out").exists()
