"""OpenAI's autoencoders, written here as their `state_dict` is, against the definition in dense float64."""

from typing import Any

import pytest
import torch

from tests.contracts.formats.dense import assert_golden, golden
from transcoders import load_dictionaries, random_dictionaries, save_dictionaries
from transcoders.dictionaries import SAESet, TopK
from transcoders.dictionaries.token_norm import TokenNorm
from transcoders.errors import FileFormatError, InputError
from transcoders.formats import list_dictionaries

D, N, K = 8, 16, 5
CASES = {
    "v1": ("mlp_post_act", "mlp_neurons", "ReLU"),
    "v4": ("resid_delta_mlp_v4", "mlp_added", "ReLU"),
    "v5": ("resid_delta_attn_v5_32k", "attn_added", "TopK"),
    "v5 mid": ("resid_post_attn_v5_128k", "resid_mid", "TopK"),
    "v5 post": ("resid_post_mlp_v5_128k", "resid_post", "TopK"),
}


def draw(seed, *shape, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state(seed, activation="ReLU", **changes):
    described = {"activation": "ReLU", "activation_state_dict": {}}
    if activation == "TopK":
        described = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
    return {
        "pre_bias": draw(seed, D), "latent_bias": draw(seed + 1, N, scale=0.3),
        "encoder.weight": draw(seed + 2, N, D, scale=D**-0.5), "decoder.weight": draw(seed + 3, D, N),
        "stats_last_nonzero": torch.zeros(N, dtype=torch.long), "latents_activation_frequency": torch.ones(N),
        "latents_mean_square": torch.zeros(N), **described, **changes,
    }  # fmt: skip


def write(root, location, layer, content):
    path = root / "gpt2-small" / location / "autoencoders" / f"{layer}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return content


def oracle(content, x):
    w = {name: value.double() for name, value in content.items() if isinstance(value, torch.Tensor)}
    topk = content.get("activation") == "TopK"
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    seen = (x - mean) / (std + 1e-5) if topk else x
    h = (seen - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]
    a = torch.relu(h)
    if topk:
        a = a * (h >= h.topk(K).values[..., -1:])
    y = a @ w.get("decoder.weight", w["encoder.weight"].T).T + w["pre_bias"]
    return a, (y * std + mean if topk else y)


def assert_is(dictionary, content):
    x = 30 * draw(99, 6, D).double() + 4
    a, y = oracle(content, x)
    assert 0.05 < (a > 0).double().mean() < 0.95
    torch.testing.assert_close(dictionary.encode(x), a, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(dictionary(x), y, atol=1e-12, rtol=1e-12)


def load(path, **choice) -> Any:
    return load_dictionaries(path, dtype=torch.float64, **choice)


@pytest.mark.parametrize("case", CASES)
def test_every_version_and_place(tmp_path, case):
    location, site, activation = CASES[case]
    contents = [write(tmp_path, location, layer, state(layer * 10, activation)) for layer in range(3)]
    for path in (tmp_path, tmp_path / "gpt2-small" / location, tmp_path / "gpt2-small" / location / "autoencoders"):
        loaded = load(path)
        assert [str(read) for read in loaded.reads] == [f"{layer}.{site}" for layer in range(3)]
        assert loaded.provenance.model == "gpt2"
        for layer in range(3):
            assert_is(loaded[layer], contents[layer])
    alone = load(tmp_path / "gpt2-small" / location / "autoencoders" / "2.pt")
    assert_is(alone[2], contents[2])


def test_what_is_chosen(tmp_path):
    write(tmp_path, "resid_post_mlp_v5_32k", 8, state(1, "TopK"))
    wide = write(tmp_path, "resid_post_mlp_v5_128k", 8, state(2, "TopK"))
    mlp = write(tmp_path, "mlp_post_act", 8, state(3))
    name, offers = list_dictionaries(tmp_path)
    assert name == "openai"
    assert {(o.site, o.width, o.variant, o.layer) for o in offers} == {
        ("resid_post", 32768, "v5_32k", 8), ("resid_post", 131072, "v5_128k", 8), ("mlp_neurons", None, None, 8)
    }  # fmt: skip
    assert_is(load(tmp_path, site="resid_post", width="128k")[8], wide)
    assert_is(load(tmp_path, site="mlp_neurons")[8], mlp)
    with pytest.raises(InputError, match="more than one site"):
        load(tmp_path)


def test_the_hub_s_repository(hub):
    content = write(hub("someone/sparse-autoencoder"), "resid_post_attn_v5_32k", 1, state(1, "TopK"))
    assert_is(load("someone/sparse-autoencoder")[1], content)
    assert_is(load("someone/sparse-autoencoder/gpt2-small/resid_post_attn_v5_32k/autoencoders/1.pt")[1], content)


def test_a_file_by_another_name_is_asked_about(tmp_path):
    content = state(1, "TopK")
    torch.save(content, tmp_path / "mine.pt")
    with pytest.raises(InputError, match="which site"):
        load(tmp_path / "mine.pt")
    assert_is(load(tmp_path / "mine.pt", site="resid_mid", layers=4)[4], content)
    (tmp_path / "autoencoders").mkdir()
    torch.save(content, tmp_path / "autoencoders" / "7.pt")
    assert str(load(tmp_path / "autoencoders", site="resid_mid").reads[7]) == "7.resid_mid"


def test_a_tied_decoder_and_no_activation(tmp_path):
    content = state(1)
    for name in ("decoder.weight", "activation", "activation_state_dict"):
        del content[name]
    write(tmp_path, "mlp_post_act", 0, content)
    assert_is(load(tmp_path)[0], content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "Identity"}, "has the activation 'Identity'"),
        ({"activation": "TopK", "activation_state_dict": {"k": 0, "postact_fn": "ReLU"}}, "with k=0"),
        ({"activation": "TopK", "activation_state_dict": {}}, "with k=None"),
        ({"activation": "TopK", "activation_state_dict": {"k": 3, "postact_fn": "Identity"}}, "postact_fn='Identity'"),
        ({"pre_bias": torch.zeros(D + 1)}, "encoder.weight"),
        ({"pre_bias": torch.full((D,), torch.nan)}, "not a finite number"),
        ({"latent_bias": torch.zeros(N, dtype=torch.long)}, "floating-point"),
        ({"encoder.weight": [1, 2]}, "lacks encoder.weight"),
    ],
)
def test_wrong_files_are_refused(tmp_path, changes, message):
    write(tmp_path, "mlp_post_act", 0, state(1) | changes)
    with pytest.raises(FileFormatError, match=message) as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


