"""clt-training's cross-layer transcoders, written here by their published layout, against its runner in float64."""

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
    dense,
    golden,
    inputs,
    load64,
)
from transcoders import random_dictionaries, save_dictionaries
from transcoders.dictionaries import CrossLayerTranscoder, GroupMax, JumpReLU, JumpTopK, TopK
from transcoders.errors import FileFormatError, InputError
from transcoders.formats import list_dictionaries

D, N, K, L = 8, 12, 4, 3


def write(root, *, cross_layer=L, module="layers.{}.mlp", name="", aliases=False, affine=False, raised=False, **common):
    """A set of L layers, of which each writes to `cross_layer` from its own on; the stored tensors by layer."""
    coders = []
    for layer in range(L):
        draw, n_targets = Draw(100 + layer), min(cross_layer, L - layer)
        n_sources = len([source for source in range(layer + 1) if source + cross_layer > layer])
        settings = {
            "d_in": D, "num_latents": N, "k": K, "transcode": True, "n_targets": n_targets, "n_sources": n_sources,
        } | common  # fmt: skip
        stored = {"encoder.weight": draw(N, D, scale=D**-0.5), "encoder.bias": draw(N, scale=0.3)}
        apart = settings.get("coalesce_topk", "none") == "none"
        if apart and not settings.get("per_source_tied"):
            stored |= {f"W_decs.{j}": draw(N, D, scale=N**-0.5) for j in range(n_targets)}
        else:
            rows = N * n_sources if settings.get("coalesce_topk") == "per-layer" else N
            stored["W_dec"] = draw(rows, D, scale=N**-0.5)
        targets = range(n_targets)
        stored |= {f"b_decs.{j}": draw(D, scale=0.3) for j in targets} if apart else {"b_dec": draw(D, scale=0.3)}
        if settings.get("skip_connection"):
            own, none = draw(D, D, scale=D**-0.5), torch.zeros(D, D)
            stored |= {f"W_skips.{j}": none if j else own for j in targets} if apart else {"W_skip": own}
        if settings.get("normalize_io"):
            stored |= {"in_norm": 2 + draw(1).abs(), "out_norm": 2 + draw(1).abs()}
        if settings.get("post_encoder_scale"):
            stored |= {f"post_enc_scales.{j}": 1 + draw(N, scale=0.2) for j in targets}
        if affine:
            stored |= {f"post_encs.{j}": draw(N, scale=0.1) for j in targets}
        if raised:
            stored |= dict.fromkeys([f"post_encs.{j}" for j in targets], draw(N, scale=0.2).abs())
        if aliases:
            stored |= {"W_dec": stored["W_decs.0"], "b_dec": stored["b_decs.0"]}
            stored |= {f"post_encs.{j}": torch.zeros(N) for j in targets}
        folder = root / name / module.format(layer)
        folder.mkdir(parents=True)
        (folder / "cfg.json").write_text(json.dumps(settings))
        save_file({key: t.clone().contiguous() for key, t in stored.items()}, folder / "sae.safetensors")
        coders.append({key: t.double() for key, t in stored.items()} | {"settings": settings})
    return coders


class Oracle:
    """What the runner computes, layer by layer: every earlier coder that still has targets adds its part."""

    def __init__(self, coders, reads):
        self.encoded, self.decoded, live = [], [], []
        for layer, (coder, x) in enumerate(zip(coders, reads, strict=True)):
            into = D**0.5 / coder["in_norm"] if "in_norm" in coder else 1.0
            h = torch.relu(x * into @ coder["encoder.weight"].T + coder["encoder.bias"])
            a = self.kept(h, coder["settings"])
            a = a + (a > 0) * coder.get("post_encs.0", 0.0)
            self.encoded.append(a)
            live.append({"coder": coder, "a": a, "x": x * into, "from": layer})
            live = [mid for mid in live if layer - mid["from"] < mid["coder"]["settings"]["n_targets"]]
            self.decoded.append(self.output(coder, live, layer))

    @staticmethod
    def kept(h, settings):
        a = torch.zeros_like(h)
        for row, token in enumerate(h):
            if settings.get("activation") == "groupmax":
                size = N // settings["k"]
                on = [g * size + int(token[g * size : (g + 1) * size].argmax()) for g in range(settings["k"])]
            else:
                on = token.argsort(descending=True)[: settings["k"]].tolist()
            a[row, on] = token[on]
        return a

    @staticmethod
    def output(coder, live, layer):
        tie = coder["settings"].get("coalesce_topk", "none")
        scaled = [mid["a"] * mid["coder"].get(f"post_enc_scales.{layer - mid['from']}", 1.0) for mid in live]
        if tie == "concat":
            y = sum(a @ coder["W_dec"] for a in scaled) + coder["b_dec"]
        elif tie == "per-layer":
            y = torch.cat(scaled, dim=1) @ coder["W_dec"][: N * len(live)] + coder["b_dec"]
        else:
            parts = []
            for a, mid in zip(scaled, live, strict=True):
                own, j = mid["coder"], layer - mid["from"]
                part = a @ own.get(f"W_decs.{j}", own.get("W_dec")) + own[f"b_decs.{j}"]
                skip = own.get(f"W_skips.{j}")
                parts.append(part if skip is None else part + mid["x"] @ skip.T)
            earlier = sum(parts[:-1]) if parts[:-1] else torch.zeros_like(parts[-1])
            if coder["settings"].get("divide_cross_layer"):
                earlier = earlier / max(1, len(live) - 1)
            y = parts[-1] + earlier
        if tie != "none" and "W_skip" in coder:
            y = y + live[-1]["x"] @ coder["W_skip"].T
        return y * coder["out_norm"] / D**0.5 if "out_norm" in coder else y


