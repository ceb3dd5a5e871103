"""dictionary_learning's folders, written here by their published definition, and by the peer itself."""

import json
from typing import Any

import pytest
import torch

from circuitsae.attribution import LogitTargets, attribute
from circuitsae.graph import NodeKind
from circuitsae.replacement import ReplacementModel
from tests.contracts.formats.dense import assert_golden, golden
from transcoders import load_dictionaries, random_dictionaries, save_dictionaries
from transcoders.dictionaries import SAESet, TranscoderSet
from transcoders.errors import DictionaryError, FileFormatError, InputError
from transcoders.formats import list_dictionaries
from transcoders.random_models import random_model

D, N, K = 8, 16, 5


def draw(seed, *shape, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(seed, d=D):
    return {"encoder.weight": draw(seed, N, d, scale=d**-0.5), "decoder.weight": draw(seed + 1, d, N)}


def matrices(seed, d=D):
    return {"W_enc": draw(seed, d, N, scale=d**-0.5), "b_enc": draw(seed + 2, N, scale=0.3),
            "W_dec": draw(seed + 1, N, d), "b_dec": draw(seed + 3, d)}  # fmt: skip


def state(name, seed=0, d=D) -> Any:
    bias = {"encoder.bias": draw(seed + 2, N, scale=0.3)}
    topk = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.35)}
    match name:
        case "AutoEncoder":
            return linear(seed, d) | bias | {"bias": draw(seed + 3, d)}
        case "AutoEncoderNew":
            return linear(seed, d) | bias | {"decoder.bias": draw(seed + 3, d)}
        case "GatedAutoEncoder":
            gates = {key: draw(seed + 4 + i, N, scale=0.4) for i, key in enumerate(("r_mag", "gate_bias", "mag_bias"))}
            return linear(seed, d) | gates | {"decoder_bias": draw(seed + 3, d)}
        case "JumpReluAutoEncoder":
            return matrices(seed, d) | {"threshold": draw(seed + 4, N, scale=0.3)}  # of both signs
        case "AutoEncoderTopK" | "BatchTopKSAE":
            return linear(seed, d) | bias | {"b_dec": draw(seed + 3, d)} | topk
        case "MatryoshkaBatchTopKSAE":
            return matrices(seed, d) | topk | {"group_sizes": torch.tensor([4, 12])}


def oracle(name, content, x) -> Any:
    w = {key: value.double() for key, value in content.items()}
    W: Any = w.get("encoder.weight")
    D_: Any = w.get("decoder.weight")
    match name:
        case "AutoEncoder":
            norms = D_.norm(dim=0)
            a = torch.relu((x - w["bias"]) @ W.T + w["encoder.bias"]) * norms
            return a, a @ (D_ / norms).T + w["bias"]
        case "AutoEncoderNew":
            a = torch.relu(x @ W.T + w["encoder.bias"])
            return a, a @ D_.T + w["decoder.bias"]
        case "GatedAutoEncoder":
            u = (x - w["decoder_bias"]) @ W.T
            a = (u + w["gate_bias"] > 0) * torch.relu(u * w["r_mag"].exp() + w["mag_bias"])
            return a, a @ D_.T + w["decoder_bias"]
        case "JumpReluAutoEncoder":
            h = x @ w["W_enc"] + w["b_enc"]
            a = torch.relu(h * (h > w["threshold"]))
            return a, a @ w["W_dec"] + w["b_dec"]
        case "AutoEncoderTopK":
            h = torch.relu((x - w["b_dec"]) @ W.T + w["encoder.bias"])
            a = h * (h >= h.topk(K).values[..., -1:])
            return a, a @ D_.T + w["b_dec"]
        case "BatchTopKSAE":
            h = torch.relu((x - w["b_dec"]) @ W.T + w["encoder.bias"])
            a = h * (h > w["threshold"])
            return a, a @ D_.T + w["b_dec"]
        case "MatryoshkaBatchTopKSAE":
            h = torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
            a = h * (h > w["threshold"])
            return a, a @ w["W_dec"] + w["b_dec"]


