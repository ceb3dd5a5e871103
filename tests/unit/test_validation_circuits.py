"""Circuits over a task: ranking, ablating everything else, faithfulness, completeness, minimality, shrinking."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from circuitsae.attribution import LogitTargets, attribute
from circuitsae.graph import NodeKind
from circuitsae.interventions import (
    Error,
    Feature,
    Features,
    Intervention,
    Mean,
    Means,
    Patch,
    Regime,
    Scale,
    Zero,
    for_node,
    intervene,
    logit_diff,
)
from circuitsae.replacement import ReplacementModel
from circuitsae.validation import (
    Circuit,
    PromptExample,
    PromptTask,
    Task,
    areas,
    completeness,
    faithfulness,
    graph_effects,
    minimal,
    minimality,
    random_circuits,
    rank_nodes,
)
from circuitsae.validation.ablation import Ablated, Kept
from circuitsae.validation.circuits import Ranking
from circuitsae.validation.curve import log_area, log_sizes
from circuitsae.validation.tasks import Cases, as_prompt
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import InputError
from transcoders.loading import random_model

FIRST = 1

KINDS: dict[str, Any] = {"gpt2": ("clt", False), "llama": ("plt", True)}
LAYERS, FEATURES = 3, 12


@pytest.fixture(scope="module", params=list(KINDS))
def model(request):
    kind, skip = KINDS[request.param]
    dictionaries = random_dictionaries(
        kind, n_layers=LAYERS, d_model=16, features=FEATURES, dtype=torch.float64, skip=skip, seed=2
    )
    return ReplacementModel(random_model(request.param, n_layers=LAYERS, d_model=16, dtype=torch.float64), dictionaries)


@pytest.fixture(scope="module")
def task():
    """Two templates; A, B and END are roles, the second template is longer and has one position without a role."""
    metric = logit_diff(5, 9)
    short = [
        PromptExample(torch.tensor([0, a, b, 7]), metric, {"A": 1, "B": 2, "END": 3}, "short")
        for a, b in ((11, 22), (12, 23), (13, 24))
    ]
    long = [
        PromptExample(torch.tensor([0, a, 30, b, 7]), metric, {"A": 1, "B": 3, "END": -1}, "long")
        for a, b in ((14, 25), (15, 26))
    ]
    return PromptTask([*short, *long], "test")


@pytest.fixture(scope="module")
def mean_ablated(model, task):
    return Ablated(Cases(model, task), "mean")


@pytest.fixture(scope="module")
def ranking(model, task):
    return rank_nodes(model, task)


def _everything(length):
    index = [(layer, pos, f) for layer in range(LAYERS) for pos in range(FIRST, length) for f in range(FEATURES)]
    return torch.tensor(index)


def _oracle(model, task, number, inside, operation, errors_inside=None, regime: Any = "replacement"):
    """Every feature outside changed one intervention each, through the intervention engine."""
    example = task.examples[number]
    length = len(example.prompt)
    index = _everything(length)
    where = {(f.layer, example.roles[f.at] % length, f.index) for f in inside if isinstance(f, Feature)}
    kept = {(e.layer, example.roles[e.at] % length) for e in inside if isinstance(e, Error)}
    out = torch.tensor([row for row in index.tolist() if tuple(row) not in where])
    changes = [Intervention(Features(out), operation)]
    changes += [
        Intervention(Error(layer, pos), operation)
        for layer in range(LAYERS)
        for pos in range(FIRST, length)
        if (layer, pos) not in (kept if errors_inside is None else errors_inside)
    ]
    outcome = intervene(model, as_prompt(example), changes, regime=regime)
    return float(outcome.after(example.measure)[0, 0])


INSIDE = (Feature(0, 3, "A"), Feature(1, 5, "END"), Error(1, "B"), Feature(2, 0, "END"), Feature(0, 7, "B"))


@pytest.mark.parametrize("regime", ["replacement", "model", "graph"])
@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_ablating_everything_else_is_many_interventions(model, task, ablation, regime):
    found = Ablated(Cases(model, task), ablation, regime=regime).metric([Kept(()), Kept(INSIDE)])
    means = Means.over(model, [as_prompt(e) for e in task.examples], by="role")
    operation = Mean(means) if ablation == "mean" else Zero()
    for number in (0, 4):
        for row, inside in enumerate([(), INSIDE]):
            expected = _oracle(model, task, number, inside, operation, regime=regime)
            assert found[row, number] == pytest.approx(expected, abs=1e-9)


def test_resampling_takes_another_prompt_of_the_template(model, task):
    found = Ablated(Cases(model, task), "resample").metric([Kept(INSIDE)])[0]
    other = _oracle(model, task, 4, INSIDE, Patch(task.examples[3].prompt))
    assert found[4] == pytest.approx(other, abs=1e-9)
    choices = [_oracle(model, task, 0, INSIDE, Patch(task.examples[i].prompt)) for i in (1, 2)]
    assert min(abs(found[0] - choice) for choice in choices) < 1e-9


def test_all_but_some_nodes(model, task):
    ablated = Ablated(Cases(model, task), "zero")
    found = ablated.metric([Kept((), all_but=True), Kept(INSIDE, all_but=True)])
    np.testing.assert_allclose(found[0], ablated.clean(), atol=1e-9)
    changes = [Intervention(node, Zero()) for node in INSIDE]
    outcome = intervene(model, as_prompt(task.examples[1]), changes, regime="replacement")
    assert found[1, 1] == pytest.approx(float(outcome.after(task.examples[1].measure)[0, 0]), abs=1e-9)


def test_error_nodes_can_all_stay_or_all_go(model, task):
    places = {(layer, pos) for layer in range(LAYERS) for pos in range(FIRST, 4)}
    cases: Any = (("keep", places), ("ablate", set()))
    for errors, inside in cases:
        found = Ablated(Cases(model, task), "zero", errors=errors).metric([Kept(INSIDE)])[0, 0]
        assert found == pytest.approx(_oracle(model, task, 0, INSIDE, Zero(), inside), abs=1e-9)


def test_batches_do_not_matter(model, task):
    circuits = [Kept(()), Kept(INSIDE), Kept(INSIDE[:2], all_but=True)]
    for regime in ("replacement", "graph"):
        one, many = (Ablated(Cases(model, task), regime=regime, memory=m).metric(circuits) for m in (1, 2**28))
        np.testing.assert_allclose(one, many, atol=1e-12)


# ranking


def test_effects_in_a_graph_are_the_derivatives_of_the_frozen_replacement_model(model):
    """E_s = dm/dα at α = 1 of node s scaled by α, with attention and norms frozen and features recomputed."""
    tokens, metric = torch.tensor([0, 11, 22, 7]), logit_diff(5, 9)
    graph = attribute(model, tokens, targets=LogitTargets([5, 9]))
    total = graph_effects(graph, {5: 1.0, 9: -1.0})
    rows = [i for i, n in enumerate(graph.nodes) if n.kind in (NodeKind.FEATURE, NodeKind.ERROR)]
    step = 1e-7
    changes = [[for_node(graph.nodes[row], Scale(1 + step))] for row in rows]
    outcome = intervene(model, tokens, changes, regime="frozen-replacement")
    np.testing.assert_allclose(total[rows], outcome.effect(metric)[0] / step, rtol=1e-5, atol=1e-6)


def test_a_ranking_joins_nodes_by_role(model, task, ranking):
    assert ranking.scores.shape == (5, len(ranking.nodes))
    example = task.examples[3]  # the longer template
    graph = attribute(model, example.prompt, targets=LogitTargets([5, 9]))
    total = graph_effects(graph, {5: 1.0, 9: -1.0})
    role_at = {1: "A", 2: -3, 3: "B", 4: "END"}
    for row, node in enumerate(graph.nodes):
        if node.kind is NodeKind.FEATURE:
            column = ranking.nodes.index(Feature(node.layer, node.index, role_at[node.pos]))
            assert ranking.scores[3, column] == pytest.approx(total[row], abs=1e-9)
    scores = np.abs(ranking.scores).mean(0)
    assert list(ranking.circuit().scores) == sorted(scores.tolist(), reverse=True)
    assert ranking.circuit(5, signed=True).scores[0] == pytest.approx(ranking.scores.mean(0).max())


def test_a_metric_that_ignores_the_logits_is_refused(model):
    flat = PromptTask([PromptExample(torch.tensor([0, 1, 2]), lambda logits: logits.sum(-1) * 0)])
    with pytest.raises(InputError, match="does not depend on the logits"):
        rank_nodes(model, flat)


def test_stability_of_agreeing_and_of_disagreeing_examples():
    nodes = tuple(Feature(0, i, "A") for i in range(4))
    same = Ranking(nodes, np.tile([4.0, 3.0, 0.2, 0.1], (6, 1)))
    stable = same.stability(2)
    assert stable.mean == 1
    assert stable.frame()["frequency"].tolist() == [1.0, 1.0]
    apart = Ranking(nodes, np.eye(4))
    assert apart.stability(2, resamples=40).mean < 0.7
    with pytest.raises(InputError, match="4 nodes"):
        same.stability(5)


# faithfulness


def test_a_curve_ends_at_one_and_starts_at_zero(model, task, ranking):
    """Ablated to zero, features that never come on do not matter: all nodes ever active are the model, or nearly."""
    assert isinstance(task, Task)
    everything = Circuit.of([f"{layer}.{i}" for layer in range(LAYERS) for i in range(FEATURES)])
    everything = Circuit((*everything.nodes, *(Error(layer) for layer in range(LAYERS))))
    curve = faithfulness(model, everything, task, sizes=[0, len(everything)])
    np.testing.assert_allclose(curve.f, [0, 1], atol=1e-9)
    np.testing.assert_allclose(curve.per_example, [[0] * 5, [1] * 5], atol=1e-9)
    np.testing.assert_allclose(curve.metric[1], curve.full, atol=1e-9)


def test_a_curve_over_a_ranking(model, task, ranking, mean_ablated):
    circuit = ranking.circuit(24)
    curve = faithfulness(model, circuit, task)
    assert curve.sizes == tuple(log_sizes(24))
    alone = mean_ablated.metric([Kept(circuit.first(curve.sizes[4]).nodes)])
    np.testing.assert_allclose(curve.metric[4], alone[0], atol=1e-12)
    base, full = curve.empty.mean(), curve.full.mean()
    np.testing.assert_allclose(curve.f, (curve.metric.mean(1) - base) / (full - base))
    frame: Any = curve.frame()
    assert (frame["features"] + frame["errors"] == frame["nodes"]).all()
    assert (frame["f_low"] <= frame["f_high"]).all()
    assert len(curve.examples_frame()) == 5 * len(curve.sizes)
    json.dumps(curve.to_json(), allow_nan=False)


def test_a_graph_is_a_circuit_in_the_roles_of_its_prompt(model, task):
    example = task.examples[0]
    graph = attribute(model, example.prompt, targets=LogitTargets([5, 9])).prune(nodes=0.9)
    curve = faithfulness(model, graph, task, sizes=[1])
    ats = {node.at for node in curve.circuit.nodes}
    assert ats <= {"A", "B", "END"}
    strongest = graph.nodes_frame().query("kind in ('feature', 'error')").sort_values("influence", ascending=False)
    assert len(curve.circuit) == len(strongest)
    assert curve.circuit.scores[0] == strongest["influence"].iloc[0]


def test_areas_over_the_logarithm():
    assert log_area([1, 10, 100], np.array([0.0, 1.0, 1.0])) == pytest.approx(0.75)
    assert log_area([0, 1, 100], np.array([9.0, 0.0, 1.0])) == pytest.approx(0.5)
    assert log_area([4], np.array([0.3])) == 0.3
    assert log_sizes(1) == [1]
    assert log_sizes(1000)[0] == 1
    assert log_sizes(1000)[-1] == 1000


def test_random_circuits_have_as_many_nodes_of_each_layer(model, task, ranking):
    null = random_circuits(model, ranking.circuit(6), ranking, task, count=8)
    whole = faithfulness(model, ranking.circuit(6), task, sizes=[6])
    assert null.f == pytest.approx(whole.f[0])
    assert len(null.random) == 8
    assert null.above == np.mean(null.random < null.f)
    with pytest.raises(InputError, match="too few nodes"):
        random_circuits(model, Circuit((Feature(0, 1, "nowhere"),)), Ranking((), np.zeros((5, 0))), task)


def test_the_regime_reaches_every_figure(model, task, ranking):
    circuit = ranking.circuit(6)
    ablated = Ablated(Cases(model, task), regime="model")
    (f,) = _f(ablated, [Kept(circuit.nodes)])
    curve = faithfulness(model, circuit, task, sizes=[6], regime="model")
    assert curve.f[0] == pytest.approx(f)
    assert curve.to_json()["regime"] == "model"
    assert random_circuits(model, circuit, ranking, task, count=1, regime="model").f == pytest.approx(f)
    table: Any = completeness(model, circuit, task, random=0, greedy=0, regime="model").subsets
    assert table["circuit"].iloc[0] == pytest.approx(f)
    least: Any = minimality(model, circuit.first(1), task, random=0, regime="model").nodes
    assert least["score"].iloc[0] == pytest.approx(abs(_f(ablated, [Kept(circuit.nodes[:1])])[0]))
    own = faithfulness(model, circuit, task, sizes=[6], regime=Regime(norms="frozen"))
    assert own.to_json()["regime"]["norms"] == "frozen"
    assert own.f[0] != pytest.approx(f, abs=1e-6)


def test_both_areas_of_a_ranking(model, task, ranking):
    """CPR is under f of the nodes of largest mean effect, CMD under |1 − f| of those of largest mean |effect|."""
    found = areas(model, ranking, task, count=20)
    towards = 1 if found.signed.full.mean() > found.signed.empty.mean() else -1
    signed = Ranking(ranking.nodes, towards * ranking.scores).circuit(20, signed=True)
    one, other = faithfulness(model, signed, task), faithfulness(model, ranking.circuit(20), task)
    assert found.cpr == pytest.approx(log_area(log_sizes(20), one.f))
    assert found.cmd == pytest.approx(log_area(log_sizes(20), np.abs(1 - other.f)))
    frame: Any = found.frame()
    assert frame.groupby("ranking").size().to_dict() == {"absolute": len(other.sizes), "signed": len(one.sizes)}
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["cpr"] == pytest.approx(found.cpr)


def test_signed_nodes_move_the_metric_towards_the_models(model, task, ranking):
    """Of the opposite metric the same nodes are best, for f is the same."""
    opposite = PromptTask([PromptExample(e.prompt, logit_diff(9, 5), e.roles, e.template) for e in task.examples])
    turned = Ranking(ranking.nodes, -ranking.scores)
    one, other = areas(model, ranking, task, count=9), areas(model, turned, opposite, count=9)
    assert one.signed.circuit.ids == other.signed.circuit.ids
    assert other.cpr == pytest.approx(one.cpr)


def test_areas_are_over_nodes_that_are_somewhere(model, task, ranking):
    nowhere = tuple(Feature(0, i, "NOBODY") for i in range(3))
    circuit = Circuit((ranking.circuit(1).nodes[0], *nowhere, *ranking.circuit(3).nodes[1:], Error(0)))
    curve = faithfulness(model, circuit, task, sizes=[0, 1, 4, 6, 7])
    assert curve.realised == (0, 1, 1, 3, 4)
    assert faithfulness(model, circuit, task, sizes=[7], errors="ablate").realised == (
        3 - sum(isinstance(node, Error) for node in ranking.circuit(3).nodes),
    )


# completeness and minimality


def _f(ablated, circuits):
    found, full = ablated.metric([Kept(()), *circuits]).mean(1), ablated.clean().mean()
    return (found[1:] - found[0]) / (full - found[0])


def test_completeness_compares_with_the_model_without_the_same_nodes(model, task, ranking, mean_ablated):
    circuit = ranking.circuit(6)
    found = completeness(model, circuit, task, random=3, greedy=2, candidates=3)
    table: Any = found.subsets
    assert set(table["how"]) == {"none", "class", "random", "greedy"}
    assert table["model"].iloc[0] == pytest.approx(1)
    for row in (0, 1, len(table) - 1):
        k = found.chosen[row]
        left = Kept(tuple(node for node in circuit.nodes if node not in k))
        circuit_f, model_f = _f(mean_ablated, [left, Kept(k, all_but=True)])
        assert table["circuit"].iloc[row] == pytest.approx(circuit_f, abs=1e-9)
        assert table["gap"].iloc[row] == pytest.approx(abs(circuit_f - model_f), abs=1e-9)
    greedy = table[table["how"] == "greedy"]
    assert greedy["size"].tolist() == [1, 2]
    assert found.worst == table["gap"].max()
    json.dumps(found.to_json(), allow_nan=False)


def test_minimality_finds_the_node_that_does_nothing(model, task, ranking, mean_ablated):
    idle = next(
        Feature(2, i, "A") for i in range(FEATURES) if Feature(2, i, "A") not in ranking.nodes
    )  # never active there
    circuit = Circuit((*ranking.circuit(4).nodes, idle))
    table: Any = minimality(model, circuit, task, random=2).nodes.set_index("id")
    assert len(table) == 5
    assert table["score"].idxmin() == circuit.ids[-1]
    single = _f(mean_ablated, [Kept(circuit.nodes), Kept(circuit.nodes[1:])])
    assert table.loc[circuit.ids[0], "score"] >= abs(single[0] - single[1]) - 1e-9


# shrinking


def _somewhat_faithful(model, task, ranking, regime):
    """A circuit with |1 − f| < ½, and how f is measured; random weights make most circuits worse than none."""
    options: Any = ((8, "zero"), (8, "mean"), (6, "zero"))
    for count, ablation in options:
        ablated = Ablated(Cases(model, task), ablation, regime=regime)
        (f,) = _f(ablated, [Kept(ranking.circuit(count).nodes)])
        if abs(1 - f) < 0.5:
            return ranking.circuit(count), ablated, f
    raise AssertionError(f"no circuit is anywhere near faithful in the regime {regime}")


@pytest.mark.parametrize("regime", ["replacement", "model", "graph"])
def test_what_is_left_is_minimal_and_each_step_the_best(model, task, ranking, regime):
    """Step by step against scoring every circuit with one node less."""
    circuit, ablated, start = _somewhat_faithful(model, task, ranking, regime)
    found = minimal(model, circuit, task, tolerance=0.3, ablation=ablated.ablation, regime=regime)
    steps: Any = found.steps
    assert len(steps) > 1
    left, limit = list(circuit.nodes), abs(1 - start) + 0.3
    for removed, f in zip(steps["removed"][1:], steps["f"][1:], strict=True):
        options = _f(ablated, [Kept(tuple(v for v in left if v != node)) for node in left])
        best = int(np.argmin(np.abs(1 - options)))
        assert removed == Circuit((left[best],)).ids[0]
        assert f == pytest.approx(options[best], abs=1e-9)
        assert abs(1 - f) <= limit
        left.pop(best)
    assert set(found.circuit.nodes) == set(left)
    needed: Any = found.nodes.set_index("id")["without"]
    for node in left:
        (without,) = _f(ablated, [Kept(tuple(v for v in left if v != node))])
        assert needed[Circuit((node,)).ids[0]] == pytest.approx(without, abs=1e-9)
        assert abs(1 - without) > limit
    assert steps["nodes"].tolist() == list(range(len(circuit), len(left) - 1, -1))
    assert found.f == pytest.approx(steps["f"].iloc[-1])
    assert found.about["regime"] == regime
    json.dumps(found.to_json(), allow_nan=False)


def test_beside_a_minimal_circuit_stands_its_completeness(model, task, ranking):
    found = minimal(model, ranking.circuit(12), task, tolerance=0.05, candidates=3)
    apart = completeness(model, found.circuit, task)
    assert found.completeness.chosen == apart.chosen
    assert found.completeness.worst == pytest.approx(apart.worst)
    assert found.circuit.scores == tuple(
        ranking.circuit(12).scores[ranking.circuit(12).nodes.index(node)] for node in found.circuit.nodes
    )


# wrong use


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda m, t: faithfulness(m, Circuit(()), t), "no features or error nodes"),
        (lambda m, t: faithfulness(m, ["0.1@A"], t, sizes=[2]), "give sizes from 0"),
        (lambda m, t: faithfulness(m, ["0.head1@A"], t), "no node of a feature circuit"),
        (lambda m, t: faithfulness(m, ["0.1@A", "0.1@A"], t), "names a node twice"),
        (lambda m, t: faithfulness(m, ["0.1@A"], PromptTask([])), "no examples"),
        (lambda m, t: faithfulness(m, ["0.1@A"], PromptTask(t.examples[:1]), ablation="resample"), "no other one"),
        (lambda m, t: completeness(m, Circuit(()), t), "empty"),
        (lambda m, t: minimal(m, Circuit(()), t), "empty"),
        (lambda m, t: minimal(m, Circuit.of(["0.1@A"]), t, candidates=0), "candidates=0 leaves nothing"),
        (lambda m, t: minimal(m, Circuit.of(["0.1@A"]), t, tolerance=-0.1), "tolerance=-0.1"),
        (lambda m, t: minimal(m, Circuit.of(["0.1@A"]), t, tolerance=1.0), "tolerance=1.0"),
    ],
)
def test_wrong_use_is_said(model, task, what, said):
    with pytest.raises(InputError, match=said):
        what(model, task)


def test_features_that_answer_linearly_cannot_be_ablated(model, task):
    with pytest.raises(InputError, match="frozen-replacement"):
        Ablated(Cases(model, task), regime="linear")
