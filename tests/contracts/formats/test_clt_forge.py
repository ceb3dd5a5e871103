"""CLT-Forge's checkpoints, written here by their published layout, against its definition in dense float64."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.contracts.formats.dense import (
    Draw,
    assert_attributes,
    assert_equal,
    assert_golden,
    assert_is,
    golden,
    inputs,
    load64,
)
from transcoders import random_dictionaries, save_dictionaries
from transcoders.dictionaries import CrossLayerTranscoder, TranscoderSet
from transcoders.errors import DictionaryError, FileFormatError
from transcoders.formats import list_dictionaries

D, N, L = 8, 12, 3
PAIRS = [(source, target) for source in range(L) for target in range(source, L)]


def write(root, *, cross=True, shards=1, model="gpt2", settings=None, **tensors):
    draw, n = Draw(1), len(PAIRS) if cross else L
    stored = {
        "W_enc": draw(L, D, N, scale=D**-0.5),
        "b_enc": draw(L, N, scale=0.3),
        "log_threshold": draw(L, N, scale=0.5) - 1.5,
        "W_dec": draw(n, N, D, scale=N**-0.5),
        "b_dec": draw(n, D, scale=0.3),
        "estimated_norm_scaling_factor_in": 1 + draw(L).abs(),
        "estimated_norm_scaling_factor_out": 1 + draw(L).abs(),
        "feature_count": torch.zeros(L, N, dtype=torch.long),
    } | tensors
    root.mkdir(parents=True, exist_ok=True)
    (root / "clt_cfg.json").write_text(
        json.dumps(
            {"d_in": D, "d_latent": N, "n_layers": L, "cross_layer_decoders": cross, "model_name": model}
            | {"feature_sharding": shards > 1, "dtype": "bfloat16", "jumprelu_bandwidth": 1.0}
            | (settings or {})
        )
    )
    axes = {"W_enc": 2, "b_enc": 1, "log_threshold": 1, "W_dec": 1, "feature_count": 1}
    for rank in range(shards):
        cut = {name: t.chunk(shards, axes[name])[rank] if name in axes else t for name, t in stored.items()}
        path = root / (f"rank{rank}_clt_weights.safetensors" if shards > 1 else "clt_weights.safetensors")
        save_file({name: t.clone().contiguous() for name, t in cut.items()}, path)
    return {name: t.double() for name, t in stored.items()} | {"cross": cross}


def assert_are(loaded, stored):
    reads = inputs(L, D)
    into, out = (stored[f"estimated_norm_scaling_factor_{side}"] for side in ("in", "out"))
    encoded, decoded = [], [torch.zeros(reads.shape[1], D).double() for _ in range(L)]
    for layer in range(L):
        h = reads[layer] * into[layer] @ stored["W_enc"][layer] + stored["b_enc"][layer]
        encoded.append(h * (h > stored["log_threshold"][layer].exp()))
    for number, (source, target) in enumerate(PAIRS if stored["cross"] else [(i, i) for i in range(L)]):
        decoded[target] += encoded[source] @ stored["W_dec"][number] + stored["b_dec"][number]
    assert_is(loaded, reads, encoded, [y / scale for y, scale in zip(decoded, out, strict=True)])


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("cross", [True, False])
def test_both_kinds_whole_and_in_shards(tmp_path, cross, shards):
    stored = write(tmp_path / "a", cross=cross, shards=shards)
    loaded = load64(tmp_path / "a")
    assert isinstance(loaded, CrossLayerTranscoder if cross else TranscoderSet)
    assert_are(loaded, stored)
    assert (loaded.provenance.model, loaded.provenance.bos) == ("gpt2", True)
    save_dictionaries(loaded, tmp_path / "b", format="clt-forge")
    assert_equal(load64(tmp_path / "b"), loaded)


@pytest.mark.parametrize(
    ("model", "read", "written", "family"),
    [
        ("gpt2", "mlp_in", "mlp_out", "gpt2"),
        ("meta-llama/Llama-3.2-1B", "mlp_normed", "mlp_out", "llama"),
        ("google/gemma-2-2b", "mlp_normed", "mlp_added", "gemma2"),
    ],
)
@pytest.mark.parametrize("cross", [True, False])
def test_transformer_lens_calls_the_hook_after_the_weights_of_a_layer_norm_only(
    tmp_path, cross, model, read, written, family
):
    stored = write(tmp_path, model=model, cross=cross)
    loaded = load64(tmp_path)
    assert (loaded.reads[1].kind, loaded.writes[1].kind) == (read, written)
    assert_are(loaded, stored)
    assert_attributes(loaded, family)


def test_from_the_hub(hub):
    stored = write(hub("org/clt"), shards=2)
    assert_are(load64("org/clt"), stored)
    name, (offer,) = list_dictionaries("org/clt")
    assert name == "clt-forge"
    assert (offer.kind, offer.site, offer.width, len(offer.files)) == ("clt", "mlp_in", N, 3)


@pytest.mark.parametrize("variant", golden("clt_forge"), ids=lambda path: path.name)
def test_files_of_clt_forge_itself(variant):
    assert_golden(variant)


@pytest.mark.parametrize("kind", ["clt", "plt"])
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_what_it_writes(tmp_path, kind, activation):
    made = random_dictionaries(kind, activation=activation, n_layers=L, d_model=D, features=N, dtype=torch.float64)
    write(tmp_path, shards=2)
    save_dictionaries(made, tmp_path, format="clt-forge")
    assert not list(tmp_path.glob("rank*"))
    stored = load_file(tmp_path / "clt_weights.safetensors")
    mask = {"layer_mask"} if kind == "clt" else set()
    assert set(stored) == mask | {
        "W_enc", "b_enc", "W_dec", "b_dec", "log_threshold", "feature_count", "estimated_norm_scaling_factor_in",
        "estimated_norm_scaling_factor_out",
    }  # fmt: skip
    if mask:
        assert stored["layer_mask"].tolist() == [[float(source == i) for source, _ in PAIRS] for i in range(L)]
    assert all(bool(tensor.isfinite().all()) for tensor in stored.values())
    assert_equal(load64(tmp_path), made)
    settings = json.loads((tmp_path / "clt_cfg.json").read_text())
    required = {
        "device", "dtype", "seed", "model_name", "d_in", "d_latent", "n_layers", "jumprelu_bandwidth",
        "jumprelu_init_threshold", "normalize_decoder", "dead_feature_window", "cross_layer_decoders", "context_size",
        "l0_coefficient",
    }  # fmt: skip
    assert required <= set(settings)
    assert settings["dtype"] == "float64"


def test_half_precision_is_of_matrices(tmp_path):
    save_dictionaries(random_dictionaries("clt"), tmp_path, format="clt-forge", storage_dtype="float16")
    stored = load_file(tmp_path / "clt_weights.safetensors")
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.float16} == {"W_enc", "W_dec"}
    assert json.loads((tmp_path / "clt_cfg.json").read_text())["dtype"] == "float16"


def test_other_sites_are_refused(tmp_path):
    write(tmp_path, model="meta-llama/Llama-3.2-1B")
    loaded = load64(tmp_path)
    loaded.provenance = random_dictionaries("clt").provenance
    with pytest.raises(DictionaryError, match="read mlp_in and write mlp_out in random, not ones that read mlp_normed"):
        save_dictionaries(loaded, tmp_path / "b", format="clt-forge")


def test_a_threshold_beyond_all_measure_is_one(tmp_path):
    stored = write(tmp_path, log_threshold=torch.full((L, N), -1.0).index_fill(1, torch.tensor([0]), 1e6))
    loaded = load64(tmp_path)
    assert isinstance(loaded, CrossLayerTranscoder)
    assert_are(loaded, stored)
    assert all(bool(value.isfinite().all()) for value in loaded.state_dict().values())


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({"n_layers": 4}, {}, r"W_enc \[3, 8, 12\]"),
        ({"n_layers": 10**9}, {}, "n_layers"),
        ({"d_latent": 13}, {}, "hold 12 features; expected 13"),
        ({"cross_layer_decoders": None}, {}, "cross_layer_decoders"),
        ({"feature_sharding": True}, {}, r"ranks \[\]; expected all from 0"),
        ({}, {"estimated_norm_scaling_factor_out": torch.zeros(L)}, "factor_out that is not positive"),
        ({}, {"b_dec": torch.zeros(L, D)}, r"b_dec \[3, 8\]"),
        ({}, {"W_enc": torch.ones(L, D, N).long()}, "W_enc in torch.int64"),
        ({}, {"log_threshold": torch.full((L, N), torch.inf)}, "not a finite number"),
    ],
)
def test_wrong_files_are_refused_in_a_sentence(tmp_path, settings, tensors, message):
    write(tmp_path, settings=settings, **tensors)
    with pytest.raises(FileFormatError, match=message) as raised:
        load64(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_rank_that_is_missing_is_named(tmp_path):
    write(tmp_path, shards=3)
    (tmp_path / "rank1_clt_weights.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"ranks \[0, 2\]"):
        load64(tmp_path)
