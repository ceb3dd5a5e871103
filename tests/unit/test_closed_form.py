"""The closed form against autograd: every cut, every batch, every way of expanding."""

import logging
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from circuitsae.attribution import LogitTargets, attribute, attribute_pruned, attribute_trace
from circuitsae.attribution.attribute import EngineName
from circuitsae.attribution.autograd import autograd_rows
from circuitsae.attribution.closed_form import ClosedForm, batches
from circuitsae.attribution.cost import choose_meeting_layer, operations
from circuitsae.attribution.linear import linear_model, reads_of
from circuitsae.attribution.nodes import SourceVectors, TargetVectors, feature_targets, logit_targets, source_nodes
from circuitsae.graph import AttributionGraph, NodeKind, keep_strongest
from circuitsae.replacement import ReplacementModel
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import InputError, ModelError
from transcoders.loading import random_model
from transcoders.random_models import Family

TOKENS = torch.tensor([0, 11, 22, 33, 11, 7])
TARGETS = LogitTargets([3, 5, 60])
FAMILIES: tuple[Family, ...] = ("gpt2", "llama", "phi", "gemma2")
N_LAYERS = 3


def replacement(family: Family = "gpt2", dtype: torch.dtype = torch.float64, kind: Any = "clt", skip: bool = False):
    model = random_model(family, n_layers=N_LAYERS, d_model=16, n_heads=4, d_vocab=64, dtype=dtype)
    dictionaries = random_dictionaries(kind, n_layers=N_LAYERS, d_model=16, features=24, skip=skip, dtype=dtype, seed=1)
    return ReplacementModel(model, dictionaries)


@pytest.fixture(scope="module", params=[(f, k, s) for f in FAMILIES for k, s in (("plt", False), ("clt", True))])
def case(request):
    """All sources, all targets, and autograd's rows in the columns of the sources."""
    family, kind, skip = request.param
    model = replacement(family, kind=kind, skip=skip)
    with torch.no_grad():
        trace = model.trace(TOKENS)
        features = feature_targets(model, trace, torch.arange(len(trace.features.value)))
        targets = TargetVectors.join(features, logit_targets(trace, TOKENS[:3]))
        with autograd_rows(model, trace) as rows_of:
            expected = rows_of(targets)
        sources = SourceVectors(model, trace, source_nodes(model, trace), linear_model(trace.frozen))
        return sources, targets, expected[:, torch.from_numpy(sources.columns)]


@torch.no_grad()
@pytest.mark.parametrize("meeting_layer", range(N_LAYERS + 1))
def test_every_meeting_layer_gives_the_rows_of_autograd(case, meeting_layer):
    sources, targets, expected = case
    engine = ClosedForm(sources, targets, meeting_layer=meeting_layer)
    seen = np.zeros(len(expected), dtype=int)
    for numbers, block in engine.carry_sources(targets):
        torch.testing.assert_close(block, expected[torch.from_numpy(numbers)], rtol=0, atol=1e-12)
        seen[numbers] += 1
    above = (targets.layer >= meeting_layer).nonzero()[:, 0]
    for batch in batches(targets.take(above), 16, size=7):
        numbers = above[batch]
        torch.testing.assert_close(engine.rows_of(targets.take(numbers)), expected[numbers], rtol=0, atol=1e-12)
        seen[numbers.numpy()] += 1
    assert (seen == 1).all()
    torch.testing.assert_close(engine.rows_of(targets), expected, rtol=0, atol=1e-12)  # all carried down, in one batch


@torch.no_grad()
def test_a_small_store_of_decoders_changes_nothing(case, monkeypatch):
    sources, targets, expected = case
    monkeypatch.setattr("circuitsae.attribution.nodes.CACHE_BYTES", 0)
    monkeypatch.setattr(sources, "_kept", {})
    engine = ClosedForm(sources, targets, meeting_layer=2)
    list(engine.carry_sources())
    torch.testing.assert_close(engine.rows_of(targets), expected, rtol=0, atol=1e-12)
    assert not sources._kept


def test_the_chosen_meeting_layer_needs_fewest_operations_and_fits(case, monkeypatch):
    sources, targets, _ = case
    costs = [operations(sources, targets, layer) for layer in range(N_LAYERS + 1)]
    assert costs[choose_meeting_layer(sources, targets)] == min(costs)
    assert min(costs) < costs[0]
    monkeypatch.setattr("circuitsae.attribution.cost.LEAST_STORED_BYTES", -1e18)
    monkeypatch.setattr("circuitsae.attribution.cost._Counts.edges", property(lambda self: 0.0))
    assert choose_meeting_layer(sources, targets) == 0


