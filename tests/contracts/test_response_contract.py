"""Linear response on every family of models: edges are the derivatives of the live replacement model, in float64.

The oracle is the model, run with more and less of many sources at once: MLPs replaced by what features, errors and
skip terms write, attention patterns and norms as they come. Every kind of source is moved by itself, each source of it
by its own random part, so that no two errors hide each other.
"""

from copy import copy
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from torch.overrides import TorchFunctionMode

from circuitsae.attribution import LogitTargets, attribute, attribute_pruned, edge_heads
from circuitsae.attribution.nodes import feature_targets
from circuitsae.graph import NodeKind, load_graph
from circuitsae.replacement import ReplacementModel
from circuitsae.report.data import page_data
from circuitsae.sentences import of_logit
from circuitsae.validation import calibrate, validate
from circuitsae.validation.claims import MISSES
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import InputError, ModelError
from transcoders.loading import random_model
from transcoders.random_models import Family

TOKENS = torch.tensor([0, 11, 22, 33, 11, 7])
LOGITS = LogitTargets([3, 5])
STEP = 1e-4
KINDS = {
    "plt": {"kind": "plt"},
    "clt-skip": {"kind": "clt", "skip": True},
    "plt-normed": {"kind": "plt", "read": "mlp_normed", "write": "mlp_added", "skip": True},
    "clt-mid": {"kind": "clt", "read": "resid_mid", "write": "mlp_added", "skip": True},
}
DISTINCT = (
    "gpt2",
    "opt",
    "gpt_neo",
    "gptj",
    "gpt_neox",
    "bloom",
    "llama",
    "qwen3",
    "gemma2",
    "olmo2",
    "granite",
    "gpt_oss",
)
"""One of each architecture that differs in how attention looks or where norms stand; the others are marked slow."""
CASES = [(family, "clt-skip") for family in DISTINCT]
CASES += [("gpt2", "plt"), ("llama", "plt"), ("gemma2", "plt-normed"), ("gemma3", "clt-mid")]
OTHERS = [(family, "clt-skip") for family in get_args(Family) if family not in DISTINCT]


class Doubled(TorchFunctionMode):
    """While it lasts, what models compute in float32 whatever their precision is in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") == "float":
            return args[0].double()
        args = [torch.float64 if value is torch.float32 else value for value in args]
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*args, **named)


def _model(family, kind="clt-skip"):
    language_model = random_model(family, n_layers=2, d_model=16, n_heads=4, d_vocab=64, dtype=torch.float64)
    options = {"n_layers": 2, "d_model": 16, "features": 8, "dtype": torch.float64, "seed": 1} | KINDS[kind]
    dictionaries = random_dictionaries(**options)
    dictionaries.provenance = replace(dictionaries.provenance, first=1)
    return ReplacementModel(language_model, dictionaries)


@pytest.mark.parametrize(
    ("family", "kind"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]
)
def test_edges_are_the_derivatives_of_the_live_model(family, kind):
    model = _model(family, kind)
    with Doubled():
        graph = attribute(model, TOKENS, targets=LOGITS, response="linear", engine="closed_form")
        _assert_derivatives(model, graph, TOKENS)


@torch.no_grad()
def _assert_derivatives(model, graph, tokens):
    trace = model.trace(tokens)
    rows = [row for row, node in enumerate(graph.nodes) if node.is_target]
    weights = torch.from_numpy(graph.weights.toarray()[rows])
    part = torch.rand(len(graph.nodes), generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.5
    for kind in (NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN, NodeKind.BIAS):
        moved = part * torch.tensor([node.kind is kind for node in graph.nodes])
        more, less = (_values(model, trace, graph, 1 + sign * STEP * moved) for sign in (1, -1))
        measured, found = (more - less) / (2 * STEP), weights @ moved
        assert found.abs().max() > 1e-5 * weights.abs().max()
        torch.testing.assert_close(found, measured, rtol=0, atol=1e-6 * float(weights.abs().max()))


def _values(model, trace, graph, factor):
    """Every target's value where each node writes `factor` times as much: pre-activations, centred logits."""
    frozen, groups = trace.frozen, model.model.bias_groups()
    clean, sets = frozen.writes, model.dictionaries
    writes = replace(
        clean,
        embed=clean.embed.clone(),
        position=None if clean.position is None else clean.position.clone(),
        mlp_out=clean.mlp_out - frozen.skip_out(frozen.reads.by_layer),
    )
    scaled = []
    for node, by in zip(graph.nodes, factor, strict=True):
        more = by - 1
        if node.kind is NodeKind.FEATURE:
            number = torch.tensor([node.index])
            for written in sets.write_layers(node.layer):
                decoder = sets.decoder_rows(node.layer, number, written)[0]
                writes.mlp_out[written, node.pos] += more * node.activation * decoder
        elif node.kind is NodeKind.ERROR or node.text == "mlp":
            writes.mlp_out[node.layer, node.pos] += more * trace.errors[node.layer, node.pos]
        elif node.kind is NodeKind.TOKEN:
            writes.embed[node.pos] *= by
        elif node.text == "pos":
            writes.position[node.pos] *= by
        elif node.text == "b_dec":
            writes.mlp_out[node.layer, trace.first :] += more * sets.decoder_bias(node.layer)
        elif node.kind is NodeKind.BIAS:
            scaled += [(p, p.clone(), by) for p in groups[node.layer, node.text.removesuffix(".b")]]
    for parameter, before, by in scaled:
        parameter.copy_(before * by)
    reads = frozen.live()(writes)
    logits = model.model.parts.unembed(reads.final[None])[0, -1]
    if model.model.parts.logit_cap is None:
        logits = logits * frozen.logit_scale  # Granite's and Cohere's constant
    for parameter, before, _ in scaled:
        parameter.copy_(before)
    features = feature_targets(model, trace, torch.arange(len(trace.features.value)))
    pre = (features.vector * reads.by_layer[features.layer, features.pos]).sum(1)
    token = [node.index for node in graph.nodes if node.kind is NodeKind.LOGIT]
    return torch.cat([pre, (logits - logits.mean())[token]])


