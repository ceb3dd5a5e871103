"""Effects of features and error nodes on a metric, and the edges between them, against plain runs in float64.

The oracle hooks the bridge itself and adds a little of what one node writes; it knows nothing of gradients.
"""

from typing import Any

import numpy as np
import pytest
import torch

import circuitsae as cs
from circuitsae.attribution.effect_edges import METRIC, edge_effects
from circuitsae.attribution.effects import Nodes, node_effects
from circuitsae.replacement import ReplacementModel
from tests.handmade import wired
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import InputError, PromptError
from transcoders.loading import random_model

LAYERS, FEATURES, WIDTH = 3, 12, 16
CASES: dict[str, Any] = {
    "gpt2-sae": ("gpt2", {"kind": "sae"}),
    "llama-sae": ("llama", {"kind": "sae", "centred": True, "activation": "jumprelu"}),
    "gpt2-clt": ("gpt2", {"kind": "clt"}),
    "llama-skip": ("llama", {"kind": "plt", "skip": True}),
}
CLEAN, CORRUPTED = torch.tensor([0, 11, 22, 33, 7]), torch.tensor([0, 12, 23, 33, 8])
WEIGHT = torch.randn(64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def metric(logits):
    """Of all logits, and curved."""
    return (logits @ WEIGHT) / 10 + (logits**2).mean(-1) / 20


@pytest.fixture(scope="module", autouse=True)
def exact_softmax():
    """Hugging Face's attention rounds its patterns to float32, which differences between runs would show."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", lambda value, dim, dtype=None, **_: value.softmax(dim))
        yield


@pytest.fixture(scope="module", params=CASES)
def model(request):
    family, options = CASES[request.param]
    sizes: dict[str, Any] = {"n_layers": LAYERS, "d_model": WIDTH, "dtype": torch.float64}
    return ReplacementModel(
        random_model(family, **sizes), random_dictionaries(**options, **sizes, features=FEATURES, seed=2)
    )


@pytest.fixture(scope="module")
def one():
    """A model for what is the same with all."""
    sizes: dict[str, Any] = {"n_layers": LAYERS, "d_model": WIDTH, "dtype": torch.float64}
    return ReplacementModel(random_model("gpt2", **sizes), random_dictionaries("sae", **sizes, features=FEATURES))


@torch.no_grad()
def _plain(model, trace, regime, added):
    """m of a run with vectors added to what is written, {(layer, pos): vector}; features and errors put by hand."""
    D, written, hooks = model.dictionaries, {}, []

    def read(layer):
        def hook(value, hook):
            for at in D.write_layers(layer):
                rows = D.decoder_rows(layer, torch.arange(FEATURES), at)
                written.setdefault(at, []).append(D.activations(layer, value[0]) @ rows)
            if D.skip(layer) is not None:
                written[layer].append(value[0] @ D.skip(layer))

        return hook

    def write(layer):
        def hook(value, hook):
            out = value.clone()
            if regime == "replacement":
                out[0, trace.first :] = (sum(written[layer]) + D.decoder_bias(layer) + trace.errors[layer])[
                    trace.first :
                ]
            for (at, pos), vector in added.items():
                if at == layer:
                    out[0, pos] += vector
            return out

        return hook

    for layer in range(LAYERS):
        hooks.append((model.model.hook(D.reads[layer]), read(layer)))
        hooks.append((model.model.hook(D.writes[layer]), write(layer)))
    logits = model.model.bridge.run_with_hooks(trace.tokens[None], fwd_hooks=hooks, prepend_bos=False)
    return float(metric(logits[:, -1])[0])


def _writes(model, nodes, row):
    """What one node of the table adds to what is written, beyond the corrupted prompt."""
    D, layer, pos = model.dictionaries, row["layer"], row["pos"]
    if row["kind"] == "error":
        return {(layer, pos): nodes.errors[layer, pos]}
    change, feature = row["value"] - row["baseline"], torch.tensor([row["feature"]])
    return {(at, pos): change * D.decoder_rows(layer, feature, at)[0] for at in D.write_layers(layer)}


@pytest.mark.parametrize(("regime", "corrupted"), [("model", CORRUPTED), ("replacement", None)])
def test_gradient_effects_are_central_differences(model, regime, corrupted):
    found = node_effects(model, CLEAN, metric, corrupted=corrupted, regime=regime)
    table, h = found.frame(), 1e-4
    largest = float(np.abs(table["effect"].to_numpy()).max())
    assert found.clean == pytest.approx(_plain(model, found.trace, regime, {}), rel=1e-9)
    records = _records(table)
    for row in [*records[:3], *[row for row in records if row["layer"] == 0][-2:]]:
        unit = _writes(model, found.nodes, row)
        up, down = (
            _plain(model, found.trace, regime, {at: sign * h * v for at, v in unit.items()}) for sign in (1, -1)
        )
        assert row["effect"] == pytest.approx((up - down) / (2 * h), rel=1e-5, abs=1e-5 * largest)


@pytest.mark.parametrize("regime", ["model", "replacement"])
def test_what_removing_a_layer_does_is_a_plain_run_of_it(model, regime):
    found = node_effects(model, CLEAN, metric, corrupted=CORRUPTED, regime=regime)
    table, added = found.frame(), {}
    for row in [row for row in _records(table) if row["layer"] == 1]:
        for at, vector in _writes(model, found.nodes, row).items():
            added[at] = added.get(at, 0) - vector
    assert float(found.removed[1]) == pytest.approx(_plain(model, found.trace, regime, added), rel=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_nodes_of_a_full_cut_on_the_corrupted_prompt_give_its_metric(family):
    """Autoencoders of resid_post, features and errors, at all positions, are all that the model goes on with."""
    sizes: dict[str, Any] = {"n_layers": LAYERS, "d_model": WIDTH, "dtype": torch.float64}
    model = ReplacementModel(random_model(family, **sizes), random_dictionaries("sae", **sizes, features=FEATURES))
    other = metric(model.trace(CORRUPTED).logits[-1:])[0]
    found = node_effects(model, CLEAN, metric, corrupted=CORRUPTED)
    assert found.removed.tolist() == pytest.approx([float(other)] * LAYERS, rel=1e-9)


@pytest.mark.parametrize("corrupted", [None, CORRUPTED], ids=["zero", "corrupted"])
def test_integrated_effects_of_a_layer_sum_up_to_what_its_removal_does(model, corrupted):
    found = {n: _gap(node_effects(model, CLEAN, metric, corrupted=corrupted, method="integrated", steps=n))
             for n in (1, 20)}  # fmt: skip
    assert (found[20] < 0.01).all()
    assert found[20].max() < found[1].max()


def _gap(effects):
    """|Σ effects − what removal does| of each layer, beside the largest change."""
    table = effects.by_layer()
    total, measured = table["sum"].to_numpy(), table["measured"].to_numpy()
    return np.abs(total - measured) / np.abs(measured).max()


def _records(table) -> list[dict[str, Any]]:
    return table.to_dict("records")


def test_integrated_effects_on_pocket_are_complete():
    model = ReplacementModel(cs.load_model("pocket"), cs.load_dictionaries("pocket-sae"))
    clean, corrupt = "The boat above the kings", "The boats above the kings"
    effects = node_effects(model, clean, (" is", " are"), corrupted=corrupt, method="integrated", steps=20)
    assert effects.by_layer()["measured"].tolist() == pytest.approx([effects.clean - _contrast(model, corrupt)] * 4)
    assert (_gap(effects) < 0.01).all()
    assert set(effects.frame()["kind"]) == {"feature", "error"}


def _contrast(model, prompt):
    right, wrong = map(model.model.token_id, (" is", " are"))
    logits = model.trace(prompt).logits[-1]
    return float(logits[right] - logits[wrong])


def test_few_steps_at_once_give_the_same(one):
    whole = node_effects(one, CLEAN, metric, method="integrated", steps=5)
    apart = node_effects(one, CLEAN, metric, method="integrated", steps=5, memory=1)
    torch.testing.assert_close(whole.features, apart.features, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(whole.errors, apart.errors, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["gradient", "integrated"])
@pytest.mark.parametrize("regime", ["model", "replacement"])
def test_effects_are_exact_where_all_is_linear(method, regime):
    """Neurons that are always on, wired at random: what removing each does follows from the wiring alone."""
    model = wired()
    trace = model.model.trace(torch.tensor([3, 1, 4, 1, 5]))
    pairs, truth = model.truth(trace, "graph")
    for token in range(3):
        target = next(i for i, node in enumerate(pairs.targets) if node.layer == 2 and node.index == token)
        effects = node_effects(model.model, trace, lambda logits, t=token: logits[:, t] - logits.mean(-1),
                               method=method, regime=regime)  # fmt: skip
        found = effects.frame().set_index("id")["effect"]
        here = pairs.target == target
        names = [f"0.{pairs.sources[i].index}@{pairs.sources[i].pos}" for i in pairs.source[here]]
        assert found[names].tolist() == pytest.approx((-truth[here]).tolist(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("regime", ["model", "replacement"])
def test_edges_that_leave_a_node_sum_up_to_its_effect(model, regime):
    effects = node_effects(model, CLEAN, metric, corrupted=CORRUPTED, regime=regime)
    table = effects.frame()
    if model.dictionaries.skip(0) is not None:  # skip terms lead past all nodes, but those behind the last one
        table = table[table["layer"] == LAYERS - 1]
    _assert_sums(edge_effects(effects, 1000), table)


def _assert_sums(graph, table):
    found = dict.fromkeys(table["id"], 0.0)
    for source, _, effect in graph.triples():
        if source in found:
            found[source] += effect
    expected = dict(zip(table["id"], table["effect"], strict=True))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9 * max(map(abs, expected.values())))


def test_an_edge_is_the_derivative_of_the_graphs_with_live_attention(model):
    """Another engine: rows of the adjacency by autograd, times what the target does to the metric."""
    effects = node_effects(model, CLEAN, metric)
    graph = cs.attribute(model, CLEAN, response="linear")
    layer, pos, feature = effects.nodes.index.T.tolist()
    names = [f"{i}.{number}@{at}" for i, at, number in zip(layer, pos, feature, strict=True)]
    slope, at = dict(zip(names, effects.slopes.tolist(), strict=True)), {n.id: i for i, n in enumerate(graph.nodes)}
    edges = edge_effects(effects, 1000).triples()[:100]
    found = {(s, t): effect for s, t, effect in edges if {s, t} <= slope.keys()}
    expected = {(s, t): slope[t] * graph.weights[at[t], at[s]] for s, t in found}
    assert len(found) > 5
    assert found == pytest.approx(expected, rel=1e-6)


def test_fewer_nodes_give_the_same_edges_between_them(one):
    effects = node_effects(one, CLEAN, metric)
    few, every = edge_effects(effects, 12, memory=1), edge_effects(effects, 1000)
    names = [*few.nodes["id"], METRIC]
    found, wider = (
        {(s, t): effect for s, t, effect in graph.triples() if {s, t} <= set(names)} for graph in (few, every)
    )
    assert len(found) == len(few.edges)
    assert found == pytest.approx(wider)
    graph = few.to_networkx()
    assert graph.number_of_edges() == len(few.edges)
    assert graph.nodes[names[0]]["effect"] == few.nodes["effect"][0]


def test_a_layer_without_an_autoencoder_has_no_nodes_and_does_not_stand_in_the_way():
    sizes: dict[str, Any] = {"n_layers": LAYERS, "d_model": WIDTH, "dtype": torch.float64}
    saes = random_dictionaries("sae", **sizes, features=FEATURES)
    model = ReplacementModel(random_model("gpt2", **sizes), saes.only([0, 2]))
    effects = node_effects(model, CLEAN, metric, corrupted=CORRUPTED)
    table = effects.frame()
    assert set(table["layer"]) == {0, 2}
    _assert_sums(edge_effects(effects, 1000), table)


def test_positions_without_features_stay_unless_another_prompt_has_others(one):
    trace = one.trace(CLEAN)
    assert not Nodes.of(one, trace).errors[:, 0].any()
    other = Nodes.of(one, trace, one.trace(torch.tensor([5, 11, 22, 33, 7])))
    assert other.errors[:, 0].any(-1).all()


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"steps": 0}, InputError, "at least one step; got 0"),
        ({"corrupted": torch.tensor([0, 1])}, PromptError, "5 tokens and the corrupted one 2"),
        ({"metric": lambda logits: torch.zeros(len(logits))}, InputError, "does not depend"),
        ({"metric": lambda logits: logits}, InputError, r"made \[1, 64\] of logits"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(one, how, error, message):
    with pytest.raises(error, match=message):
        node_effects(one, CLEAN, **{"metric": metric, **how})


def test_no_edges_between_no_nodes(one):
    effects = node_effects(one, CLEAN, metric)
    for nodes in (0, -1, ["0.99@1"]):
        with pytest.raises(InputError, match="none of the prompt's"):
            edge_effects(effects, nodes)
