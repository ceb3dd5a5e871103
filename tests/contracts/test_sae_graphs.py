"""Graphs of autoencoders: every edge is a derivative of the model between two sites, against central differences.

The oracle runs the model's own modules with hooks that hold what stands at every autoencoder's site, and reads the
targets with the autoencoders' own matrices.
"""

import numpy as np
import pytest
import torch

from circuitsae.attribution import LogitTargets, attribute, attribute_pruned
from circuitsae.graph import NodeKind, load_graph, save_graph
from circuitsae.graph.exchange import neuronpedia
from circuitsae.interventions import Recording
from circuitsae.replacement import ReplacementModel
from circuitsae.report import write_html
from circuitsae.sentences import of_graph
from circuitsae.validation import Validation, calibrate, validate
from circuitsae.validation.claims import Pairs, Settings, judge
from transcoders.bridge import native_bridge
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import DictionaryError, InputError
from transcoders.language_model import LanguageModel
from transcoders.loading import random_model
from transcoders.sites import Site

TOKENS = torch.tensor([0, 11, 22, 33, 11])
TARGETS = LogitTargets([3, 5, 60])
STEP = 1e-5
ROUNDING = {"random-gpt2-0": 1e-8, "random-llama-0": 1e-6}
"""Of the largest edge; the bridge's softmax of Llama, which is differentiated, rounds to float32."""
SITES = {kind: (kind, kind, kind) for kind in ("resid_post", "resid_mid", "resid_pre", "attn_out", "mlp_out")}
SITES["each"] = ("mlp_out", "resid_pre", "attn_out")
WRITERS = (NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN)


def autoencoders(kinds, *, only=None, features=24, d_model=16, **options):
    """Random autoencoders, one for each layer, at sites of these kinds; `only` these layers have one."""
    made = random_dictionaries(
        "sae", n_layers=len(kinds), d_model=d_model, features=features, dtype=torch.float64, **options
    )
    for layer, kind in enumerate(kinds):
        made[layer].read, made[layer].writes = Site(layer, kind), (Site(layer, kind),)
    return made if only is None else made.only(only)


def small_model(family):
    return random_model(family, n_layers=3, d_model=16, n_heads=4, d_vocab=64, dtype=torch.float64)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def language_model(request):
    return small_model(request.param)


@pytest.fixture(params=list(SITES))
def model(language_model, request):
    return ReplacementModel(language_model, autoencoders(SITES[request.param]))


class Oracle:
    """The model with what stands at the sites of its autoencoders held, but for changes; each change in a row."""

    def __init__(self, model, tokens):
        self.model, self.tokens = model, tokens
        self.saes = {layer: model.dictionaries[layer] for layer in model.written}
        self.names = {layer: model.model.hook(sae.read) for layer, sae in self.saes.items()}
        _, clean = model.model.run_hooked(tokens[None], read=[*self.names.values(), "embed.hook_out"])
        self.clean = {layer: clean[name][0] for layer, name in self.names.items()}
        self.embed = clean["embed.hook_out"][0]
        self.active, self.errors = {}, {}
        for layer, sae in self.saes.items():
            self.active[layer] = torch.relu(self.clean[layer] @ sae.W_enc + sae.b_enc).detach()
            self.active[layer][: model.first] = 0
            self.errors[layer] = (self.clean[layer] - self.active[layer] @ sae.W_dec - sae.b_dec).detach()
            self.errors[layer][: model.first] = self.clean[layer][: model.first]

    def written(self, node):
        """The place of a node, a layer (−1 the embeddings) and what it writes there, `[pos d_model]`."""
        vector = torch.zeros_like(self.embed)
        if node.kind is NodeKind.TOKEN:
            vector[node.pos] = self.embed[node.pos]
        elif node.kind is NodeKind.ERROR:
            vector[node.pos] = self.errors[node.layer][node.pos]
        else:
            sae = self.saes[node.layer]
            vector[node.pos] = self.active[node.layer][node.pos, node.index] * sae.W_dec[node.index].detach()
        return node.layer, vector

    @torch.no_grad()
    def values(self, nodes, factors, targets, features="held"):
        """[run, target], the value of targets where node i is `1 + factors[i]` times what it was.

        features: `held`, or `live`, where autoencoders read what comes, and their clean errors are added.
        """
        places = [self.written(node) for node in nodes]

        def added(value, at):
            for row, ((layer, vector), factor) in enumerate(zip(places, factors, strict=True)):
                if layer == at:
                    value[row] += factor * vector
            return value

        reads = {}

        def at_site(layer):
            def change(value):
                reads[layer] = value.clone()
                put = self.clean[layer].expand(len(nodes), -1, -1).clone()
                if features == "live":
                    sae, first = self.saes[layer], self.model.first
                    active = torch.relu(value @ sae.W_enc + sae.b_enc)
                    put[:, first:] = (active @ sae.W_dec + sae.b_dec + self.errors[layer])[:, first:]
                return added(put, layer)

            return change

        edits = self.exact_patterns()
        for layer, name in self.names.items():
            middle = self.saes[layer].read.kind == "resid_mid"
            edits |= in_the_stream(layer, at_site(layer)) if middle else {name: at_site(layer)}
        edits["embed.hook_out"] = lambda value: added(value.clone(), -1)
        logits, _ = self.model.model.run_hooked(self.tokens.expand(len(nodes), -1), write=edits)
        logits = logits[:, -1] - logits[:, -1].mean(-1, keepdim=True)
        columns = [
            logits[:, node.index]
            if node.kind is NodeKind.LOGIT
            else reads[node.layer][:, node.pos] @ self.saes[node.layer].W_enc[:, node.index]
            for node in targets
        ]
        return torch.stack(columns, dim=1).numpy()

    def exact_patterns(self):
        """Hooks for softmax in float64; the bridge's rounds to float32 in some families, more than a step changes."""
        scores = {}

        def softmax_at(layer):
            return lambda pattern: scores[layer].softmax(-1) if layer in scores else pattern

        edits = {}
        for layer in range(self.model.model.n_layers):
            edits[f"blocks.{layer}.attn.hook_attn_scores"] = lambda value, layer=layer: scores.update({layer: value})
            edits[f"blocks.{layer}.attn.hook_pattern"] = softmax_at(layer)
        return edits

    def derivatives(self, nodes, targets, features="held"):
        """[target, node] by central differences."""
        step = np.full(len(nodes), STEP)
        up, down = (self.values(nodes, factors, targets, features) for factors in (step, -step))
        return ((up - down) / (2 * STEP)).T


