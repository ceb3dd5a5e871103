"""crosslayer-transcoder's folders, written here by their published layout, against its definition in dense float64."""

import copy
from typing import Any

import pytest
import torch
import yaml
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
from transcoders.dictionaries import CrossLayerTranscoder, JumpReLU, ReLU, TopK, TranscoderSet
from transcoders.errors import FileFormatError
from transcoders.formats import list_dictionaries

D, N, L, K = 8, 12, 3, 4
MODEL = "crosslayer_transcoder.model."


def part(path, **arguments):
    return {"class_path": MODEL + path, "init_args": arguments}


SIGMAS = {
    "JumpReLU": part("jumprelu.JumpReLU", theta=0.03, bandwidth=1.0, n_layers=L, d_features=N),
    "ReLU": part("jumprelu.ReLU"),
    "PerLayerTopK": part("topk.PerLayerTopK", k=K, e=None, n_layers=L),
    "BatchTopK": part("topk.BatchTopK", k=K, e=0.01, n_layers=L),
    "PerLayerBatchTopK": part("topk.PerLayerBatchTopK", k=K, e=0.01, n_layers=L),
}


def contents(sigma="JumpReLU", decoder="CrosslayerDecoder", standardised="Dimensionwise"):
    """Settings and tensors."""
    draw, sizes = Draw(5), {"d_acts": D, "d_features": N, "n_layers": L}
    parts: dict[str, Any] = {
        "encoder": part("clt.Encoder", **sizes),
        "decoder": part(f"clt.{decoder}", **sizes),
        "nonlinearity": copy.deepcopy(SIGMAS[sigma]),
    }
    stored = {
        "encoder.W": draw(L, D, N, scale=D**-0.5),
        "encoder.b": draw(L, N, scale=0.3),
        "decoder.b": draw(L, D, scale=0.3),
    }
    if decoder == "Decoder":
        stored["decoder.W"] = draw(L, N, D, scale=N**-0.5)
    else:
        stored |= {f"decoder.W_{t}": draw(t + 1, N, D, scale=N**-0.5) for t in range(L)}
    if sigma == "JumpReLU":
        stored |= {"nonlinearity.theta": draw(1, L, N, scale=0.3), "nonlinearity.bandwidth": torch.tensor(1.0)}
    elif "Batch" in sigma:
        stored["nonlinearity.threshold"] = draw(L if "Layer" in sigma else 1, scale=0.2) + 0.2
    for side in ("input", "output"):
        name = f"{side}_standardizer"
        parts[name] = part(f"standardize.{standardised}{side.title()}Standardizer") if standardised else None
        if standardised in ("Dimensionwise", "Layerwise"):
            shape = (L, D) if standardised == "Dimensionwise" else (L,)
            stored |= {f"{name}.mean": draw(*shape), f"{name}.std": 0.5 + draw(*shape).abs()}
    model = part("clt.CrossLayerTranscoder", **parts)
    return {"model": model | {"is_folded": not standardised}}, stored


def write(root, settings, stored):
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text(yaml.safe_dump(settings))
    save_file(stored, root / "checkpoint.safetensors")


def assert_are(loaded, sigma, stored):
    stored = {name: t.double() for name, t in stored.items()}
    reads = inputs(L, D)

    def statistics(side, layer):
        found = (stored.get(f"{side}_standardizer.{name}") for name in ("mean", "std"))
        return [t[layer] if t is not None else neutral for t, neutral in zip(found, (0.0, 1.0), strict=True)]

    encoded = []
    for layer in range(L):
        mean, std = statistics("input", layer)
        h = (reads[layer] - mean) / std @ stored["encoder.W"][layer] + stored["encoder.b"][layer]
        if sigma == "JumpReLU":
            a = h * (h > stored["nonlinearity.theta"][0, layer]) * (h > 0)
        elif sigma == "ReLU":
            a = torch.relu(h)
        elif sigma == "PerLayerTopK":
            a = torch.relu(h) * (h >= h.sort(dim=1).values[:, [-K]])
        else:
            kept = stored["nonlinearity.threshold"].expand(L)[layer]
            a = h * (h > max(0.0, float(kept)))
        encoded.append(a)
    decoded = []
    for target in range(L):
        if "decoder.W" in stored:
            y = encoded[target] @ stored["decoder.W"][target]
        else:
            y = sum(encoded[source] @ stored[f"decoder.W_{target}"][source] for source in range(target + 1))
        mean, std = statistics("output", target)
        decoded.append((y + stored["decoder.b"][target]) * std + mean)
    assert_is(loaded, reads, encoded, decoded)


