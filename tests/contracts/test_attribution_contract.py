"""Every kind of dictionary on every family of models: the graph says what the frozen model does, in float64.

The oracle is the frozen model itself: it is run again with one source doubled, and every target is read.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from circuitsae.attribution import LogitTargets, attribute, attribute_pruned
from circuitsae.attribution.nodes import TargetVectors, centred_columns, feature_targets, logit_targets
from circuitsae.frozen import FrozenModel
from circuitsae.graph import NodeKind
from circuitsae.interventions import Recording, node_change, run_alternatives
from circuitsae.loading import load_dictionaries, load_model
from circuitsae.replacement import ReplacementModel
from transcoders.dictionaries import Transcoder, TranscoderSet, random_dictionaries
from transcoders.errors import DictionaryError
from transcoders.loading import random_model
from transcoders.sites import MLP_READS, MLP_WRITES, Site

KINDS = {
    "plt": {"kind": "plt"},
    "plt-jumprelu": {"kind": "plt", "activation": "jumprelu"},
    "plt-topk": {"kind": "plt", "activation": "topk"},
    "plt-skip": {"kind": "plt", "skip": True},
    "clt": {"kind": "clt"},
    "clt-jumprelu": {"kind": "clt", "activation": "jumprelu"},
    "clt-skip": {"kind": "clt", "skip": True},
}
SITES = {
    "plt-normed": {"kind": "plt", "read": "mlp_normed", "write": "mlp_added", "skip": True},
    "clt-mid": {"kind": "clt", "read": "resid_mid", "write": "mlp_added", "skip": True},
}
WITH_BOS = torch.tensor([0, 11, 22, 33, 11])
WITHOUT_BOS = torch.tensor([7, 11, 22, 33, 11])
TARGETS = LogitTargets([3, 5, 60])


THOROUGH = ("gpt2", "llama")
OTHERS = (
    "opt", "gpt_neo", "gptj", "gpt_neox", "bloom", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3", "phi",
    "olmo2",
)  # fmt: skip
"""The families of `benchmarks/results/families.md` beyond these pass tests/contracts/test_families.py."""
CASES = [(family, kind) for family in THOROUGH for kind in KINDS]
CASES += [(family, kind) for family in OTHERS for kind in ("plt", "clt", "clt-skip")]
CASES += [("gpt2", "plt-normed"), ("gemma2", "plt-normed"), ("gemma3", "clt-mid"), ("llama", "clt-mid")]
CASES += [("pocket", "clt"), ("pocket", "plt")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def model(request):
    family, kind = request.param
    if family == "pocket":
        loaded = load_dictionaries(f"pocket-{kind}", dtype=torch.float64)
        return ReplacementModel(load_model("pocket", dtype=torch.float64), loaded)
    language_model = random_model(family, n_layers=3, d_model=16, n_heads=4, d_vocab=64, dtype=torch.float64)
    features = 24 if family in THOROUGH else 8
    options = (KINDS | SITES)[kind]
    return ReplacementModel(language_model, _random(**options, features=features, first=2 if kind in SITES else 1))


def _random(first=1, **options):
    dictionaries = random_dictionaries(**{"n_layers": 3, "d_model": 16, "dtype": torch.float64, "seed": 1} | options)
    dictionaries.provenance = replace(dictionaries.provenance, first=first)
    return dictionaries


@pytest.fixture(scope="module", params=[WITH_BOS, WITHOUT_BOS], ids=["bos", "no-bos"])
def tokens(request):
    return request.param


@pytest.fixture(scope="module")
def graph(model, tokens):
    return attribute(model, tokens, targets=TARGETS, engine="closed_form")


@pytest.fixture(scope="module")
def trace(model, tokens):
    return model.trace(tokens)


@pytest.fixture(scope="module")
def values(model, trace, graph):
    return _values(model, trace, graph)


def _values(model, trace, graph):
    """The pre-activation of every target of the graph, in the order of its nodes, as a function of what is read.

    Of many runs at once, `[run target]`: one matrix product for each place that is read.
    """
    token = torch.tensor([n.index for n in graph.nodes if n.kind is NodeKind.LOGIT])
    features = feature_targets(model, trace, torch.arange(len(trace.features.value)))
    targets = TargetVectors.join(features, logit_targets(trace, token))
    places, place_of = torch.stack([targets.layer, targets.pos], dim=1).unique(dim=0, return_inverse=True)

    def of(mlp_in, final):
        # Read each time: one of the tests doubles the parameters.
        b_U = centred_columns(model.model.bridge.unembed.b_U.detach(), trace, token)
        constant = torch.nn.functional.pad(b_U, (len(features.layer), 0))
        stacked = torch.cat([mlp_in, final[:, None]], dim=1)
        read = stacked.new_empty(len(stacked), len(targets.layer))
        for number, (layer, pos) in enumerate(places.tolist()):
            here = place_of == number
            read[:, here] = stacked[:, layer, pos] @ targets.vector[here].T
        return read + constant

    return of


def _values_of(values, reads):
    return values(reads.by_layer[None], reads.final[None])[0]


def _target_rows(graph):
    return [row for row, node in enumerate(graph.nodes) if node.is_target]


def test_rows_sum_to_the_pre_activation(graph):
    size = max(abs(node.pre_activation) for node in graph.nodes if node.is_target)
    assert abs(graph.residual()).max() <= 1e-9 * size


def test_both_engines_agree(model, tokens, graph):
    exact = attribute(model, tokens, targets=TARGETS, engine="autograd")
    assert [node.id for node in exact.nodes] == [node.id for node in graph.nodes]
    assert abs(exact.weights - graph.weights).max() <= 1e-12 * abs(exact.weights).max()
    skips = [layer for layer in range(model.model.n_layers) if model.dictionaries.skip(layer) is not None]
    assert (graph.past is None) == (exact.past is None) == (not skips)
    if skips:
        assert abs(exact.past - graph.past).max() <= 1e-12 * abs(exact.weights).max()


def test_pre_activations_are_the_models(model, trace, graph, values):
    measured = _values_of(values, trace.frozen.reads)
    targets = [graph.nodes[row] for row in _target_rows(graph)]
    stated = torch.tensor([node.pre_activation - node.bias for node in targets], dtype=torch.float64)
    torch.testing.assert_close(stated, measured, rtol=1e-9, atol=1e-9)


def test_doubling_any_source_moves_every_target_by_its_edge(model, trace, graph, values):
    _assert_exact(model, trace, graph, values)


def _assert_exact(model, trace, graph, values):
    rows = _target_rows(graph)
    weights = torch.from_numpy(graph.weights.toarray()[rows])
    before = _values_of(values, trace.frozen.reads)
    kinds = (NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN)
    sources = [column for column, node in enumerate(graph.nodes) if node.kind in kinds]
    doubled = [(Recording(model, trace), [node_change(model, trace, graph.nodes[column])]) for column in sources]
    with torch.no_grad():
        for chunk in run_alternatives(model, doubled, "frozen"):
            moved = values(chunk.by_layer, chunk.final) - before
            edges = weights[:, sources[chunk.start : chunk.stop]].T
            torch.testing.assert_close(moved, edges, rtol=1e-9, atol=1e-9)


def test_doubling_any_bias_moves_every_target_by_its_edge(model, trace, graph, values):
    rows = _target_rows(graph)
    weights = torch.from_numpy(graph.weights.toarray()[rows])
    before = _values_of(values, trace.frozen.reads)
    groups = model.model.bias_groups()
    for column, node in enumerate(graph.nodes):
        if node.kind is not NodeKind.BIAS:
            continue
        group = groups.get((node.layer, node.text.removesuffix(".b")), [])
        writes = _with_bias_doubled(model, trace, node)
        for parameter in group:
            parameter.mul_(2)
        after = _values_of(values, trace.frozen(writes))
        for parameter in group:
            parameter.mul_(0.5)
        torch.testing.assert_close(after - before, weights[:, column], rtol=1e-9, atol=1e-9)


def _with_bias_doubled(model, trace, node):
    frozen = trace.frozen
    writes = replace(
        frozen.writes,
        position=None if frozen.writes.position is None else frozen.writes.position.clone(),
        mlp_out=frozen.writes.mlp_out - frozen.skip_out(frozen.reads.by_layer),
    )
    if node.text == "pos":
        writes.position[node.pos] *= 2
    elif node.text == "mlp":
        writes.mlp_out[node.layer, node.pos] *= 2
    elif node.text == "b_dec":
        writes.mlp_out[node.layer, trace.first :] += model.dictionaries.decoder_bias(node.layer).detach()
    return writes


def test_frozen_run_of_the_clean_writes_is_the_model(trace):
    frozen = trace.frozen
    written = frozen.writes.mlp_out - frozen.skip_out(frozen.reads.by_layer)
    reads = frozen(replace(frozen.writes, mlp_out=written))
    torch.testing.assert_close(reads.final, frozen.reads.final, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reads.by_layer, frozen.reads.by_layer, rtol=1e-12, atol=1e-12)


def test_replacement_with_errors_is_the_model(model, trace):
    torch.testing.assert_close(model.run(trace.tokens, trace.errors), trace.logits, rtol=1e-9, atol=1e-9)


def test_the_first_positions_have_no_features(model, trace, graph, tokens):
    active = model.dictionaries.encode(trace.frozen.reads.by_layer).index
    assert {tuple(row) for row in active.tolist() if row[1] >= model.first} == {
        (node.layer, node.pos, node.index) for node in graph.nodes if node.kind is NodeKind.FEATURE
    }
    assert all(node.pos >= model.first for node in graph.nodes if node.kind is NodeKind.FEATURE)
    errors = {node.pos for node in graph.nodes if node.kind is NodeKind.ERROR}
    starts = [node for node in graph.nodes if node.kind is NodeKind.BIAS and node.text == "mlp"]
    if int(tokens[0]) == 0:
        assert min(errors) == 1
        assert len(starts) == model.model.n_layers
    else:
        assert min(errors) == 0
        assert not starts


def test_fewer_features_lose_nothing(model, tokens, graph):
    small = attribute(model, tokens, targets=TARGETS, max_features=6)
    assert small.mask(NodeKind.FEATURE).sum() == 6
    assert abs(small.residual()).max() <= 1e-9 * abs(graph.weights).max() * 10


def test_edges_only_go_up(graph):
    coo = graph.weights.tocoo()
    for target, source in zip(coo.row, coo.col, strict=True):
        if graph.nodes[source].kind in (NodeKind.FEATURE, NodeKind.ERROR):
            assert graph.nodes[source].layer < graph.nodes[target].layer
        assert graph.nodes[source].pos <= graph.nodes[target].pos


@pytest.mark.parametrize("engine", ["closed_form", "autograd"])
@pytest.mark.parametrize("kind", ["plt", "clt"])
@pytest.mark.parametrize("tokens", [WITH_BOS, WITHOUT_BOS], ids=["bos", "no-bos"])
@torch.no_grad()
def test_a_skip_term_is_a_path_from_the_first_token_too(engine, kind, tokens):
    """Where MLPs are linear, W_skip is the MLP: with patterns and scales held, the real model moves by the edges."""
    language_model = random_model("gpt2", n_layers=3, d_model=16, n_heads=4, d_vocab=64, dtype=torch.float64)
    dictionaries = random_dictionaries(kind, n_layers=3, d_model=16, features=8, skip=True, dtype=torch.float64)
    for layer, block in enumerate(language_model.bridge.blocks):
        block.mlp.original_component.act = torch.nn.Identity()
        dictionaries.skip(layer).copy_(block.mlp.W_in @ block.mlp.W_out)
    model = ReplacementModel(language_model, dictionaries)
    graph = attribute(model, tokens, targets=TARGETS, engine=engine)
    logits = [row for row, node in enumerate(graph.nodes) if node.kind is NodeKind.LOGIT]
    held = {name: lambda _, value=value: value for name, value in model.trace(tokens).frozen.constants.items()}

    def centred(edits):
        out = language_model.run_hooked(tokens[None], write=held | edits)[0][0, -1]
        return (out - out.mean())[[3, 5, 60]]

    for pos in (0, 2):

        def doubled(embed, pos=pos):
            embed[:, pos] *= 2
            return embed

        moved = centred({"embed.hook_out": doubled}) - centred({})
        edges = torch.from_numpy(graph.weights.toarray()[logits, graph.position[f"tok@{pos}"]])
        torch.testing.assert_close(moved, edges, rtol=1e-9, atol=1e-9)


FAMILIES = ("gpt2", "llama", "gemma2", "gemma3")
COMBINATIONS = [
    pytest.param(family, read, write, options, id=f"{family}-{read}-{write}-{'-'.join(map(str, options.values()))}")
    for family in FAMILIES
    for read in MLP_READS
    for write in MLP_WRITES
    for options in (
        {"kind": "plt"}, {"kind": "plt", "skip": True, "first": 3}, {"kind": "clt"},
        {"kind": "clt", "skip": True, "first": 0},
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def families():
    sizes = {"n_layers": 3, "d_model": 16, "n_heads": 4, "d_vocab": 64, "dtype": torch.float64}
    return {family: random_model(family, **sizes) for family in FAMILIES}


@pytest.mark.parametrize(("family", "read", "write", "options"), COMBINATIONS)
def test_every_read_and_write_site_conserves_and_is_exact(families, family, read, write, options):
    model = ReplacementModel(families[family], _random(**options, read=read, write=write, features=8))
    tokens = WITH_BOS if read == "mlp_normed" else WITHOUT_BOS
    graph, trace = attribute(model, tokens, targets=TARGETS, engine="closed_form"), model.trace(tokens)
    test_rows_sum_to_the_pre_activation(graph)
    test_both_engines_agree(model, tokens, graph)
    _assert_exact(model, trace, graph, _values(model, trace, graph))
    test_replacement_with_errors_is_the_model(model, trace)
    assert {node.pos for node in graph.nodes if node.kind is NodeKind.FEATURE} == set(range(model.first, len(tokens)))


def test_what_is_written_before_or_after_a_norm_of_its_own_differs_in_gemma_alone(families):
    """The decoder of a feature that writes before the norm passes it, one that writes after does not."""
    edges = {}
    for family in ("llama", "gemma2"):
        for write in MLP_WRITES:
            model = ReplacementModel(families[family], _random(kind="plt", write=write, features=8))
            graph = attribute(model, WITH_BOS, targets=TARGETS)
            edges[family, write] = graph.weights[:, graph.mask(NodeKind.FEATURE)].toarray()
    assert np.array_equal(edges["llama", "mlp_out"], edges["llama", "mlp_added"])
    assert not np.allclose(edges["gemma2", "mlp_out"], edges["gemma2", "mlp_added"])


def test_layers_may_read_and_write_each_a_site_of_its_own(families):
    plt = _random(kind="plt", skip=True, features=8)
    for layer, (read, write) in enumerate(zip(MLP_READS, ("mlp_added", "mlp_out", "mlp_added"), strict=True)):
        plt[layer].read, plt[layer].writes = Site(layer, read), (Site(layer, write),)
    model = ReplacementModel(families["gemma2"], plt)
    graph, trace = attribute(model, WITH_BOS, targets=TARGETS), model.trace(WITH_BOS)
    test_rows_sum_to_the_pre_activation(graph)
    test_both_engines_agree(model, WITH_BOS, graph)
    _assert_exact(model, trace, graph, _values(model, trace, graph))


SOME = {
    "gpt2": ("mlp_in", "mlp_out"), "gptj": ("mlp_in", "mlp_out"), "granite": ("resid_mid", "mlp_added"),
    "gemma2": ("mlp_normed", "mlp_out"),
}  # fmt: skip


@pytest.mark.parametrize("family", SOME)
@torch.no_grad()
def test_skip_terms_of_some_layers_pass_by_every_position(family):
    """Layer 0's has two directions, layer 1 has one and no features, layer 2 none. No features at positions 0, 1, 4."""
    tokens = WITH_BOS if family in ("gptj", "gemma2") else WITHOUT_BOS
    model = _with_some_skips(family, *SOME[family], tokens)
    graph, trace = attribute(model, tokens, targets=TARGETS, engine="closed_form"), model.trace(tokens)
    values = _values(model, trace, graph)
    assert {node.pos for node in graph.nodes if node.kind is NodeKind.FEATURE} <= {2, 3}
    assert {node.layer for node in graph.nodes if node.kind is NodeKind.FEATURE} == {0, 2, 3}
    test_rows_sum_to_the_pre_activation(graph)
    test_both_engines_agree(model, tokens, graph)
    test_replacement_with_errors_is_the_model(model, trace)
    _assert_exact(model, trace, graph, values)
    test_doubling_any_bias_moves_every_target_by_its_edge(model, trace, graph, values)
    _assert_past(model, trace, graph, values)


