"""Several nodes removed together, against plain runs; targets in the order that they are asked for."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from circuitsae import validation
from circuitsae.attribution import LogitTargets, attribute
from circuitsae.graph import NodeKind
from circuitsae.interventions import Zero, for_node, intervene
from circuitsae.replacement import ReplacementModel
from circuitsae.validation import strongest_pairs
from circuitsae.validation.joint import _tables
from circuitsae.validation.measuring import Targets
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import InputError
from transcoders.loading import random_model

# Tables come back as Any: pandas' declared types are wider than what these hold.
joint_ablation: Any = validation.joint_ablation

TOKENS = torch.tensor([0, 11, 22, 33])


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
    after, before = outcome.changed_reads.by_layer[0, 0], outcome.clean_reads.by_layer[0]
    return float((after - before)[target.layer, target.pos] @ row)


def _node(graph, name):
    return graph.nodes[graph.position[name]]


def test_targets_are_read_in_the_order_of_the_nodes(model, graph):
    trace = model.trace(TOKENS)
    nodes = [node for node in graph.nodes if node.is_target][::-1]
    stated = [node.pre_activation - node.bias for node in nodes]
    np.testing.assert_allclose(Targets(model, trace, nodes).clean, stated, rtol=1e-9, atol=1e-9)


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
