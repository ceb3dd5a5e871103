"""Circuits of autoencoders' features: ranked by effects, and judged with everything outside ablated, in float64."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from circuitsae.attribution.effect_edges import edge_effects
from circuitsae.attribution.effects import node_effects
from circuitsae.interventions import Error, Feature, logit_diff
from circuitsae.replacement import ReplacementModel
from circuitsae.validation import Circuit, PromptExample, PromptTask, circuit_edges, faithfulness, rank_nodes
from circuitsae.validation.ablation import Ablated, Kept
from circuitsae.validation.tasks import Cases
from transcoders.dictionaries import DictionaryProvenance, SAESet, TranscoderSet, random_dictionaries
from transcoders.dictionaries.sparse_dictionary import SAE
from transcoders.errors import InputError
from transcoders.loading import random_model
from transcoders.sites import Site

LAYERS, FEATURES = 3, 6
SIZES: dict[str, Any] = {"n_layers": LAYERS, "d_model": 16, "dtype": torch.float64}
KINDS: dict[str, Any] = {
    "gpt2-post": ("gpt2", "resid_post", {"skip": True}),
    "llama-mid": ("llama", "resid_mid", {"activation": "jumprelu", "centred": True}),
}
METRIC = logit_diff(5, 9)
PROMPTS = ([0, 11, 22, 33, 7], [0, 12, 23, 33, 8])
INSIDE = (Feature(0, 3, "A"), Feature(1, 5, "END"), Feature(2, 1, "END"), Error(1, "A"), Error(2, "END"), Error(0, 3))


@pytest.fixture(scope="module")
def task():
    return PromptTask([PromptExample(torch.tensor(tokens), METRIC, {"A": 1, "END": -1}) for tokens in PROMPTS])


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    family, site, options = KINDS[request.param]
    made = random_dictionaries("sae", **SIZES, **options, features=FEATURES, seed=2)
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "activation", "centred", "norm")
    moved = [
        SAE(**{n: _plain(getattr(sae, n)) for n in names}, site=Site(i, site)) for i, sae in enumerate(made.layers)
    ]
    return ReplacementModel(random_model(family, **SIZES), SAESet(moved, DictionaryProvenance(model="random")))


def _plain(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.nn.Parameter) else value


def _parts(model, layer, x):
    """Activations and errors of every position but the first, by the layer's own autoencoder."""
    sae = model.dictionaries[layer]
    return sae.encode(x), x - sae(x)


@torch.no_grad()
def _oracle(model, task, clean, number, circuit, regime, ablation):
    """One prompt, node by node."""
    examples, first = task.examples, 1
    here = {(n.layer, examples[number].roles.get(n.at, n.at) % 5, getattr(n, "index", None)) for n in circuit}

    def mean(layer, pos, part):
        groups = [[1], [4], [2, 3]]  # A, END, and what has no role
        same = next(group for group in groups if pos in group)
        return torch.stack([run[layer][part][p] for run in clean for p in same]).mean(0)

    def splice(layer):
        def edit(value):
            x, out = value[0], value.clone()
            a, e = _parts(model, layer, x)
            if regime == "replacement":
                e = clean[number][layer][1]
            for pos in range(first, len(x)):
                put = a[pos].clone()
                for index in range(FEATURES):
                    if (layer, pos, index) not in here:
                        put[index] = 0 if ablation == "zero" else mean(layer, pos, 0)[index]
                error = e[pos]
                if (layer, pos, None) not in here:
                    error = torch.zeros_like(error) if ablation == "zero" else mean(layer, pos, 1)
                out[0, pos] = model.dictionaries[layer].decode(put, x[pos]) + error
            return out

        return edit

    edits = {model.dictionaries.writes[layer]: splice(layer) for layer in range(LAYERS)}
    logits, _ = model.model.run(examples[number].prompt[None], edits=edits)
    return float(METRIC(logits[0, -1]))


@torch.no_grad()
def _clean(model, tokens):
    reads = model.trace(tokens).frozen.reads.by_layer
    return [_parts(model, layer, reads[layer]) for layer in range(LAYERS)]


@pytest.mark.parametrize(("regime", "ablation"), [("model", "mean"), ("replacement", "zero")])
def test_everything_outside_a_circuit_is_set_node_by_node(model, task, regime, ablation):
    circuits = [(), INSIDE]
    found = Ablated(Cases(model, task), ablation, regime=regime).metric([Kept(nodes) for nodes in circuits])
    clean = [_clean(model, example.prompt) for example in task.examples]
    expected = [[_oracle(model, task, clean, i, nodes, regime, ablation) for i in range(2)] for nodes in circuits]
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # some models' attention rounds to float32
    assert abs(found[1] - found[0]).min() > 1e-3


