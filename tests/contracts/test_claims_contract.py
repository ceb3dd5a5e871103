"""What a graph claims and what the model does, against dense algebra and plain runs of the bridge, in float64.

The oracles know nothing of the engine: T̂ is solved from the graph's own matrix, measurements are runs with the hooks
written out here, one source at a time.
"""

from typing import Any

import numpy as np
import pytest
import torch

from circuitsae import validation
from circuitsae.attribution import LogitTargets, attribute
from circuitsae.graph import NodeKind
from circuitsae.interventions import Recording, node_change
from circuitsae.interventions.forward import FINAL
from circuitsae.replacement import ReplacementModel
from circuitsae.validation import error_budget
from circuitsae.validation.measuring import Targets, effects
from transcoders.dictionaries import random_dictionaries
from transcoders.loading import random_model
from transcoders.sites import Site

# Tables come back as Any: pandas' declared types are wider than what these hold.
validate: Any = validation.validate
split_by_part: Any = error_budget.split_by_part

KINDS: dict[str, Any] = {
    "gpt2-plt": ("gpt2", {"kind": "plt"}),
    "llama-plt-skip": ("llama", {"kind": "plt", "activation": "jumprelu", "skip": True}),
    "gpt2-clt": ("gpt2", {"kind": "clt"}),
    "gemma2-clt-skip": ("gemma2", {"kind": "clt", "activation": "jumprelu", "skip": True}),
    "gptj-topk": ("gptj", {"kind": "plt", "activation": "topk", "k": 6}),
    "gpt2-topk-over-layers": ("gpt2", {"kind": "clt", "activation": "topk", "k": 12}),
}
TOKENS = torch.tensor([0, 11, 22, 33, 11])
SOURCES = (NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN)
LAYERS = 3


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    family, kind = KINDS[request.param]
    language_model = random_model(family, n_layers=LAYERS, d_model=16, n_heads=4, d_vocab=64, dtype=torch.float64)
    dictionaries = random_dictionaries(**kind, n_layers=LAYERS, d_model=16, features=24, dtype=torch.float64, seed=1)
    return ReplacementModel(language_model, dictionaries)


@pytest.fixture(scope="module")
def graph(model):
    return attribute(model, TOKENS, targets=LogitTargets([3, 60]))


@pytest.fixture(scope="module")
def check(model, graph):
    return validate(model, graph, edges=None, controls=0, heads=3)


def _rows(graph, *kinds):
    return [row for row, node in enumerate(graph.nodes) if node.kind in kinds]


def _size(values):
    return float(np.abs(values).max())


# T̂


def total(graph) -> np.ndarray:
    """T̂[t, s] of a complete graph, by one dense solution."""
    A = graph.weights.toarray()
    F, V = _rows(graph, NodeKind.FEATURE), _rows(graph, NodeKind.LOGIT)
    a = np.array([graph.nodes[row].activation for row in F])
    answer = np.linalg.solve(np.eye(len(F)) - A[np.ix_(F, F)] / a, A[F])
    found = np.full(A.shape, np.nan)
    found[F] = -answer
    found[V] = -(A[V] + (A[np.ix_(V, F)] / a) @ answer)
    return found


def test_the_linear_regime_is_the_sum_over_all_paths_of_the_graph(model, graph):
    sources, targets = _rows(graph, *SOURCES), _rows(graph, NodeKind.FEATURE, NodeKind.LOGIT)
    trace = model.trace(TOKENS)
    removed = [[-1.0 * node_change(model, trace, graph.nodes[row])] for row in sources]
    read = Targets(model, trace, [graph.nodes[row] for row in targets])
    moved = effects(model, Recording(model, trace), removed, read, "linear")
    expected = total(graph)[np.ix_(targets, sources)].T
    np.testing.assert_allclose(moved, expected, rtol=1e-9, atol=1e-9 * _size(expected))
    assert _size(expected + graph.weights.toarray()[np.ix_(targets, sources)].T) > 1e-3  # there are indirect paths


def test_what_a_graph_was_pruned_of_still_answers(model, graph):
    pruned, expected = graph.prune(nodes=0.7), total(graph)
    assert len(pruned.nodes) < len(graph.nodes)
    found = validate(model, pruned, edges=None, claims=("graph",), controls=0).edges
    ends = [[graph.position[name] for name in found[end]] for end in ("target", "source")]
    np.testing.assert_allclose(found["graph_predicted"], expected[tuple(ends)], rtol=1e-9, atol=1e-9)


