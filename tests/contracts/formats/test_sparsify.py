"""sparsify's folders, written here by their published layout, against the definition in dense float64."""

import json
from typing import Any

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
    golden_settings,
    inputs,
    load64,
)
from transcoders import load_dictionaries, random_dictionaries, save_dictionaries
from transcoders.dictionaries import SAE, GroupMax, ReLU, SAESet, TopK, Transcoder, TranscoderSet
from transcoders.errors import DictionaryError, FileFormatError, InputError
from transcoders.formats import list_dictionaries
from transcoders.sites import Site

D, N, K = 8, 16, 4


def write(folder, seed=0, *, settings=None, **tensors):
    """One coder's folder; `tensors` beside or in the place of the drawn ones."""
    draw = Draw(seed)
    settings = {"d_in": D, "num_latents": N, "k": K} | (settings or {})
    stored = {
        "encoder.weight": draw(N, D, scale=D**-0.5),
        "encoder.bias": draw(N, scale=0.3),
        "W_dec": draw(N, D, scale=N**-0.5),
        "b_dec": draw(D, scale=0.3),
    }
    if settings.get("skip_connection"):
        stored["W_skip"] = draw(D, D, scale=D**-0.5)
    stored |= tensors
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(settings))
    save_file({name: t.contiguous() for name, t in stored.items()}, folder / "sae.safetensors")
    return {name: t.double() for name, t in stored.items()} | {"settings": settings}


def oracle(coder, x):
    """Activations and reconstruction by sparsify's definition, in float64."""
    settings = coder["settings"]
    into, out = 1.0, 1.0
    if settings.get("normalize_io"):
        into, out = D**0.5 / coder["in_norm"], coder["out_norm"] / D**0.5
    read = x * into
    h = (read if settings.get("transcode") else read - coder["b_dec"]) @ coder["encoder.weight"].T + coder[
        "encoder.bias"
    ]
    h, a = torch.relu(h), torch.zeros(len(x), len(coder["encoder.bias"]), dtype=torch.float64)
    for row, (token, k) in enumerate((token, settings["k"]) for token in h):
        if settings.get("activation", "topk") == "topk":
            on = sorted(range(len(token)), key=lambda i: -token[i])[:k]
        else:
            size = len(token) // k
            on = [max(range(g * size, (g + 1) * size), key=lambda i: token[i]) for g in range(k)]
        a[row, on] = token[on]
    a = a + (a > 0) * coder.get("post_enc", 0.0)
    written = a * coder["post_enc_scale"] if settings.get("post_encoder_scale") else a
    y = written @ coder["W_dec"] + coder["b_dec"]
    return a, (y + read @ coder["W_skip"].T if "W_skip" in coder else y) * out


def assert_are(loaded, by_layer):
    reads = inputs(loaded.n_layers, D)
    truth = [oracle(by_layer[i], reads[i]) for i in range(loaded.n_layers)]
    assert_is(loaded, reads, [a for a, _ in truth], [y for _, y in truth])


@pytest.mark.parametrize("activation", [None, "topk", "groupmax"])
@pytest.mark.parametrize("transcode", [None, False, True])
@pytest.mark.parametrize("skip", [None, True])
def test_every_kind(tmp_path, activation, transcode, skip):
    settings = {"activation": activation, "transcode": transcode, "skip_connection": skip, "multi_topk": True}
    settings = {name: value for name, value in settings.items() if value is not None}
    module = "layers.{}.mlp" if transcode else "layers.{}"
    coders = [write(tmp_path / module.format(i), i, settings=settings) for i in range(2)]
    loaded = load64(tmp_path)
    assert isinstance(loaded, TranscoderSet if transcode else SAESet)
    assert isinstance(loaded[0].activation, GroupMax if activation == "groupmax" else TopK)
    sites = ("mlp_in", "mlp_out") if transcode else ("resid_post", "resid_post")
    assert [(str(r), str(w)) for r, w in zip(loaded.reads, loaded.writes, strict=True)] == [
        (f"{i}.{sites[0]}", f"{i}.{sites[1]}") for i in range(2)
    ]
    assert_are(loaded, coders)
    if transcode:
        assert_attributes(loaded, "llama")
    save_dictionaries(loaded, tmp_path / "again", format="sparsify")
    assert_equal(load64(tmp_path / "again"), loaded)


