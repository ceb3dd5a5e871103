"""Gemma Scope 1 and 2, written here by their published layouts, against the definition in dense float64."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from circuitsae.attribution import LogitTargets, attribute
from circuitsae.graph import NodeKind
from circuitsae.replacement import ReplacementModel
from transcoders import load_dictionaries, random_dictionaries, save_dictionaries
from transcoders.dictionaries import CrossLayerTranscoder, MappedDictionaries, SAESet, TranscoderSet
from transcoders.errors import DictionaryError, FileFormatError, InputError
from transcoders.formats import list_dictionaries
from transcoders.random_models import random_model

D, N = 8, 16


def draw(seed, *shape, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def arrays(seed, d=D, n=N):
    return {
        "W_enc": draw(seed, d, n, scale=d**-0.5),
        "W_dec": draw(seed + 1, n, d),
        "b_enc": draw(seed + 2, n, scale=0.3),
        "b_dec": draw(seed + 3, d),
        "threshold": np.abs(draw(seed + 4, n, scale=0.4)),
    }


def npz(root, place, seed=0, **options):
    (root / place).mkdir(parents=True)
    np.savez(root / place / "params.npz", **(found := arrays(seed, **options)))
    return found


def oracle(stored, x):
    """Features and reconstruction in float64."""
    w = {name.replace("w_", "W_"): torch.as_tensor(value).double() for name, value in stored.items()}
    h = x @ w["W_enc"] + w["b_enc"]
    a = torch.relu(h) * (h > w["threshold"])
    skip = x @ w["affine_skip_connection"] if "affine_skip_connection" in w else 0
    return a, a @ w["W_dec"] + w["b_dec"] + skip


def inputs(d=D):
    return torch.as_tensor(draw(99, 6, d)).double()


def assert_is(dictionary, stored, x=None):
    x = inputs(dictionary.d_in) if x is None else x
    a, y = oracle(stored, x)
    assert 0.05 < (a > 0).double().mean() < 0.95
    torch.testing.assert_close(dictionary.encode(x), a, atol=1e-12, rtol=0)
    torch.testing.assert_close(dictionary(x), y, atol=1e-12, rtol=0)


def load(path, **choice):
    return load_dictionaries(path, dtype=torch.float64, **choice)


# Gemma Scope


@pytest.mark.parametrize(
    ("place", "read", "write", "model"),
    [
        ("gemma-scope-2b-pt-res", "resid_post", "resid_post", "google/gemma-2-2b"),
        ("gemma-scope-9b-it-res", "resid_post", "resid_post", "google/gemma-2-9b-it"),
        ("gemma-scope-9b-pt-mlp", "mlp_added", "mlp_added", "google/gemma-2-9b"),
        ("gemma-scope-2b-pt-att", "attn_z", "attn_z", "google/gemma-2-2b"),
        ("gemma-scope-2b-pt-transcoders", "mlp_normed", "mlp_added", "google/gemma-2-2b"),
        ("transcoders", "mlp_normed", "mlp_added", "unknown"),
    ],
)
def test_the_repository_says_where_they_read(tmp_path, place, read, write, model):
    stored = npz(tmp_path, f"{place}/layer_1/width_16k/average_l0_72")
    loaded = load(tmp_path / place)
    assert isinstance(loaded, TranscoderSet if read != write else SAESet)
    assert (str(loaded.reads[1]), str(loaded.writes[1])) == (f"1.{read}", f"1.{write}")
    assert loaded.provenance.model == model
    assert loaded.provenance.bos is (True if model != "unknown" else None)
    assert [loaded.n_features(layer) for layer in (0, 1)] == [0, N]
    assert_is(loaded[1], stored)


def tree(root):
    """Two layers, two widths, and L0s of each."""
    found = {}
    for layer in (0, 1):
        for width, l0s in (("16k", (20, 72)), ("65k", (40, 141))):
            for l0 in l0s:
                place = f"layer_{layer}/width_{width}/average_l0_{l0}"
                found[layer, width, l0] = npz(root, place, seed=layer * 1000 + l0)
    return found


def test_a_tree_is_listed_without_its_weights_and_chosen_from(tmp_path):
    root = tmp_path / "gemma-scope-2b-pt-res"
    stored = tree(root)
    for path in root.rglob("layer_0/width_65k/*/params.npz"):
        path.write_bytes(b"")  # whatever it holds
    name, offers = list_dictionaries(root)
    assert (name, len(offers)) == ("gemma-scope", 8)
    assert {(o.layer, o.width, o.l0, o.site, o.kind) for o in offers} == {
        (layer, {"16k": 16384, "65k": 65536}[width], l0, "resid_post", "sae") for layer, width, l0 in stored
    }
    loaded = load(root, width="16k", l0=60)
    for layer in (0, 1):
        assert_is(loaded[layer], stored[layer, "16k", 72])
    assert_is(load(root, layers=1, width=65536, l0=1)[1], stored[1, "65k", 40])
    assert_is(load(root, sae_id="layer_1/width_16k/average_l0_20")[1], stored[1, "16k", 20])
    assert_is(load(root / "layer_1/width_16k", l0=20)[1], stored[1, "16k", 20])
    assert_is(load(root / "layer_1/width_16k/average_l0_20/params.npz")[1], stored[1, "16k", 20])
    with pytest.raises(InputError, match=r"more than one width \(16k, 65k\); say which with width"):
        load(root)
    with pytest.raises(InputError, match=r"of layer 0, of L0 20, 72; say which with l0"):
        load(root, width="16k")


def test_a_file_that_nothing_names_is_asked_about(tmp_path):
    stored = npz(tmp_path, "download")
    with pytest.raises(InputError, match=r"which site it reads; say it with site"):
        load(tmp_path / "download")
    with pytest.raises(InputError, match=r"which layer it reads; say it with layers"):
        load(tmp_path / "download" / "params.npz", site="resid_post")
    with pytest.raises(InputError, match="Unknown site 'stream'"):
        load(tmp_path / "download", site="stream", layers=2)
    loaded = load(tmp_path / "download", site="mlp_normed", layers=2)
    assert (str(loaded.reads[2]), str(loaded.writes[2])) == ("2.mlp_normed", "2.mlp_added")
    assert_is(loaded[2], stored)


def test_an_embedding_is_read_in_the_units_of_the_stream(tmp_path):
    root = tmp_path / "gemma-scope-2b-pt-res"
    stored = npz(root, "embedding/width_4k/average_l0_21")
    loaded = load(root)
    embedded = inputs()
    a, y = oracle(stored, embedded)
    stream = embedded * D**0.5  # what Gemma makes of a row of its embedding matrix
    assert str(loaded.reads[0]) == "0.resid_pre"
    torch.testing.assert_close(loaded[0].encode(stream), a, atol=1e-12, rtol=0)
    torch.testing.assert_close(loaded[0](stream), y * D**0.5, atol=1e-12, rtol=0)


def test_canonical_is_the_one_with_an_l0_near_100(tmp_path):
    root = tmp_path / "gemma-scope-2b-pt-mlp"
    npz(root, "layer_0/width_16k/average_l0_28", seed=1)
    stored = npz(root, "layer_0/width_16k/canonical", seed=2)
    assert_is(load(root, l0=100)[0], stored)
    assert_is(load(root, sae_id="layer_0/width_16k/canonical")[0], stored)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub on a machine without a network: `hub(repository)` is where its files lie."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def repository(name):
        home = tmp_path / f"models--{name.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("0123abcd")
        return home / "snapshots" / "0123abcd"

    return repository


def test_the_hub_s_repository_is_read_by_its_name(hub):
    stored = tree(hub("google/gemma-scope-9b-pt-att"))
    loaded = load("google/gemma-scope-9b-pt-att", layers=[1], width="65k", l0=150)
    assert_is(loaded[1], stored[1, "65k", 141])
    assert (loaded.provenance.model, str(loaded.reads[1])) == ("google/gemma-2-9b", "1.attn_z")
    loaded = load("google/gemma-scope-9b-pt-att/layer_0/width_16k/average_l0_20/params.npz")
    assert_is(loaded[0], stored[0, "16k", 20])


def test_a_scaling_factor_must_be_one(tmp_path):
    place = tmp_path / "res/layer_0/width_16k/average_l0_9"
    stored = npz(tmp_path, "res/layer_0/width_16k/average_l0_9")
    np.savez(place / "params.npz", **stored, scaling_factor=np.ones(N, np.float32))
    assert_is(load(tmp_path)[0], stored)
    np.savez(place / "params.npz", **stored, scaling_factor=np.full(N, 2, np.float32))
    with pytest.raises(FileFormatError, match="scaling_factor beside 1"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("threshold"), "lacks threshold"),
        (lambda a: a.update(W_dec=a["W_dec"][:, :-1]), r"W_dec \[16, 7\]"),
        (lambda a: a.update(b_enc=a["b_enc"][None]), "b_enc"),
        (lambda a: a.update(b_enc=np.full(N, np.nan, np.float32)), "not a finite number"),
        (lambda a: a.update(W_enc=a["W_enc"].astype(np.int32)), "floating-point"),
        (lambda a: a.update(W_enc=a["W_enc"].astype(object)), "Cannot read"),
        (lambda a: a.update(W_enc=a["W_enc"].astype(complex)), "Cannot read"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, change, message):
    place = tmp_path / "res/layer_0/width_16k/average_l0_9"
    stored = npz(tmp_path, "res/layer_0/width_16k/average_l0_9")
    change(stored)
    np.savez(place / "params.npz", **stored)
    with pytest.raises(FileFormatError, match=message) as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


# Gemma Scope 2

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


def test_a_layer_that_no_model_has_is_refused(tmp_path):
    npz(tmp_path, "res/layer_99999/width_16k/average_l0_9")
    with pytest.raises(FileFormatError, match="layer 99999, but no model has 1000 layers"):
        load(tmp_path)


# attribution


def model_of(n_layers=2):
    return random_model("gemma3", n_layers=n_layers, d_model=16, n_heads=4, d_vocab=64, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["transcoders", "clt", "gemma-scope"])
def test_edges_add_up_to_what_is_read(tmp_path, kind):
    if kind == "clt":
        place = tmp_path / "clt/width_1k_l0_big_affine"
        place.mkdir(parents=True)
        for layer in (0, 1):
            weights = tensors(layer * 10, True, d=16) | {"w_dec": torch.as_tensor(draw(layer, N, 2, 16, scale=0.2))}
            save_file(weights, place / f"params_layer_{layer}.safetensors")
    elif kind == "transcoders":
        for layer in (0, 1):
            folder(tmp_path, f"transcoder_all/layer_{layer}_width_16k_l0_big", tensors(layer * 10, True, d=16))
    else:
        for layer in (0, 1):
            npz(tmp_path, f"transcoders/layer_{layer}/width_16k/average_l0_{layer + 5}", layer * 10, d=16)
    model = ReplacementModel(model_of(), load(tmp_path))
    graph = attribute(model, torch.tensor([0, 11, 22, 33, 11]), targets=LogitTargets([3, 5]))
    assert sum(node.kind is NodeKind.FEATURE for node in graph.nodes) > 5
    assert abs(graph.residual()).max() < 1e-9


# writing


def assert_same(loaded, original):
    d = original.d_model
    reads = torch.as_tensor(draw(5, original.n_layers, 6, d))
    assert (loaded.kind, loaded.reads, loaded.writes) == (original.kind, original.reads, original.writes)
    found, expected = loaded.encode(reads), original.encode(reads)
    assert torch.equal(found.index, expected.index)
    torch.testing.assert_close(found.value, expected.value, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        loaded.reconstruct(found, reads), original.reconstruct(expected, reads), atol=1e-5, rtol=1e-5
    )


def build(**case):
    return random_dictionaries(**case, n_layers=3, d_model=D, features=N, k=5, seed=7).requires_grad_(False)


@pytest.mark.parametrize("name", ["gemma-scope", "gemma-scope-2"])
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize("centred", [True, False])
def test_autoencoders_come_back(tmp_path, name, activation, centred):
    original = build(kind="sae", activation=activation, centred=centred)
    save_dictionaries(original, tmp_path, format=name)
    assert_same(load_dictionaries(tmp_path), original)


@pytest.mark.parametrize("kind", ["plt", "clt"])
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize("skip", [True, False])
def test_transcoders_come_back_from_gemma_scope_2(tmp_path, kind, activation, skip):
    original = build(kind=kind, activation=activation, skip=skip)
    save_dictionaries(original, tmp_path, format="gemma-scope-2")
    assert_same(load_dictionaries(tmp_path), original)
    assert_same(load_dictionaries(tmp_path, decoders="mapped"), original)


def test_published_dictionaries_come_back(tmp_path):
    for layer in (0, 2):
        npz(tmp_path / "a", f"transcoders/layer_{layer}/width_16k/average_l0_9", seed=layer)
    original = load_dictionaries(tmp_path / "a")
    save_dictionaries(original, tmp_path / "b", format="gemma-scope")
    assert [path.name for path in sorted((tmp_path / "b/transcoders").iterdir())] == ["layer_0", "layer_2"]
    assert_same(load_dictionaries(tmp_path / "b"), original)


def test_a_second_set_takes_the_place_of_the_first(tmp_path):
    for name in ("gemma-scope", "gemma-scope-2"):
        place = tmp_path / name
        save_dictionaries(build(kind="sae"), place, format=name)
        smaller = random_dictionaries("sae", n_layers=2, d_model=D, features=24, seed=3).requires_grad_(False)
        save_dictionaries(smaller, place, format=name)
        assert_same(load_dictionaries(place), smaller)


def test_matrices_are_stored_as_asked_for(tmp_path):
    original = build(kind="sae", activation="jumprelu")
    for name in ("gemma-scope", "gemma-scope-2"):
        save_dictionaries(original, tmp_path / name, format=name, storage_dtype=torch.float16)
        loaded = load_dictionaries(tmp_path / name)
        assert torch.equal(loaded[1].activation.threshold, original[1].activation.threshold)
        torch.testing.assert_close(loaded[1].W_dec, original[1].W_dec, atol=1e-3, rtol=1e-3)
    with pytest.raises(DictionaryError, match="NumPy's files hold no torch.bfloat16"):
        save_dictionaries(original, tmp_path / "c", format="gemma-scope", storage_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "case", "message"),
    [
        ("gemma-scope", {"kind": "sae", "activation": "topk"}, "not TopK"),
        ("gemma-scope", {"kind": "plt"}, "no place for dictionaries that read mlp_in"),
        ("gemma-scope", {"kind": "clt"}, "not 'clt' dictionaries"),
        ("gemma-scope-2", {"kind": "plt", "activation": "topk"}, "not TopK"),
        ("gemma-scope-2", {"kind": "clt", "activation": "topk"}, "not TopK"),
    ],
)
def test_what_they_cannot_hold_is_refused(tmp_path, name, case, message):
    with pytest.raises(DictionaryError, match=message):
        save_dictionaries(build(**case), tmp_path / "out", format=name)
    assert not (tmp_path / "out").exists()
