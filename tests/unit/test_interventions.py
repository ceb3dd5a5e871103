"""Changes and regimes: each regime against the run that defines it."""

import pytest
import torch

from circuitsae.attribution import attribute
from circuitsae.graph import Node, NodeKind
from circuitsae.interventions import node_change, random_change, reads_after
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


def test_a_feature_writes_its_decoder_rows(model, trace, nodes):
    node = nodes[NodeKind.FEATURE]
    change = node_change(model, trace, node)
    for layer in range(3):
        expected = torch.zeros(len(TOKENS), 16, dtype=torch.float64)
        if layer in model.dictionaries.write_layers(node.layer):
            row = model.dictionaries.decoder_rows(node.layer, torch.tensor([node.index]), layer)[0]
            expected[node.pos] = node.activation * row
        torch.testing.assert_close(change.mlp_out[layer], expected)
    assert change.embed.abs().max() == 0


def test_all_nodes_together_write_the_mlp_outputs(model, trace):
    graph = attribute(model, TOKENS)
    writers = [n for n in graph.nodes if n.kind in (NodeKind.FEATURE, NodeKind.ERROR)]
    total = sum(node_change(model, trace, n).mlp_out for n in writers)
    biases = torch.stack([model.dictionaries.decoder_bias(layer) for layer in range(3)])[:, None]
    torch.testing.assert_close((total + biases)[:, 1:], trace.frozen.writes.mlp_out[:, 1:])


def test_model_regime_is_the_model_with_the_sum_written_in(model, trace, nodes):
    change = -1.0 * node_change(model, trace, nodes[NodeKind.FEATURE])
    layers = range(3)
    edits = {Site(i, "mlp_out"): (lambda v, i=i: v + change.mlp_out[i]) for i in layers}
    _, at = model.model.run(TOKENS[None], [Site(i, "mlp_in") for i in layers], edits)
    (reads,) = reads_after(model, trace, [change], "model")
    torch.testing.assert_close(reads.mlp_in, torch.cat([at[Site(i, "mlp_in")] for i in layers]))


@pytest.mark.parametrize("regime", ["frozen", "replacement", "model"])
def test_no_change_changes_nothing(model, trace, nodes, regime):
    nothing = 0.0 * node_change(model, trace, nodes[NodeKind.FEATURE])
    (reads,) = reads_after(model, trace, [nothing], regime)
    torch.testing.assert_close(reads.mlp_in, trace.frozen.reads.mlp_in)
    torch.testing.assert_close(reads.final, trace.frozen.reads.final)


@pytest.mark.parametrize("regime", ["frozen", "replacement", "model"])
def test_a_batch_is_its_members(model, trace, regime):
    graph = attribute(model, TOKENS)
    changes = [node_change(model, trace, n) for n in graph.nodes if n.kind is NodeKind.FEATURE][:5]
    together = reads_after(model, trace, changes, regime)
    for change, reads in zip(changes, together, strict=True):
        (alone,) = reads_after(model, trace, [change], regime)
        torch.testing.assert_close(reads.final, alone.final)


@pytest.mark.parametrize("kind", [NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN])
def test_a_stand_in_has_the_size_and_place_of_the_original(model, trace, nodes, kind):
    node = nodes[kind]
    original = node_change(model, trace, node)
    stand_in = random_change(model, trace, node, torch.Generator().manual_seed(321))
    for ours, theirs in ((stand_in.embed, original.embed), (stand_in.mlp_out, original.mlp_out)):
        torch.testing.assert_close(ours.norm(dim=-1), theirs.norm(dim=-1))
    assert not torch.allclose(stand_in.mlp_out + stand_in.embed, original.mlp_out + original.embed)


def test_a_stand_in_is_every_other_feature_of_the_layer_and_never_the_feature_itself():
    model = ReplacementModel(
        random_model("gpt2", n_layers=1, d_model=16, dtype=torch.float64),
        random_dictionaries("plt", n_layers=1, d_model=16, features=3, dtype=torch.float64),
    )
    model.dictionaries.layers[0].b_enc.data += 10  # all are active
    trace = model.trace(TOKENS)
    rows = torch.nn.functional.normalize(model.dictionaries.decoder_rows(0, torch.arange(3), 0), dim=-1)
    rng = torch.Generator().manual_seed(0)
    for feature in range(3):
        node = Node(NodeKind.FEATURE, 0, 1, feature)
        stand_ins = [random_change(model, trace, node, rng).mlp_out[0, 1] for _ in range(40)]
        drawn = {int((torch.nn.functional.normalize(vector, dim=-1) @ rows.T).argmax()) for vector in stand_ins}
        assert drawn == {0, 1, 2} - {feature}


def test_a_layers_only_feature_has_a_random_vector_for_a_stand_in():
    model = ReplacementModel(
        random_model("gpt2", n_layers=1, d_model=16, dtype=torch.float64),
        random_dictionaries("plt", n_layers=1, d_model=16, features=1, dtype=torch.float64),
    )
    model.dictionaries.layers[0].b_enc.data += 10
    trace, node = model.trace(TOKENS), Node(NodeKind.FEATURE, 0, 1, 0)
    original, stand_in = node_change(model, trace, node), random_change(model, trace, node, torch.Generator())
    torch.testing.assert_close(stand_in.mlp_out.norm(dim=-1), original.mlp_out.norm(dim=-1))
    cosine = torch.cosine_similarity(stand_in.mlp_out[0, 1], original.mlp_out[0, 1], dim=0)
    assert abs(cosine) < 0.9


def test_what_cannot_be_changed_is_refused(model, trace, nodes):
    with pytest.raises(InputError, match="only features, errors and tokens"):
        node_change(model, trace, nodes[NodeKind.LOGIT])
    inactive = {(n[0], n[1], n[2]) for n in trace.features.index.tolist()}
    off = next(f for f in range(24) if (0, 1, f) not in inactive)
    with pytest.raises(InputError, match="not active on this prompt"):
        node_change(model, trace, Node(NodeKind.FEATURE, 0, 1, off))
