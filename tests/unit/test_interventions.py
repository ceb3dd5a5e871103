"""Changes and regimes: each regime against the run that defines it."""

import pytest
import torch

from circuitsae.attribution import attribute
from circuitsae.graph import Node, NodeKind
from circuitsae.interventions import (
    REGIMES,
    Contribution,
    Error,
    Feature,
    Head,
    Intervention,
    Recording,
    Set,
    Stream,
    Zero,
    node_change,
    reads_after,
    run_alternatives,
    run_reads,
)
from circuitsae.replacement import ReplacementModel
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import InputError
from transcoders.loading import random_model
from transcoders.sites import Site

TOKENS = torch.tensor([0, 11, 22, 33])
CHANGED = (NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN)


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


@pytest.mark.parametrize("regime", REGIMES)
def test_what_is_read_is_that_of_whole_passes(model, trace, regime):
    changes = [[node_change(model, trace, node)] for node in attribute(model, TOKENS).nodes if node.kind in CHANGED]
    changes += [[Intervention(Feature(layer, 3), Set(1.5))] for layer in range(3)]
    changes += [[Intervention(Error(2), Zero()), Intervention(Head(1, 0), Zero())]]
    changes += [[Intervention(Stream(2, "resid_pre", 1), Zero())]]
    prompt, found = Recording(model, trace), {}
    for chunk in run_reads(model, prompt, changes, regime):
        found |= dict(zip(chunk.rows, zip(chunk.by_layer, chunk.final, strict=True), strict=True))
    for chunk in run_alternatives(model, [(prompt, change) for change in changes], regime):
        for row, *reads in zip(range(chunk.start, chunk.stop), chunk.by_layer, chunk.final, strict=True):
            torch.testing.assert_close(found.pop(row), tuple(reads))
    assert not found


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_a_pass_begins_at_the_first_block_that_changes(family):
    lm = random_model(family, n_layers=3, d_model=16, dtype=torch.float64)
    dictionaries = random_dictionaries("plt", n_layers=3, d_model=16, features=24, skip=True, dtype=torch.float64)
    model = ReplacementModel(lm, dictionaries)
    prompt = Recording(model, model.trace(TOKENS))
    assert sorted(prompt.streams) == [1, 2]
    ran = []
    for number, block in enumerate(lm.bridge.blocks):
        block.attn.register_forward_hook(lambda *_, number=number: ran.append(number))
    late = next(node for node in attribute(model, TOKENS).nodes if node.kind is NodeKind.ERROR and node.layer == 2)
    ran.clear()
    change = [node_change(model, prompt.trace, late)]
    (part,) = run_reads(model, prompt, [change], "graph")
    assert ran == [2]
    (whole,) = run_alternatives(model, [(prompt, change)], "graph")
    torch.testing.assert_close(part.final, whole.final)


@pytest.mark.parametrize("regime", REGIMES)
def test_mlps_whose_outputs_are_held_are_not_run(model, trace, nodes, regime):
    prompt, change = Recording(model, trace), [node_change(model, trace, nodes[NodeKind.TOKEN])]
    list(run_reads(model, prompt, [change], regime))  # what is found out once
    ran = []
    acts = [block.mlp.original_component.act for block in model.model.bridge.blocks]
    handles = [act.register_forward_hook(lambda *_, number=i: ran.append(number)) for i, act in enumerate(acts)]
    list(run_reads(model, prompt, [change], regime))
    for handle in handles:
        handle.remove()
    assert ran == ([] if REGIMES[regime].mlps in ("constant", "linear") else [0, 1, 2])


def test_what_cannot_be_changed_is_refused(model, trace, nodes):
    with pytest.raises(InputError, match="only features, errors and tokens"):
        node_change(model, trace, nodes[NodeKind.LOGIT])
    inactive = {(n[0], n[1], n[2]) for n in trace.features.index.tolist()}
    off = next(f for f in range(24) if (0, 1, f) not in inactive)
    with pytest.raises(InputError, match="not active on this prompt"):
        node_change(model, trace, Node(NodeKind.FEATURE, 0, 1, off))
