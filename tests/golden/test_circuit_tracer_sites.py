"""circuit-tracer's own graphs of a random GPT-2 and Gemma 2, whose dictionaries read and write at various sites.

Written by benchmarks/interop/peer_circuit_tracer_graph.py in circuit-tracer's own environment, in float64.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from circuitsae.attribution import attribute
from circuitsae.replacement import ReplacementModel
from transcoders import load_dictionaries, load_model

CASES = Path(__file__).parent / "attribution"


NAMES = sorted(path.parent.relative_to(CASES).as_posix() for path in CASES.glob("*/*/attribution.npz"))


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    folder = CASES / request.param
    reference = np.load(folder / "attribution.npz", allow_pickle=False)
    model = load_model(folder.parent / "model", dtype="float64")
    replaced = ReplacementModel(model, load_dictionaries(folder / "transcoders", dtype="float64"))
    return attribute(replaced, torch.tensor(reference["tokens"])), reference


def test_the_same_features_are_active(case):
    graph, reference = case
    ours = {node.id: node.activation for node in graph.nodes if node.kind == "feature"}
    theirs = [f"{layer}.{feature}@{position}" for layer, position, feature in reference["active_features"]]
    assert ours.keys() == set(theirs)
    np.testing.assert_allclose([ours[name] for name in theirs], reference["activation_values"], atol=1e-6)


def test_the_same_logits_are_chosen(case):
    graph, reference = case
    chosen = graph.top_logits()
    assert [node.index for node in chosen] == reference["logit_ids"].tolist()
    np.testing.assert_allclose([node.probability for node in chosen], reference["logit_probs"], atol=1e-6)


def test_adjacency_agrees(case):
    """Rows are targets. At position 0 circuit-tracer has empty errors; what the MLP writes there is our bias."""
    graph, reference = case
    last = len(reference["tokens"]) - 1
    features = [f"{layer}.{feature}@{position}" for layer, position, feature in reference["active_features"]]
    errors = [f"{layer}.err@{position}" for layer in range(3) for position in range(last + 1)]
    tokens = [f"tok@{position}" for position in range(last + 1)]
    logits = [f"logit.{token}@{last}" for token in reference["logit_ids"]]
    rows = [graph.position.get(name, -1) for name in (*features, *errors, *tokens, *logits)]
    dense = np.pad(graph.weights.toarray(), ((0, 1), (0, 1)))
    assert abs(reference["adjacency"]).max() > 1
    assert abs(dense[np.ix_(rows, rows)] - reference["adjacency"]).max() <= 1e-5
