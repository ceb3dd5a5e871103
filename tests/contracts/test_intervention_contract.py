"""Interventions in every regime, on every family and kind of dictionary, against plain runs, in float64.

The oracle knows nothing of the engine: it hooks the bridge itself, one alternative at a time, and computes features
with the dictionaries' own weights.
"""

from dataclasses import replace

import pytest
import torch

from circuitsae.attribution import LogitTargets, attribute
from circuitsae.graph import NodeKind
from circuitsae.interventions import (
    MLP,
    Add,
    Error,
    Feature,
    Head,
    Intervention,
    Recording,
    Regime,
    Scale,
    Set,
    Stream,
    Token,
    Zero,
    for_node,
    intervene,
)
from circuitsae.loading import load_dictionaries, load_model
from circuitsae.replacement import ReplacementModel
from circuitsae.validation.measuring import Targets, effects
from transcoders.dictionaries import mixed, random_dictionaries
from transcoders.loading import random_model
from transcoders.sites import SiteKind

KINDS = {
    "gpt2-topk": ("gpt2", {"kind": "plt", "activation": "topk"}),
    "gpt2-clt": ("gpt2", {"kind": "clt"}),
    "llama-plt": ("llama", {"kind": "plt"}),
    "llama-skip": ("llama", {"kind": "clt", "activation": "jumprelu", "skip": True}),
    "gpt2-normed": ("gpt2", {"kind": "plt", "read": "mlp_normed"}),
    "gemma2-mid": ("gemma2", {"kind": "clt", "skip": True, "read": "resid_mid", "write": "mlp_added"}),
    "gpt2-sae": ("gpt2", {"kind": "sae", "activation": "jumprelu", "centred": True}),
    "llama-mixed": ("llama", {"kind": "sae", "skip": True}),
}
SAE_SITES: dict[str, tuple[SiteKind, ...]] = {
    "gpt2-sae": ("attn_out", "mlp_out", "resid_post"),
    "llama-mixed": ("resid_pre", "resid_mid", "resid_mid"),
}
"""Of the first layers; the last, of a fourth, has no autoencoder."""
REGIMES = {
    "frozen": Regime(mlps="constant", patterns="frozen", norms="frozen"),
    "frozen-replacement": Regime(mlps="features", patterns="frozen", norms="frozen"),
    "replacement": Regime(mlps="features"),
    "frozen-attention": Regime(patterns="frozen"),
    "frozen-norms": Regime(norms="frozen"),
    "until-1": Regime(mlps="features", until=1),
    "graph": Regime(patterns="frozen", norms="frozen", first="frozen"),
    "direct": Regime(mlps="constant"),
    "some-heads": Regime(mlps="constant", patterns=frozenset({(0, 2), (1, 1), (2, 0), (2, 3)}), norms="frozen"),
    "some-norms": Regime(patterns="frozen", norms=frozenset({"blocks.1.ln1.hook_scale", "ln_final.hook_scale"})),
    "model": Regime(),
}
TOKENS = torch.tensor([0, 11, 22, 33, 11])
MIDDLE = "after what an autoencoder writes into the stream of layer 1 between attention and MLP"
STREAMS = {"resid_pre": "hook_in", "resid_mid": "ln2.hook_in", "resid_post": "hook_out"}
SIDES = (
    {"mlp_in": "mlp.hook_in", "mlp_normed": "ln2.hook_normalized", "attn_out": "attn.hook_out", **STREAMS},
    {"mlp_out": "mlp.hook_out", "mlp_added": "ln2_post.hook_out"},
)
"""Hooks of what the dictionaries read and write; `mlp_added` as Gemma has it."""


def _hooks(model, layer):
    """What the dictionary of a layer reads, and what it writes."""
    D = model.dictionaries
    sites = (D.reads[layer], D.writes[layer])
    names = SIDES[0] | SIDES[1]
    return tuple(f"blocks.{layer}.{names[site.kind]}" for site in sites)


def _sae(model, layer):
    return model.dictionaries.reads[layer] == model.dictionaries.writes[layer]


