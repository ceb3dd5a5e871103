"""Errors that answer: chained over features, edges are the model's own derivative, whatever the dictionaries."""

from typing import Any

import numpy as np
import pytest
import torch

from circuitsae import ReplacementModel, attribute, load_dictionaries, random_model
from circuitsae.attribution import LogitTargets, attribute_pruned, attribute_trace
from circuitsae.commands.graph_folders import check_identities
from circuitsae.graph import AttributionGraph, NodeKind
from circuitsae.graph.totals import total_effects
from circuitsae.interventions import Recording, Regime, node_change
from circuitsae.validation import Validation, agreement, validate
from circuitsae.validation.choice import choose_edges
from circuitsae.validation.claims import Pairs, Settings, judge
from circuitsae.validation.measuring import Targets, effects
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import InputError

N_LAYERS = 3
PROMPT = torch.tensor([0, 11, 22, 33, 11])
LOGITS = LogitTargets([3, 5])
SIZE = {"frozen": 1e-5, "linear": 1e-3}
"""Of a change of what a source writes: some families' softmax is in float32 whatever the precision."""
NEAR = {"frozen": 1e-6, "linear": 1e-3}

CASES: list[tuple[Any, ...]] = [
    ("gpt2", {"kind": "plt"}),
    ("gpt2", {"kind": "plt", "read": "resid_mid"}),
    ("llama", {"kind": "clt", "skip": True}),
    ("phi", {"kind": "clt"}),
    ("gemma2", {"kind": "plt", "skip": True}),
    ("gemma2", {"kind": "plt", "write": "mlp_added"}),
]


def replacement(family: Any, kind: Any, **options: Any) -> ReplacementModel:
    model = random_model(family, n_layers=N_LAYERS, d_model=16, n_heads=4, d_vocab=64, dtype=torch.float64)
    sizes = {"n_layers": N_LAYERS, "d_model": 16, "features": 24, "dtype": torch.float64, "seed": 1}
    return ReplacementModel(model, random_dictionaries(kind, **sizes, **options))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def model(request):
    family, options = request.param
    return replacement(family, **options)


def rounding(model: ReplacementModel, response: str) -> str:
    """Which of `SIZE` and `NEAR`: a softmax in float32 shows where patterns answer."""
    return "frozen" if model.model.name.startswith("random-gpt2") else response


def graph_of(model: ReplacementModel, **settings: Any) -> AttributionGraph:
    return attribute(model, PROMPT, targets=LOGITS, errors="linear", **settings)


def totals(graph: AttributionGraph) -> np.ndarray:
    """[target, node], how fast each target moves as a node is scaled up, features between answering: (I − B)⁻¹ A."""
    targets = np.flatnonzero(graph.mask(NodeKind.FEATURE, NodeKind.LOGIT))
    return total_effects(graph.nodes_frame(), graph.edges_frame(), targets.tolist())


def measured(
    model: ReplacementModel, graph: AttributionGraph, regime: Regime, size: float, text: Any = PROMPT
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the sources, and central differences [target, source] of the graph's targets in the model."""
    prompt = Recording(model, model.trace(text))
    kinds = (NodeKind.FEATURE, NodeKind.TOKEN, NodeKind.ERROR)
    sources = np.flatnonzero(graph.mask(*kinds))
    changes = [node_change(model, prompt.trace, graph.nodes[s]) for s in sources]
    targets = [node for node in graph.nodes if node.kind in (NodeKind.FEATURE, NodeKind.LOGIT)]
    trace = prompt.trace.with_logit_slope() if graph.response == "linear" else prompt.trace
    read = Targets(model, trace, targets)
    up, down = (effects(model, prompt, [[sign * size * c] for c in changes], read, regime) for sign in (1, -1))
    return sources, ((up - down) / (2 * size)).T


@pytest.mark.parametrize("response", ["frozen", "linear"])
@pytest.mark.parametrize("most", [None, 20], ids=["all", "some"])
def test_totals_are_the_models_own_derivative(model, response, most):
    graph = graph_of(model, response=response, max_features=most)
    held = "frozen" if response == "frozen" else "live"
    sources, expected = measured(model, graph, Regime(patterns=held, norms=held), SIZE[rounding(model, response)])
    if most is not None:  # an error that took in features is more than the error vector
        sources, expected = _without_errors(graph, sources, expected)
    found = totals(graph)[:, sources]
    np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR[rounding(model, response)] * np.abs(expected).max())


def _without_errors(graph, sources, expected):
    kept = graph.mask(NodeKind.FEATURE, NodeKind.TOKEN)[sources]
    return sources[kept], expected[:, kept]


@pytest.mark.parametrize("response", ["frozen", "linear"])
def test_both_engines_find_the_same(model, response):
    found, expected = (graph_of(model, response=response, engine=e) for e in ("closed_form", "autograd"))
    assert found.ids.tolist() == expected.ids.tolist()
    for name in ("weights", "past"):
        ours, theirs = (getattr(graph, name).toarray() for graph in (found, expected))
        most = 1e-9 if rounding(model, response) == "frozen" else 1e-5
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=most * np.abs(theirs).max())