def _with_some_skips(family, read, write, tokens):
    language_model = random_model(family, n_layers=4, d_model=16, n_heads=4, d_vocab=64, dtype=torch.float64)
    made = [_random(kind="plt", n_layers=4, skip=skip, features=8, read=read, write=write) for skip in (True, False)]
    W_skip = 4 * made[0].skip(0)
    left, size, right = torch.linalg.svd(W_skip)
    made[0].skip(0).copy_(left[:, :2] * size[:2] @ right[:2])
    alone = Transcoder.absent(1, 16, read, write, torch.float64)
    alone.W_skip = torch.nn.Parameter(W_skip)
    norms = language_model.activations(tokens[None], made[0].reads)
    sizes = torch.stack([norms[site][0].norm(dim=-1) for site in made[0].reads])
    layer = int((sizes[:, 4] / sizes[:, 2:4].max(1).values).argmax())
    provenance = replace(
        made[0].provenance, first=2, limits={str(made[0].reads[layer]): float(sizes[layer, 4]) * (1 - 1e-9)}
    )
    return ReplacementModel(language_model, TranscoderSet([made[0][0], alone, made[1][2], made[0][3]], provenance))


def _assert_past(model, trace, graph, values):
    """Without W_skip, the frozen model moves by what does not pass by it: sources are doubled one by one."""
    D, rows = model.dictionaries, _target_rows(graph)
    direct = torch.from_numpy((graph.weights - graph.past).toarray()[rows])
    frozen = FrozenModel(model.model, trace.tokens, reads=D.reads, writes=D.writes)  # has no skip terms
    clean = replace(frozen.writes, mlp_out=frozen.writes.mlp_out - trace.frozen.skip_out(frozen.reads.by_layer))
    before = _values_of(values, frozen(clean))
    assert abs(graph.past).max() > 0.01 * abs(graph.weights).max()
    for column, node in list(enumerate(graph.nodes))[::9]:
        if node.kind not in (NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN):
            continue
        embed, out = clean.embed.clone(), clean.mlp_out.clone()
        if node.kind is NodeKind.TOKEN:
            embed[node.pos] *= 2
        elif node.kind is NodeKind.ERROR:
            out[node.layer, node.pos] += trace.errors[node.layer, node.pos]
        else:
            for layer in D.write_layers(node.layer):
                row = D.decoder_rows(node.layer, torch.tensor([node.index]), layer)[0]
                out[layer, node.pos] += node.activation * row
        moved = _values_of(values, frozen(replace(clean, embed=embed, mlp_out=out))) - before
        torch.testing.assert_close(moved, direct[:, column], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "plt-skip"), ("llama", "clt-skip"), ("gemma2", "clt-skip")])