def assert_are(loaded, coders):
    reads = inputs(L, D)
    truth = Oracle(coders, reads)
    assert_is(loaded, reads, truth.encoded, truth.decoded)


CASES = {
    "untied": {},
    "untied, as a GPU saves it": {"aliases": True},
    "untied, two targets": {"cross_layer": 2},
    "of one target": {"cross_layer": 1},
    "all": {"post_encoder_scale": True, "normalize_io": True, "skip_connection": True, "divide_cross_layer": True},
    "divided, two targets": {"divide_cross_layer": True, "cross_layer": 2},
    "groupmax": {"activation": "groupmax"},
    "raised": {"raised": True, "post_encoder_scale": True, "coalesce_topk": "per-layer"},
    "raised, of all features": {"raised": True, "k": N},
    "tied by source": {"per_source_tied": True, "post_encoder_scale": True, "skip_connection": True},
    "tied by target": {"coalesce_topk": "concat", "skip_connection": True, "post_encoder_scale": True},
    "tied by target, normalised": {"coalesce_topk": "concat", "skip_connection": True, "normalize_io": True},
    "by target and layer": {"coalesce_topk": "per-layer", "skip_connection": True},
    "by target and layer, two targets": {"coalesce_topk": "per-layer", "cross_layer": 2, "post_encoder_scale": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_every_kind_of_tie(tmp_path, case):
    coders = write(tmp_path / "a", **case)
    loaded = load64(tmp_path / "a")
    assert isinstance(loaded, CrossLayerTranscoder)
    sigma = GroupMax if "activation" in case else JumpTopK if "raised" in case else TopK
    assert isinstance(loaded.activation, JumpReLU if case.get("k") == N else sigma)
    assert [(str(r), str(w)) for r, w in zip(loaded.reads, loaded.writes, strict=True)] == [
        (f"{i}.mlp_in", f"{i}.mlp_out") for i in range(L)
    ]
    assert_are(loaded, coders)
    save_dictionaries(loaded, tmp_path / "b", format="clt-training")
    assert_equal(load64(tmp_path / "b"), loaded)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_they_attribute(tmp_path, family):
    write(tmp_path, **CASES["all"])
    assert_attributes(load64(tmp_path), family)


def test_jumprelu_is_written_as_features_that_are_raised(tmp_path):
    clt = random_dictionaries("clt", activation="jumprelu", n_layers=L, d_model=D, features=N, dtype=torch.float64)
    save_dictionaries(clt, tmp_path, format="clt-training")
    assert_equal(load64(tmp_path), clt)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_raised_features_attribute_and_stay_in_native_files(tmp_path, family):
    write(tmp_path / "a", raised=True)
    loaded = load64(tmp_path / "a")
    assert_attributes(loaded, family)
    save_dictionaries(loaded, tmp_path / "b")
    assert_equal(load64(tmp_path / "b"), loaded)
    for layer, read in enumerate(inputs(L, D)):
        torch.testing.assert_close(loaded.activations(layer, read), dense(loaded, inputs(L, D))[layer])


def test_the_run_says_what_is_read(tmp_path):
    coders = write(tmp_path, module="h.{}.mlp")
    every = [f"h.{i}.mlp" for i in range(L)]
    settings = {
        "model": "gpt2",
        "hookpoints": every,
        "hookpoints_in": [f"h.{i}.ln_2" for i in range(L)],
        "sae": {"k": 9},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded = load64(tmp_path)
    assert (str(loaded.reads[1]), loaded.provenance.model) == ("1.resid_mid", "gpt2")
    assert_are(loaded, coders)
    assert_attributes(loaded, "gpt2")
    save_dictionaries(loaded, tmp_path / "b", format="clt-training")
    assert (tmp_path / "b/h.2.mlp/cfg.json").is_file()
    assert_equal(load64(tmp_path / "b"), loaded)


def test_from_the_hub_in_variants(hub):
    snapshot = hub("org/clt")
    coders = {name: write(snapshot, name=name, k=k) for name, k in (("best", 4), ("", 3))}
    name, offers = list_dictionaries("org/clt")
    assert name == "clt-training"
    assert {(o.kind, o.site, o.width, o.variant, len(o.files)) for o in offers} == {
        ("clt", "mlp_in", N, "best", 2 * L), ("clt", "mlp_in", N, None, 2 * L),
    }  # fmt: skip
    with pytest.raises(InputError, match="more than one variant"):
        load64("org/clt")
    assert_are(load64("org/clt", variant="best"), coders["best"])
    assert_are(load64("org/clt/best"), coders["best"])


REFUSED = {
    "cross_layer_affine": "raises each active feature by another number for each target",
    "cross_layer_skip": "skip term from one layer to another",
}


@pytest.mark.parametrize("variant", golden("clt_training"), ids=lambda path: path.name)
def test_files_of_clt_training_itself(variant):
    if (why := REFUSED.get(variant.name)) is not None:
        with pytest.raises(FileFormatError, match=why):
            load64(variant / "files")
        return
    assert_golden(variant)


def test_what_it_writes_is_whole(tmp_path):
    clt = random_dictionaries("clt", n_layers=L, d_model=D, features=N, skip=True)
    assert isinstance(clt, CrossLayerTranscoder)
    save_dictionaries(clt, tmp_path, format="clt-training")
    stored = load_file(tmp_path / "layers.1.mlp/sae.safetensors")
    assert set(stored) == {
        "encoder.weight", "encoder.bias", "W_decs.0", "W_decs.1", "b_decs.0", "b_decs.1", "W_skips.0", "W_skips.1",
        "post_encs.0", "post_encs.1",
    }  # fmt: skip
    settings = json.loads((tmp_path / "layers.1.mlp/cfg.json").read_text())
    assert settings["n_targets"] == settings["n_sources"] == 2
    assert (settings["transcode"], settings["k"], settings["num_latents"]) == (True, N, N)
    assert_equal(load64(tmp_path), clt.to(torch.float64))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"affine": True}, r"by another number for each target \(post_encs.0, post_encs.1\)"),
        ({"affine": True, "cross_layer": 1}, r"lowers active features \(post_encs.0 down to -0\.\d+\)"),
        ({"raised": True, "activation": "groupmax"}, "groupmax and raises active features"),
        ({"topk_coalesced": True}, "topk_coalesced true; supported is false"),
        ({"secondary_target_tied": True}, "secondary_target_tied true"),
        ({"coalesce_topk": "group"}, "coalesce_topk 'group'; supported are none, concat, per-layer"),
        ({"activation": "batchtopk"}, "whose threshold it does not store"),
        ({"module": "layers.1{}.mlp"}, r"of the layers \[10, 11, 12\]; expected every layer from 0"),
    ],
)
def test_what_is_no_plain_one_is_refused_by_name(tmp_path, case, message):
    write(tmp_path, **case)
    with pytest.raises(FileFormatError, match=message) as raised:
        load64(tmp_path)
    assert "\n" not in str(raised.value)