@pytest.mark.parametrize(
    ("module", "read", "write_", "transcode"),
    [
        ("layers.5.mlp", "5.mlp_in", "5.mlp_out", True),
        ("h.5.mlp", "5.mlp_in", "5.mlp_out", True),
        ("gpt_neox.layers.5.mlp", "5.mlp_in", "5.mlp_out", True),
        ("transformer.h.5", "5.resid_post", "5.resid_post", False),
        ("layers.5.self_attn", "5.attn_out", "5.attn_out", False),
        ("layers.5.attention", "5.attn_out", "5.attn_out", False),
        ("layers.5.mlp", "5.mlp_out", "5.mlp_out", False),
        ("layers.5", "5.resid_pre", "5.resid_post", True),
        ("layers.5.post_feedforward_layernorm", "5.mlp_added", "5.mlp_added", False),
    ],
)
def test_hookpoints_are_modules_of_transformers(tmp_path, module, read, write_, transcode):
    write(tmp_path / module, settings={"transcode": transcode})
    loaded = load64(tmp_path)
    assert (str(loaded.reads[5]), str(loaded.writes[5])) == (read, write_)
    assert [loaded.n_features(i) for i in range(6)] == [0] * 5 + [N]
    assert str(load64(tmp_path / module).reads[5]) == read


def test_the_width_may_be_a_factor(tmp_path):
    coder = write(tmp_path / "layers.0", settings={"num_latents": 0, "expansion_factor": 2})
    assert_are(load64(tmp_path), [coder])
    assert list_dictionaries(tmp_path)[1][0].width == N


def test_k_of_all_features_is_a_relu(tmp_path):
    coder = write(tmp_path / "layers.0", settings={"k": N})
    loaded = load64(tmp_path)
    assert isinstance(loaded, SAESet)
    assert isinstance(loaded[0].activation, ReLU)
    assert_are(loaded, [coder])


@pytest.mark.parametrize("post", [0.0, 0.2])
@pytest.mark.parametrize("transcode", [True, False])
def test_a_forks_norms_and_scales_are_folded_in(tmp_path, transcode, post):
    settings = {"transcode": transcode, "normalize_io": True, "post_encoder_scale": True, "skip_connection": True}
    extra: dict[str, Any] = {
        "in_norm": torch.tensor([3.0]), "out_norm": torch.tensor([5.0]), "post_enc": Draw(6)(N, scale=post).abs(),
        "post_enc_scale": 1 + Draw(7)(N, scale=0.1),
    }  # fmt: skip
    coder = write(tmp_path / "layers.0.mlp", settings=settings, **extra)
    assert_are(load64(tmp_path), [coder])


def run(root, **settings):
    (root / "config.json").write_text(json.dumps({"sae": {"k": 1}, **settings}))


@pytest.mark.parametrize(
    ("model", "module", "before", "sites"),
    [
        ("meta-llama/Llama-3.2-1B", "layers.0.mlp", "layers.0.post_attention_layernorm", ("resid_mid", "mlp_out")),
        ("gpt2", "h.0.mlp", "h.0.ln_2", ("resid_mid", "mlp_out")),
        (
            "google/gemma-2-2b", "layers.0.post_feedforward_layernorm", "layers.0.pre_feedforward_layernorm",
            ("resid_mid", "mlp_added"),
        ),
    ],
)  # fmt: skip
def test_the_run_says_what_is_read_and_of_which_model(tmp_path, model, module, before, sites):
    coder = write(tmp_path / module, settings={"transcode": True})
    run(tmp_path, model=model, dataset="a/corpus", hookpoints=[module], hookpoints_in=[before])
    loaded = load64(tmp_path)
    assert (loaded.reads[0].kind, loaded.writes[0].kind) == sites
    assert (loaded.provenance.model, loaded.provenance.corpus) == (model, "a/corpus")
    assert_are(loaded, [coder])
    save_dictionaries(loaded, tmp_path / "again", format="sparsify")
    assert_equal(again := load64(tmp_path / "again"), loaded)
    assert again.provenance.model == model
    assert load_file(tmp_path / "again" / module / "sae.safetensors")["W_dec"].shape == (N, D)


def test_a_name_that_gemma_uses_otherwise_is_refused(tmp_path):
    write(tmp_path / "layers.0.mlp", settings={"transcode": True})
    run(
        tmp_path,
        model="google/gemma-2-2b",
        hookpoints=["layers.0.mlp"],
        hookpoints_in=["layers.0.post_attention_layernorm"],
    )
    with pytest.raises(InputError, match="say which site"):
        load64(tmp_path)


