"""circuit-tracer's own attribution of 12 tokens, on a random 3-layer GPT-2 with ReLU transcoders in its file format."""

import numpy as np
import pytest
import torch

from circuitsae.attribution import LogitTargets, attribute
from circuitsae.replacement import ReplacementModel
from transcoders import load_dictionaries, load_model


@pytest.fixture(scope="module")
def reference(shared):
    return np.load(shared / "references/gpt2-mini-plt/attribution.npz", allow_pickle=False)


@pytest.fixture(scope="module")
def graph(shared, reference):
    folder = shared / "references/gpt2-mini-plt"
    model = ReplacementModel(load_model(folder / "model"), load_dictionaries(folder / "transcoders"))
    return attribute(model, torch.tensor(reference["tokens"]))


@pytest.fixture(scope="module")
def ids(reference):
    """Our ids in circuit-tracer's order: features, errors layer by layer, tokens, logits. Bias nodes have no peer."""
    features = [f"{layer}.{feature}@{pos}" for layer, pos, feature in reference["active_features"]]
    errors = [f"{layer}.err@{pos}" for layer in range(3) for pos in range(12)]
    logits = [f"logit.{token}@11" for token in reference["logit_ids"]]
    return [*features, *errors, *(f"tok@{pos}" for pos in range(12)), *logits]


def _matrix(graph, ids):
    """Our weights in their order. Their errors at position 0 are empty nodes; ours is part of the bias."""
    dense = np.pad(graph.weights.toarray(), ((0, 1), (0, 1)))
    rows = [graph.position.get(name, -1) for name in ids]
    return dense[np.ix_(rows, rows)]


def test_the_same_features_are_active(graph, reference):
    ours = {node.id: node.activation for node in graph.nodes if node.kind == "feature"}
    theirs = {f"{layer}.{feature}@{pos}" for layer, pos, feature in reference["active_features"]}
    assert ours.keys() == theirs
    np.testing.assert_allclose(list(ours.values()), reference["activation_values"], atol=1e-5)


def test_the_same_logits_are_chosen(graph, reference):
    chosen = graph.top_logits()
    assert [node.index for node in chosen] == reference["logit_ids"].tolist()
    np.testing.assert_allclose([node.probability for node in chosen], reference["logit_probs"], atol=1e-6)


def test_adjacency_agrees(graph, reference, ids):
    assert abs(_matrix(graph, ids) - reference["adjacency"]).max() <= 1e-5


def test_node_influence_agrees(graph, reference, ids):
    influence = np.append(np.nan_to_num(graph.influence), 0.0)
    ours = influence[[graph.position.get(name, -1) for name in ids]]
    np.testing.assert_allclose(ours, reference["node_influence"], atol=1e-6)


def test_pruning_keeps_the_same_nodes_and_edges(graph, reference, ids):
    pruned = graph.prune(nodes=0.8, edges=0.98)
    assert [name in pruned.position for name in ids] == reference["node_mask_08"].tolist()
    assert np.array_equal(_matrix(pruned, ids) != 0, reference["edge_mask_098"])


def test_scores_agree(graph, reference):
    assert graph.scores.replacement == pytest.approx(float(reference["replacement_score"]), abs=1e-6)
    assert graph.scores.completeness == pytest.approx(float(reference["completeness_score"]), abs=1e-6)


def test_named_targets_are_the_top_ones(graph, shared, reference):
    folder = shared / "references/gpt2-mini-plt"
    model = ReplacementModel(load_model(folder / "model"), load_dictionaries(folder / "transcoders"))
    token = int(reference["logit_ids"][0])
    alone = attribute(model, torch.tensor(reference["tokens"]), targets=LogitTargets([token]))
    row = alone.position[f"logit.{token}@11"]
    expected = graph.weights[[graph.position[f"logit.{token}@11"]]].sum()
    assert alone.weights[[row]].sum() == pytest.approx(expected, rel=1e-5)
