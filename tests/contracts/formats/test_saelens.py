"""SAELens' folders of every architecture and version, against the published definitions in float64 and SAELens itself.

The oracle, `published`, is written from the definitions and knows nothing of our dictionaries.
"""

import json
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from circuitsae.attribution import LogitTargets, attribute
from circuitsae.replacement import ReplacementModel
from tests.contracts.formats.dense import assert_golden, golden, golden_settings
from transcoders import load_dictionaries, random_dictionaries, save_dictionaries
from transcoders.dictionaries import DictionaryProvenance, SAESet, TranscoderSet
from transcoders.dictionaries.token_norm import TokenNorm
from transcoders.errors import CircuitsaeError, DictionaryError, FileFormatError, InputError
from transcoders.evaluation.evaluate import Splice
from transcoders.evaluation.statistics import reconstruct_dense
from transcoders.formats import list_dictionaries, source
from transcoders.formats.releases import release_named, release_names
from transcoders.loading import random_model
from transcoders.sites import Frame, Site, SiteKind

D, N, K = 8, 24, 5
SAE_KINDS = ("standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
NORMS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")


def draw(seed, *shape, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(seed=50):
    """Tokens of quite different sizes, with a mean."""
    return draw(seed, 7, D) * torch.tensor([0.3, 1, 1, 2, 5, 1, 30.0])[:, None].double() + 0.7


def tensors_of(architecture, seed=0):
    made = {"W_enc": draw(seed, D, N, scale=D**-0.5), "W_dec": draw(seed + 1, N, D, scale=N**-0.5)}
    made |= {"b_dec": draw(seed + 2, D, scale=0.3)}
    if architecture == "gated":
        return made | {name: draw(seed + i, N, scale=0.3) for i, name in enumerate(("b_gate", "b_mag", "r_mag"), 3)}
    made["b_enc"] = draw(seed + 3, N, scale=0.3)
    if "jumprelu" in architecture:
        made["threshold"] = draw(seed + 6, N, scale=0.2)  # some are negative
    if "batchtopk" in architecture:
        made["topk_threshold"] = torch.tensor(0.4, dtype=torch.float64)
    if "skip" in architecture:
        made["W_skip"] = draw(seed + 7, D, D, scale=D**-0.5)
    return made


def settings_of(kind, **changed):
    """As version 6 writes them; `changed` may name what is under `metadata` too."""
    is_transcoder = "transcoder" in kind
    metadata = {"sae_lens_version": "6.54.12", "model_name": "gpt2", "prepend_bos": True, "dataset_path": "some/text"}
    metadata |= {"hook_name": "blocks.1.ln2.hook_normalized" if is_transcoder else "blocks.1.hook_resid_pre"}
    metadata |= {"hook_name_out": "blocks.1.hook_mlp_out"} if is_transcoder else {}
    settings = {"architecture": kind, "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu"}
    settings |= {"d_out": D} if is_transcoder else {}
    settings |= {"k": K} if "topk" in kind else {}
    settings |= {"apply_b_dec_to_input": not is_transcoder, "normalize_activations": "none"}
    settings |= {"reshape_activations": "none", "metadata": metadata}
    for key, value in changed.items():
        place = settings if key in settings or key in ("rescale_acts_by_decoder_norm", "activation_fn") else metadata
        place[key] = value
    return settings


def write(folder, settings, tensors):
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(settings))
    save_file({name: t.float().contiguous() for name, t in tensors.items()}, folder / "sae_weights.safetensors")
    return folder


def published(settings, tensors, x):
    """Activations and output as SAELens defines them."""
    w = {name: t.float().double() for name, t in tensors.items()}  # as stored
    norm, is_transcoder = settings["normalize_activations"], "transcoder" in settings["architecture"]
    shift, scale, size = torch.zeros(len(x), 1).double(), torch.ones(len(x), 1).double(), torch.ones(len(x), 1).double()
    if norm == "constant_norm_rescale":
        scale = size = x.square().sum(1, keepdim=True).sqrt() / math.sqrt(D)
    if norm == "layer_norm":
        shift = x.mean(1, keepdim=True)
        size = ((x - shift).square().sum(1, keepdim=True) / (D - 1)).sqrt()
        scale = size + 1e-5
    seen = (x - shift) / scale
    if settings["apply_b_dec_to_input"]:
        seen = seen - w["b_dec"]
    u = seen @ w["W_enc"]
    W_dec = w["W_dec"]
    if settings["architecture"] == "gated":
        a = (u + w["b_gate"] > 0) * (u * w["r_mag"].exp() + w["b_mag"]).clamp(min=0)
    else:
        h = u + w["b_enc"]
        if settings.get("rescale_acts_by_decoder_norm"):
            length = W_dec.square().sum(1).sqrt()
            h, W_dec = h * length, W_dec / length[:, None]
        threshold = w.get("threshold", w.get("topk_threshold", torch.zeros(())))
        a = h.clamp(min=0) * (h > threshold)
        if settings["architecture"] == "topk":
            a = a * (h >= h.sort(1, descending=True).values[:, K - 1 : K])
    y = a @ W_dec + w["b_dec"]
    if "W_skip" in w:
        y = y + x @ w["W_skip"].T
    return a, y if is_transcoder else y * size + shift


def assert_is(folder, a, y, x, **choice):
    """Encoding and reconstruction through the whole set."""
    loaded = load_dictionaries(folder, dtype="float64", **choice)
    assert isinstance(loaded, SAESet | TranscoderSet)
    layer = loaded.n_layers - 1
    reads = torch.zeros(loaded.n_layers, *x.shape, dtype=x.dtype)
    reads[layer] = x
    assert 0.1 < (a > 0).double().mean() < 0.9
    torch.testing.assert_close(loaded[layer].encode(x), a, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loaded[layer](x), y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loaded.reconstruct(loaded.encode(reads), reads)[layer], y, rtol=1e-10, atol=1e-10)
    return loaded


VARIANTS = [
    *((kind, {"apply_b_dec_to_input": centred, "normalize_activations": norm})
      for kind in SAE_KINDS for centred in (True, False) for norm in NORMS),
    *((kind, {"normalize_activations": norm}) for kind in TRANSCODERS for norm in NORMS),
    *((kind, {"rescale_acts_by_decoder_norm": True}) for kind in SAE_KINDS if "topk" in kind),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changed"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
def test_every_architecture_is_what_is_published(tmp_path, kind, changed):
    settings, tensors, x = settings_of(kind, **changed), tensors_of(kind), inputs()
    loaded = assert_is(write(tmp_path / "d", settings, tensors), *published(settings, tensors, x), x)
    is_transcoder = "transcoder" in kind
    assert loaded.reads[-1] == Site(1, "mlp_normed" if is_transcoder else "resid_pre")
    assert loaded.writes[-1] == Site(1, "mlp_added" if is_transcoder else "resid_pre")
    assert [loaded.n_features(0), loaded.n_features(1)] == [0, N]
    said = loaded.provenance
    assert (said.model, said.bos, said.corpus, said.frame) == ("gpt2", True, "some/text", Frame())
    assert said.config == settings


@pytest.mark.parametrize("variant", golden("sae_lens"), ids=lambda path: path.name)
def test_what_saelens_wrote_is_read_as_saelens_reads_it(variant):
    if variant.name == "abstopk":
        with pytest.raises(FileFormatError, match="architecture='abstopk', which this package does not read"):
            load_dictionaries(variant / "files")
        return
    assert assert_golden(variant).n_layers == golden_settings(variant)["layer"] + 1


# older versions

OLDER = {
    "hook_point": (
        {"hook_point": "blocks.1.hook_resid_pre", "hook_point_layer": 1, "normalize_activations": False},
        {},
    ),
    "layer in braces": ({"hook_point": "blocks.{layer}.hook_resid_pre", "hook_point_layer": 1}, {}),
    "no b_dec": (
        {"hook_name": "blocks.1.hook_resid_pre", "apply_b_dec_to_input": False},
        {"apply_b_dec_to_input": False},
    ),
    "layer norm": (
        {"hook_name": "blocks.1.hook_resid_pre", "normalize_activations": "layer_norm"},
        {"normalize_activations": "layer_norm"},
    ),
    "topk": (
        {"hook_name": "blocks.1.hook_resid_pre", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
        {"architecture": "topk"},
    ),
    "gated": ({"hook_name": "blocks.1.hook_resid_pre", "architecture": "gated"}, {"architecture": "gated"}),
}


def older(**changed):
    written = {"model_name": "gpt2-small", "d_in": D, "d_sae": N, "dtype": "torch.float32", "hook_head_index": None}
    return written | {"dataset_path": "some/text", "sae_lens_training_version": "3.2.0"} | changed


@pytest.mark.parametrize("name", OLDER)
def test_older_settings_have_their_own_names_and_defaults(tmp_path, name):
    written, means = OLDER[name]
    kind, x = means.get("architecture", "standard"), inputs()
    tensors = tensors_of(kind)
    truth = published(settings_of(kind, **means), tensors, x)
    loaded = assert_is(write(tmp_path / "d", older(**written), tensors), *truth, x)
    assert loaded.reads[-1] == Site(1, "resid_pre")
    assert loaded.provenance.bos is True


@pytest.mark.parametrize("key", ["scaling_factor", "finetuning_scaling_factor"])
def test_scaling_factors_of_older_versions_scale_the_decoder(tmp_path, key):
    x, tensors = inputs(), tensors_of("standard")
    factor = 1 + draw(9, N).abs()
    folder = write(tmp_path / "d", older(hook_name="blocks.1.hook_resid_pre"), tensors | {key: factor})
    scaled = tensors | {"W_dec": tensors["W_dec"].float() * factor.float()[:, None]}
    loaded = load_dictionaries(folder, dtype="float64")
    a, y = published(settings_of("standard"), scaled, x)
    assert isinstance(loaded, SAESet)
    torch.testing.assert_close(loaded[1].encode(x), a, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loaded[1](x), y, rtol=1e-5, atol=1e-5)


def test_thresholds_of_early_checkpoints_are_logarithms(tmp_path):
    x, tensors = inputs(), tensors_of("jumprelu")
    logarithm = draw(6, N, scale=0.2) - 1
    tensors["threshold"] = logarithm.float().double().exp()
    stored = {name: t for name, t in tensors.items() if name != "threshold"} | {"log_threshold": logarithm}
    loaded = load_dictionaries(write(tmp_path / "d", settings_of("jumprelu"), stored), dtype="float64")
    assert isinstance(loaded, SAESet)
    a, _ = published(settings_of("jumprelu"), tensors, x)
    torch.testing.assert_close(loaded[1].encode(x), a, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "by_norm"),
    [("standard", False), ("standard", True), ("batchtopk", False), ("batchtopk", True), ("transcoder", False)],
)
def test_the_factor_of_a_checkpoint_is_folded_in(tmp_path, kind, by_norm):
    """Trained on s x: what a dictionary of s x gives, brought back to x."""
    s, x, tensors = 0.37, inputs() / 10, tensors_of(kind)
    settings = settings_of(kind, normalize_activations="expected_average_only_in", rescale_acts_by_decoder_norm=by_norm)
    folder = write(tmp_path / "d", settings, tensors)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": s}))
    loaded = load_dictionaries(folder, dtype="float64")
    assert isinstance(loaded, SAESet | TranscoderSet)
    a, y = published(settings, tensors, s * x)
    a = a / s if by_norm else a  # features in units of what they write
    torch.testing.assert_close(loaded[1].encode(x), a, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loaded[1](x), y / s, rtol=1e-10, atol=1e-10)


# sites, and how the model was processed

HOOKS = {
    "blocks.2.hook_resid_pre": "resid_pre",
    "blocks.2.hook_in": "resid_pre",
    "blocks.2.hook_resid_mid": "resid_mid",
    "blocks.2.hook_resid_post": "resid_post",
    "blocks.2.hook_out": "resid_post",
    "blocks.2.hook_mlp_out": "mlp_added",
    "blocks.2.mlp.hook_out": "mlp_out",
    "blocks.2.hook_attn_out": "attn_added",
    "blocks.2.attn.hook_z": "attn_z",
    "blocks.2.mlp.hook_post": "mlp_neurons",
    "blocks.2.ln2.hook_normalized": "mlp_normed",
    "blocks.2.ln2.hook_out": "mlp_in",
    "blocks.2.mlp.hook_in": "mlp_in",
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_both_transformer_lenses_are_sites(tmp_path, hook):
    z = {"reshape_activations": "hook_z"} if "hook_z" in hook else {}
    folder = write(tmp_path / "d", settings_of("standard", hook_name=hook, **z), tensors_of("standard"))
    assert load_dictionaries(folder).reads[-1] == Site.parse(f"2.{HOOKS[hook]}")


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"model_name": "EleutherAI/pythia-70m", "sae_lens_version": "6.10.0"}, "mlp_in"),
        ({"model_name": "EleutherAI/pythia-70m", "sae_lens_version": "6.54.12"}, "mlp_normed"),
        ({"model_name": "google/gemma-2-2b", "sae_lens_version": "6.10.0"}, "mlp_normed"),
        ({"sae_lens_version": "6.10.0", "model_from_pretrained_kwargs": {"fold_ln": True}}, "mlp_normed"),
        ({"hook_name": "blocks.1.mlp.hook_in", "model_from_pretrained_kwargs": {"fold_ln": True}}, "mlp_normed"),
        (
            {
                "hook_name": "model.layers.1.pre_feedforward_layernorm",
                "hook_name_out": "model.layers.1.mlp",
                "model_class_name": "AutoModelForCausalLM",
            },
            "mlp_in",
        ),
    ],
)
def test_what_a_norm_gives_depends_on_who_recorded_it(tmp_path, changed, kind):
    folder = write(tmp_path / "d", settings_of("transcoder", **changed), tensors_of("transcoder"))
    assert load_dictionaries(folder).reads[-1] == Site(1, kind)