def _made(name, kind):
    """Of three layers; with autoencoders, at one site after the other, and a fourth layer that has none."""
    sizes = {"n_layers": 3, "d_model": 16, "features": 24, "dtype": torch.float64, "seed": 1}
    if name not in SAE_SITES:
        return random_dictionaries(**kind, **sizes)
    transcoders = random_dictionaries(**kind | {"kind": "plt", "centred": False}, **sizes)
    of_site = {site: random_dictionaries(**kind, **sizes, read=site) for site in SAE_SITES[name] if site != "mlp_in"}
    return mixed({layer: of_site.get(site, transcoders) for layer, site in enumerate(SAE_SITES[name])}).padded(4)


@pytest.fixture(scope="module", params=[*KINDS, "pocket"])
def model(request):
    if request.param == "pocket":
        dictionaries = load_dictionaries("pocket", dtype=torch.float64)
        return ReplacementModel(load_model("pocket", dtype=torch.float64), dictionaries)
    family, kind = KINDS[request.param]
    dictionaries = _made(request.param, kind)
    sizes = {"n_layers": dictionaries.n_layers, "d_model": 16, "n_heads": 4, "d_vocab": 64}
    language_model = random_model(family, **sizes, dtype=torch.float64)
    dictionaries.provenance = replace(dictionaries.provenance, first=2 if family == "gemma2" else 1)
    return ReplacementModel(language_model, dictionaries)


@pytest.fixture(scope="module")
def clean(model):
    """Every activation of the clean run that the oracle holds."""
    kept = {}

    def keep(value, hook):
        kept[hook.name] = value.clone()

    names = [
        n
        for n in model.model.bridge.hook_dict
        if n.endswith((".hook_pattern", ".hook_scale", *SIDES[0].values(), *SIDES[1].values()))
    ]
    model.model.bridge.run_with_hooks(TOKENS[None], fwd_hooks=[(n, keep) for n in names], prepend_bos=False)
    return kept


def _active(model, layer, r):
    return model.dictionaries.activations(layer, r)


def _features_out(model, layer, activations, reads):
    """b_dec + Σ features (+ skip) of one layer, from dense activations of all layers up to it."""
    out = model.dictionaries.decoder_bias(layer)
    for source, a in activations.items():
        if layer in model.dictionaries.write_layers(source):
            rows = model.dictionaries.decoder_rows(source, torch.arange(a.shape[-1]), layer)
            out = out + a @ rows
    skip = model.dictionaries.skip(layer)
    return out if skip is None else out + reads @ skip


def _held(regime, name, value, clean):
    """The value that a regime gives a pattern or a scale."""
    what = regime.patterns if name.endswith("pattern") else regime.norms
    if not isinstance(what, frozenset):
        return value if what == "live" else clean.clone()
    if name.endswith("scale"):
        return value if name in what else clean.clone()
    held, layer = clean.clone(), int(name.split(".")[1])
    for head in range(held.shape[1]):
        if (layer, head) in what:
            held[:, head] = value[:, head]
    return held


