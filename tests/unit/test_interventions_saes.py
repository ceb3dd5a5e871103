"""Interventions and steering by the features of autoencoders: what the contract with plain hooks leaves open."""

import json

import pytest
import torch

from circuitsae.cli import main
from circuitsae.interventions import (
    MLP,
    REGIMES,
    Error,
    Feature,
    Intervention,
    Mean,
    Means,
    Patch,
    Recording,
    Replace,
    Resample,
    Set,
    Target,
    Zero,
    audit,
    generate,
    intervene,
    reads_after,
)
from circuitsae.loading import load_dictionaries, load_model
from circuitsae.replacement import ReplacementModel
from transcoders.dictionaries import SAE, SAESet, random_dictionaries
from transcoders.errors import InputError, ModelError
from transcoders.loading import random_model
from transcoders.sites import Site

TOKENS, OTHER = torch.tensor([0, 11, 22, 33, 11]), torch.tensor([0, 7, 9, 5, 3])


@pytest.fixture(scope="module")
def model():
    """A Llama with autoencoders in the stream's middle, before layer 2, and none in layer 1."""
    made = {
        site: random_dictionaries("sae", n_layers=3, d_model=16, features=24, read=site, dtype=torch.float64)
        for site in ("resid_mid", "resid_pre")
    }
    layers = [made["resid_mid"][0], SAE.absent(1, 16, "resid_post", torch.float64), made["resid_pre"][2]]
    saes = SAESet(layers, made["resid_mid"].provenance).requires_grad_(False)
    return ReplacementModel(random_model("llama", n_layers=3, d_model=16, dtype=torch.float64), saes)


def _after(model, operation, at: Target):
    return intervene(model, TOKENS, [Intervention(at, operation)]).changed[0, 0]


def _activation(model, tokens, layer, index, pos):
    return float(Recording(model, tokens).activations(torch.tensor([[layer, pos, index]])))


def test_values_of_other_prompts_and_features_are_put_in_the_place_of_a_feature(model):
    active = model.trace(OTHER).features.of_layer(0).index
    index = int(active[active[:, 1] == 2][0, 2])
    feature, (here, there) = Feature(0, index, 2), (_activation(model, t, 0, index, 2) for t in (TOKENS, OTHER))
    assert here != there
    means = Means.over(model, [TOKENS, OTHER], by="position")
    expected = {Patch(OTHER): there, Resample([TOKENS, OTHER]): there, Mean(means): (here + there) / 2}
    for operation, value in expected.items():
        by_hand = _after(model, Set(value), feature)
        torch.testing.assert_close(_after(model, operation, feature), by_hand, rtol=1e-12, atol=1e-12)
    both = [Intervention(feature, Zero()), Intervention(Feature(2, 7, 2), Set(1.5))]
    by_hand = intervene(model, TOKENS, both).changed[0, 0]
    torch.testing.assert_close(_after(model, Replace(Feature(2, 7), 1.5), feature), by_hand, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_mlp_is_the_mlp_wherever_the_autoencoder_is(model, layer):
    edits = {Site(layer, "mlp_out"): lambda value: torch.zeros_like(value)}
    expected = model.model.run(TOKENS[None], edits=edits)[0][0, -1:]
    torch.testing.assert_close(_after(model, Zero(), at=MLP(layer)), expected, rtol=1e-12, atol=1e-12)


def test_a_layer_without_an_autoencoder_has_neither_features_nor_an_error(model):
    with pytest.raises(InputError, match=r"no feature 1\.0; layer 1 has none"):
        _after(model, Zero(), at=Feature(1, 0, 2))
    with pytest.raises(InputError, match=r"layer 1 has no autoencoder; change 1\.resid_post as a Stream"):
        _after(model, Zero(), at=Error(1, 2))
    moved = audit(model, TOKENS, [Intervention(Feature(0, 5, 2), Set(3.0))], "direct")
    assert list(zip(moved.kind, moved.layer, strict=True)) == [("autoencoder's site", 0), ("autoencoder's site", 2)]


@pytest.mark.parametrize("regime", ["direct", "frozen", "linear", "model"])
def test_passes_that_begin_at_a_block_read_the_same(model, regime):
    changes = [[Intervention(Feature(layer, 5, 2), Set(3.0))] for layer in (0, 2)]
    outcome = intervene(model, TOKENS, changes, regime=REGIMES[regime], logits_at=None)
    found = reads_after(model, model.trace(TOKENS), changes, regime)
    for row, reads in enumerate(found):
        assert outcome.changed_reads is not None
        torch.testing.assert_close(reads.by_layer, outcome.changed_reads.by_layer[0, row], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(reads.final, outcome.changed_reads.final[0, row], rtol=1e-12, atol=1e-12)
    # An autoencoder reads what comes to its site, without the change of its own features.
    torch.testing.assert_close(found[0].by_layer[0], model.trace(TOKENS).frozen.reads.by_layer[0])


def test_writing_on_adds_to_the_stream_at_every_new_token(model):
    made = generate(model, TOKENS, [Intervention(Feature(2, 7), Set(4.0))], n=3)
    row, sae = model.dictionaries.decoder_rows(2, torch.tensor([7]), 2)[0], model.dictionaries[2]

    def write(value):
        moved = (4.0 - sae.encode(value)[..., 7:8]) * row
        moved[:, 0] = 0
        return value + moved

    tokens, logits = TOKENS, torch.empty(0)
    for _ in range(3):
        logits, _ = model.model.run(tokens[None], edits={Site(2, "resid_pre"): write})
        tokens = torch.cat([tokens, logits[0, -1:].argmax(-1)])
    assert made.tokens[1].tolist() == tokens.tolist()
    torch.testing.assert_close(made.logits[1, -1], logits[0, -1], rtol=1e-9, atol=1e-9)


def test_the_command_takes_the_pocket_models_autoencoders(capsys):
    prompt = "When John and Mary went to the store, John gave a drink to"
    model = ReplacementModel(load_model("pocket", dtype=torch.float64), load_dictionaries("pocket-sae"))
    features = model.trace(prompt).features
    layer, pos, index = features.of_layer(2).index[-1].tolist()
    named = ["--dictionaries", "pocket-sae", "--feature", f"{layer}.{index}@{pos}"]
    main(["intervene", prompt, *named, "--zero", "--json", "--dtype", "float64"])
    document = json.loads(capsys.readouterr().out)
    outcome = intervene(model, prompt, [Intervention(Feature(layer, index, pos), Zero())])
    first = int(outcome.clean[0, -1].argmax())
    effect = float(outcome.changed[0, 0, -1, first] - outcome.clean[0, -1, first])
    assert abs(effect) > 1e-6
    assert document["metric"]["effect"] == pytest.approx(effect, rel=1e-9)


def test_a_stream_that_is_no_sum_cannot_be_written_in_its_middle():
    lm = random_model("gpt2", n_layers=2, d_model=16, dtype=torch.float64)
    norm = lm.bridge.hook_dict[lm.hook(Site(1, "resid_mid"))]
    norm.add_perma_hook(lambda tensor, *, hook: 2 * tensor)
    saes = random_dictionaries("sae", n_layers=2, d_model=16, features=8, read="resid_mid", dtype=torch.float64)
    with pytest.raises(ModelError, match="between attention and MLP of layer 1 is not the sum"):
        ReplacementModel(lm, saes).trace(TOKENS)