def test_back_through_the_mlps_as_through_matrices(model, monkeypatch):
    expected = graph_of(model).weights.toarray()
    monkeypatch.setattr("circuitsae.attribution.responding.JACOBIAN_BYTES", 0)
    monkeypatch.setattr("circuitsae.attribution.responding.BACKWARD_BYTES", 1)
    monkeypatch.setattr("circuitsae.attribution.responding.CACHE_BYTES", 0)
    np.testing.assert_allclose(graph_of(model).weights.toarray(), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_the_sweep_of_a_device_finds_the_same(model, monkeypatch):
    expected = graph_of(model)
    monkeypatch.setattr("circuitsae.attribution.device_sweep.ON_DEVICE", frozenset({"cpu"}))
    found = graph_of(model, batch_size=7)
    for name in ("weights", "past"):
        ours, theirs = (getattr(graph, name).toarray() for graph in (found, expected))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9 * np.abs(theirs).max())


def test_what_passed_by_errors_is_all_that_held_errors_leave_out(model):
    free, held = graph_of(model), attribute(model, PROMPT, targets=LOGITS)
    assert free.ids.tolist() == held.ids.tolist()
    found, expected = (_direct(graph) for graph in (free, held))
    where = free.weights.toarray() != 0
    np.testing.assert_allclose(found[where], expected[where], rtol=0, atol=1e-9 * np.abs(expected).max())
    assert (free.scores.past or 0) > 0.05


def _direct(graph):
    weights = graph.weights.toarray()
    return weights if graph.past is None else weights - graph.past.toarray()


def test_a_graph_says_what_its_errors_do(model):
    graph, pruned = graph_of(model), attribute_pruned(model, PROMPT, targets=LOGITS, errors="linear")[0]
    held = attribute(model, PROMPT, targets=LOGITS)
    assert (graph.errors, pruned.errors, held.errors) == ("linear", "linear", "held")
    assert graph.derivatives
    assert not held.derivatives
    assert np.isnan(graph.residual()[graph.mask(NodeKind.LOGIT)]).all()
    assert np.isfinite(held.residual()).all()


def test_where_errors_cannot_answer():
    model = replacement("gpt2", "plt")
    with pytest.raises(InputError, match=r"errors='linear' does not go with unexplained"):
        graph_of(model, unexplained=0.1)
    spliced = replacement("gpt2", "sae")
    with pytest.raises(InputError, match=r"those between autoencoders are the model's own"):
        graph_of(spliced)
    trace = model.trace(PROMPT)
    assert attribute_trace(model, trace, errors="linear").errors == "linear"


@pytest.mark.parametrize("response", ["frozen", "linear"])
def test_edges_are_what_the_mlps_do_less_what_features_answer(model, response, tmp_path):
    graph = graph_of(model, response=response)
    check = validate(model, graph, edges=12, controls=6)
    assert (check.errors, check.derivatives) == ("linear", True)
    assert check.frozen_error < 10 * NEAR[response]
    for claim in ("graph", "direct"):
        found = check.claim(claim)
        held = found[found["predicted"].abs() > 0.05 * found["predicted"].abs().max()]
        assert len(held) > 1
        ratio = np.asarray(held["measured"] / held["predicted"])
        assert np.mean((ratio > 0.5) & (ratio < 2)) > 0.8, claim
    assert Validation.load(check.save(tmp_path / "validation.json")).errors == "linear"


def test_rows_of_many_regimes_in_one_pass_come_to_the_same():
    model = replacement("llama", "clt")
    graph = graph_of(model)
    apart, together = (
        judge(model, Recording(model, model.trace(PROMPT)), _some_pairs(graph), Settings(errors="linear", together=how))
        for how in (False, True)
    )
    for column in ("frozen", "direct_measured", "graph_measured", "model_measured"):
        np.testing.assert_allclose(apart[column], together[column], rtol=0, atol=1e-9)


def _some_pairs(graph):
    rows = choose_edges(graph, 8).rows
    return Pairs.of([(graph.nodes[s], graph.nodes[t]) for s, t in rows[["s", "t"]].to_numpy()])


def test_features_that_became_error_leave_the_direct_claim_untested():
    model = replacement("llama", "clt")
    check = validate(model, graph_of(model, max_features=15), edges=6, controls=4)
    assert check.claims == ("graph", "model")
    assert np.isnan(check.frozen_error)
    check_identities(check, "float64")


def test_a_regime_of_errors_is_of_transcoders():
    model = replacement("gpt2", "sae")
    prompt = Recording(model, model.trace(PROMPT))
    with pytest.raises(InputError, match=r"mlps='errors' is for transcoders"):
        effects(model, prompt, [[]], Targets(model, prompt.trace, []), Regime(mlps="errors"))


@pytest.mark.parametrize("response", ["frozen", "linear"])
def test_totals_of_the_pocket_model_hold_in_it(pocket, response):
    prompt = "When Mary and John went to the store, John gave a drink to"
    pocket = ReplacementModel(pocket, load_dictionaries("pocket-plt"))
    graph = attribute(pocket, prompt, errors="linear", response=response, max_features=200)
    held = "frozen" if response == "frozen" else "live"
    sources, done = measured(pocket, graph, Regime(patterns=held, norms=held), 1e-2, prompt)
    kept = graph.mask(NodeKind.FEATURE)[sources]
    logits = int(graph.mask(NodeKind.LOGIT).sum())  # the last of the targets
    foreseen, done = totals(graph)[-logits:, sources[kept]].ravel(), done[-logits:, kept].ravel()
    found = agreement(foreseen, done)
    assert found.spearman > 0.99
    assert found.within > 0.95