def test_processed_models_differ_from_published_ones_as_the_settings_assume():
    """TransformerLens' own processing of a model: the stream and what is added lose their mean, and nothing else."""
    stream = ("hook_in", "ln2.hook_in", "hook_out", "mlp.hook_out", "attn.hook_out")
    others = ("ln2.hook_normalized", "mlp.hook_in", "attn.o.hook_in")
    tokens, found = torch.tensor([[0, 11, 22, 33, 11]]), []
    for processed in (False, True):
        model = random_model("gpt2", n_layers=2, d_model=16, n_heads=4, d_vocab=64, dtype=torch.float64)
        if processed:
            model.bridge.enable_compatibility_mode(disable_warnings=True)
        cache = model.bridge.run_with_cache(tokens)[1]
        found.append({hook: cache[f"blocks.1.{hook}"].detach().clone() for hook in stream + others})
    raw, other = found
    for hook in stream:
        torch.testing.assert_close(other[hook], raw[hook] - raw[hook].mean(-1, keepdim=True), rtol=1e-6, atol=1e-6)
        assert (raw[hook] - other[hook]).abs().max() > 1e-2
    normed, mlp_in, attn_z = others
    torch.testing.assert_close(other[normed], raw[normed], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(other[mlp_in], raw[normed], rtol=1e-6, atol=1e-6)
    assert (raw[attn_z] - other[attn_z]).abs().max() > 1e-2


CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}