class _Code:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_nothing_is_unpickled(tmp_path, capsys):
    write(tmp_path, "mlp_post_act", 0, state(1, activation_state_dict=_Code()))
    with pytest.raises(FileFormatError, match="hold more than tensors"):
        load(tmp_path)
    assert "unpickled" not in capsys.readouterr().out


# writing


def normed(k=K, centred=True):
    made = random_dictionaries("sae", n_layers=2, d_model=D, features=N, activation="topk", k=k, centred=centred)
    for sae in made.layers:
        sae.norm = TokenNorm("layer_norm")
    return made.requires_grad_(False)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_what_is_saved_comes_back(tmp_path, activation, centred):
    original = random_dictionaries("sae", n_layers=2, d_model=D, features=N, centred=centred).requires_grad_(False)
    original = original if activation == "relu" else normed(centred=centred)
    save_dictionaries(original, tmp_path, format="openai")
    loaded = load_dictionaries(tmp_path)
    assert isinstance(loaded, SAESet)
    assert loaded.reads == original.reads
    x = draw(3, 2, 6, D)
    found, expected = loaded.encode(x), original.encode(x)
    assert torch.equal(found.index, expected.index)
    torch.testing.assert_close(found.value, expected.value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.reconstruct(found, x), original.reconstruct(expected, x), atol=1e-5, rtol=1e-5)
    if activation == "topk":
        assert isinstance(loaded[0].activation, TopK)


def test_the_files_hold_all_that_the_peer_s_loader_asks_for(tmp_path):
    save_dictionaries(normed(), tmp_path, format="openai")
    stored = torch.load(tmp_path / "resid_post_mlp" / "autoencoders" / "1.pt", weights_only=True)
    expected = state(0, "TopK")
    assert {name: getattr(value, "shape", value) for name, value in stored.items()} == {
        name: getattr(value, "shape", value) for name, value in expected.items()
    }


# the peer itself


@pytest.mark.parametrize("variant", golden("openai"), ids=lambda path: path.name)
def test_files_of_the_peer_itself(variant):
    assert_golden(variant)