@pytest.mark.parametrize("kind", KINDS)
def test_both_engines_agree(kind):
    model = _model("gemma2", kind)
    with Doubled():
        closed, exact = (
            attribute(model, TOKENS, targets=LOGITS, response="linear", engine=engine)
            for engine in ("closed_form", "autograd")
        )
    assert [node.id for node in closed.nodes] == [node.id for node in exact.nodes]
    assert abs(closed.weights - exact.weights).max() <= 1e-12 * abs(exact.weights).max()
    assert abs(closed.weights - attribute(model, TOKENS, targets=LOGITS).weights).max() > 0.01


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "clt-skip"), ("gemma3", "plt"), ("olmo2", "plt")])
def test_heads_take_an_edge_by_values_and_by_patterns(family, kind):
    """Parts sum to the edge in each layer; those by patterns are what it loses where that layer's are held."""
    model = _model(family, kind)
    with Doubled():
        graph = attribute(model, TOKENS, targets=LOGITS, response="linear")
        trace = model.trace(TOKENS)
        weights, tried = graph.weights.toarray(), 0
        features = [node.id for node in graph.nodes if node.kind is NodeKind.FEATURE and node.layer == 0]
        for name in ("tok@2", "0.err@1", *features[::5]):
            source, target = graph.nodes[graph.position[name]], graph.top_logits()[0]
            edge = weights[graph.position[target.id], graph.position[name]]
            parts: Any = edge_heads(model, trace, source, target, response="linear")
            sums = parts.groupby("layer")["weight"].sum()
            assert sums.tolist() == pytest.approx([edge] * len(sums), abs=1e-9 * abs(weights).max())
            layer = int(parts["layer"].max())
            by_patterns = parts[(parts["layer"] == layer) & (parts["by"] == "patterns")]["weight"].sum()
            held = _with_pattern_held(model, trace, graph, source, target, layer)
            assert edge - held == pytest.approx(by_patterns, abs=1e-6 * abs(weights).max())
            tried += abs(by_patterns) > 1e-4 * abs(weights).max()
    assert tried > 2


def _with_pattern_held(model, trace, graph, source, target, layer):
    """The derivative of a logit by a source where one layer's patterns stay."""
    name = f"blocks.{layer}.attn.hook_pattern"
    held = trace.frozen.live()
    held.constants = {name: trace.frozen.constants[name]}
    factor = torch.ones(len(graph.nodes), dtype=torch.float64)
    values = []
    for sign in (1, -1):
        factor[graph.position[source.id]] = 1 + sign * STEP
        frozen = copy(trace.frozen)
        frozen.live = lambda: held
        moved = _values(model, replace(trace, frozen=frozen), graph, factor)
        values.append(float(moved[len(trace.features.value) + LOGITS.tokens.index(target.index)]))
    return (values[0] - values[1]) / (2 * STEP)


def test_a_graph_says_that_its_edges_are_derivatives(tmp_path):
    model = _model("gpt2")
    frozen, linear = (attribute(model, TOKENS, targets=LOGITS, response=response) for response in (None, "linear"))
    assert (frozen.response, linear.response) == ("frozen", "linear")
    targets = linear.mask(NodeKind.FEATURE, NodeKind.LOGIT)
    assert np.isnan(linear.residual()[targets]).all()
    assert not linear.residual()[~targets].any()
    assert abs(frozen.residual()).max() < 1e-9
    kept = load_graph(linear.prune().save(tmp_path / "graph"))
    assert kept.response == "linear"
    assert "derivatives" in page_data(kept)["response"]
    assert "These are derivatives" in of_logit(kept)
    assert page_data(frozen)["response"] == ""
    assert "derivatives" not in of_logit(frozen)