def test_operations_are_those_of_the_loops(case):
    """The textbook way (meeting layer 0), counted target by target."""
    sources, targets, _ = case
    hop = (6 if sources.dictionaries.skip(0) is not None else 4) * 16**2
    counted = 0
    for layer, pos in zip(targets.layer.tolist(), targets.pos.tolist(), strict=True):
        full = min(layer, N_LAYERS - 1)
        counted += hop * (1 + full * (pos + 1))
    assert operations(sources, targets, 0) == pytest.approx(counted)


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_model_reads_what_the_model_reads(family):
    with torch.no_grad():
        frozen = replacement(family).trace(TOKENS).frozen
        reads = reads_of(linear_model(frozen), frozen)
    torch.testing.assert_close(reads.by_layer, frozen.reads.by_layer, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reads.final, frozen.reads.final, rtol=1e-12, atol=1e-12)


def test_float32_agrees_to_rounding():
    model = replacement(dtype=torch.float32)
    engines: tuple[EngineName, ...] = ("closed_form", "autograd")
    closed, exact = (attribute(model, TOKENS, targets=TARGETS, engine=engine).weights for engine in engines)
    assert closed.dtype == np.float32
    difference = (closed - exact).toarray()
    assert np.linalg.norm(difference) <= 1e-5 * np.linalg.norm(exact.toarray())


@pytest.mark.parametrize(("kind", "skip"), [("clt", False), ("clt", True), ("plt", True)])
@pytest.mark.parametrize("max_features", [None, 12])
def test_weights_in_bf16_are_summed_in_float32(kind, skip, max_features):
    model = replacement(dtype=torch.bfloat16, kind=kind, skip=skip)
    graph = attribute(model, TOKENS, targets=TARGETS, engine="closed_form", max_features=max_features)
    assert graph.weights.dtype == np.float32
    size = max(abs(n.pre_activation) for n in graph.nodes if n.is_target)
    assert graph.mask(NodeKind.FEATURE).sum() == (max_features or len(model.trace(TOKENS).features.value))
    assert abs(graph.residual()).max() <= 0.05 * size