CLASSES = (
    "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)  # fmt: skip


def settings(name, layer, io="out", **changes):
    trainer = {"trainer_class": "Trainer", "dict_class": name, "activation_dim": D, "dict_size": N, "layer": layer,
               "lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": f"resid_post_layer_{layer}"}  # fmt: skip
    if "TopK" in name:
        trainer["k"] = K
    return {"trainer": trainer | changes, "buffer": {"d_submodule": D, "io": io, "ctx_len": 128}}


def write(root, place, name, seed=0, config=None, d=D):
    folder = root / place
    folder.mkdir(parents=True, exist_ok=True)
    content = state(name, seed, d)
    torch.save(content, folder / "ae.pt")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return content


def assert_is(dictionary, name, content):
    x = draw(99, 6, dictionary.d_in).double()
    a, y = oracle(name, content, x)
    assert 0.05 < (a > 0).double().mean() < 0.95
    torch.testing.assert_close(dictionary.encode(x), a, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(dictionary(x), y, atol=1e-12, rtol=1e-12)


def load(path, **choice) -> Any:
    return load_dictionaries(path, dtype=torch.float64, **choice)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class(tmp_path, name):
    content = write(tmp_path, "resid_post_layer_1/trainer_0", name, config=settings(name, 1))
    for path in (tmp_path, tmp_path / "resid_post_layer_1/trainer_0", tmp_path / "resid_post_layer_1/trainer_0/ae.pt"):
        loaded = load(path)
        assert isinstance(loaded, SAESet)
        assert (str(loaded.reads[1]), loaded.provenance.model) == ("1.resid_post", "EleutherAI/pythia-70m-deduped")
        assert_is(loaded[1], name, content)


@pytest.mark.parametrize("name", CLASSES)
def test_a_transcoder_of_every_class(tmp_path, name):
    config = settings(name, 1, io="in_and_out", submodule_name="gpt_neox.layers.1.mlp")
    content = write(tmp_path, "a", name, config=config)
    loaded = load(tmp_path)
    assert isinstance(loaded, TranscoderSet)
    assert (str(loaded.reads[1]), str(loaded.writes[1])) == ("1.mlp_in", "1.mlp_out")
    assert_is(loaded[1], name, content)


@pytest.mark.parametrize("name", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_before_a_threshold_was_estimated_all_of_relu_is_kept(tmp_path, name):
    content = write(tmp_path, "resid_post_layer_0", name, config=settings(name, 0)) | {"threshold": torch.tensor(-1.0)}
    torch.save(content, tmp_path / "resid_post_layer_0/ae.pt")
    assert_is(load(tmp_path)[0], name, content)


@pytest.mark.parametrize("name", CLASSES)
def test_without_settings_the_tensors_say_the_class(tmp_path, name):
    content = write(tmp_path, "mlp_out_layer3/10_32768", name)
    if ("TopKSAE" in name and "Matryoshka" not in name) or name == "AutoEncoderTopK":
        with pytest.raises(FileFormatError, match="download its config.json too"):
            load(tmp_path)
    else:
        loaded = load(tmp_path)
        assert str(loaded.reads[3]) == "3.mlp_out"
        assert_is(loaded[3], name, content)


@pytest.mark.parametrize(
    ("text", "io", "site"),
    [
        ("resid_post_layer_2", "out", "resid_post"),
        ("resid_pre_layer_2", "in", "resid_pre"),
        ("resid_mid", "out", "resid_mid"),
        ("resid_out", "out", "resid_post"),
        ("mlp_out_layer2", "out", "mlp_out"),
        ("attn_out_layer2", "out", "attn_out"),
        ("model.layers.2", "out", "resid_post"),
        ("model.layers.2", "in", "resid_pre"),
        ("model.layers.2.mlp", "in", "mlp_in"),
        ("model.layers.2.mlp", "out", "mlp_out"),
        ("transformer.h.2.attn", "out", "attn_out"),
        ("model.layers.2.post_feedforward_layernorm", "out", "mlp_added"),
    ],
)
def test_the_text_that_names_a_module(tmp_path, text, io, site):
    content = write(tmp_path, "a", "AutoEncoderNew", config=settings("AutoEncoderNew", 2, io, submodule_name=text))
    loaded = load(tmp_path)
    assert str(loaded.reads[2]) == f"2.{site}"
    assert_is(loaded[2], "AutoEncoderNew", content)


def test_what_nothing_names_is_asked_about(tmp_path):
    content = write(tmp_path, "a", "AutoEncoderNew", config=settings("AutoEncoderNew", None, submodule_name="here"))
    with pytest.raises(InputError, match="which site"):
        load(tmp_path)
    with pytest.raises(InputError, match="which layer"):
        load(tmp_path, site="mlp_out")
    assert_is(load(tmp_path, site="mlp_out", layers=4)[4], "AutoEncoderNew", content)
    write(tmp_path, "a", "AutoEncoderNew", config=settings("AutoEncoderNew", 2, "in_and_out", submodule_name="here"))
    with pytest.raises(InputError, match="attn_z is no module's input"):
        load(tmp_path, site="attn_z")
    loaded = load(tmp_path, site="mlp_normed")
    assert (str(loaded.reads[2]), str(loaded.writes[2])) == ("2.mlp_normed", "2.mlp_added")


def test_what_nothing_names_does_not_stand_in_the_way_of_the_rest(tmp_path):
    contents = [write(tmp_path, f"resid_out_layer{layer}/10_32768", "AutoEncoder", layer) for layer in (0, 1)]
    embedded = write(tmp_path, "embed/10_32768", "AutoEncoder", 7)
    for chosen in ({}, {"site": "resid_post"}, {"layers": [0, 1]}):
        for layer, content in enumerate(contents):
            assert_is(load(tmp_path, **chosen)[layer], "AutoEncoder", content)
    with pytest.raises(InputError, match="which site embed/10_32768 reads"):
        load(tmp_path, sae_id="embed/10_32768")
    loaded = load(tmp_path, sae_id="embed/10_32768", site="resid_pre", layers=0)
    assert_is(loaded[0], "AutoEncoder", embedded)


def sweep(root):
    contents = {}
    for layer in (3, 7):
        for trainer in (0, 1):
            place = f"resid_post_layer_{layer}/trainer_{trainer}"
            config = settings("BatchTopKSAE", layer, k=32 * (trainer + 1))
            contents[layer, trainer] = write(root, place, "BatchTopKSAE", 10 * layer + trainer, config)
            (root / place / "checkpoints").mkdir()
            torch.save(state("BatchTopKSAE", 5), root / place / "checkpoints" / "ae_100.pt")
    return contents


def test_the_hub_s_repository_is_listed_and_chosen_from(hub):
    contents = sweep(hub("someone/saes"))
    name, offers = list_dictionaries("someone/saes")
    assert name == "dictionary-learning"
    assert {(o.layer, o.variant, o.width, o.l0, o.site, o.kind) for o in offers} == {
        (layer, f"trainer_{trainer}", N, 32 * (trainer + 1), "resid_post", "sae")
        for layer in (3, 7) for trainer in (0, 1)
    }  # fmt: skip
    loaded = load("someone/saes", variant="trainer_1")
    assert_is(loaded[7], "BatchTopKSAE", contents[7, 1])
    assert loaded.n_features(0) == 0
    assert_is(load("someone/saes/resid_post_layer_3/trainer_0/ae.pt")[3], "BatchTopKSAE", contents[3, 0])
    step = load("someone/saes/resid_post_layer_3/trainer_0/checkpoints")
    assert_is(step[3], "BatchTopKSAE", state("BatchTopKSAE", 5))
    with pytest.raises(InputError, match=r"more than one variant \(trainer_0, trainer_1\)"):
        load("someone/saes")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("AutoEncoder", {"dict_class": "IdentityDict"}, "dict_class 'IdentityDict', which is not read"),
        ("AutoEncoder", {"dict_class": "CrossCoder"}, "dict_class 'CrossCoder', which is not read"),
        ("AutoEncoder", {"dict_class": 3}, "dict_class"),
        ("AutoEncoder", {"dict_class": "GatedAutoEncoder"}, "lacks"),
        ("AutoEncoder", {"layer": -1}, "trainer.layer"),
        ("AutoEncoder", {"dict_size": 0}, "trainer.dict_size"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, name, changes, message):
    config = settings(name, 1)
    config["trainer"] |= changes
    write(tmp_path, "a", name, config=config)
    with pytest.raises(FileFormatError, match=message) as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("AutoEncoderTopK", {"k": torch.tensor(0)}, "has k = 0 of 16 features"),
        ("AutoEncoderTopK", {"k": torch.tensor(2.5)}, "has k = 2.5"),
        ("AutoEncoderTopK", {"k": torch.tensor([3])}, "has k = None"),
        ("BatchTopKSAE", {"threshold": torch.zeros(N)}, "threshold"),
        ("JumpReluAutoEncoder", {"threshold": torch.tensor(1.0)}, "threshold"),
        ("AutoEncoder", {"bias": torch.full((D,), torch.inf)}, "not a finite number"),
        ("AutoEncoder", {"decoder.weight": torch.zeros(D, N)}, "norm 0"),
        ("AutoEncoder", {"bias": torch.zeros(D, dtype=torch.long)}, "floating-point"),
        ("AutoEncoderNew", {"encoder.weight": torch.zeros(N, D + 1)}, "asks? for"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path, name, change, message):
    content = write(tmp_path, "a", name, config=settings(name, 1)) | change
    torch.save(content, tmp_path / "a" / "ae.pt")
    with pytest.raises((FileFormatError, DictionaryError), match=message) as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


def test_k_may_be_in_the_settings(tmp_path):
    content = write(tmp_path, "a", "AutoEncoderTopK", config=settings("AutoEncoderTopK", 1))
    torch.save({key: value for key, value in content.items() if key not in ("k", "threshold")}, tmp_path / "a/ae.pt")
    assert_is(load(tmp_path)[1], "AutoEncoderTopK", content)


@pytest.mark.parametrize("name", CLASSES)
def test_edges_add_up_to_what_is_read(tmp_path, name):
    for layer in (0, 1):
        config = settings(name, layer, io="in_and_out", submodule_name="mlp")
        write(tmp_path, f"mlp_layer_{layer}", name, 10 * layer, config, d=16)
    model = random_model("gpt2", n_layers=2, d_model=16, n_heads=4, d_vocab=64, dtype=torch.float64)
    graph = attribute(
        ReplacementModel(model, load(tmp_path)), torch.tensor([0, 11, 22, 33, 11]), targets=LogitTargets([3, 5])
    )
    assert sum(node.kind is NodeKind.FEATURE for node in graph.nodes) > 5
    assert abs(graph.residual()).max() < 1e-9


# writing


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("case", [{"kind": "sae"}, {"kind": "sae", "centred": True}, {"kind": "plt"}], ids=str)
def test_what_is_saved_comes_back(tmp_path, case, activation):
    original = random_dictionaries(**case, activation=activation, n_layers=2, d_model=D, features=N, k=K)
    original.requires_grad_(False)
    save_dictionaries(original, tmp_path, format="dictionary-learning")
    loaded = load_dictionaries(tmp_path)
    assert (loaded.kind, loaded.reads, loaded.writes) == (original.kind, original.reads, original.writes)
    assert loaded.provenance.model == "random"
    x = draw(3, 2, 6, D)
    found, expected = loaded.encode(x), original.encode(x)
    assert torch.equal(found.index, expected.index)
    torch.testing.assert_close(found.value, expected.value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.reconstruct(found, x), original.reconstruct(expected, x), atol=1e-5, rtol=1e-5)


# the peer itself


@pytest.mark.parametrize("variant", golden("dictionary_learning"), ids=lambda path: path.name)
def test_files_of_the_peer_itself(variant):
    assert_golden(variant)