def test_small_doses_confirm_the_edges_of_a_graph():
    model = _model("gpt2", "plt")
    graph = attribute(model, TOKENS, targets=LOGITS, response="linear")
    found = validate(model, graph, edges=None, controls=0)
    assert found.frozen_error <= 1e-5  # of differences at a dose of 1e-3
    edges: Any = found.edges
    np.testing.assert_allclose(edges["direct_measured"], -edges["weight"], atol=0.2 * edges["weight"].abs().max())
    assert found.agreement("direct")["all"].spearman > 0.99
    assert "direct_patterns" not in edges
    assert not set(edges["direct_verdict"]) & {"attention", "norms"}
    miss = edges[[f"miss_{part}" for part in MISSES if f"miss_{part}" in edges]].sum(axis=1)
    np.testing.assert_allclose(edges["model_predicted"] + miss, edges["model_measured"], atol=1e-12)
    held = attribute(model, TOKENS, targets=LOGITS)
    assert validate(model, held, edges=None, controls=0).agreement("direct")["all"].spearman < 0.99
    with pytest.raises(InputError, match="Calibration plants edges"):
        calibrate(model, [graph])


@pytest.mark.parametrize("limits", [{"max_features": 12}, {"unexplained": 0.1}, {"edges_per_node": 5}])
def test_limits_mean_what_they_do_by_autograd(limits):
    model = _model("gemma2")
    with Doubled():
        closed, exact = (
            attribute(model, TOKENS, targets=LOGITS, response="linear", engine=engine, **limits)
            for engine in ("closed_form", "autograd")
        )
    assert [node.id for node in closed.nodes] == [node.id for node in exact.nodes]
    assert abs(closed.weights - exact.weights).max() <= 1e-12 * abs(exact.weights).max()


@pytest.mark.parametrize("bound", ["circuitsae.attribution.live.LOOK_BYTES", "circuitsae.frozen.PATTERN_BYTES"])
def test_what_is_computed_again_is_the_same(bound, monkeypatch):
    model = _model("qwen3")
    whole = attribute(model, TOKENS, targets=LOGITS, response="linear")
    monkeypatch.setattr(bound, 0)
    again, full = attribute_pruned(model, TOKENS, targets=LOGITS, response="linear", engine="closed_form")
    pruned = whole.prune()
    assert (full.nodes, full.edges) == (len(whole.nodes), whole.weights.nnz)
    assert [node.id for node in again.nodes] == [node.id for node in pruned.nodes]
    assert abs(again.weights - pruned.weights).max() <= 1e-12 * abs(pruned.weights).max()


def test_a_model_in_low_precision_gives_the_same_graph_but_for_rounding():
    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 4, "d_vocab": 64}
    dictionaries = random_dictionaries("plt", n_layers=2, d_model=16, features=8, seed=1)
    graphs = [
        attribute(ReplacementModel(random_model("llama", **sizes, dtype=dtype), dictionaries), TOKENS, targets=LOGITS,
                  response="linear", engine="closed_form")
        for dtype in (torch.float32, torch.bfloat16)
    ]  # fmt: skip
    exact, rough = (graph.edges_frame().set_index(["source", "target"])["weight"] for graph in graphs)
    both: Any = pd.concat([exact, rough], axis=1, join="inner").to_numpy()
    assert len(both) > 0.8 * len(exact)
    assert abs(both[:, 0] - both[:, 1]).max() < 0.1 * abs(both).max()


def test_autograd_takes_over_where_no_product_of_queries_and_keys_is_seen(monkeypatch, caplog):
    model = _model("gpt2")
    closed = attribute(model, TOKENS, targets=LOGITS, response="linear")
    monkeypatch.setattr("transcoders.looks._PRODUCTS", set())
    graph = attribute(model, TOKENS, targets=LOGITS, response="linear")
    assert "no product of queries and keys" in caplog.text
    assert "using autograd, which is slower" in caplog.text
    assert abs(graph.weights - closed.weights).max() <= 1e-9 * abs(closed.weights).max()
    with pytest.raises(ModelError, match="random-gpt2-0.*use engine='autograd'"):
        attribute(model, TOKENS, targets=LOGITS, response="linear", engine="closed_form")


def test_the_closed_form_is_refused_between_autoencoders():
    language_model = random_model("gpt2", n_layers=2, d_model=16, n_heads=4, d_vocab=64)
    saes = random_dictionaries("sae", n_layers=2, d_model=16, features=8)
    with pytest.raises(InputError, match="The closed form needs transcoders in the place of all MLPs"):
        attribute(ReplacementModel(language_model, saes), TOKENS, engine="closed_form")
