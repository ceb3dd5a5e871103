"""Validation beyond one prompt and one node: paraphrases, error budgets, joint ablations, intervals, surveys."""

import json
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from circuitsae import validation
from circuitsae.attribution import LogitTargets, attribute
from circuitsae.graph import Node, NodeKind
from circuitsae.interventions import Prompt, Regime, Zero, for_node, intervene
from circuitsae.replacement import ReplacementModel
from circuitsae.validation import agreement, paraphrases, strongest_pairs
from circuitsae.validation.budget import PARTS
from circuitsae.validation.joint import _tables
from circuitsae.validation.measuring import Targets, require_active
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import InputError
from transcoders.loading import random_model

# Tables come back as Any: pandas' declared types are wider than what these hold.
validate: Any = validation.validate
error_budget: Any = validation.error_budget
joint_ablation: Any = validation.joint_ablation
survey: Any = validation.survey
on_paraphrases: Any = paraphrases.on_paraphrases
intervals: Any = paraphrases.intervals

TOKENS = torch.tensor([0, 11, 22, 33])
OTHER = torch.tensor([0, 44, 22, 33])
LONGER = torch.tensor([0, 9, 11, 22, 33])


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    dictionaries = random_dictionaries("clt", n_layers=3, d_model=16, features=24, dtype=torch.float64)
    return ReplacementModel(random_model(request.param, n_layers=3, d_model=16, dtype=torch.float64), dictionaries)


@pytest.fixture(scope="module")
def graph(model):
    return attribute(model, TOKENS, targets=LogitTargets([1, 2]))


def _effect(model, tokens, nodes, target, regime) -> float:
    """The oracle: one plain run for one set of nodes, one target read with the dictionaries' own weights."""
    outcome: Any = intervene(model, tokens, [for_node(node, Zero()) for node in nodes], regime=regime)
    if target.kind is NodeKind.LOGIT:
        after, before = outcome.changed[0, 0, -1], outcome.clean[0, -1]
        return float((after - after.mean())[target.index] - (before - before.mean())[target.index])
    row = model.dictionaries.encoder_rows(target.layer, torch.tensor([target.index]))[0].detach()
    after, before = outcome.changed_reads.mlp_in[0, 0], outcome.clean_reads.mlp_in[0]
    return float((after - before)[target.layer, target.pos] @ row)


def _node(graph, name):
    return graph.nodes[graph.position[name]]


def test_every_edge_of_a_full_graph(model, graph):
    check = validate(model, graph, edges=None, regimes=("frozen",))
    usable = graph.mask(NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN)
    assert len(check.edges) == usable[graph.weights.tocoo().col].sum()
    np.testing.assert_allclose(check.edges["frozen"], check.edges["predicted"], rtol=1e-9, atol=1e-9)


