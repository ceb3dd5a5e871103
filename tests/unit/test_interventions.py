"""Changes and regimes: each regime against the run that defines it."""

import pytest
import torch

from circuitsae.attribution import attribute
from circuitsae.graph import Node, NodeKind
from circuitsae.interventions import Contribution, node_change, reads_after
from circuitsae.replacement import ReplacementModel
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import InputError
from transcoders.loading import random_model
from transcoders.sites import Site

TOKENS = torch.tensor([0, 11, 22, 33])


@pytest.fixture(scope="module", params=["plt", "clt"])
def model(request):
    dictionaries = random_dictionaries(request.param, n_layers=3, d_model=16, features=24, dtype=torch.float64)
    return ReplacementModel(random_model("gpt2", n_layers=3, d_model=16, dtype=torch.float64), dictionaries)


@pytest.fixture(scope="module")
def trace(model):
    return model.trace(TOKENS)


@pytest.fixture(scope="module")
def nodes(model):
    graph = attribute(model, TOKENS)
    return {kind: next(n for n in graph.nodes if n.kind is kind) for kind in NodeKind}


def _dense(change: Contribution):
    """What is added to the embeddings and to the MLPs' outputs."""
    embed, out = torch.zeros(len(TOKENS), 16, dtype=torch.float64), torch.zeros(3, len(TOKENS), 16, dtype=torch.float64)
    for layer, vector in zip(change.layers, change.vectors, strict=True):
        (embed if layer < 0 else out[layer])[change.pos] += vector
    return embed, out


def test_a_feature_writes_its_decoder_rows(model, trace, nodes):
    node = nodes[NodeKind.FEATURE]
    embed, out = _dense(node_change(model, trace, node))
    for layer in range(3):
        expected = torch.zeros(len(TOKENS), 16, dtype=torch.float64)
        if layer in model.dictionaries.write_layers(node.layer):
            row = model.dictionaries.decoder_rows(node.layer, torch.tensor([node.index]), layer)[0]
            expected[node.pos] = node.activation * row
        torch.testing.assert_close(out[layer], expected)
    assert embed.abs().max() == 0


def test_all_nodes_together_write_the_mlp_outputs_and_the_embeddings(model, trace):
    graph = attribute(model, TOKENS)
    writers = [n for n in graph.nodes if n.kind in (NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN)]
    embeds, outs = zip(*(_dense(node_change(model, trace, n)) for n in writers), strict=True)
    biases = torch.stack([model.dictionaries.decoder_bias(layer) for layer in range(3)])[:, None]
    torch.testing.assert_close((sum(outs) + biases)[:, 1:], trace.frozen.writes.mlp_out[:, 1:])
    torch.testing.assert_close(sum(embeds), trace.frozen.writes.embed)


def test_model_regime_is_the_model_with_the_sum_written_in(model, trace, nodes):
    change = -0.7 * node_change(model, trace, nodes[NodeKind.FEATURE])
    _, out = _dense(change)
    layers = range(3)
    edits = {Site(i, "mlp_out"): (lambda v, i=i: v + out[i]) for i in layers}
    _, at = model.model.run(TOKENS[None], [Site(i, "mlp_in") for i in layers], edits)
    (reads,) = reads_after(model, trace, [change], "model")
    torch.testing.assert_close(reads.by_layer, torch.cat([at[Site(i, "mlp_in")] for i in layers]))


@pytest.mark.parametrize("regime", ["frozen", "linear", "graph", "direct", "replacement", "model"])
def test_no_change_changes_nothing(model, trace, nodes, regime):
    nothing = 0.0 * node_change(model, trace, nodes[NodeKind.FEATURE])
    (reads,) = reads_after(model, trace, [nothing], regime)
    torch.testing.assert_close(reads.by_layer, trace.frozen.reads.by_layer)
    torch.testing.assert_close(reads.final, trace.frozen.reads.final)


@pytest.mark.parametrize("regime", ["frozen", "linear", "graph", "direct", "replacement", "model"])
def test_a_batch_is_its_members(model, trace, regime):
    graph = attribute(model, TOKENS)
    changes = [node_change(model, trace, n) for n in graph.nodes if n.kind is NodeKind.FEATURE][:5]
    together = reads_after(model, trace, changes, regime)
    for change, reads in zip(changes, together, strict=True):
        (alone,) = reads_after(model, trace, [change], regime)
        torch.testing.assert_close(reads.final, alone.final)


def test_what_cannot_be_changed_is_refused(model, trace, nodes):
    with pytest.raises(InputError, match="only features, errors and tokens"):
        node_change(model, trace, nodes[NodeKind.LOGIT])
    inactive = {(n[0], n[1], n[2]) for n in trace.features.index.tolist()}
    off = next(f for f in range(24) if (0, 1, f) not in inactive)
    with pytest.raises(InputError, match="not active on this prompt"):
        node_change(model, trace, Node(NodeKind.FEATURE, 0, 1, off))