def in_the_stream(layer, change):
    """Hooks that change the stream between attention and MLP for all that reads it later, by what attention adds."""
    before = {}

    def added(value):
        return change(before["stream"] + value) - before["stream"]

    return {
        f"blocks.{layer}.hook_in": lambda value: before.update(stream=value),
        f"blocks.{layer}.hook_attn_out": added,
    }


def ends(graph):
    """The rows of the targets and the columns of what can be changed."""
    rows = [row for row, node in enumerate(graph.nodes) if node.is_target]
    columns = [row for row, node in enumerate(graph.nodes) if node.kind in WRITERS]
    return rows, columns


def assert_edges_are_derivatives(model, graph, tokens):
    rows, columns = ends(graph)
    nodes = [graph.nodes[i] for i in columns]
    found = Oracle(model, tokens).derivatives(nodes, [graph.nodes[i] for i in rows])
    edges = graph.weights.toarray()[np.ix_(rows, columns)]
    assert np.abs(edges).max() > 0.05
    np.testing.assert_allclose(edges, found, rtol=1e-5, atol=ROUNDING[model.model.name] * np.abs(edges).max())


def total_effects(graph):
    """[target, source], what a small change of a source does through all features, which answer as they read."""
    rows, columns = ends(graph)
    A, a = graph.weights.toarray(), np.array([node.activation for node in graph.nodes])
    feature = graph.mask(NodeKind.FEATURE)
    B = np.where(feature[:, None] & feature, A / np.where(feature, a, 1.0), 0)
    answered = np.linalg.solve(np.eye(len(A)) - B, np.where(feature[:, None], A, 0))
    through = np.where(feature, A / np.where(feature, a, 1.0), 0) @ answered
    return (A + through)[np.ix_(rows, columns)]


def test_edges_are_derivatives_with_all_other_sites_held(model):
    graph = attribute(model, TOKENS, targets=TARGETS)
    assert graph.provenance["response"] == "linear"
    assert {node.layer for node in graph.nodes if node.kind is NodeKind.FEATURE} == {0, 1, 2}
    assert_edges_are_derivatives(model, graph, TOKENS)


def test_total_effects_are_derivatives_with_features_that_answer(model):
    graph = attribute(model, TOKENS, targets=TARGETS)
    rows, columns = ends(graph)
    sources, targets = ([graph.nodes[i] for i in numbers] for numbers in (columns, rows))
    found = Oracle(model, TOKENS).derivatives(sources, targets, features="live")
    atol = ROUNDING[model.model.name] * np.abs(found).max()
    np.testing.assert_allclose(total_effects(graph), found, rtol=1e-5, atol=atol)