def test_batches_cover_every_target_once_and_are_near_in_position():
    rng = torch.Generator().manual_seed(0)
    pos = torch.randint(0, 300, (5000,), generator=rng)
    targets = TargetVectors(torch.randint(0, 4, (5000,), generator=rng), pos, torch.zeros(5000, 8))
    found = batches(targets, 8)
    assert torch.equal(torch.cat(found).sort().values, torch.arange(5000))
    late = [pos[batch] for batch in found if pos[batch].min() > 200]
    assert late
    assert all(int(p.max() - p.min()) <= 300 // 16 for p in late)


def test_an_architecture_the_matrices_do_not_describe_falls_back_with_a_notice(monkeypatch, caplog):
    model = replacement()
    expected = attribute(model, TOKENS, targets=TARGETS)
    from circuitsae.attribution import linear

    def wrong(frozen, layer, original=linear._block):
        block = original(frozen, layer)
        return replace(block, kept_attention=replace(block.attention, W_in=2 * block.attention.W_in))

    monkeypatch.setattr(linear, "_block", wrong)
    with caplog.at_level(logging.WARNING):
        graph = attribute(model, TOKENS, targets=TARGETS)
    assert "using autograd" in caplog.text
    assert abs(graph.weights - expected.weights).max() < 1e-12
    with pytest.raises(ModelError, match="engine='autograd'"):
        attribute(model, TOKENS, targets=TARGETS, engine="closed_form")


@pytest.mark.parametrize("kind", ["plt", "clt"])
@pytest.mark.parametrize("engine", ["closed_form", "autograd"])
def test_lazy_expansion_finds_the_influential_features_and_keeps_the_sums(engine, kind):
    model = replacement(kind=kind)
    full = attribute(model, TOKENS, targets=TARGETS, engine=engine)
    count = int(full.mask(NodeKind.FEATURE).sum()) // 4
    small = attribute(model, TOKENS, targets=TARGETS, max_features=count, engine=engine)
    assert small.mask(NodeKind.FEATURE).sum() == count
    assert abs(small.residual()).max() <= 1e-12 * abs(full.weights).max() * len(full.nodes)
    influence = {n.id: i for n, i in zip(full.nodes, full.influence, strict=True) if n.kind is NodeKind.FEATURE}
    held = sum(influence[n.id] for n in small.nodes if n.kind is NodeKind.FEATURE)
    assert held >= 0.95 * sum(sorted(influence.values())[-count:])


@pytest.mark.parametrize(("old", "new"), [("fast", "closed_form"), ("plain", "autograd")])
def test_the_engines_go_by_their_old_names_too(old: Any, new: Any):
    model = replacement()
    expected = attribute(model, TOKENS, targets=TARGETS, engine=new)
    for call in (attribute, attribute_pruned):
        with pytest.warns(DeprecationWarning, match=f"{old!r} is called {new!r} now"):
            found = call(model, TOKENS, targets=TARGETS, engine=old)
        graph = found if isinstance(found, AttributionGraph) else found[0]
        same = expected if graph is found else attribute_pruned(model, TOKENS, targets=TARGETS, engine=new)[0]
        assert np.array_equal(graph.weights.toarray(), same.weights.toarray())
        assert graph.provenance == same.provenance


@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_edges_between_lazily_expanded_features_are_those_of_the_full_graph(kind):
    model = replacement(kind=kind)
    full = attribute(model, TOKENS, targets=TARGETS)
    small = attribute(model, TOKENS, targets=TARGETS, max_features=12)
    kept = [full.position[n.id] for n in small.nodes if n.kind is not NodeKind.ERROR]
    own = [i for i, n in enumerate(small.nodes) if n.kind is not NodeKind.ERROR]
    difference = full.weights[kept][:, kept] - small.weights[own][:, own]
    assert abs(difference).max() < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_lazily_chosen_features_have_the_graph_of_the_trace_that_keeps_only_them(family, kind):
    model = replacement(family, kind=kind, skip=kind == "plt")
    small = attribute(model, TOKENS, targets=TARGETS, max_features=12)
    trace = model.trace(TOKENS)
    chosen = {(n.layer, n.pos, n.index) for n in small.nodes if n.kind is NodeKind.FEATURE}
    rows = [i for i, place in enumerate(trace.features.index.tolist()) if tuple(place) in chosen]
    expected = attribute_trace(model, model.keep(trace, torch.tensor(rows)), targets=TARGETS, engine="autograd")
    assert [n.id for n in small.nodes] == [n.id for n in expected.nodes]
    assert abs(small.weights - expected.weights).max() < 1e-12


def test_expansion_stops_at_the_unexplained_influence():
    model = replacement()
    full = attribute(model, TOKENS, targets=TARGETS)
    features = full.mask(NodeKind.FEATURE)
    sizes = []
    for share in (0.5, 0.2, 0.0):
        graph = attribute(model, TOKENS, targets=TARGETS, unexplained=share)
        kept = {n.id for n in graph.nodes if n.kind is NodeKind.FEATURE}
        missed = sum(
            i
            for i, n in zip(full.influence, full.nodes, strict=True)
            if n.kind is NodeKind.FEATURE and n.id not in kept
        )
        assert missed <= (share + 0.1) * full.influence[features].sum()
        sizes.append(len(kept))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


@pytest.mark.parametrize("kind", ["plt", "clt"])
@pytest.mark.parametrize("max_features", [None, 20], ids=["all", "lazy"])
def test_rows_with_only_their_strongest_edges_keep_sums_and_shares(kind, max_features):
    model = replacement(kind=kind)
    whole = attribute(model, TOKENS, targets=TARGETS, max_features=max_features)
    short = attribute(model, TOKENS, targets=TARGETS, max_features=max_features, edges_per_node=9)
    kept, rest, inputs = keep_strongest(whole.weights.toarray(), 9, whole.mask(NodeKind.BIAS))
    np.testing.assert_allclose(short.weights.toarray(), kept, atol=1e-12)
    np.testing.assert_allclose(short.rest, rest, atol=1e-12)
    np.testing.assert_allclose(short.inputs, inputs, atol=1e-12)
    assert abs(short.residual()).max() <= 1e-12 * abs(whole.weights).max() * len(whole.nodes)


@pytest.mark.parametrize(
    "wrong", [{"max_features": 0}, {"unexplained": 1.0}, {"edges_per_node": 0}, {"batch_size": 0}], ids=str
)
def test_settings_out_of_range_are_refused(wrong: Any):
    with pytest.raises(InputError):
        attribute(replacement(), TOKENS, targets=TARGETS, **wrong)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("embedding", r"The embedding in random-gpt2-0 at position 2 \(token 22\)"),
        ("read", "What MLP 1 reads in random-gpt2-0 at position 0"),
        ("write", "What MLP 1 writes in random-gpt2-0 at position 0"),
        ("final", "What the unembedding reads in random-gpt2-0 at position 0"),
        ("feature", r"Feature 1\.5 is not finite at position 1"),
    ],
)
@torch.no_grad()
def test_what_is_not_finite_is_named_with_layer_and_position(what, says, value):
    model = replacement(kind="plt")
    bridge, dictionaries = model.model.bridge, cast(Any, model.dictionaries)
    place = {
        "embedding": lambda: bridge.embed.W_E[22, 3:4],
        "read": lambda: bridge.blocks[1].ln2.original_component.bias[:1],
        "write": lambda: bridge.blocks[1].mlp.b_out[:1],
        "final": lambda: bridge.ln_final.original_component.bias[:1],
        "feature": lambda: dictionaries[1].b_enc[5:6],
    }[what]()
    place.fill_(abs(value) if what == "feature" else value)
    with pytest.raises(InputError, match=f"{says}.*{abs(value) if what == 'feature' else value}"):
        attribute(model, torch.tensor([0, 11, 22, 33]))