@pytest.mark.parametrize("kind", SAE_KINDS)
@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize("centred", [True, False])
def test_autoencoders_of_a_stream_without_mean(tmp_path, kind, norm, centred):
    """The same activations and the same error as in the processed model."""
    x, tensors = inputs(), tensors_of(kind)
    settings = settings_of(kind, normalize_activations=norm, apply_b_dec_to_input=centred, **CENTRED)
    mean = x.mean(1, keepdim=True)
    a, y = published(settings, tensors, x - mean)
    loaded = assert_is(write(tmp_path / "d", settings, tensors), a, y + mean, x)
    assert str(loaded[1].norm) == f"TokenNorm({'centre' if norm == 'none' else norm!r})".replace(
        "(centre)", "('centre')"
    )


@pytest.mark.parametrize("kind", TRANSCODERS)
@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_transcoders_of_a_stream_without_mean(tmp_path, kind, norm):
    x, tensors = inputs(), tensors_of(kind)
    settings = settings_of(kind, hook_name="blocks.1.hook_resid_mid", normalize_activations=norm, **CENTRED)
    a, y = published(settings, tensors, x - x.mean(1, keepdim=True))
    assert_is(write(tmp_path / "d", settings, tensors), a, y, x)


def test_models_without_layer_norm_keep_their_mean(tmp_path):
    x, tensors = inputs(), tensors_of("standard")
    settings = settings_of("standard", model_name="gemma-2-2b", **CENTRED)
    assert_is(write(tmp_path / "d", settings, tensors), *published(settings, tensors, x), x)


