"""circuit-tracer's own graphs, in float64, of a random GPT-2 and Gemma 2 with dictionaries at various sites.

Written by benchmarks/interop/peer_circuit_tracer_graph.py; rows are targets, in its order: features, errors layer by
layer, tokens, logits.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from circuitsae.attribution import attribute
from circuitsae.replacement import ReplacementModel
from transcoders import load_dictionaries, load_model

ROOT = Path(__file__).parent / "attribution"
FAMILIES = ("gpt2", "gemma2")
CASES = {family: sorted(path.parent.name for path in (ROOT / family).glob("*/attribution.npz")) for family in FAMILIES}


@pytest.fixture(scope="module")
def models():
    return {family: load_model(ROOT / family / "model", dtype=torch.float64) for family in FAMILIES}


@pytest.mark.parametrize("decoders", ["memory", "mapped"])
@pytest.mark.parametrize("case", [f"{family}/{case}" for family, cases in CASES.items() for case in cases])
def test_adjacency_is_circuit_tracers(models, case, decoders):
    model = models[case.partition("/")[0]]
    reference = np.load(ROOT / case / "attribution.npz", allow_pickle=False)
    loaded = load_dictionaries(ROOT / case / "transcoders", dtype=torch.float64, decoders=decoders)
    graph = attribute(ReplacementModel(model, loaded), torch.tensor(reference["tokens"]))
    last = len(reference["tokens"]) - 1
    features = [f"{layer}.{feature}@{pos}" for layer, pos, feature in reference["active_features"]]
    errors = [f"{layer}.err@{pos}" for layer in range(model.n_layers) for pos in range(last + 1)]
    logits = [f"logit.{token}@{last}" for token in reference["logit_ids"]]
    ids = [*features, *errors, *(f"tok@{pos}" for pos in range(last + 1)), *logits]
    ours = {node.id: node.activation for node in graph.nodes if node.kind == "feature"}
    assert ours.keys() == set(features)
    activations = [ours[name] for name in features]
    np.testing.assert_allclose(activations, reference["activation_values"], atol=1e-5, rtol=1e-5)
    assert [node.index for node in graph.top_logits()] == reference["logit_ids"].tolist()
    # Their errors at position 0 are empty nodes; ours is part of the bias.
    dense = np.pad(graph.weights.toarray(), ((0, 1), (0, 1)))
    rows = [graph.position.get(name, -1) for name in ids]
    assert abs(dense[np.ix_(rows, rows)] - reference["adjacency"]).max() <= 1e-5
    assert abs(graph.residual()).max() < 1e-9