@torch.no_grad()
def test_past_is_what_edges_lose_without_skip_terms(families, family, kind):
    model = ReplacementModel(families[family], _random(**KINDS[kind], features=8))
    graph, trace = attribute(model, WITHOUT_BOS, targets=TARGETS), model.trace(WITHOUT_BOS)
    _assert_past(model, trace, graph, _values(model, trace, graph))


@pytest.mark.parametrize(
    "limits",
    [{"max_features": 9}, {"unexplained": 0.2}, {"edges_per_node": 5}, {"unexplained": 0.2, "edges_per_node": 5}],
    ids=str,
)
def test_past_of_fewer_features_and_edges_is_still_what_passed_by(families, limits):
    model = ReplacementModel(families["gpt2"], _random(kind="plt", skip=True, features=16))
    graph: Any = attribute(model, WITH_BOS, targets=TARGETS, **limits)
    if "edges_per_node" not in limits:
        _assert_autograd_agrees(model, graph, limits)
    at_once: Any = attribute_pruned(model, WITH_BOS, targets=TARGETS, **limits)[0]
    small = graph.prune()
    assert abs(at_once.past - small.past).max() <= 1e-12 * abs(graph.weights).max()
    assert at_once.scores.past == pytest.approx(graph.scores.past, rel=1e-9)
    if "max_features" not in limits and "unexplained" not in limits:
        full: Any = attribute(model, WITH_BOS, targets=TARGETS)
        kept = graph.weights.toarray() != 0
        np.testing.assert_allclose(graph.past.toarray(), np.where(kept, full.past.toarray(), 0), atol=1e-12)


