"""Gemma Scope's files, written here by their published layout, against the definition in dense float64."""

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.contracts.formats.dense import assert_attributes, assert_golden, assert_maps, golden, load64
from tests.contracts.formats.gemma import D, N, assert_is, assert_same, build, inputs, load, npz, oracle
from transcoders import load_dictionaries, random_dictionaries, save_dictionaries
from transcoders.dictionaries import SAESet, TranscoderSet
from transcoders.errors import DictionaryError, FileFormatError, InputError
from transcoders.formats import list_dictionaries


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


def test_a_layer_that_no_model_has_is_refused(tmp_path):
    npz(tmp_path, "res/layer_99999/width_16k/average_l0_9")
    with pytest.raises(FileFormatError, match="layer 99999, but no model has 1000 layers"):
        load(tmp_path)


# attribution


def test_edges_add_up_to_what_is_read(tmp_path):
    for layer in (0, 1):
        npz(tmp_path, f"transcoders/layer_{layer}/width_16k/average_l0_{layer + 5}", layer * 10, d=16)
    assert_attributes(load(tmp_path), "gemma2")


# the peer itself


@pytest.mark.parametrize("variant", golden("gemma_scope", "one_*"), ids=lambda path: path.name)
def test_files_that_saelens_reads(variant):
    folder = next((variant / "files").glob("*/*"))
    if "embedding" not in variant.name:
        assert_golden(variant, folder)
        return
    truth, loaded = load_file(variant / "truth.safetensors"), load64(folder)
    # SAELens leaves b_dec in the units of the embedding matrix.
    assert isinstance(loaded, SAESet)
    left = loaded[0].b_dec * (1 - loaded.d_model**-0.5)
    assert_maps(loaded[0], truth, truth["decoded"].double() + left)


# writing


def test_published_dictionaries_come_back(tmp_path):
    for layer in (0, 2):
        npz(tmp_path / "a", f"transcoders/layer_{layer}/width_16k/average_l0_9", seed=layer)
    original = load_dictionaries(tmp_path / "a")
    save_dictionaries(original, tmp_path / "b", format="gemma-scope")
    assert [path.name for path in sorted((tmp_path / "b/transcoders").iterdir())] == ["layer_0", "layer_2"]
    assert_same(load_dictionaries(tmp_path / "b"), original)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize("centred", [True, False])
def test_autoencoders_come_back(tmp_path, activation, centred):
    original = build(kind="sae", activation=activation, centred=centred)
    save_dictionaries(original, tmp_path, format="gemma-scope")
    assert_same(load_dictionaries(tmp_path), original)


def test_a_second_set_takes_the_place_of_the_first(tmp_path):
    save_dictionaries(build(kind="sae"), tmp_path, format="gemma-scope")
    smaller = random_dictionaries("sae", n_layers=2, d_model=D, features=24, seed=3).requires_grad_(False)
    save_dictionaries(smaller, tmp_path, format="gemma-scope")
    assert_same(load_dictionaries(tmp_path), smaller)


def test_matrices_are_stored_as_asked_for(tmp_path):
    original: Any = build(kind="sae", activation="jumprelu")
    save_dictionaries(original, tmp_path / "half", format="gemma-scope", storage_dtype=torch.float16)
    loaded: Any = load_dictionaries(tmp_path / "half")
    assert torch.equal(loaded[1].activation.threshold, original[1].activation.threshold)
    torch.testing.assert_close(loaded[1].W_dec, original[1].W_dec, atol=1e-3, rtol=1e-3)
    with pytest.raises(DictionaryError, match=r"NumPy's files hold no torch\.bfloat16"):
        save_dictionaries(original, tmp_path / "out", format="gemma-scope", storage_dtype=torch.bfloat16)
    assert not (tmp_path / "out").exists()


def test_arrays_that_are_larger_than_their_file_are_refused(tmp_path):
    stored = npz(tmp_path, "res/layer_0/width_16k/average_l0_9", d=32, n=64)
    path = tmp_path / "res/layer_0/width_16k/average_l0_9/params.npz"
    np.savez_compressed(path, **stored)
    assert_is(load(tmp_path)[0], stored)
    nothing: Any = {name: np.zeros_like(stored[name]) for name in ("W_enc", "W_dec")}
    np.savez_compressed(path, **(stored | nothing))
    with pytest.raises(FileFormatError, match=r"claims tensors of [\d,]+ bytes"):
        load(tmp_path)