def test_heads_without_their_value_biases_are_of_another_frame(tmp_path):
    changed = {"hook_name": "blocks.1.attn.hook_z", "model_from_pretrained_kwargs": {"fold_value_biases": True}}
    folder = write(tmp_path / "d", settings_of("standard", **changed), tensors_of("standard"))
    assert load_dictionaries(folder).provenance.frame == Frame("folded")


# sets, folders and repositories


def write_layers(root, kind="standard", layers=(0, 1, 2), hook="hook_resid_post", **changed):
    for layer in layers:
        name = f"blocks.{layer}.{hook}"
        write(root / name, settings_of(kind, hook_name=name, **changed), tensors_of(kind, seed=100 * layer))
    return root


def test_folders_are_offered_by_their_settings(tmp_path):
    write_layers(tmp_path)
    write(
        tmp_path / "wide" / "a", settings_of("standard", hook_name="blocks.1.hook_resid_post"), tensors_of("standard")
    )
    name, offers = list_dictionaries(tmp_path)
    assert name == "saelens"
    rows = {(o.id, o.kind, o.layer, o.site, o.width, o.variant) for o in offers}
    post = {(f"blocks.{i}.hook_resid_post", "sae", i, "resid_post", N, None) for i in range(3)}
    assert rows == post | {("wide/a", "sae", 1, "resid_post", N, "wide")}
    with pytest.raises(InputError, match=r"more than one variant \(wide or none\)"):
        load_dictionaries(tmp_path)
    whole = load_dictionaries(tmp_path, sae_id="blocks.2.hook_resid_post")
    assert [whole.n_features(i) for i in range(3)] == [0, 0, N]
    assert load_dictionaries(tmp_path, variant="wide").n_layers == 2