def _oracle(model, clean, regime, features=(), hooks=None):
    """Logits and MLP reads of one run; `features`: (layer, pos, index, function of the activation)."""
    n_layers, D, first = model.model.n_layers, model.dictionaries, model.dictionaries.provenance.first
    # features read by the clean run, from which the errors follow
    a_clean = {layer: _active(model, layer, clean[_hooks(model, layer)[0]][0]) for layer in range(n_layers)}
    errors = {}
    for layer in range(n_layers):
        read_hook, write_hook = _hooks(model, layer)
        y = _features_out(model, layer, a_clean, clean[read_hook][0])
        errors[layer] = clean[write_hook][0] - y
    recomputed, reads, delta = {}, {}, {}
    own = [
        (n, lambda v, hook: _held(regime, hook.name, v, clean[hook.name]))
        for n in clean
        if n.endswith(("pattern", "scale"))
    ]

    def read(layer):
        def hook(value, hook):
            reads[layer] = value[0].clone()
            recomputed[layer] = _active(model, layer, value[0])
            start = a_clean if regime.mlp(layer) == "constant" else recomputed
            for at, pos, index, change in features:
                if at == layer:
                    before = start[layer][pos, index].clone()
                    delta.setdefault((layer, pos, index), 0.0)
                    delta[layer, pos, index] = change(before + delta[layer, pos, index]) - before

        return hook

    def write(layer):
        def hook(value, hook):
            out = value.clone()
            mode, held = regime.mlp(layer), clean[_hooks(model, layer)[1]]
            if mode == "constant":
                out = held.clone()
                if (skip := D.skip(layer)) is not None:
                    moved = (reads[layer] - clean[_hooks(model, layer)[0]][0]) @ skip
                    out[0] += moved
            elif mode == "live" and regime.first == "frozen":
                out[0, :first] = held[0, :first]
                if (skip := D.skip(layer)) is not None:
                    out[0, :first] += (reads[layer] - clean[_hooks(model, layer)[0]][0])[:first] @ skip
            elif mode == "features":
                out[0, first:] = (_features_out(model, layer, recomputed, reads[layer]) + errors[layer])[first:]
            for (source, pos, index), d in delta.items():
                if layer in D.write_layers(source):
                    out[0, pos] += d * D.decoder_rows(source, torch.tensor([index]), layer)[0]
            return out

        return hook

    def splice(layer):
        """An autoencoder reads, and then writes; a stream in the middle by what attention adds."""
        place, stream = _hooks(model, layer)[1], []

        def hook(value, hook):
            read(layer)(value, hook)
            return write(layer)(value, hook)

        def middle(value, hook):
            x = stream[0] + value
            y = splice_hook(x.clone(), hook)
            return value + (given.pop(MIDDLE, torch.clone)(y) - x)

        splice_hook = hook
        if not place.endswith("ln2.hook_in"):
            return [(place, hook)], []
        note = (f"blocks.{layer}.hook_in", lambda value, hook: stream.append(value.clone()))
        return [], [note, (f"blocks.{layer}.attn.hook_out", middle)]

    late, saes = [], [layer for layer in range(n_layers) if _sae(model, layer)]
    for layer in range(n_layers):
        if layer not in saes:
            own += [(_hooks(model, layer)[1], write(layer))]
        elif D.n_features(layer):
            before, after = splice(layer)
            own, late = own + before, late + after
    given = dict(hooks or {})
    own += [(name, lambda v, hook, f=f: f(v.clone())) for name, f in given.items() if name != MIDDLE]
    own += late
    for layer in range(n_layers):
        if layer not in saes or not D.n_features(layer):
            own += [(_hooks(model, layer)[0], read(layer))]
    logits = model.model.bridge.run_with_hooks(TOKENS[None], fwd_hooks=own, prepend_bos=False)
    return logits[0], torch.stack([reads[layer] for layer in range(n_layers)])