def test_variants_and_sites_are_chosen(tmp_path):
    seeds = {seed: write(tmp_path / f"layers.0.mlp/seed{seed}", seed) for seed in (1, 2)}
    post = write(tmp_path / "layers.0", 3)
    name, offers = list_dictionaries(tmp_path)
    assert name == "sparsify"
    assert {(o.id, o.layer, o.site, o.kind, o.width, o.variant) for o in offers} == {
        ("layers.0", 0, "resid_post", "sae", N, None),
        ("layers.0.mlp/seed1", 0, "mlp_out", "sae", N, "seed1"),
        ("layers.0.mlp/seed2", 0, "mlp_out", "sae", N, "seed2"),
    }
    with pytest.raises(InputError, match=r"more than one site \(mlp_out, resid_post\)"):
        load64(tmp_path)
    with pytest.raises(InputError, match=r"more than one variant \(seed1, seed2\)"):
        load64(tmp_path, site="mlp_out")
    assert_are(load64(tmp_path, site="mlp_out", variant="seed2"), [seeds[2]])
    assert_are(load64(tmp_path, sae_id="layers.0.mlp/seed1"), [seeds[1]])
    assert_are(load64(tmp_path / "layers.0.mlp/seed1"), [seeds[1]])
    assert_are(load64(tmp_path, site="resid_post"), [post])


def test_modules_that_are_no_sites_are_left_out(tmp_path):
    coder = write(tmp_path / "layers.0")
    write(tmp_path / "embed_tokens", 1)
    write(tmp_path / "layers.0.mlp.act", 1)
    assert [offer.id for offer in list_dictionaries(tmp_path)[1]] == ["layers.0"]
    assert_are(load64(tmp_path), [coder])


def test_a_folder_that_names_no_module_asks(tmp_path):
    coder = write(tmp_path / "mine")
    with pytest.raises(InputError, match="say which site"):
        load64(tmp_path / "mine")
    with pytest.raises(InputError, match="say which layer"):
        load64(tmp_path / "mine", site="mlp_out")
    loaded = load64(tmp_path / "mine", site="mlp_out", layers=0)
    assert str(loaded.writes[0]) == "0.mlp_out"
    assert_are(loaded, [coder])
    with pytest.raises(InputError, match="nowhere"):
        load64(tmp_path / "mine", site="nowhere", layers=0)
    write(tmp_path / "other", settings={"transcode": True})
    with pytest.raises(FileFormatError, match="none is known that reads mlp_out"):
        load64(tmp_path / "other", site="mlp_out", layers=0)
    assert str(load64(tmp_path / "other", site="mlp_in", layers=0).writes[0]) == "0.mlp_out"


def test_from_the_hub(hub):
    snapshot = hub("EleutherAI/sae-mini")
    coders = [write(snapshot / f"layers.{i}", i) for i in range(2)]
    run(snapshot, model="mini")
    assert_are(loaded := load64("EleutherAI/sae-mini"), coders)
    assert loaded.provenance.model == "mini"
    alone = load64("EleutherAI/sae-mini/layers.1")
    assert [alone.n_features(i) for i in range(2)] == [0, N]
    assert [o.id for o in list_dictionaries("EleutherAI/sae-mini")[1]] == ["layers.0", "layers.1"]


@pytest.mark.parametrize("variant", golden("sparsify"), ids=lambda path: path.name)
def test_files_of_sparsify_itself(tmp_path, variant):
    asked = {}
    if golden_settings(variant)["folders"] == ["."]:
        asked = {"layers": 0, "site": "mlp_in" if "transcoder" in variant.name else "resid_post"}
    loaded = assert_golden(variant, **asked)
    save_dictionaries(loaded, tmp_path, format="sparsify")
    assert_equal(load64(tmp_path), loaded)


def test_an_uncentred_autoencoder_is_centred_in_the_file(tmp_path):
    original = random_dictionaries(
        "sae", n_layers=2, d_model=D, features=N, activation="topk", k=K, dtype=torch.float64
    )
    assert isinstance(original, SAESet)
    assert not original[0].centred
    save_dictionaries(original, tmp_path, format="sparsify")
    assert_equal(load64(tmp_path), original)