@pytest.mark.parametrize("regime", ["model", "replacement"])
def test_with_everything_inside_the_model_is_its_own(model, task, regime):
    ablated = Ablated(Cases(model, task), "zero", regime=regime)
    whole = [Feature(layer, index) for layer, index in product(range(LAYERS), range(FEATURES))]
    found = ablated.metric([Kept((), all_but=True), Kept((*whole, *(Error(layer) for layer in range(LAYERS))))])
    np.testing.assert_allclose(found, np.stack([ablated.clean()] * 2), rtol=1e-9)


def test_nodes_are_ranked_by_their_effects_joined_by_role(model, task):
    corrupted = [torch.tensor(tokens) for tokens in PROMPTS[::-1]]
    ranking = rank_nodes(model, task, corrupted=corrupted)
    role = {1: "A", 4: "END"}
    for number, (tokens, other) in enumerate(zip(PROMPTS, corrupted, strict=True)):
        effects = node_effects(model, torch.tensor(tokens), METRIC, corrupted=other, method="integrated")
        scored = dict(zip(ranking.nodes, ranking.scores[number], strict=True))
        for (layer, pos, index), effect in zip(effects.nodes.index.tolist(), effects.features.tolist(), strict=True):
            assert scored[Feature(layer, index, role.get(pos, pos))] == pytest.approx(effect)
        for layer, pos in product(range(LAYERS), range(1, 5)):
            assert scored[Error(layer, role.get(pos, pos))] == pytest.approx(float(effects.errors[layer, pos]))


def test_the_whole_ranking_is_faithful_and_errors_can_go(model, task):
    ranking = rank_nodes(model, task, method="gradient")
    curve = faithfulness(model, ranking.circuit(), task, ablation="zero", regime="model")
    assert curve.f[-1] == pytest.approx(1, abs=1e-6)
    alone = faithfulness(model, ranking.circuit(), task, ablation="zero", regime="model", errors="ablate")
    assert abs(alone.f[-1] - 1) > 1e-3
    assert alone.empty == pytest.approx(curve.empty)


def test_edges_of_a_circuit_are_means_over_prompts(model, task):
    circuit, role = rank_nodes(model, task, method="gradient").circuit(20), {1: "A", 4: "END"}
    graph = circuit_edges(model, circuit, task)
    expected: dict[tuple[str, str], float] = {}
    for tokens in PROMPTS:
        edges = edge_effects(node_effects(model, torch.tensor(tokens), METRIC), 1000)
        for source, target, effect in edges.triples():
            pair = _at_role(source, role), _at_role(target, role)
            if set(pair) <= {*circuit.ids, "metric"}:
                expected[pair] = expected.get(pair, 0) + effect / len(PROMPTS)
    found = dict(
        zip(zip(graph.edges["source"], graph.edges["target"], strict=True), graph.edges["effect"], strict=True)
    )
    assert found == pytest.approx(expected)
    assert set(graph.edges["frequency"]) <= {0.5, 1.0}
    assert set(graph.to_networkx()) == {*circuit.ids, "metric"}


def _at_role(name, role):
    what, at, pos = name.partition("@")
    return f"{what}@{role.get(int(pos), pos)}" if at else name


def test_what_autoencoders_cannot_do_is_refused(model, task):
    with pytest.raises(InputError, match="nothing of the model is held"):
        Ablated(Cases(model, task), regime="graph")
    with pytest.raises(InputError, match="1 corrupted prompts for 2 examples"):
        rank_nodes(model, task, corrupted=[torch.tensor(PROMPTS[0])])
    with pytest.raises(InputError, match="1 corrupted prompts for 2 examples"):
        circuit_edges(model, Circuit(INSIDE), task, corrupted=[torch.tensor(PROMPTS[0])])
    with pytest.raises(InputError, match="no nodes"):
        circuit_edges(model, Circuit(()), task)


def test_corrupted_prompts_are_not_for_graphs(task):
    model = ReplacementModel(random_model("gpt2", **SIZES), random_dictionaries("plt", **SIZES, features=FEATURES))
    assert isinstance(model.dictionaries, TranscoderSet)
    with pytest.raises(InputError, match="method='graph'"):
        rank_nodes(model, task, corrupted=[torch.tensor(tokens) for tokens in PROMPTS])