def test_a_direct_edge_predicts_what_the_graph_says(graph, check):
    frame = check.edges
    ends = [[graph.position[name] for name in frame[end]] for end in ("target", "source")]
    assert len(frame) == np.isin(graph.weights.tocoo().col, _rows(graph, *SOURCES)).sum()
    np.testing.assert_allclose(frame["direct_predicted"], -graph.weights.toarray()[tuple(ends)], rtol=0, atol=1e-9)
    assert check.frozen_error < 1e-9


# measurements


class Plain:
    """Runs of the bridge, one at a time, with what is held written down as hooks."""

    def __init__(self, model: ReplacementModel) -> None:
        self.model, self.trace = model, model.trace(TOKENS)
        self.sites = [tuple(Site(layer, kind).hooks[0] for kind in ("mlp_in", "mlp_out")) for layer in range(LAYERS)]
        self.patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in range(LAYERS)]
        self.scales = [n for n in model.model.hook_names if n.endswith("hook_scale") and n.startswith(("b", "ln"))]
        self.clean: dict[str, torch.Tensor] = {}
        names = [*self.patterns, *self.scales, *(name for site in self.sites for name in site), FINAL]
        self._run([(name, lambda value, hook: self.clean.update({hook.name: value.clone()})) for name in names])

    @torch.no_grad()
    def _run(self, hooks) -> None:
        self.model.model.bridge.run_with_hooks(TOKENS[None], fwd_hooks=hooks, prepend_bos=False)

    def removed(self, node):
        """What the node adds to the embeddings and to each MLP's output, dense, from the dictionaries' own weights."""
        D, at = self.model.dictionaries, (len(TOKENS), self.model.model.d_model)
        embed, out = torch.zeros(at, dtype=torch.float64), torch.zeros(LAYERS, *at, dtype=torch.float64)
        if node.kind is NodeKind.TOKEN:
            embed[node.pos] = self.trace.frozen.writes.embed[node.pos]
        elif node.kind is NodeKind.ERROR:
            out[node.layer, node.pos] = self.trace.errors[node.layer, node.pos]
        else:
            for layer in D.write_layers(node.layer):
                row = D.decoder_rows(node.layer, torch.tensor([node.index]), layer)[0].detach()
                out[layer, node.pos] = node.activation * row
        return embed, out

    def moved(self, node, target, *, mlps, held, live=(), share=1.0) -> float:
        """How far a target moves when a share of a node is taken out.

        `mlps`: positions whose MLP outputs are held; `held`: hooks at their clean values but for the `live` heads.
        """
        embed, out = self.removed(node)
        reads: dict[str, torch.Tensor] = {}
        hooks: list[Any] = [("embed.hook_out", lambda value, hook: value - share * embed)]

        def hold(value, hook):
            kept = self.clean[hook.name].clone()
            for layer, head in live:
                if hook.name == self.patterns[layer]:
                    kept[:, head] = value[:, head]
            return kept

        def read(value, hook):
            reads[hook.name] = value.clone()

        def write(value, hook, layer):
            kept = self.clean[hook.name].clone()
            if (skip := self.model.dictionaries.skip(layer)) is not None:  # a path, which no claim holds
                mlp_in = self.sites[layer][0]
                kept = kept + (reads[mlp_in] - self.clean[mlp_in]) @ skip
            value = value.clone()
            value[:, mlps] = kept[:, mlps]
            return value - share * out[layer]

        hooks += [(name, hold) for name in held] + [(FINAL, read)]
        for layer, (mlp_in, mlp_out) in enumerate(self.sites):
            hooks += [(mlp_in, read), (mlp_out, lambda value, hook, layer=layer: write(value, hook, layer))]
        self._run(hooks)
        if target.kind is NodeKind.LOGIT:
            name, pos = FINAL, -1
            W_U = self.model.model.W_U * self.trace.frozen.logit_scale
            vector = W_U[:, target.index] - W_U.mean(dim=1)
        else:
            name, pos = self.sites[target.layer][0], target.pos
            vector = self.model.dictionaries.encoder_rows(target.layer, torch.tensor([target.index]))[0].detach()
        return float((reads[name] - self.clean[name])[0, pos] @ vector)

    def claim(self, name, *ends, share=1.0) -> float:
        """The measurement of a claim."""
        held = [*self.patterns, *self.scales] if name == "graph" else []
        mlps = {"graph": slice(0, 1), "direct": slice(None), "model": slice(0, 0)}[name]
        return self.moved(*ends, mlps=mlps, held=held, share=share)