def test_layers_of_one_kind_are_one_set(tmp_path):
    x, loaded = inputs(), load_dictionaries(write_layers(tmp_path / "d", "gated"), dtype="float64")
    assert isinstance(loaded, SAESet)
    for layer in range(3):
        a, y = published(settings_of("gated"), tensors_of("gated", seed=100 * layer), x)
        torch.testing.assert_close(loaded[layer].encode(x), a, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(loaded[layer](x), y, rtol=1e-10, atol=1e-10)
    assert set(loaded.provenance.config["folders"]) == {f"blocks.{i}.hook_resid_post" for i in range(3)}
    assert [load_dictionaries(tmp_path / "d", layers=[0, 2]).n_features(i) for i in range(3)] == [N, 0, N]


def test_of_many_folders_only_the_settings_of_the_chosen_are_read(tmp_path):
    write_layers(tmp_path / "d", layers=range(70))
    for layer in range(1, 70):
        (tmp_path / "d" / f"blocks.{layer}.hook_resid_post" / "cfg.json").write_text("{")
    assert len(list_dictionaries(tmp_path / "d")[1]) == 70
    assert load_dictionaries(tmp_path / "d", layers=0).n_layers == 1
    with pytest.raises(FileFormatError, match="as JSON"):
        load_dictionaries(tmp_path / "d")


def test_a_dictionary_that_cannot_be_read_does_not_keep_the_others(tmp_path, caplog):
    write_layers(tmp_path / "d")
    write(tmp_path / "d" / "other", settings_of("standard") | {"architecture": "temporal"}, tensors_of("standard"))
    assert load_dictionaries(tmp_path / "d").n_layers == 3
    assert "architecture='temporal'" in caplog.text
    (tmp_path / "d" / "other" / "cfg.json").write_text("{")  # which may have been one of the set
    with pytest.raises(FileFormatError, match="as JSON"):
        load_dictionaries(tmp_path / "d")


def test_a_repository_of_the_hub(hub):
    write_layers(hub("some/saes") / "deep")
    assert load_dictionaries("some/saes").n_layers == 3
    assert load_dictionaries("some/saes/deep/blocks.1.hook_resid_post").n_layers == 2
    assert load_dictionaries("hf://some/saes@main/deep", layers=1).n_layers == 2


def test_a_part_of_a_repository_in_the_cache_is_enough(hub):
    root = write_layers(hub("some/saes"))
    for layer in (0, 2):  # as after `layers=1`, for which all settings were fetched
        (root / f"blocks.{layer}.hook_resid_post" / "sae_weights.safetensors").unlink()
    loaded = load_dictionaries("some/saes", layers=1)
    assert [loaded.n_features(i) for i in range(loaded.n_layers)] == [0, N]


def test_a_release_is_loaded_by_its_name(hub):
    root = write_layers(hub("jbloom/GPT2-Small-SAEs-Reformatted"), layers=range(12), hook="hook_resid_pre")
    write_layers(root, layers=[11])
    write(root / "extra", settings_of("standard", hook_name="blocks.3.hook_resid_pre"), tensors_of("standard"))
    release = "gpt2-small-res-jb"
    with pytest.raises(InputError, match=r"more than one site \(resid_post, resid_pre\); say which with site"):
        load_dictionaries(release)
    every = load_dictionaries(release, site="resid_pre", dtype="float64")
    assert isinstance(every, SAESet)
    assert [site.kind for site in every.reads] == ["resid_pre"] * 12
    one = load_dictionaries(release, sae_id="blocks.8.hook_resid_pre", dtype="float64")
    assert isinstance(one, SAESet)
    x, mean = inputs(), inputs().mean(1, keepdim=True)
    a, y = published(settings_of("standard"), tensors_of("standard", seed=800), x - mean)  # the release says: centred
    for loaded in (one, every):
        torch.testing.assert_close(loaded[8].encode(x), a, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(loaded[8](x), y + mean, rtol=1e-10, atol=1e-10)
    with pytest.raises(
        FileFormatError, match="has no 'blocks.8.hook_resid'; its 13 dictionaries .* blocks.8.hook_resid_pre"
    ):
        load_dictionaries(release, sae_id="blocks.8.hook_resid")


def test_a_release_says_what_its_folders_are_and_which_factor_is_not_folded_in(hub):
    release = release_named("gpt2-small-mlp-tm")
    assert release is not None
    listed = release.dictionaries[3]
    s = listed.stated["norm_scaling_factor"]
    assert (listed.id, s != 1) == ("blocks.3.hook_mlp_out", True)
    settings = older(hook_name="blocks.3.hook_mlp_out", normalize_activations="expected_average_only_in")
    write(hub(release.repo) / listed.folder, settings, tensors_of("standard"))
    loaded = load_dictionaries(release.name, sae_id=listed.id, dtype="float64")
    assert isinstance(loaded, SAESet)
    x, mean = inputs(), inputs().mean(1, keepdim=True)
    a, y = published(settings_of("standard"), tensors_of("standard"), s * (x - mean))
    torch.testing.assert_close(loaded[3].encode(x), a, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loaded[3](x), y / s + mean, rtol=1e-10, atol=1e-10)


def test_a_release_may_be_in_another_communitys_layout(hub):
    release = release_named("gemma-scope-2b-pt-res-canonical")
    assert release is not None
    made: dict[str, Any] = {name: t.float().numpy() for name, t in tensors_of("jumprelu").items()}
    root = hub(release.repo) / "layer_20" / "width_16k"
    for folder in ("average_l0_71", "average_l0_38"):  # the first is the canonical one
        (root / folder).mkdir(parents=True)
        np.savez(root / folder / "params.npz", **made)
    loaded = load_dictionaries(release.name, sae_id="layer_20/width_16k/canonical", dtype="float64")
    assert isinstance(loaded, SAESet)
    x = inputs()
    a, y = published(settings_of("jumprelu", apply_b_dec_to_input=False), tensors_of("jumprelu"), x)
    torch.testing.assert_close(loaded[20].encode(x), a, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loaded[20](x), y, rtol=1e-10, atol=1e-10)
    assert loaded.reads[20] == Site(20, "resid_post")
    assert load_dictionaries(release.name).n_layers == 21


def test_a_layout_that_only_saelens_converts_is_named(hub):
    release = release_named("qwen-scope-3-8b-base-w64k-l50")
    assert release is not None
    place = hub(release.repo)
    (place / "layer0.sae.pt").write_bytes(b"")
    with pytest.raises(
        FileFormatError, match="a layout that SAELens converts by 'qwen_scope' and this package does not"
    ):
        load_dictionaries(release.name)


def test_a_release_that_is_one_set_has_no_parts(hub):
    release = release_named("mntss-gemma-2-2b-2.5m-clt-as-per-layer")
    assert release is not None
    clt = random_dictionaries("clt", n_layers=3, d_model=D, features=N)
    save_dictionaries(clt, hub(release.repo), format="circuit-tracer")
    assert load_dictionaries(release.name).kind == "clt"
    with pytest.raises(FileFormatError, match="holds all layers in one set; load it without sae_id='layer_1'"):
        load_dictionaries(release.name, sae_id="layer_1")


def test_a_factor_that_is_not_known_is_spoken_of(tmp_path, caplog):
    settings = settings_of("standard", normalize_activations="expected_average_only_in")
    folder = write(tmp_path / "d", settings, tensors_of("standard"))
    load_dictionaries(folder)
    assert "it is not known whether the factor of the activations in training" in caplog.text
    caplog.clear()
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.5}')
    load_dictionaries(folder)
    assert not caplog.text


def test_releases_are_listed_without_asking_anybody(monkeypatch):
    monkeypatch.setattr(source, "hub_problem", lambda: pytest.fail("the hub was asked"))
    assert len(release_names()) > 150
    name, offers = list_dictionaries("gpt2-small-res-jb@main")
    assert (name, len(offers), offers[8].id, offers[8].layer, offers[8].site) == (
        "saelens", 13, "blocks.8.hook_resid_pre", 8, "resid_pre",
    )  # fmt: skip
    name, offers = list_dictionaries("gemma-scope-2b-pt-res-canonical")
    canonical = next(o for o in offers if o.id == "layer_20/width_16k/canonical")
    assert (name, canonical.layer, canonical.width, canonical.l0) == ("gemma_2", 20, 16384, 71.0)
    release = release_named("gemma-scope-2b-pt-res-canonical")
    assert release is not None
    assert release.only(canonical.id).dictionaries[0].folder == "layer_20/width_16k/average_l0_71"
    every = [offer for name in release_names() for offer in list_dictionaries(name)[1]]
    assert sum(offer.layer is not None for offer in every) > 0.99 * len(every)
    with pytest.raises(FileFormatError, match="releases of like names are gpt2-small-res-jb"):
        list_dictionaries("gpt2-small-res")
    with pytest.raises(FileFormatError, match="or a release of SAELens'"):
        list_dictionaries("nothing-of-the-kind")


# what else is made of them


@pytest.mark.parametrize("norm", NORMS)
def test_norms_are_taken_back_in_the_running_model(tmp_path, norm):
    """Each layer's stream is replaced by the reconstruction of what it then is, but at the first position."""
    changed: dict[str, Any] = {"normalize_activations": norm} | ({} if norm == "constant_norm_rescale" else CENTRED)
    loaded = load_dictionaries(write_layers(tmp_path, "jumprelu", **changed), dtype="float64")
    assert isinstance(loaded, SAESet)
    model = random_model("gpt2", n_layers=3, d_model=D, n_heads=2, d_vocab=64, dtype=torch.float64)
    tokens, sites = torch.tensor([[0, 11, 22, 33]]), [Site(layer, "resid_post") for layer in range(3)]

    def by_hand(layer):
        return lambda x: torch.cat([x[:, :1], loaded[layer](x)[:, 1:]], dim=1)

    expected, reads = model.run(tokens, sites, {site: by_hand(site.layer) for site in sites})
    spliced, _ = model.run(tokens, edits=Splice(loaded).edits())
    torch.testing.assert_close(spliced, expected, rtol=1e-10, atol=1e-10)
    read = torch.stack([reads[site][0] for site in sites]) + 0.1
    a, y = reconstruct_dense(loaded, read)
    for layer in range(3):
        torch.testing.assert_close(a[layer], loaded[layer].encode(read[layer]))
        torch.testing.assert_close(y[layer], loaded[layer](read[layer]), rtol=1e-10, atol=1e-10)


def test_transcoders_in_units_of_each_token_are_not_attributed(tmp_path):
    hooks = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.mlp.hook_out"}
    settings = settings_of("transcoder", normalize_activations="layer_norm", **hooks)
    loaded = load_dictionaries(write(tmp_path / "d", settings, tensors_of("transcoder")))
    with pytest.raises(
        DictionaryError, match=r"layer 1 reads each token in units of its own \(TokenNorm\('layer_norm_in'"
    ):
        ReplacementModel(random_model("gpt2", n_layers=2, d_model=D, n_heads=2, d_vocab=64), loaded)


TRANSCODER_HOOKS = {"hook_name_out": "blocks.{}.mlp.hook_out", "hook_name": "blocks.{}.mlp.hook_in"}


@pytest.mark.parametrize("kind", TRANSCODERS)
def test_transcoders_conserve_what_they_attribute(tmp_path, kind):
    for layer in range(3):
        hooks = {key: hook.format(layer) for key, hook in TRANSCODER_HOOKS.items()}
        write(tmp_path / f"{layer}", settings_of(kind, **hooks), tensors_of(kind, seed=100 * layer))
    loaded = load_dictionaries(tmp_path, dtype="float64")
    assert isinstance(loaded, TranscoderSet)
    model = random_model("gpt2", n_layers=3, d_model=D, n_heads=2, d_vocab=64, dtype=torch.float64)
    graph = attribute(ReplacementModel(model, loaded), torch.tensor([0, 11, 22, 33]), targets=LogitTargets([3, 5]))
    size = max(abs(node.pre_activation) for node in graph.nodes if node.is_target)
    assert sum(node.kind.name == "FEATURE" for node in graph.nodes) > 10
    assert abs(graph.residual()).max() <= 1e-9 * size


# writing

SAVED = [
    *(
        {"kind": "sae", "activation": sigma, "centred": c}
        for sigma in ("relu", "jumprelu", "topk")
        for c in (True, False)
    ),
    *({"kind": "plt", "activation": sigma, "skip": skip} for sigma in ("relu", "jumprelu") for skip in (True, False)),
]


@pytest.mark.parametrize("case", SAVED, ids=lambda case: "-".join(map(str, case.values())))
@pytest.mark.parametrize("norm", [None, "rescale", "layer_norm", "centre"])
def test_round_trip(tmp_path, case, norm: Any):
    if norm is not None and case["kind"] == "plt":
        norm = None if norm == "centre" else f"{norm}_in"
    original = random_dictionaries(**case, n_layers=3, d_model=D, features=N, k=K, seed=7).requires_grad_(False)
    for dictionary in original.layers:
        dictionary.norm = None if norm is None else TokenNorm(norm)
    save_dictionaries(original, tmp_path / "d", format="saelens")
    loaded = load_dictionaries(tmp_path / "d")
    assert type(loaded) is type(original)
    assert (loaded.reads, loaded.writes) == (original.reads, original.writes)
    reads = torch.stack([inputs(layer).float() for layer in range(3)])
    found, expected = loaded.encode(reads), original.encode(reads)
    assert torch.equal(found.index, expected.index)
    assert torch.equal(found.value, expected.value)
    assert torch.equal(loaded.reconstruct(found, reads), original.reconstruct(expected, reads))
    assert not [path for path in (tmp_path / "d").rglob("*") if "tmp" in path.name]


@pytest.mark.parametrize("kind", get_args(SiteKind))
def test_every_site_travels(tmp_path, kind):
    sites = [Site(i, kind) for i in range(2)]
    made = random_dictionaries("sae", n_layers=2, d_model=D, features=N)
    for layer, site in zip(made.layers, sites, strict=True):
        layer.read, layer.writes = site, (site,)
    made.provenance = DictionaryProvenance(model="gpt2")
    save_dictionaries(made, tmp_path / "saes", format="saelens")
    assert load_dictionaries(tmp_path / "saes").reads == tuple(sites)
    if kind in ("mlp_in", "mlp_normed", "resid_mid"):
        for write_kind in ("mlp_out", "mlp_added"):
            made = random_dictionaries("plt", d_model=D, features=N, read=kind, write=write_kind)
            save_dictionaries(made, tmp_path / write_kind, format="saelens")
            loaded = load_dictionaries(tmp_path / write_kind)
            assert (loaded.reads, loaded.writes) == (made.reads, made.writes)


def test_what_is_written_is_what_saelens_reads(tmp_path):
    original = random_dictionaries("plt", activation="jumprelu", skip=True, n_layers=2, d_model=D, features=N)
    original.provenance = DictionaryProvenance(model="gpt2", bos=True, corpus="some/text", config={"context": 64})
    save_dictionaries(original, tmp_path, format="saelens", storage_dtype="bfloat16")
    folder = tmp_path / "blocks.1.mlp.hook_in"
    settings = json.loads((folder / "cfg.json").read_text())
    assert settings == {
        "architecture": "jumprelu_skip_transcoder", "d_in": D, "d_sae": N, "d_out": D, "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.54.12", "model_name": "gpt2", "hook_name": "blocks.1.mlp.hook_in",
            "hook_name_out": "blocks.1.mlp.hook_out", "prepend_bos": True, "context_size": 64,
            "dataset_path": "some/text",
        },
    }  # fmt: skip
    tensors = load_file(folder / "sae_weights.safetensors")
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "W_enc": ((D, N), torch.bfloat16), "W_dec": ((N, D), torch.bfloat16), "W_skip": ((D, D), torch.bfloat16),
        "b_enc": ((N,), torch.float32), "b_dec": ((D,), torch.float32), "threshold": ((N,), torch.float32),
    }  # fmt: skip
    W_skip = original.skip(1)
    assert W_skip is not None
    assert torch.equal(tensors["W_skip"], W_skip.T.bfloat16())


