"""Sets with a dictionary for some layers only, and with another number of features in each, wherever sets are used.

What an absent layer's MLP writes is error; nothing else about it is peculiar.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from circuitsae.attribution import LogitTargets, attribute
from circuitsae.features import CollectConfig, collect, contrast_features
from circuitsae.features.collection import dictionary_fingerprint
from circuitsae.graph import NodeKind
from circuitsae.interventions import (
    REGIMES,
    Error,
    Feature,
    Intervention,
    Mean,
    Means,
    Recording,
    Zero,
    for_node,
    intervene,
)
from circuitsae.replacement import ReplacementModel
from circuitsae.validation import validate
from circuitsae.validation.measuring import Targets, effects
from transcoders.dictionaries import (
    SAE,
    DictionaryProvenance,
    MappedDictionaries,
    SAESet,
    Transcoder,
    TranscoderSet,
    fitted,
    present_layers,
    random_dictionaries,
)
from transcoders.errors import DictionaryError, InputError
from transcoders.evaluation import evaluate
from transcoders.formats import load_dictionaries, save_dictionaries
from transcoders.loading import random_model

LAYERS, WIDTH = 4, 16
SIZES: Any = {"n_layers": LAYERS, "d_model": WIDTH, "dtype": torch.float64}
TOKENS = torch.tensor([0, 11, 22, 33, 11])
TARGETS = LogitTargets([3, 5, 60])
ROWS = torch.randint(1, 64, (6, 10), generator=torch.Generator().manual_seed(4))


def transcoders(**options) -> TranscoderSet:
    """Layers 0 and 2 with 8 and 20 features, none in layers 1 and 3."""
    narrow, wide = (random_dictionaries("plt", **SIZES, features=n, **options) for n in (8, 20))
    absent = [Transcoder.absent(layer, WIDTH, dtype=torch.float64) for layer in (1, 3)]
    return TranscoderSet([narrow[0], absent[0], wide[2], absent[1]], narrow.provenance).requires_grad_(False)


@pytest.fixture(scope="module", params=["memory", "mapped"])
def model(request, tmp_path_factory):
    plt: Any = transcoders(skip=True)
    if request.param == "mapped":
        folder = tmp_path_factory.mktemp("mapped")
        save_dictionaries(plt, folder)
        plt = load_dictionaries(folder, dtype=torch.float64, decoders="mapped")
    return ReplacementModel(random_model("gpt2", **SIZES), plt)


@pytest.fixture(scope="module")
def graph(model):
    return attribute(model, TOKENS, targets=TARGETS)


def test_all_that_an_absent_layers_mlp_writes_is_error(model, graph):
    trace = model.trace(TOKENS)
    assert present_layers(model.dictionaries) == [0, 2]
    assert {node.layer for node in graph.nodes if node.kind is NodeKind.FEATURE} == {0, 2}
    for layer in (1, 3):
        assert torch.equal(trace.errors[layer], trace.frozen.writes.mlp_out[layer])
        assert not graph.weights[:, graph.position[f"{layer}.b_dec"]].nnz
    assert abs(graph.residual()).max() <= 1e-9 * abs(graph.weights).max()
    exact = attribute(model, TOKENS, targets=TARGETS, engine="autograd")
    assert abs(exact.weights - graph.weights).max() <= 1e-12 * abs(exact.weights).max()


def test_removing_any_source_moves_every_target_by_its_edge(model, graph):
    kinds = (NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN)
    sources = [number for number, node in enumerate(graph.nodes) if node.kind in kinds]
    rows = [row for row, node in enumerate(graph.nodes) if node.is_target]
    trace = model.trace(TOKENS)
    targets = Targets(model, trace, [graph.nodes[row] for row in rows])
    removed = [[for_node(graph.nodes[number])] for number in sources]
    moved = effects(model, Recording(model, trace), removed, targets, "frozen")
    expected = -torch.from_numpy(graph.weights.toarray()[rows][:, sources].T)
    torch.testing.assert_close(torch.from_numpy(moved), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_leaves_the_clean_run_as_it_is(model, regime):
    outcome = intervene(model, TOKENS, [], regime=regime, logits_at=None, audit=True)
    torch.testing.assert_close(outcome.changed[:, 0], outcome.clean, rtol=1e-9, atol=1e-9)


def test_the_model_with_its_errors_is_the_model_and_without_keeps_mlps_that_nothing_stands_for(model):
    trace, lm, D = model.trace(TOKENS), model.model, model.dictionaries
    torch.testing.assert_close(model.run(TOKENS, trace.errors), trace.logits, rtol=1e-9, atol=1e-9)
    edits, written = {}, {}
    for layer in (0, 2):

        def read(value, layer=layer):
            a = torch.relu(
                value @ D.encoder_rows(layer, torch.arange(D.n_features(layer))).T
                + D.encoder_biases(layer, torch.arange(D.n_features(layer)))
            )
            rows = D.decoder_rows(layer, torch.arange(D.n_features(layer)), layer)
            written[layer] = a @ rows + D.decoder_bias(layer) + value @ D.skip(layer)

        def write(value, layer=layer):
            return torch.cat([value[:, :1], written[layer][:, 1:]], dim=1)

        edits |= {D.reads[layer]: read, D.writes[layer]: write}
    torch.testing.assert_close(model.run(TOKENS), lm.run(TOKENS[None], edits=edits)[0][0], rtol=1e-9, atol=1e-9)


def test_interventions_on_an_absent_layer(model):
    error = intervene(model, TOKENS, [Intervention(Error(1, 2), Zero())], regime="direct")
    assert float((error.changed - error.clean).abs().max()) > 1e-3
    with pytest.raises(InputError, match=r"no feature 1\.0; layer 1 has none"):
        intervene(model, TOKENS, [Intervention(Feature(1, 0, 2), Zero())])
    means = Means.over(model, [TOKENS, TOKENS.flip(0)])
    outcome = intervene(model, TOKENS, [Intervention(Feature(2, 5, 2), Mean(means))])
    assert torch.isfinite(outcome.changed).all()


def test_validation_tests_edges_between_what_is_there(model, graph):
    check = validate(model, graph, edges=20, controls=20)
    assert check.frozen_error < 1e-9
    assert check.logit_error < 1e-9
    assert len(check.edges) == 20


def test_contrasts_find_features_of_present_layers(model):
    group = contrast_features(model, list(ROWS[:3]), list(ROWS[3:]), rate=0.1)
    assert set(group.index[:, 0].tolist()) <= {0, 2}


def test_evaluation_leaves_absent_layers_out(model):
    lm, plt = model.model, transcoders(skip=True)
    found = evaluate(lm, model.dictionaries, ROWS)
    whole = random_dictionaries("plt", **SIZES, features=8, skip=True)
    assert [layer.layer for layer in found.layers] == [0, 2]
    assert found.layers[0] == evaluate(lm, whole, ROWS).layers[0]
    edits: dict = {}
    held = {}
    for layer in (0, 2):
        edits[plt.reads[layer]] = lambda value, layer=layer: held.update({layer: value})
        edits[plt.writes[layer]] = lambda value, layer=layer: torch.cat(
            [value[:, :1], plt[layer](held[layer])[:, 1:]], dim=1
        )
    logits = lm.run(ROWS, edits=edits)[0]
    loss = torch.nn.functional.cross_entropy(logits[:, 1:-1].flatten(0, 1), ROWS[:, 2:].flatten())
    assert found.replaced.loss == pytest.approx(float(loss), rel=1e-10)


def test_features_are_collected_from_the_layers_that_have_them(model):
    cards = collect(model.model, model.dictionaries, ROWS, CollectConfig(tokens=54, context=10))
    features = model.dictionaries.encode(
        torch.stack([x[:, 1:].flatten(0, 1) for x in model.model.activations(ROWS, model.dictionaries.reads).values()])
    )
    active = features.of_layer(2).index[:, 2].bincount(minlength=20)
    card = cards.card(2, int(active.argmax()))
    assert card is not None
    assert card.firing_rate == pytest.approx(int(active.max()) / 54)


@pytest.mark.parametrize("make", [transcoders, lambda: _saes()], ids=["plt", "sae"])
def test_a_set_with_absent_layers_is_saved_and_loaded(tmp_path, make):
    original = make()
    original.provenance = replace(original.provenance, first=4, d_vocab=64)
    save_dictionaries(original, tmp_path)
    for place in ("memory", "mapped"):
        loaded = load_dictionaries(tmp_path, dtype=torch.float64, decoders=place)
        assert loaded.provenance == original.provenance
        assert [loaded.n_features(layer) for layer in range(LAYERS)] == [8, 0, 20, 0]
        assert dictionary_fingerprint(loaded) == dictionary_fingerprint(original)
        assert present_layers(loaded) == [0, 2]


def _saes() -> SAESet:
    narrow, wide = (random_dictionaries("sae", **SIZES, features=n) for n in (8, 20))
    absent = [SAE.absent(layer, WIDTH, "resid_post", torch.float64) for layer in (1, 3)]
    return SAESet([narrow[0], absent[0], wide[2], absent[1]], narrow.provenance)


def test_what_is_absent_says_so():
    plt = transcoders()
    assert [d.is_absent for d in plt.layers] == [False, True, False, True]
    only_bias = Transcoder.absent(1, WIDTH, "resid_mid", "mlp_added")
    assert (str(only_bias.read), str(only_bias.writes[0])) == ("1.resid_mid", "1.mlp_added")
    only_bias.b_dec[0] = 1
    assert not only_bias.is_absent


# sets that cover fewer layers than the model


def _first_layers(n: int, name: str, *, mapped: Any = None) -> Any:
    plt = random_dictionaries("plt", **SIZES | {"n_layers": n}, features=8, read="resid_mid").requires_grad_(False)
    plt.provenance = DictionaryProvenance(model=name)
    if mapped is None:
        return plt
    save_dictionaries(plt, mapped)
    return load_dictionaries(mapped, dtype=torch.float64, decoders="mapped")


@pytest.mark.parametrize("mapped", [False, True])
def test_a_set_of_this_very_model_is_filled_up(tmp_path, mapped):
    plt = _first_layers(2, "somebody/Random-GPT2-0", mapped=tmp_path if mapped else None)
    model = ReplacementModel(random_model("gpt2", **SIZES), plt)
    assert isinstance(model.dictionaries, MappedDictionaries) == mapped
    assert [str(site) for site in model.dictionaries.reads] == [f"{layer}.resid_mid" for layer in range(LAYERS)]
    assert present_layers(model.dictionaries) == [0, 1]
    assert plt.n_layers == 2
    graph = attribute(model, TOKENS, targets=TARGETS)
    assert abs(graph.residual()).max() <= 1e-9 * abs(graph.weights).max()


def test_a_set_that_is_known_to_be_a_part_is_filled_up():
    lm = random_model("gpt2", **SIZES)
    assert present_layers(fitted(_first_layers(1, "another"), lm)) == [0]
    part = TranscoderSet(
        [*_first_layers(2, "another").layers, Transcoder.absent(2, WIDTH)], DictionaryProvenance(model="")
    )
    assert present_layers(fitted(part.to(torch.float64), lm)) == [0, 1]


@pytest.mark.parametrize("n_layers", [2, 5])
def test_other_sets_of_other_numbers_of_layers_are_refused(n_layers):
    with pytest.raises(
        DictionaryError, match=rf"trained on another, are for {n_layers} layers, but random-gpt2-0 has 4"
    ):
        ReplacementModel(random_model("gpt2", **SIZES), _first_layers(n_layers, "another"))


def test_more_layers_than_the_model_has_are_refused_whatever_its_name():
    with pytest.raises(DictionaryError, match="5 layers"):
        ReplacementModel(random_model("gpt2", **SIZES), _first_layers(5, "random-gpt2-0"))
    clt = random_dictionaries("clt", **SIZES | {"n_layers": 2})
    clt.provenance = DictionaryProvenance(model="random-gpt2-0")
    with pytest.raises(DictionaryError, match="2 layers"):
        ReplacementModel(random_model("gpt2", **SIZES), clt)


# positions without features


def test_cards_are_of_the_positions_with_features():
    plt = random_dictionaries("plt", **SIZES, features=8)
    plt.provenance = replace(plt.provenance, first=4)
    lm = random_model("gpt2", **SIZES)
    cards = collect(lm, plt, ROWS, CollectConfig(tokens=36, context=10, before=3))
    reads = torch.stack([x[:, 4:] for x in lm.activations(ROWS, plt.reads).values()])
    active = plt[1].encode(reads[1])
    feature = int((active > 0).sum((0, 1)).argmax())
    card = cards.card(1, feature)
    assert card is not None
    assert card.firing_rate == pytest.approx(float((active[..., feature] > 0).double().mean()))
    assert card.max_activation == pytest.approx(float(active[..., feature].max()))
    assert card.examples
    with pytest.raises(InputError, match="Rows of 4 tokens have no position with features, which start at 4"):
        collect(lm, plt, ROWS[:, :4], CollectConfig(tokens=36))