@pytest.fixture(scope="module")
def plain(model):
    return Plain(model)


def _some_of_each_kind(frame) -> list[dict[str, Any]]:
    return [row for _, rows in frame.groupby("kind") for row in rows.iloc[[0, -1]].to_dict("records")]


def _ends(graph, row):
    return [graph.nodes[graph.position[row[end]]] for end in ("source", "target")]


@pytest.mark.parametrize("claim", ["graph", "direct", "model"])
def test_each_claim_is_measured_by_its_own_run_of_the_model(plain, graph, check, claim):
    for row in _some_of_each_kind(check.edges):
        measured = plain.claim(claim, *_ends(graph, row))
        assert row[f"{claim}_measured"] == pytest.approx(measured, rel=1e-9, abs=1e-9), (row["source"], row["target"])


def test_a_ratio_is_the_slope_over_doses(plain, graph, check):
    frame = check.edges[~check.edges["kind"].str.startswith("feature")]  # those take values elsewhere, too
    for row in _some_of_each_kind(frame):
        over, under = 0.0, 0.0
        for dose in (0.1, 0.25, 0.5, 1.0):
            over += dose * row["graph_predicted"] * plain.claim("graph", *_ends(graph, row), share=dose)
            under += (dose * row["graph_predicted"]) ** 2
        assert row["graph_ratio"] == pytest.approx(over / under, rel=1e-9)


# splits


def test_parts_sum_to_rounding(graph, check):
    frame = check.edges
    size = max(_size(frame[f"{claim}_measured"]) for claim in ("graph", "direct", "model"))
    direct = frame["direct_patterns"] + frame["direct_norms"] - frame["weight"]
    np.testing.assert_allclose(direct, frame["direct_measured"], rtol=0, atol=1e-9 * size)
    parts = frame[[f"miss_{part}" for part in ("dictionary", "curvature", "first", "patterns", "norms")]]
    miss = frame["model_measured"] - frame["model_predicted"]
    np.testing.assert_allclose(parts.sum(axis=1), miss, rtol=0, atol=1e-9 * size)
    assert (frame["miss"] == parts.abs().idxmax(axis=1).str.removeprefix("miss_")).all()


@pytest.mark.parametrize(("claim", "prefix"), [("direct", "direct"), ("model", "miss")])
def test_heads_and_norms_sum_to_their_part(model, graph, check, claim, prefix):
    frame = check.edges.iloc[::7]
    split = split_by_part(model, graph, frame, claim)
    parts = split.assign(what=split["part"].str.split().str[0]).groupby(["source", "target", "what"])["value"].sum()
    for row in frame.to_dict("records"):
        heads, norms = (parts[row["source"], row["target"], what] for what in ("head", "norm"))
        assert heads == pytest.approx(row[f"{prefix}_patterns"], abs=1e-9)
        assert norms == pytest.approx(row[f"{prefix}_norms"], abs=1e-9)


def test_a_heads_share_is_what_it_adds_first_and_last(plain, model, graph, check):
    """First: the heads before it live, norms held; last: norms and the heads after it live."""
    edge = check.edges.loc[check.edges["direct_patterns"].abs().idxmax()]
    values = split_by_part(model, graph, check.edges.loc[[edge.name]]).set_index("part")["value"]
    order = [(layer, head) for layer in range(LAYERS) for head in range(4)]

    def measured(live, norms):
        held = plain.patterns if norms else [*plain.patterns, *plain.scales]
        return plain.moved(*_ends(graph, edge), mlps=slice(None), held=held, live=live)

    for number in (1, 6, 11):
        first = measured(order[: number + 1], norms=False) - measured(order[:number], norms=False)
        last = measured(order[number:], norms=True) - measured(order[number + 1 :], norms=True)
        layer, head = order[number]
        assert values[f"head {layer}.{head}"] == pytest.approx((first + last) / 2, abs=1e-9)


def test_the_leading_head_is_named_where_attention_carries_an_edge(model, graph, check):
    frame = check.edges
    carried = frame[frame["direct_verdict"] == "attention"].sort_values("influence", ascending=False, kind="stable")
    assert (frame["direct_head"] != "").sum() == min(3, len(carried))
    split = split_by_part(model, graph, carried.head(3))
    heads = split[split["part"].str.startswith("head")]
    for (source, target), rows in heads.groupby(["source", "target"]):
        largest = rows.loc[rows["value"].abs().idxmax(), "part"]
        named = frame[(frame["source"] == source) & (frame["target"] == target)]["direct_head"].item()
        assert f"head {named}" == largest
