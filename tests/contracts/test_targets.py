"""Whatever a graph explains: its row says what the frozen model of the whole prompt does, in float64.

The oracle is dense and knows nothing of targets: the model's reads at a layer and position of the prompt with all its
tokens, times a vector that is written out here.
"""

import json
from typing import Any

import numpy as np
import pytest
import torch

from circuitsae.attribution import (
    Contrast,
    DirectionTarget,
    FeatureTarget,
    LogitTargets,
    TopLogits,
    attribute,
    attribute_pruned,
    attribute_trace,
    edge_heads,
)
from circuitsae.attribution.device_sweep import Memory
from circuitsae.graph import NodeKind, load_graph
from circuitsae.graph.exchange import FORMATS, read_graph, write_graph
from circuitsae.interventions import Intervention, Recording, Token, Zero, intervene, node_change, run_alternatives
from circuitsae.loading import load_dictionaries, load_model
from circuitsae.replacement import ReplacementModel
from circuitsae.validation import validate
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import FileFormatError, InputError
from transcoders.loading import random_model

TOKENS = torch.tensor([0, 11, 22, 33, 11, 7, 5])
AT = 4
"""The position that is explained; two tokens come after it."""
VECTOR = torch.randn(16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
KINDS = ("tokens", "contrast", "mean", "feature", "inside", "final")
MODELS = [("gpt2", "plt", True), ("llama", "clt", False)]
ROOMY = Memory(2**26, 2**26)


def _random(family: Any, kind: Any, skip: bool) -> ReplacementModel:
    model = random_model(family, n_layers=3, d_model=16, n_heads=4, d_vocab=64, dtype=torch.float64)
    read = random_dictionaries(kind, n_layers=3, d_model=16, features=24, skip=skip, dtype=torch.float64, seed=1)
    return ReplacementModel(model, read)


@pytest.fixture(scope="module", params=MODELS, ids=lambda p: f"{p[0]}-{p[1]}{'-skip' * p[2]}")
def model(request):
    return _random(*request.param)


@pytest.fixture(scope="module")
def whole(model):
    """The prompt with all its tokens."""
    return model.trace(TOKENS)


def _feature(trace, layer=2, pos=AT):
    """The most active feature at a place."""
    index, value = trace.features
    here = ((index[:, 0] == layer) & (index[:, 1] == pos)).nonzero()[:, 0]
    return int(index[here[value[here].argmax()], 2])


def _target(kind, trace, position=AT):
    match kind:
        case "tokens":
            return LogitTargets([3, 60], position=position)
        case "contrast":
            return Contrast(3, 60, position=position)
        case "mean":
            return Contrast([3, 5], [60, 9, 8], position=position)
        case "feature":
            return FeatureTarget(2, _feature(trace), position)
        case "inside":
            return DirectionTarget(VECTOR, "1.mlp_in", position, "probe")
    return DirectionTarget(VECTOR.tolist(), position=position)


def _read(kind, model, trace, by_layer, final):
    """What the targets read in many runs of the whole prompt, `[run target]`, without biases that are no edges."""
    logits = final[:, AT] @ model.model.W_U.detach()
    match kind:
        case "tokens":
            return logits[:, [3, 60]] - logits.mean(1, keepdim=True)
        case "contrast":
            return (logits[:, 3] - logits[:, 60])[:, None]
        case "mean":
            return (logits[:, [3, 5]].mean(1) - logits[:, [60, 9, 8]].mean(1))[:, None]
        case "feature":
            return by_layer[:, 2, AT] @ model.dictionaries.encoder_rows(2, torch.tensor([_feature(trace)])).detach().T
        case "inside":
            return (by_layer[:, 1, AT] @ VECTOR)[:, None]
    return (final[:, AT] @ VECTOR)[:, None]


def _tops(graph):
    return [row for row, node in enumerate(graph.nodes) if node.start > 0]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_sum_up_and_say_what_doubling_a_source_does(model, whole, kind):
    graph = attribute(model, TOKENS, targets=_target(kind, whole), engine="closed_form")
    tops = _tops(graph)
    clean = _read(kind, model, whole, whole.frozen.reads.by_layer[None], whole.frozen.reads.final[None])[0]
    stated = [graph.nodes[row].pre_activation - graph.nodes[row].bias for row in tops]
    b_U = [row for row, node in enumerate(graph.nodes) if node.id == "3.unembed.b"]
    added = torch.from_numpy(graph.weights[tops][:, b_U].toarray().sum(1))
    torch.testing.assert_close(torch.tensor(stated, dtype=torch.float64) - added, clean, rtol=1e-9, atol=1e-9)
    assert abs(graph.residual()).max() <= 1e-9 * max(abs(node.pre_activation) for node in graph.nodes if node.is_target)
    assert {node.pos for node in graph.nodes} <= {*range(-1, AT + 1)}
    below = max(graph.nodes[row].layer for row in tops)
    sources = [
        row for row, node in enumerate(graph.nodes)
        if node.kind in (NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN) and node.layer < below
    ]  # fmt: skip
    runs = [(Recording(model, whole), [node_change(model, whole, graph.nodes[row])]) for row in sources]
    edges = torch.from_numpy(graph.weights[tops][:, sources].toarray().T)
    assert abs(edges).max() > 1e-3
    with torch.no_grad():
        for chunk in run_alternatives(model, runs, "frozen"):
            moved = _read(kind, model, whole, chunk.by_layer, chunk.final) - clean
            torch.testing.assert_close(moved, edges[chunk.start : chunk.stop], rtol=1e-9, atol=1e-9)


def _assert_same(found, expected):
    assert [node.id for node in found.nodes] == [node.id for node in expected.nodes]
    assert abs(found.weights - expected.weights).max() <= 1e-12 * abs(expected.weights).max()
    np.testing.assert_allclose(found.influence, expected.influence, rtol=1e-9, atol=1e-12)
    if expected.past is not None:
        assert abs(found.past - expected.past).max() <= 1e-12 * abs(expected.weights).max()


@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_finds_the_same_graph(model, whole, kind, monkeypatch):
    targets = _target(kind, whole, position=AT - len(TOKENS))
    found = attribute(model, TOKENS, targets=targets, engine="closed_form")
    _assert_same(attribute(model, TOKENS, targets=targets, engine="autograd"), found)
    pruned, size = attribute_pruned(model, TOKENS, targets=targets, nodes=0.9, edges=0.95)
    few = attribute(model, TOKENS, targets=targets, max_features=5)
    monkeypatch.setattr("circuitsae.attribution.device_sweep.ON_DEVICE", frozenset({"cpu"}))
    monkeypatch.setattr(Memory, "of", lambda device: ROOMY)
    _assert_same(attribute(model, TOKENS, targets=targets), found)
    on_device, same = attribute_pruned(model, TOKENS, targets=targets, nodes=0.9, edges=0.95)
    _assert_same(on_device, pruned)
    _assert_same(pruned, found.prune(nodes=0.9, edges=0.95))
    assert size == same == (len(found.nodes), found.weights.nnz)
    assert [pruned.nodes[row].id for row in _tops(pruned)] == [found.nodes[row].id for row in _tops(found)]
    _assert_same(attribute(model, TOKENS, targets=targets, max_features=5), few)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_features_lose_nothing(model, whole, kind):
    targets = _target(kind, whole)
    full = attribute_trace(model, whole, targets=targets)
    for most, unexplained in ((3, None), (None, 0.2), (4, 0.0)):
        small = attribute(model, TOKENS, targets=targets, max_features=most, unexplained=unexplained)
        assert small.mask(NodeKind.FEATURE).sum() <= (most or full.mask(NodeKind.FEATURE).sum())
        assert abs(small.residual()).max() <= 1e-9 * abs(full.weights).max() * 10
        assert [small.nodes[row].id for row in _tops(small)] == [full.nodes[row].id for row in _tops(full)]


@pytest.mark.parametrize("kind", ["mean", "feature", "inside"])
def test_what_is_explained_comes_back_from_files(model, whole, kind, tmp_path):
    graph = attribute(model, TOKENS, targets=_target(kind, whole)).prune()
    graph.save(tmp_path / "native")
    graphs = {"native": load_graph(tmp_path / "native")}
    for name, form in FORMATS.items():
        graphs[name] = read_graph(write_graph(graph, tmp_path / f"graph{form.suffix}", format=name))
    (top,) = (node for node in graph.nodes if node.explained)
    for name, found in graphs.items():
        (same,) = (node for node in found.nodes if node.explained)
        assert repr(same) == repr(top), name
        kept = graph.mask(NodeKind.TOKEN, NodeKind.FEATURE, NodeKind.ERROR)
        assert found.influence[found.mask(NodeKind.TOKEN, NodeKind.FEATURE, NodeKind.ERROR)].tolist() == (
            graph.influence[kept].tolist()
        ), name


@pytest.mark.parametrize(
    "change",
    [
        {"terms": []}, {"terms": [[3, 1.0]]}, {"terms": [[3, 1.0, 2.0]]}, {"terms": [[-3, 1.0, 0.2]]},
        {"explained": "yes"}, {"explained": False}, {"vector": [1.0]}, {"terms": "all"},
    ],
    ids=str,
)  # fmt: skip
def test_a_target_that_makes_no_sense_is_refused(change, tmp_path, contrast):
    contrast.save(tmp_path)
    document = json.loads((tmp_path / "graph.json").read_text())
    (record,) = (record for record in document["nodes"] if record.get("explained"))
    record |= change
    (tmp_path / "graph.json").write_text(json.dumps(document))
    with pytest.raises(FileFormatError, match="does not hold a whole graph"):
        load_graph(tmp_path)


@pytest.fixture(scope="module")
def contrast():
    return attribute(_random("gpt2", "plt", False), TOKENS, targets=Contrast(3, 60)).prune()


def test_a_soft_cap_is_one_more_frozen_scale():
    model = _random("gemma2", "plt", False)
    graph, logits = attribute(model, TOKENS, targets=Contrast(3, 60)), model.trace(TOKENS).logits[-1]
    (row,) = _tops(graph)
    torch.testing.assert_close(float(logits[3] - logits[60]), graph.nodes[row].pre_activation, rtol=1e-12, atol=0)
    assert abs(graph.residual()[row]) <= 1e-9 * abs(graph.nodes[row].pre_activation)
    both = attribute(model, TOKENS, targets=LogitTargets([3, 60]))
    one, other = (both.weights[[both.position[f"logit.{token}@6"]]] for token in (3, 60))
    assert abs(graph.weights[[row]][:, :-1] - (one - other)[:, :-2]).max() <= 1e-12 * abs(one).max()


# the pocket model

PROMPT = "When John and Mary went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def pocket():
    dtype = torch.float64
    return ReplacementModel(load_model("pocket", dtype=dtype), load_dictionaries("pocket", dtype=dtype))


def test_mary_less_john_is_the_difference_of_their_graphs(pocket):
    found = attribute(pocket, PROMPT, targets=Contrast(" Mary", " John"))
    (top,) = (node for node in found.nodes if node.explained)
    assert (top.text, top.id) == ("·Mary − ·John", "logit.529-417@14")
    single = [attribute(pocket, PROMPT, targets=LogitTargets([token])) for token in (" Mary", " John")]
    for graph in single:
        assert [node.id for node in graph.nodes[:-1]] == [node.id for node in found.nodes[:-1]]
    expected = single[0].weights[-1:] - single[1].weights[-1:]
    assert abs(found.weights[-1:] - expected).max() <= 1e-12 * abs(expected).max()
    assert abs(found.weights[:-1] - single[0].weights[:-1]).max() == 0
    probabilities = [graph.nodes[-1].probability for graph in single]
    assert [term.probability for term in top.terms] == pytest.approx(probabilities, rel=1e-12)


@pytest.mark.parametrize("kind", ["contrast", "feature", "direction"])
def test_each_claim_is_measured_on_what_is_explained(pocket, kind):
    """The whole prompt is run with the source gone, and read where the graph's prompt ends, three tokens earlier."""
    trace, at = pocket.trace(PROMPT), 11
    vector = torch.randn(pocket.model.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    number = _feature(trace, pos=at)
    encoder = pocket.dictionaries.encoder_rows(2, torch.tensor([number])).detach()[0]
    mary, john = (pocket.model.token_id(token) for token in (" Mary", " John"))
    W_U = pocket.model.W_U.detach()
    targets, layer, read = {
        "contrast": (Contrast(mary, john, position=at), None, W_U[:, mary] - W_U[:, john]),
        "feature": (FeatureTarget(2, number, at), 2, encoder),
        "direction": (DirectionTarget(vector, "2.mlp_in", at), 2, vector),
    }[kind]
    graph = attribute(pocket, PROMPT, targets=targets)
    (top,) = (node for node in graph.nodes if node.explained)
    (found,) = validate(pocket, graph, edges=[f"tok@2 → {top.id}"], controls=10).edges.to_dict("records")
    weight = float(graph.weights[[graph.position[top.id]]][:, [graph.position["tok@2"]]].sum())
    assert found["direct_predicted"] == pytest.approx(-weight, rel=1e-9)
    for claim in ("graph", "direct", "model"):
        run = intervene(pocket, PROMPT, [Intervention(Token(2), Zero())], regime=claim)
        assert run.changed_reads is not None
        clean, changed = (
            (r.final if layer is None else r.by_layer[..., layer, :, :])[..., at, :].flatten() @ read
            for r in (run.clean_reads, run.changed_reads)
        )
        assert found[f"{claim}_measured"] == pytest.approx(float(changed - clean), rel=1e-6), claim


def test_an_edge_into_what_is_explained_passes_by_heads(pocket):
    graph = attribute(pocket, PROMPT, targets=Contrast(" Mary", " John"))
    (top,) = (node for node in graph.nodes if node.explained)
    source = graph.nodes[graph.position["tok@4"]]
    table = edge_heads(pocket, PROMPT, source, top)
    weight = float(graph.weights[[graph.position[top.id]]][:, [graph.position["tok@4"]]].sum())
    sums = np.bincount(table["layer"].to_numpy(), weights=table["weight"].to_numpy())
    np.testing.assert_allclose(sums, [weight] * 4, rtol=1e-9)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (TopLogits(position=15), "Position 15 is not in the prompt, which has 15 tokens"),
        (LogitTargets([" Mary"], position=-16), "Position -16 is not in the prompt"),
        (Contrast(" Mary", " Mary"), "needs tokens on both sides, and each only once"),
        (Contrast([" Mary", " Mary"], " John"), "each only once"),
        (Contrast([], " John"), "needs tokens on both sides"),
        (Contrast(" Mary", 10**6), "are no set of tokens of"),
        (FeatureTarget(2, 0, 3), r"Feature 2.0 is not active at position 3 \(·and\), .* in layer 2: 2\."),
        (FeatureTarget(9, 0), "there are layers 0 to 3"),
        (DirectionTarget([1.0, 2.0]), "has 2 numbers"),
        (DirectionTarget([0.0] * 128), "of which 0 are not 0"),
        (DirectionTarget([1.0] * 128, "2.resid_pre"), "0.mlp_in to 3.mlp_in"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_explained_is_refused_in_one_sentence(pocket, targets, said):
    with pytest.raises(InputError, match=said) as refused:
        attribute(pocket, PROMPT, targets=targets)
    assert "\n" not in str(refused.value)