def test_batched_and_one_by_one_are_the_same(model, graph):
    together, alone = (validate(model, graph, edges=30, controls=4, memory=size) for size in (2**28, 1))
    pd.testing.assert_frame_equal(together.edges, alone.edges, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("regime", ["replacement", "model"])
def test_measurements_are_plain_runs(model, graph, regime):
    check = validate(model, graph, edges=40, regimes=("frozen", "replacement", "model"), controls=2)
    column = "measured" if regime == "model" else regime
    for record in check.edges.iloc[[0, 7, 39]].to_dict("records"):
        ends = _node(graph, record["source"]), _node(graph, record["target"])
        assert record[column] == pytest.approx(_effect(model, TOKENS, ends[:1], ends[1], regime), abs=1e-9)
    np.testing.assert_allclose(check.edges["ratio"], check.edges["measured"] / check.edges["predicted"])


def test_targets_are_read_in_the_order_of_the_nodes(model, graph):
    trace = model.trace(TOKENS)
    nodes = [node for node in graph.nodes if node.is_target][::-1]
    stated = [node.pre_activation - node.bias for node in nodes]
    np.testing.assert_allclose(Targets(model, trace, nodes).clean, stated, rtol=1e-9, atol=1e-9)


# error budgets


def test_budget_parts_sum_to_the_miss_and_are_shapley_values(model, graph):
    check = validate(model, graph, edges=20, controls=0)
    budget = error_budget(model, graph, check.edges)
    np.testing.assert_allclose(budget[list(PARTS)].sum(axis=1), budget["miss"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(budget["miss"], check.edges["measured"] - check.edges["predicted"], atol=1e-9)
    record = budget.iloc[3]
    source, target = _node(graph, record["source"]), _node(graph, record["target"])

    @cache
    def measured(mlps, patterns, norms):
        regime = Regime(mlps=mlps, patterns=patterns, norms=norms)
        return _effect(model, TOKENS, [source], target, regime)

    added = {part: [] for part in PARTS}
    for order in permutations(PARTS):
        if order.index("features") > order.index("reconstruction"):
            continue
        state: Any = {"mlps": "constant", "patterns": "frozen", "norms": "frozen"}
        for part in order:
            change = {"features": ("mlps", "features"), "reconstruction": ("mlps", "live")}.get(part, (part, "live"))
            before, state = measured(**state), state | dict([change])
            added[part].append(measured(**state) - before)
    for part in PARTS:
        assert record[part] == pytest.approx(np.mean(added[part]), abs=1e-9)
    assert record["largest"] == max(PARTS, key=lambda part: abs(record[part]))


def test_first_layer_reads_miss_by_norms_and_patterns_only(model, graph):
    frame = validate(model, graph, edges=None, regimes=("frozen", "model"), controls=0).edges
    budget = error_budget(model, graph, frame[frame["target"].str.startswith("0.")].head(10))
    np.testing.assert_allclose(budget[["features", "reconstruction"]], 0, atol=1e-12)
    assert budget["norms"].abs().max() > 1e-6


def test_budget_beside_the_edges(model, graph):
    check = validate(model, graph, edges=12, controls=2, budget=3)
    misses = (check.edges["measured"] - check.edges["predicted"]).abs()
    assert len(check.budget) == 3
    assert check.budget["miss"].abs().min() >= misses.sort_values().iloc[-3] - 1e-12
    row = check.budget.iloc[0]
    edge = check.annotate(graph).to_networkx().edges[row["source"], row["target"]]
    assert edge["miss_norms"] == row["norms"]
    assert len(json.loads(json.dumps(check.to_json(), allow_nan=False))["budget"]) == 3


# paraphrases


def test_effects_on_a_paraphrase_are_those_of_its_own_graph(model, graph):
    check = validate(model, graph, edges=40, controls=0)
    spread = on_paraphrases(model, graph, check.edges, [TOKENS, OTHER], roles={})
    own = spread[spread["paraphrase"] == 0]
    np.testing.assert_allclose(own["predicted"].astype(float), check.edges["predicted"], atol=1e-9)
    np.testing.assert_allclose(own["measured"].astype(float), check.edges["measured"], atol=1e-9)
    there = attribute(model, OTHER, targets=LogitTargets([1, 2]))
    for record in spread[spread["paraphrase"] == 1].to_dict("records"):
        ends = there.position.get(record["source"]), there.position.get(record["target"])
        assert record["active"] == (ends[0] is not None)
        if ends[0] is None:
            assert record["predicted"] == record["measured"] == 0
        elif ends[1] is not None:
            assert record["predicted"] == pytest.approx(-there.weights[ends[1], ends[0]], abs=1e-9)
            nodes = there.nodes[ends[0]], there.nodes[ends[1]]
            assert record["measured"] == pytest.approx(_effect(model, OTHER, nodes[:1], nodes[1], "model"), abs=1e-9)


def test_roles_say_which_positions_correspond(model, graph):
    frame = validate(model, graph, edges=None, regimes=("frozen",)).edges
    frame = frame[frame["target"].str.startswith("logit") & frame["source"].str.startswith("tok")]
    shifted = Prompt(LONGER, {"A": 2, "B": 3})
    spread = on_paraphrases(model, graph, frame, [shifted], roles={"A": 1, "B": 2})
    assert set(spread["source"]) == {"tok@1", "tok@2"}  # positions 0 and 3 have no role, and the lengths differ
    there = attribute(model, LONGER, targets=LogitTargets([1, 2]))
    for record in spread.to_dict("records"):
        source = {"tok@1": "tok@2", "tok@2": "tok@3"}[record["source"]]
        target = record["target"].replace("@3", "@4")
        weight = there.weights[there.position[target], there.position[source]]
        assert record["predicted"] == pytest.approx(-weight, abs=1e-9)


def test_intervals_over_paraphrases(model, graph):
    check = validate(model, graph, edges=10, controls=2, paraphrases=[TOKENS, OTHER], roles={})
    frame = check.edges
    assert (frame["mean_measured_low"] <= frame["mean_measured"] + 1e-12).all()
    assert (frame["mean_measured"] <= frame["mean_measured_high"] + 1e-12).all()
    assert (frame["paraphrases"] >= 1).all()
    spread = pd.DataFrame(
        {"source": "a", "target": "b", "active": True, "predicted": [1.0, 3.0], "measured": [2.0, -2.0]}
    )
    (row,) = intervals(spread).to_dict("records")
    assert (row["kept_sign"], row["mean_measured"], row["mean_ratio"]) == (0.5, 0.0, 0.0)
    assert (row["mean_measured_low"], row["mean_measured_high"]) == (-2.0, 2.0)
    assert (row["mean_ratio_low"], row["mean_ratio_high"]) == (-2 / 3, 2.0)


# joint ablations


def _supernodes(graph):
    features = [node.id for node in graph.nodes if node.kind is NodeKind.FEATURE and node.layer < 2]
    return {"pair": features[:2], "three": [features[3], "1.err@2", "tok@3"]}


def test_in_the_frozen_regime_joint_effects_add_up(model, graph):
    found = joint_ablation(model, graph, _supernodes(graph), regime="frozen")
    np.testing.assert_allclose(found.groups["joint"], found.groups["sum"], atol=1e-9)
    np.testing.assert_allclose(found.groups["joint"], found.groups["predicted"], atol=1e-9)
    np.testing.assert_allclose(found.members["conditional"], found.members["single"], atol=1e-9)
    assert not found.groups["super_additive"].any()


def test_joint_and_conditional_effects_are_plain_runs(model, graph):
    groups = _supernodes(graph)
    found = joint_ablation(model, graph, groups, targets=["logit.2@3"])
    target = _node(graph, "logit.2@3")
    for group in found.groups.to_dict("records"):
        members = [_node(graph, name) for name in groups[group["group"]]]
        joint = _effect(model, TOKENS, members, target, "model")
        singles = [_effect(model, TOKENS, [node], target, "model") for node in members]
        assert group["joint"] == pytest.approx(joint, abs=1e-9)
        assert group["excess"] == pytest.approx(joint - sum(singles), abs=1e-9)
        without = _effect(model, TOKENS, members[1:], target, "model")
        first = found.members[(found.members["group"] == group["group"]) & (found.members["member"] == members[0].id)]
        assert first["conditional"].item() == pytest.approx(joint - without, abs=1e-9)
    json.dumps(found.to_json(), allow_nan=False)


def test_a_backup_is_super_additive():
    """Two sources that saturate one target: a hand-made table of runs."""
    runs = {frozenset("a"): [-0.1], frozenset("b"): [-0.1], frozenset("ab"): [-2.0]}
    found: Any = _tables({"ab": ["a", "b"]}, ["t"], {k: np.array(v) for k, v in runs.items()}, lambda s, t: 0.1)
    assert found.groups["super_additive"].item()
    assert found.groups["predicted"].item() == pytest.approx(-0.2)
    assert found.groups["excess"].item() == pytest.approx(-1.8)
    assert found.members["backed_up"].all()
    assert found.members["conditional"].tolist() == pytest.approx([-1.9, -1.9])


def test_strongest_pairs(graph):
    target = graph.top_logits()[0].id
    weights = np.abs(graph.weights[[graph.position[target]]].toarray()[0])
    pairs = strongest_pairs(graph, count=5)
    assert len(pairs) == 5
    usable = [i for i, node in enumerate(graph.nodes) if node.kind in ("feature", "error", "token")]
    best = sorted(usable, key=lambda i: -weights[i])[:2]
    assert {graph.position[name] for name in pairs[0]} == set(best)


@pytest.mark.parametrize(
    ("groups", "targets", "said"),
    [
        ([["tok@1"]], None, "two nodes or more"),
        ([["tok@1", "tok@9"]], None, "no node 'tok@9'"),
        ([["tok@1", "pos@1"]], None, r"cannot be removed|no node"),
        ([["tok@1", "tok@2"]], ["tok@3"], "no inputs to read"),
    ],
)
def test_groups_that_cannot_be_removed(model, graph, groups, targets, said):
    with pytest.raises(InputError, match=said):
        joint_ablation(model, graph, groups, targets=targets)


# statistics


def test_bootstrap_intervals_hold_the_figures():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(200)
    y = 2 * x + 0.3 * rng.standard_normal(200)
    found = agreement(x, y, bootstrap=300)
    for name, (low, high) in found.intervals.items():
        assert low <= getattr(found, name) <= high
    assert found.intervals["slope"][1] - found.intervals["slope"][0] < 0.2
    assert agreement(x, y).intervals == {}


def test_clusters_are_drawn_whole():
    x, y = np.tile([1.0, 2.0, 3.0], 4), np.repeat([1.0, -1.0], 6) * np.tile([1.0, 2.0, 3.0], 4)
    clusters = np.repeat(np.arange(4), 3)
    alone, together = (agreement(x, y, bootstrap=400, clusters=c) for c in (None, clusters))
    assert alone.intervals["sign"][0] > 0.1
    assert together.intervals["sign"] == (0.0, 1.0)


def test_a_survey_pools_prompts(model):
    """Through token ids, for random models have no tokenizer."""
    found = survey(model, {"one": [TOKENS, OTHER], "two": [TOKENS]}, edges=10, controls=3, nodes=0.95)
    assert found.tasks == ["one", "two"]
    alone = validate(
        model,
        attribute(model, TOKENS).prune(nodes=0.95),
        edges=10,
        regimes=("frozen", "replacement", "model"),
        controls=3,
    )
    mine = found.edges[found.edges["task"] == "two"].drop(columns=["task", "prompt"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, alone.edges, check_dtype=False)
    assert found.frozen_error < 1e-9
    table = found.agreement("measured", bootstrap=20).set_index("edges")
    assert table.loc["all", "n"] == len(found.edges) == len(found.budget)
    assert table.loc["all", "random_sign"] == pytest.approx(
        np.mean(np.sign(found.controls["predicted"].astype(float)) == np.sign(found.controls["measured"].astype(float)))
    )
    assert 1 <= len(found.worst(4)) <= 4
    assert not found.worst(4).duplicated(["source", "target", "miss"]).any()
    assert found.worst(1)["miss"].abs().item() == pytest.approx(found.budget["miss"].abs().max())
    assert found.verdicts()[["confirmed", "null", "reversed"]].to_numpy().sum() == len(found.edges)
    json.dumps(found.to_json(), allow_nan=False)


def test_nodes_that_are_not_active_are_refused(model, graph):
    with pytest.raises(InputError, match="not active in these dictionaries"):
        require_active(model.trace(TOKENS), [Node(NodeKind.FEATURE, 0, 1, 10**6)])