def edit(root, layer, settings=None, **tensors):
    folder = root / f"layers.{layer}.mlp"
    old = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(old | (settings or {})))
    stored = load_file(folder / "sae.safetensors") | {name.replace("__", "."): t for name, t in tensors.items()}
    save_file({name: t for name, t in stored.items() if t is not None}, folder / "sae.safetensors")


@pytest.mark.parametrize(
    ("layer", "settings", "tensors", "message"),
    [
        (0, {}, {"W_skips__2": torch.ones(D, D)}, r"skip term from one layer to another \(W_skips.2\)"),
        (1, {"k": 5}, {}, "k 5, but .* has 4"),
        (1, {"n_targets": 3}, {}, "Layer 1 .*n_targets 3, but there are 3 layers; expected 1 to 2"),
        (1, {"n_targets": 0}, {}, "n_targets 0"),
        (0, {}, {"W_decs__1": None}, r"lacks W_decs.1"),
        (0, {}, {"W_decs__1": torch.ones(N, D + 1)}, r"W_decs.1 \[12, 9\]"),
        (2, {}, {"encoder__bias": torch.ones(3)}, r"encoder.bias \[3\]"),
    ],
)
def test_wrong_files_are_refused_in_a_sentence(tmp_path, layer, settings, tensors, message):
    write(tmp_path, skip_connection=True)
    edit(tmp_path, layer, settings, **tensors)
    with pytest.raises(FileFormatError, match=message) as raised:
        load64(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_layer_that_is_missing_is_named(tmp_path):
    write(tmp_path, module="layers.{}.mlp")
    for path in (tmp_path / "layers.1.mlp").iterdir():
        path.unlink()
    with pytest.raises(FileFormatError, match=r"of the layers \[0, 2\]"):
        load64(tmp_path)