def _close(outcome, oracle, alternative=0):
    logits, reads = oracle
    torch.testing.assert_close(outcome.changed_reads.by_layer[0, alternative], reads, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(outcome.changed[0, alternative], logits, rtol=1e-9, atol=1e-9)


def _actives(model, layer):
    index, _ = model.trace(TOKENS).features
    return [tuple(row) for row in index[index[:, 0] == layer].tolist()]


@pytest.mark.parametrize("regime", REGIMES)
def test_several_features_at_once(model, clean, regime):
    first, second = _actives(model, 0)[0], _actives(model, 1)[-1]
    third, off = _actives(model, 2)[0], (1, 2, 5)
    changes = [(first, Zero(), lambda a: 0 * a), (second, Scale(-1.5), lambda a: -1.5 * a)]
    changes += [(third, Add(2.0), lambda a: a + 2), (off, Set(3.0), lambda a: 3.0 + 0 * a)]
    changes += [(second, Add(0.25), lambda a: a + 0.25)]
    interventions = [Intervention(Feature(f[0], f[2], f[1]), op) for f, op, _ in changes]
    outcome = intervene(model, TOKENS, interventions, regime=REGIMES[regime], logits_at=None)
    _close(outcome, _oracle(model, clean, REGIMES[regime], [(*f, change) for f, _, change in changes]))


@pytest.mark.parametrize("regime", REGIMES)
def test_heads_mlps_streams_and_tokens(model, clean, regime):
    d, d_head = model.model.d_model, model.model.bridge.cfg.d_head
    rng = torch.Generator().manual_seed(77)
    v, w, z = (torch.randn(n, generator=rng, dtype=torch.float64) for n in (d, d, d_head))

    def at(pos, change):
        def hook(value):
            value[0, pos] = change(value[0, pos])
            return value

        return hook

    def head(value):
        value[0, 2, 1] += z
        value[0, :, 0] *= 0.5
        return value

    interventions = [
        Intervention(Token(3), Scale(0.5)),
        Intervention(Head(1, 1, 2), Add(z)),
        Intervention(Head(1, 0), Scale(0.5)),
        Intervention(MLP(1, (1, 2)), Zero()),
        Intervention(Stream(2, "resid_pre", -1), Set(w)),
        Intervention(Stream(0, "attn_out", 4), Add(v)),
        Intervention(Stream(1, "mlp_in", 3), Add(v)),
    ]
    hooks = {
        "embed.hook_out": at(3, lambda x: 0.5 * x),
        "blocks.1.attn.hook_z": head,
        _hooks(model, 1)[1] if not _sae(model, 1) else "blocks.1.mlp.hook_out": at([1, 2], lambda x: 0 * x),
        "blocks.2.hook_in": at(4, lambda x: w),
        "blocks.0.attn.hook_out": at(4, lambda x: x + v),
        "blocks.1.mlp.hook_in": at(3, lambda x: x + v),
    }
    outcome = intervene(model, TOKENS, interventions, regime=REGIMES[regime], logits_at=None)
    _close(outcome, _oracle(model, clean, REGIMES[regime], hooks=hooks))


@pytest.mark.parametrize("regime", REGIMES)
def test_a_stream_in_the_middle_is_changed_by_what_attention_adds(model, clean, regime):
    v = torch.randn(model.model.d_model, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def hook(value):
        value[0, 2] += v
        return value

    added = "ln1_post.hook_out" if model.model.has_hook("blocks.1.ln1_post.hook_out") else "attn.hook_out"
    interventions = [Intervention(Stream(1, "resid_mid", 2), Add(v))]
    place = MIDDLE if _hooks(model, 1)[1].endswith("ln2.hook_in") else f"blocks.1.{added}"
    outcome = intervene(model, TOKENS, interventions, regime=REGIMES[regime], logits_at=None)
    _close(outcome, _oracle(model, clean, REGIMES[regime], hooks={place: hook}))


@pytest.mark.parametrize("regime", REGIMES)
def test_an_error_node_is_a_vector_of_the_mlps_output(model, clean, regime):
    trace = model.trace(TOKENS)

    def hook(value):
        value[0, 2] -= trace.errors[1, 2]
        return value

    place = _hooks(model, 1)[1]
    outcome = intervene(model, TOKENS, [Intervention(Error(1, 2), Zero())], regime=REGIMES[regime], logits_at=None)
    hooks = {MIDDLE if place.endswith("ln2.hook_in") else place: hook}
    _close(outcome, _oracle(model, clean, REGIMES[regime], hooks=hooks))


@pytest.mark.parametrize("regime", REGIMES)
def test_no_change_is_the_clean_run_and_the_audit_passes(model, regime):
    outcome = intervene(model, TOKENS, [], regime=REGIMES[regime], logits_at=None, audit=True)
    torch.testing.assert_close(outcome.changed[:, 0], outcome.clean, rtol=1e-9, atol=1e-9)
    assert outcome.audit is not None
    assert max([0.0, *outcome.audit["moved"]]) < 1e-9


def test_the_frozen_regime_is_the_graph(model, monkeypatch):
    """Removing any source moves every target of the full graph by minus its edge; one batched call.

    With autoencoders edges are derivatives: of the regime that holds what is at every other site.
    """
    # The bridge rounds Llama's patterns to float32, too coarse for differences.
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    graph, trace = attribute(model, TOKENS, targets=LogitTargets([3, 5, 60])), model.trace(TOKENS)
    kinds = (NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN)
    sources = [s for s, n in enumerate(graph.nodes) if n.kind in kinds and n.layer not in model.passed]
    rows = [row for row, node in enumerate(graph.nodes) if node.is_target]
    targets = Targets(model, trace, [graph.nodes[row] for row in rows])
    weights = torch.from_numpy(graph.weights.toarray()[rows][:, sources].T)

    def moved(operation, regime):
        alternatives = [[for_node(graph.nodes[s], operation)] for s in sources]
        return torch.from_numpy(effects(model, Recording(model, trace), alternatives, targets, regime))

    if not model.spliced:
        torch.testing.assert_close(moved(Zero(), "frozen"), -weights, rtol=1e-9, atol=1e-9)
        return
    size = 1e-5
    slope = (moved(Scale(1 + size), "direct") - moved(Scale(1 - size), "direct")) / (2 * size)
    torch.testing.assert_close(slope, weights, rtol=1e-6, atol=1e-6)
    assert float(weights.abs().max()) > 0.1