def test_a_layer_without_an_autoencoder_is_left_alone(language_model):
    model = ReplacementModel(language_model, autoencoders(SITES["resid_post"], only=[1]))
    graph = attribute(model, TOKENS, targets=TARGETS)
    assert {node.layer for node in graph.nodes if node.kind is NodeKind.ERROR} == {1}
    assert {node.id for node in graph.nodes if node.kind is NodeKind.BIAS and node.layer >= 0} <= {
        "1.b_dec", "1.resid_post@0", "3.unembed.b"
    }  # fmt: skip
    assert_edges_are_derivatives(model, graph, TOKENS)
    trace = model.trace(TOKENS)
    torch.testing.assert_close(model.run(TOKENS, trace.errors), trace.logits, rtol=1e-9, atol=1e-9)


def test_nothing_of_the_stream_passes_an_autoencoder_of_the_stream(language_model):
    graph = attribute(ReplacementModel(language_model, autoencoders(SITES["resid_post"])), TOKENS, targets=TARGETS)
    coo = graph.weights.tocoo()
    hops = {(graph.nodes[t].layer - graph.nodes[s].layer) for t, s in zip(coo.row, coo.col, strict=True)
            if graph.nodes[s].kind in WRITERS}  # fmt: skip
    assert hops == {1}


def test_heads_and_neurons_are_refused_in_a_sentence(language_model):
    with pytest.raises(DictionaryError, match=r"layer 0 reads 0.attn_z, .* other sites than attn_z and mlp_neurons"):
        ReplacementModel(language_model, autoencoders(["attn_z"] * 3))


def linear_model():
    """No norms, patterns that no query moves, MLPs that are never off: the stream is linear in all that is written."""
    width, generator = 16, torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-2 if len(shape) > 1 else -1] ** 0.5

    weights = {"W_E": draw(64, width), "W_pos": draw(8, width), "W_U": draw(width, 64)}
    for layer in range(3):
        here = f"blocks.{layer}."
        weights |= {here + f"W_{kind}": torch.zeros(2, width, 8, dtype=torch.float64) for kind in "QK"}
        weights |= {here + "W_V": draw(2, width, 8), here + "W_O": draw(2, 8, width)}
        weights |= {here + "W_in": draw(width, 24), here + "W_out": draw(24, width)}
        weights[here + "b_in"] = torch.full((24,), 1000.0, dtype=torch.float64)
        weights[here + "b_out"] = -1000 * weights[here + "W_out"].sum(0)
    bridge = native_bridge(
        weights, n_layers=3, n_heads=2, d_model=width, d_head=8, d_mlp=24, n_ctx=8, d_vocab=64, d_out=64, causal=True,
        dtype=torch.float64,
    )  # fmt: skip
    return LanguageModel(bridge, "linear")


@pytest.mark.parametrize("factor", [-1.0, 3.0])
def test_where_the_model_is_linear_edges_are_exact_for_any_change(factor):
    model = ReplacementModel(linear_model(), autoencoders(SITES["each"]))
    graph = attribute(model, TOKENS, targets=TARGETS)
    rows, columns = ends(graph)
    nodes, targets = ([graph.nodes[i] for i in numbers] for numbers in (columns, rows))
    oracle = Oracle(model, TOKENS)
    moved = oracle.values(nodes, np.full(len(nodes), factor), targets) - oracle.values(
        nodes, np.zeros(len(nodes)), targets
    )
    edges = graph.weights.toarray()[np.ix_(rows, columns)]
    np.testing.assert_allclose(moved.T, factor * edges, rtol=1e-9, atol=1e-9 * np.abs(edges).max())


@pytest.mark.parametrize("limits", [{"max_features": 9}, {"unexplained": 0.2}, {"edges_per_node": 5}, {}], ids=str)
def test_fewer_features_and_small_batches_give_the_same_rows(language_model, limits):
    model = ReplacementModel(language_model, autoencoders(SITES["each"]))
    graph = attribute(model, TOKENS, targets=TARGETS, **limits)
    by_few = attribute(model, TOKENS, targets=TARGETS, batch_size=2, **limits)
    at_once, _ = attribute_pruned(model, TOKENS, targets=TARGETS, **limits)
    small = graph.prune()
    assert [node.id for node in by_few.nodes] == [node.id for node in graph.nodes]
    assert abs(by_few.weights - graph.weights).max() <= 1e-12 * abs(graph.weights).max()
    assert [node.id for node in at_once.nodes] == [node.id for node in small.nodes]
    assert abs(at_once.weights - small.weights).max() <= 1e-12 * abs(graph.weights).max()
    if "max_features" in limits:  # what the others write is error
        full = attribute(model, TOKENS, targets=TARGETS)
        logits = [graph.mask(NodeKind.LOGIT), full.mask(NodeKind.LOGIT)]
        sums = [g.weights.toarray()[rows].sum(axis=1) for g, rows in zip((graph, full), logits, strict=True)]
        np.testing.assert_allclose(sums[0], sums[1], rtol=1e-9)