@pytest.mark.parametrize("decoder", ["CrosslayerDecoder", "Decoder"])
@pytest.mark.parametrize("standardised", ["Dimensionwise", "Layerwise", None])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_every_kind(tmp_path, sigma, standardised, decoder):
    settings, stored = contents(sigma, decoder, standardised)
    write(tmp_path / "a", settings, stored)
    loaded = load64(tmp_path / "a")
    assert isinstance(loaded, TranscoderSet if decoder == "Decoder" else CrossLayerTranscoder)
    assert [(str(r), str(w)) for r, w in zip(loaded.reads, loaded.writes, strict=True)] == [
        (f"{i}.resid_mid", f"{i}.mlp_out") for i in range(L)
    ]
    activation = loaded[0].activation if isinstance(loaded, TranscoderSet) else loaded.activation
    assert type(activation) is {"ReLU": ReLU, "PerLayerTopK": TopK}.get(sigma, JumpReLU)
    assert_are(loaded, sigma, stored)
    save_dictionaries(loaded, tmp_path / "b", format="crosslayer-transcoder")
    assert_equal(load64(tmp_path / "b"), loaded)


@pytest.mark.parametrize("decoder", ["CrosslayerDecoder", "Decoder"])
@pytest.mark.parametrize("sigma", ["JumpReLU", "PerLayerTopK"])
def test_they_attribute(tmp_path, sigma, decoder):
    write(tmp_path, *contents(sigma, decoder))
    assert_attributes(load64(tmp_path), "gpt2")


@pytest.mark.parametrize("compiled", ["", "_orig_mod."])
def test_a_checkpoint_of_lightning_beside_the_settings_of_its_training(tmp_path, compiled):
    settings, stored = contents()
    training = {
        "seed_everything": 42,
        "model": {
            "class_path": f"{MODEL}clt_lightning.JumpReLUCrossLayerTranscoderModule",
            "init_args": {"model": settings["model"], "learning_rate": 1e-4},
        },
        "data": {"class_path": "x", "init_args": {"model_name": "openai-community/gpt2"}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(training))
    state = {f"model.{compiled}{name}": tensor for name, tensor in stored.items()}
    checkpoint = {"epoch": 1, "global_step": 7, "state_dict": state, "optimizer_states": [], "loops": {"a": {"b": 1}}}
    torch.save(checkpoint, tmp_path / "clt.ckpt")
    loaded = load64(tmp_path)
    assert (loaded.provenance.model, loaded.provenance.bos) == ("openai-community/gpt2", True)
    assert_are(loaded, "JumpReLU", stored)
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(FileFormatError, match=r"2 checkpoints \(clt.ckpt, other.ckpt\)"):
        load64(tmp_path)


def test_from_the_hub(hub):
    settings, stored = contents()
    write(hub("org/clt"), settings, stored)
    assert_are(load64("org/clt"), "JumpReLU", stored)
    name, (offer,) = list_dictionaries("org/clt")
    assert name == "crosslayer-transcoder"
    assert (offer.kind, offer.site, offer.width) == ("clt", "resid_mid", N)


@pytest.mark.parametrize("variant", golden("crosslayer_transcoder"), ids=lambda path: path.name)
def test_files_of_crosslayer_transcoder_itself(variant):
    if "samplewise" in variant.name:
        with pytest.raises(FileFormatError, match="'SamplewiseInputStandardizer'; supported are"):
            load64(variant / "files")
        return
    assert_golden(variant)


@pytest.mark.parametrize("kind", ["clt", "plt"])
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_what_it_writes(tmp_path, caplog, kind, activation):
    made = random_dictionaries(kind, activation=activation, n_layers=L, d_model=D, features=N, dtype=torch.float64)
    save_dictionaries(made, tmp_path, format="crosslayer-transcoder")
    assert "itself runs all of its own as if they read resid_mid" in caplog.text
    found = load64(tmp_path)
    assert_equal(found, made)
    assert found.provenance.model == "random"
    stored = set(load_file(tmp_path / "checkpoint.safetensors"))
    decoder = {f"decoder.W_{t}" for t in range(L)} if kind == "clt" else {"decoder.W"}
    sigma = {"nonlinearity.theta", "nonlinearity.bandwidth"} if activation == "jumprelu" else set()
    assert stored == {"encoder.W", "encoder.b", "decoder.b"} | decoder | sigma
    model = yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]
    assert model["class_path"] == f"{MODEL}clt.CrossLayerTranscoder"
    assert model["is_folded"] is True
    assert model["init_args"]["encoder"] == part("clt.Encoder", d_acts=D, d_features=N, n_layers=L)