def test_absent_layers_are_not_written_and_shorter_sets_replace_longer_ones(tmp_path):
    write_layers(tmp_path / "sparse", layers=[0, 2])
    save_dictionaries(load_dictionaries(tmp_path / "sparse"), tmp_path / "d", format="saelens")
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [f"blocks.{i}.hook_resid_post" for i in (0, 2)]
    longer = random_dictionaries("sae", n_layers=4, d_model=D, features=N)
    save_dictionaries(longer, tmp_path / "d", format="saelens")
    assert load_dictionaries(tmp_path / "d").n_layers == 4
    save_dictionaries(random_dictionaries("sae", n_layers=2, d_model=D, features=N), tmp_path / "d", format="saelens")
    assert load_dictionaries(tmp_path / "d").n_layers == 2


def test_autoencoders_with_a_skip_term_are_refused(tmp_path):
    made = random_dictionaries("sae", d_model=D, features=N)
    made[0].W_skip = torch.nn.Parameter(torch.eye(D))
    with pytest.raises(DictionaryError, match="no autoencoder with a skip term"):
        save_dictionaries(made, tmp_path / "d", format="saelens")


# wrong files

WRONG_SETTINGS = {
    "architecture='temporal'": {"architecture": "temporal"},
    "architecture='matching_pursuit'": {"architecture": "matching_pursuit"},
    "normalize_activations='covariance_whitening'": {"normalize_activations": "covariance_whitening"},
    "activation_fn='tanh-relu'": {"activation_fn": "tanh-relu"},
    "hook_head_index='3'": {"hook_head_index": 3},
    "reshape_activations='hook_q'": {"reshape_activations": "hook_q"},
    "model_class_name='HookedMamba'": {"model_class_name": "HookedMamba"},
    "hook_name='blocks.1.attn.hook_q'": {"hook_name": "blocks.1.attn.hook_q"},
    "hook_name='blocks.5000.hook_resid_pre'": {"hook_name": "blocks.5000.hook_resid_pre"},
    "refactor_factored_attn_matrices='True'": {
        "hook_name": "blocks.1.attn.hook_z",
        "model_from_pretrained_kwargs": {"refactor_factored_attn_matrices": True},
    },
    "with center_writing_weights": {"normalize_activations": "constant_norm_rescale", **CENTRED},
    "d_in: 'eight'": {"d_in": "eight"},
    r"W_enc \[8, 24\]": {"d_sae": 25},
    "threshold": {"architecture": "jumprelu"},
    "k='None'": {"architecture": "topk"},
}