def test_saving_replaces_what_was_there_and_keeps_the_rest(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    for features in (16, 12):
        for n_layers in (3, 2):
            made = random_dictionaries("plt", n_layers=n_layers, d_model=D, features=features, dtype=torch.float64)
            save_dictionaries(made, tmp_path, format="sparsify")
            assert_equal(load64(tmp_path), made)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_half_precision_is_of_matrices(tmp_path):
    made = random_dictionaries("plt", n_layers=1, d_model=D, features=N, skip=True)
    save_dictionaries(made, tmp_path, format="sparsify", storage_dtype="bfloat16")
    stored = load_file(tmp_path / "layers.0.mlp/sae.safetensors")
    half = {name for name, tensor in stored.items() if tensor.dtype == torch.bfloat16}
    assert half == {"encoder.weight", "W_dec", "W_skip"}
    assert load_dictionaries(tmp_path).decoder_bias(0).dtype == torch.float32


def test_absent_layers_are_not_written(tmp_path):
    write(tmp_path / "a/layers.2.mlp", settings={"transcode": True})
    save_dictionaries(loaded := load64(tmp_path / "a"), tmp_path / "b", format="sparsify")
    assert {path.parent.name for path in (tmp_path / "b").rglob("cfg.json")} == {"layers.2.mlp"}
    assert_equal(load64(tmp_path / "b"), loaded)


def test_sites_that_no_module_has_are_refused(tmp_path):
    weights: dict[str, Any] = {
        "W_enc": torch.ones(D, N),
        "b_enc": torch.ones(N),
        "W_dec": torch.ones(N, D),
        "b_dec": torch.ones(D),
    }
    provenance = random_dictionaries("sae").provenance
    sae = SAESet([SAE(**weights, activation=TopK(K), site=Site(0, "attn_z"))], provenance)
    with pytest.raises(DictionaryError, match=r"No module of transformers' random writes 0\.attn_z"):
        save_dictionaries(sae, tmp_path, format="sparsify")
    made = Transcoder(**weights, activation=TopK(K), read=Site(0, "mlp_normed"), write=Site(0, "mlp_out"))
    with pytest.raises(DictionaryError, match=r"reads 0\.mlp_normed"):
        save_dictionaries(TranscoderSet([made], provenance), tmp_path, format="sparsify")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({"activation": "batchtopk"}, {}, "'batchtopk', whose threshold it does not store; supported are topk"),
        ({"activation": "swish"}, {}, "activation 'swish'; supported are topk and groupmax"),
        ({"signed": True}, {}, "signed true"),
        ({"k": 5, "activation": "groupmax"}, {}, "16 features are no k = 5"),
        ({"k": 0}, {}, "k: 0 is less than the minimum"),
        ({"k": "4"}, {}, "k: '4' is not of type"),
        ({"num_latents": 99}, {}, r"encoder.weight \[16, 8\].*\[99, 8\]"),
        ({"d_in": 9}, {}, r"encoder.weight \[16, 8\]"),
        ({"skip_connection": True}, {"W_skip": torch.zeros(D, 3)}, r"W_skip \[8, 3\]"),
        ({}, {"W_dec": torch.zeros(D, N)}, r"W_dec \[8, 16\]"),
        ({}, {"W_dec": torch.zeros(N, D).long()}, "W_dec in torch.int64"),
        ({}, {"b_dec": torch.full((D,), torch.nan)}, "not a finite number"),
        ({}, {"post_enc": -torch.ones(N)}, r"lowers active features \(post_enc down to -1\)"),
        ({"normalize_io": True}, {}, "lacks in_norm, out_norm"),
        ({"normalize_io": True}, {"in_norm": torch.zeros(1), "out_norm": torch.ones(1)}, r"norms 0\.0 and 1\.0"),
        ({"transcode": True, "n_targets": 2}, {}, "layers .0. .*of n_targets|n_targets 2, but there are 1 layers"),
    ],
)  # fmt: skip
def test_wrong_files_are_refused_in_a_sentence(tmp_path, settings, tensors, message):
    write(tmp_path / "layers.0.mlp", settings=settings, **tensors)
    with pytest.raises(FileFormatError, match=message) as raised:
        load64(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_cross_layer_transcoder_among_others_is_refused(tmp_path):
    write(tmp_path / "layers.0.mlp", settings={"transcode": True})
    write(tmp_path / "layers.1.mlp", settings={"transcode": True, "n_targets": 1})
    with pytest.raises(FileFormatError, match=r"n_targets 1\), but others beside it are not"):
        load64(tmp_path)