def _assert_autograd_agrees(model, graph, limits):
    exact = attribute(model, WITH_BOS, targets=TARGETS, engine="autograd", **limits)
    assert abs(exact.past - graph.past).max() <= 1e-12 * abs(exact.weights).max()
    assert exact.scores.past == pytest.approx(graph.scores.past, rel=1e-9)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gptj", {"read": "resid_mid"}, r"read 0.resid_mid, but random-gptj-0 has no site .*side by side"),
        ("gpt2", {"read": "resid_post"}, r"read mlp_in, mlp_normed, resid_mid .* layer 0 read 0.resid_post"),
        ("gpt2", {"write": "attn_added"}, r"write mlp_out or mlp_added .* write 0.attn_added"),
    ],
)
def test_other_sites_are_refused_in_a_sentence(family, options, message):
    with pytest.raises(DictionaryError, match=message):
        ReplacementModel(random_model(family, n_layers=3, d_model=16), _random(kind="plt", **options, dtype="float32"))


@pytest.mark.parametrize("tokens", [WITH_BOS, WITHOUT_BOS], ids=["bos", "no-bos"])
@pytest.mark.parametrize("first", [0, 1, 4, 9])
def test_what_is_written_at_the_first_positions_is_error_and_exact(families, tokens, first):
    model = ReplacementModel(families["gpt2"], _random(kind="clt", skip=True, features=8, first=first))
    trace = model.trace(tokens)
    graph = attribute(model, tokens, targets=TARGETS)
    test_rows_sum_to_the_pre_activation(graph)
    early = slice(min(first, len(tokens)))
    written = trace.frozen.writes.mlp_out - trace.frozen.skip_out(trace.frozen.reads.by_layer)
    assert torch.equal(trace.errors[:, early], written[:, early])
    assert all(node.pos >= first for node in graph.nodes if node.kind is NodeKind.FEATURE)
    constant = {node.pos for node in graph.nodes if node.kind is NodeKind.BIAS and node.text == "mlp"}
    assert constant == ({0} if int(tokens[0]) == 0 and first > 0 else set())
    assert {node.pos for node in graph.nodes if node.kind is NodeKind.ERROR} == set(range(len(tokens))) - constant