# claims


def judged(model, graph, **settings):
    """All three claims of every edge that can be removed, in float64."""
    rows, columns = ends(graph)
    pairs = [(graph.nodes[s], graph.nodes[t]) for t in rows for s in columns if graph.weights[t, s]]
    prompt = Recording(model, model.trace(TOKENS))
    return judge(model, prompt, Pairs.of(pairs), Settings(controls=0, **settings)), pairs


@pytest.mark.parametrize("sites", ["resid_post", "each", "transcoders"])
def test_predictions_are_the_edges_and_the_totals(language_model, sites):
    """Also of transcoders between which attention and norms answer."""
    if sites == "transcoders":
        dictionaries = random_dictionaries("plt", n_layers=3, d_model=16, features=8, dtype=torch.float64)
    else:
        dictionaries = autoencoders(SITES[sites], features=8)
    model = ReplacementModel(language_model, dictionaries)
    graph = attribute(model, TOKENS, targets=TARGETS, response="linear")
    found, pairs = judged(model, graph, response="linear")
    rows, columns = ends(graph)
    target = [rows.index(graph.position[t.id]) for _, t in pairs]
    source = [columns.index(graph.position[s.id]) for s, _ in pairs]
    edges = graph.weights.toarray()[np.ix_(rows, columns)][target, source]
    totals = total_effects(graph)[target, source]
    for predicted, exact in (("frozen", edges), ("direct_predicted", edges), ("graph_predicted", totals)):
        # Doses of a thousandth bend a little, and Llama's softmax rounds to float32.
        np.testing.assert_allclose(-found[predicted], exact, rtol=1e-3, atol=1e-4 * np.abs(exact).max())
    for claim in ("graph", "direct") if model.spliced else ("direct",):  # random ones answer as no MLP does
        near = np.abs(found[f"{claim}_ratio"] - 1) < 0.25
        assert near.mean() > 0.5, f"{claim}: a tenth is too much for most edges"
    parts = found["miss_dictionary"] + found["miss_curvature"]
    np.testing.assert_allclose(found["model_measured"] - found["model_predicted"], parts, rtol=1e-9, atol=1e-12)


def test_where_the_model_is_linear_direct_claims_hold_exactly():
    model = ReplacementModel(linear_model(), autoencoders(SITES["each"], features=8))
    graph = attribute(model, TOKENS, targets=TARGETS)
    found, _ = judged(model, graph)
    size = np.abs(found["direct_predicted"]).max()
    np.testing.assert_allclose(found["direct_measured"], found["direct_predicted"], rtol=1e-6, atol=1e-7 * size)


def test_what_is_validated_says_what_it_is(language_model, tmp_path):
    """A command's way through: annotated, saved, read again, and refused where a linear map is needed."""
    model = ReplacementModel(language_model, autoencoders(SITES["resid_post"], features=8))
    graph = attribute(model, TOKENS, targets=TARGETS).prune()
    check = validate(model, graph, edges=12, controls=20)
    assert check.response == "linear"
    assert check.frozen_error < 1e-3
    assert check.claims == ("graph", "direct", "model")
    assert Validation.load(check.save(tmp_path / "check.json")).response == "linear"
    assert not {"direct_patterns", "direct_head", "miss_norms"} & {*check.edges}
    save_graph(check.annotate(graph), tmp_path / "graph")
    again = load_graph(tmp_path / "graph")
    assert again.provenance["sites"] == ["resid_post"] * 3
    assert of_graph(again).startswith("Of what the logit of")
    written = next(node for node in neuronpedia.write(again)["nodes"] if node["feature_type"].endswith("error"))
    assert written["clerp"].startswith("Err: resid_post")
    assert write_html(again, tmp_path / "page.html").exists()
    with pytest.raises(InputError, match="Calibration plants edges"):
        calibrate(model, [graph])
    with pytest.raises(InputError, match="closed form needs transcoders|found by autograd"):
        attribute(model, TOKENS, engine="closed_form")