@pytest.mark.parametrize("said", WRONG_SETTINGS)
def test_settings_that_are_not_read_are_named(tmp_path, said):
    folder = write(tmp_path / "d", settings_of("standard", **WRONG_SETTINGS[said]), tensors_of("standard"))
    with pytest.raises(FileFormatError, match=said) as refused:
        load_dictionaries(folder)
    assert "\n" not in str(refused.value)


WRONG_TENSORS = {
    "'W_skip', which the architecture 'standard' has not": lambda t: t | {"W_skip": t["W_enc"]},
    "lacks W_dec": lambda t: {"W_enc": t["W_enc"], "b_enc": t["b_enc"], "b_dec": t["b_dec"]},
    r"b_dec \[24\]": lambda t: t | {"b_dec": t["b_enc"]},
    "not a finite number": lambda t: t | {"W_enc": t["W_enc"] * math.nan},
}


@pytest.mark.parametrize("said", WRONG_TENSORS)
def test_tensors_that_are_not_the_settings_are_refused(tmp_path, said):
    folder = write(tmp_path / "d", settings_of("standard"), WRONG_TENSORS[said](tensors_of("standard")))
    with pytest.raises(FileFormatError, match=said):
        load_dictionaries(folder)


def test_numbers_that_overflow_on_the_way_are_refused(tmp_path):
    huge = tensors_of("gated") | {"r_mag": torch.full((N,), 200.0)}
    with pytest.raises(FileFormatError, match="not a finite number"):
        load_dictionaries(write(tmp_path / "gated", settings_of("gated"), huge))
    dead = tensors_of("topk")
    dead["W_dec"][3] = 0
    settings = settings_of("topk", rescale_acts_by_decoder_norm=True)
    with pytest.raises(FileFormatError, match="feature of norm 0"):
        load_dictionaries(write(tmp_path / "dead", settings, dead))


def test_whole_numbers_in_the_place_of_weights_are_refused(tmp_path):
    folder = write(tmp_path / "d", settings_of("standard"), tensors_of("standard"))
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file(tensors | {"W_enc": tensors["W_enc"].to(torch.int32)}, folder / "sae_weights.safetensors")
    with pytest.raises(FileFormatError, match="W_enc in I32"):
        load_dictionaries(folder)


def test_incomplete_folders_say_what_is_missing(tmp_path):
    folder = write(tmp_path / "d", settings_of("standard"), tensors_of("standard"))
    (folder / "cfg.json").unlink()
    with pytest.raises(FileFormatError, match=r"has no cfg\.json beside"):
        load_dictionaries(folder)
    with pytest.raises(CircuitsaeError):
        load_dictionaries(tmp_path / "nothing")
    write_layers(tmp_path / "three")
    (tmp_path / "three" / "blocks.1.hook_resid_post" / "sae_weights.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"has no blocks\.1\.hook_resid_post/sae_weights\.safetensors beside"):
        load_dictionaries(tmp_path / "three")