def test_half_precision_is_of_matrices(tmp_path):
    save_dictionaries(random_dictionaries("clt"), tmp_path, format="crosslayer-transcoder", storage_dtype="float16")
    stored = load_file(tmp_path / "checkpoint.safetensors")
    assert {name for name, t in stored.items() if t.dtype == torch.float16} == {
        "encoder.W",
        "decoder.W_0",
        "decoder.W_1",
    }


def change(settings, place, value):
    *path, last = place.split(".")
    at = settings["model"]["init_args"]
    for name in path:
        at = at[name]
    at[last] = value


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("input_standardizer.class_path", f"{MODEL}standardize.SamplewiseInputStandardizer", "'SamplewiseInputStand"),
        (
            "input_standardizer.class_path",
            f"{MODEL}standardize.DimensionwiseOutputStandardizer",
            "input_standardizer 'Dim",
        ),
        ("decoder.class_path", f"{MODEL}molt.Molt", "decoder 'Molt'; supported are CrosslayerDecoder, Decoder"),
        ("nonlinearity.class_path", "os.system", "nonlinearity 'system'; supported are JumpReLU"),
        ("nonlinearity", SIGMAS["PerLayerTopK"] | {"init_args": {"k": 0}}, "k: 0 is less"),
        ("nonlinearity", SIGMAS["PerLayerTopK"] | {"init_args": None}, "'k' is a required"),
        ("encoder", None, "encoder: None is not of type 'object'"),
        ("decoder.class_path", f"{MODEL}clt.Decoder", "lacks decoder.W"),
    ],
)
def test_settings_beyond_what_is_supported_are_named(tmp_path, place, value, message):
    settings, stored = contents()
    change(settings, place, value)
    write(tmp_path, settings, stored)
    with pytest.raises(FileFormatError, match=message) as raised:
        load64(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"encoder.b": torch.zeros(L, N + 1)}, r"encoder.b \[3, 13\]"),
        ({"decoder.W_1": torch.zeros(3, N, D)}, r"decoder.W_1 \[3, 12, 8\]"),
        ({"nonlinearity.theta": torch.zeros(L, N)}, r"nonlinearity.theta \[3, 12\]"),
        ({"input_standardizer.std": torch.zeros(L, D)}, "std are not all positive"),
        ({"other.encoder.W": torch.zeros(2)}, "2 tensors named encoder.W"),
    ],
)
def test_wrong_files_are_refused_in_a_sentence(tmp_path, tensors, message):
    settings, stored = contents()
    write(tmp_path, settings, stored | tensors)
    with pytest.raises(FileFormatError, match=message) as raised:
        load64(tmp_path)
    assert "\n" not in str(raised.value)


def test_another_model_of_the_package_is_named(tmp_path):
    settings, stored = contents()
    settings["model"]["class_path"] = f"{MODEL}clt.SimpleCrossLayerTranscoder"
    write(tmp_path, settings, stored)
    with pytest.raises(FileFormatError, match="is of a 'SimpleCrossLayerTranscoder'"):
        load64(tmp_path)
