"""Sets of others' layers: transcoders and autoencoders side by side, several widths, several sites, layers without any.

The oracle of a row is the model with plain hooks: what is written in the place of an MLP, or at an autoencoder's site,
is the clean value and a small part of what a source writes.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from circuitsae.attribution import LogitTargets, attribute
from circuitsae.graph import NodeKind
from circuitsae.interventions import REGIMES, intervene
from circuitsae.replacement import ReplacementModel
from transcoders import MixedSet, SAESet, TranscoderSet, evaluate, load_dictionaries, mixed, save_dictionaries
from transcoders.dictionaries import CrossLayerTranscoder, fitted, present_layers, random_dictionaries
from transcoders.dictionaries.fingerprint import dictionary_fingerprint
from transcoders.errors import DictionaryError, InputError
from transcoders.formats import list_dictionaries
from transcoders.loading import random_model

LAYERS, WIDTH = 5, 16
SIZES: Any = {"n_layers": LAYERS, "d_model": WIDTH, "dtype": torch.float64}
TOKENS = torch.tensor([0, 11, 22, 33, 11])
TARGETS = LogitTargets([3, 5, 60])


def side_by_side() -> MixedSet:
    """Transcoders of two widths in layers 0 and 2, autoencoders at two sites in 1 and 4, nothing in 3."""
    narrow, wide = (random_dictionaries("plt", **SIZES, features=n, skip=n > 8) for n in (8, 20))
    middle = random_dictionaries("sae", **SIZES, features=12, read="resid_mid", centred=True)
    attention = random_dictionaries("sae", **SIZES, features=10, read="attn_out", activation="jumprelu")
    made = mixed({0: narrow, 1: middle, 2: wide, 4: attention})
    assert isinstance(made, MixedSet)
    return made


def _exact_softmax(monkeypatch):
    """The bridge rounds Llama's patterns to float32, too coarse for differences."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rows_of_a_mixture_are_derivatives(family, monkeypatch):
    _exact_softmax(monkeypatch)
    model = ReplacementModel(random_model(family, **SIZES), side_by_side())
    lm, D, trace = model.model, model.dictionaries, model.trace(TOKENS)
    assert (model.spliced, model.passed) == ((1, 3, 4), (3,))
    graph = attribute(model, TOKENS, targets=TARGETS)
    assert graph.provenance["response"] == "linear"
    with pytest.raises(InputError, match="Leave response at its default, or give 'linear'"):
        attribute(model, TOKENS, targets=TARGETS, response="frozen")
    features = [n for n in graph.nodes if n.kind is NodeKind.FEATURE]

    def values(written, embed):
        """Every feature's pre-activation and the logits, all writes given, a row each; skip terms stay live."""
        read: dict[int, torch.Tensor] = {}

        def note(layer):
            return lambda value: read.update({layer: value})

        def write(layer):
            def hook(value):
                skip = D.skip(layer)
                if layer in model.spliced:
                    read[layer] = value
                moved = 0 if skip is None else (read[layer] - trace.frozen.reads.by_layer[layer]) @ skip
                return written[:, layer] + moved

            return hook

        edits: Any = {D.reads[layer]: note(layer) for layer in (0, 2)}
        edits |= {D.writes[layer]: write(layer) for layer in (0, 1, 2, 4)}
        held = {name: hook for site, edit in edits.items() for name, hook in lm.writing(site, edit).items()}
        held["embed.hook_out"] = lambda _: embed
        out, _ = lm.run_hooked(TOKENS.expand(len(embed), -1), write=held)
        h = [read[n.layer][:, n.pos] @ D.encoder_rows(n.layer, torch.tensor([n.index]))[0] for n in features]
        last = out[:, -1]
        return torch.cat([torch.stack(h, 1), last[:, [3, 5, 60]] - last.mean(-1, keepdim=True)], dim=1)

    clean, embed = trace.frozen.writes.mlp_out, trace.frozen.writes.embed
    sources = [n for n in graph.nodes if n.kind in (NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN)]
    activation = {tuple(i): v for i, v in zip(trace.features.index.tolist(), trace.features.value, strict=True)}
    moved, moved_embed = (x.new_zeros(len(sources), *x.shape) for x in (clean, embed))
    for row, node in enumerate(sources):
        if node.kind is NodeKind.FEATURE:
            decoder = D.decoder_rows(node.layer, torch.tensor([node.index]), node.layer)[0]
            moved[row, node.layer, node.pos] = activation[node.layer, node.pos, node.index] * decoder
        elif node.kind is NodeKind.ERROR:
            moved[row, node.layer, node.pos] = trace.errors[node.layer, node.pos]
        else:
            moved_embed[row, node.pos] = embed[node.pos]
    size = 1e-5
    ends = [values(clean + s * moved, embed + s * moved_embed) for s in (size, -size)]
    rows = [graph.position[node.id] for node in features]
    rows += [number for number, node in enumerate(graph.nodes) if node.kind is NodeKind.LOGIT]
    weights = torch.from_numpy(graph.weights.toarray())[rows][:, [graph.position[node.id] for node in sources]]
    torch.testing.assert_close(weights, ((ends[0] - ends[1]) / (2 * size)).T, rtol=1e-6, atol=1e-6)
    assert float(weights.abs().max()) > 0.1


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_leaves_the_clean_run_of_a_mixture_as_it_is(regime):
    model = ReplacementModel(random_model("gpt2", **SIZES), side_by_side())
    outcome = intervene(model, TOKENS, [], regime=regime, logits_at=None, audit=True)
    torch.testing.assert_close(outcome.changed[:, 0], outcome.clean, rtol=1e-9, atol=1e-9)


def test_a_mixture_with_its_errors_is_the_model():
    model = ReplacementModel(random_model("llama", **SIZES), side_by_side())
    trace = model.trace(TOKENS)
    torch.testing.assert_close(model.run(TOKENS, trace.errors), trace.logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("place", ["memory", "mapped"])
def test_a_mixture_is_saved_and_loaded(tmp_path, place):
    original = side_by_side()
    save_dictionaries(original, tmp_path)
    loaded: Any = load_dictionaries(tmp_path, dtype=torch.float64, decoders=place)
    assert (loaded.kind, loaded.reads, loaded.writes) == ("mixed", original.reads, original.writes)
    assert dictionary_fingerprint(loaded) == dictionary_fingerprint(original)
    assert list_dictionaries(tmp_path)[1][0].kind == "mixed"
    lm = random_model("gpt2", **SIZES)
    ours, theirs = (attribute(ReplacementModel(lm, d), TOKENS, targets=TARGETS) for d in (original, loaded))
    assert ours.nodes == theirs.nodes
    assert abs(ours.weights - theirs.weights).max() <= 1e-12 * abs(ours.weights).max()
    if place == "memory":
        assert isinstance(loaded, MixedSet)
        assert loaded[1].centred
        assert present_layers(load_dictionaries(tmp_path, layers=[0, 1])) == [0, 1]


def test_a_mixture_is_evaluated():
    rows = torch.randint(1, 64, (4, 10), generator=torch.Generator().manual_seed(4))
    found = evaluate(random_model("gpt2", **SIZES), side_by_side(), rows)
    assert [layer.layer for layer in found.layers] == [0, 1, 2, 4]
    assert found.agreement is None


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_transcoders_of_several_sites_and_widths_are_attributed_exactly(family):
    """Layers that write what the MLP gives, and layers that write what it adds: after Gemma's norm."""
    kinds = [{"read": "mlp_in"}, {"read": "resid_mid", "write": "mlp_added"}, {"read": "mlp_normed", "skip": True}]
    sets = [random_dictionaries("plt", **SIZES, features=8 + 6 * i, **kind) for i, kind in enumerate(kinds)]
    made = mixed({0: sets[0], 1: sets[1], 2: sets[2], 4: sets[1]})
    assert isinstance(made, TranscoderSet)
    assert [made.n_features(layer) for layer in range(LAYERS)] == [8, 14, 20, 0, 14]
    _assert_exact(ReplacementModel(random_model(family, **SIZES), made))


def test_a_cross_layer_transcoder_of_several_sites_is_attributed_exactly():
    one, other = (random_dictionaries("clt", **SIZES, features=8, write=w) for w in ("mlp_out", "mlp_added"))
    writes = [(one, other)[layer % 2].writes[layer] for layer in range(LAYERS)]
    weights = {name: getattr(one, name) for name in ("W_enc", "b_enc", "b_dec", "activation", "provenance", "reads")}
    clt = CrossLayerTranscoder(**weights, W_dec=list(one.W_dec), writes=writes, W_skip=None)
    _assert_exact(ReplacementModel(random_model("gemma2", **SIZES), clt))


def _assert_exact(model):
    """Rows sum up to what is read, and both engines agree."""
    graph = attribute(model, TOKENS, targets=TARGETS)
    assert abs(graph.residual()).max() <= 1e-9 * abs(graph.weights).max()
    exact = attribute(model, TOKENS, targets=TARGETS, engine="autograd")
    assert abs(exact.weights - graph.weights).max() <= 1e-12 * abs(exact.weights).max()
    assert model.logit_error(model.trace(TOKENS)) < 1e-12


# which layers


def test_it_is_the_simplest_set_that_holds_the_layers():
    plt, sae = random_dictionaries("plt", **SIZES), random_dictionaries("sae", **SIZES, read="attn_out")
    assert isinstance(mixed({0: plt, 3: plt}), TranscoderSet)
    assert isinstance(mixed({0: sae}), SAESet)
    made = mixed({4: plt, 1: sae})
    assert made[4] is plt[4]
    assert present_layers(made) == [1, 4]
    assert [str(site) for site in made.reads] == ["0.attn_out", "1.attn_out", "2.attn_out", "3.attn_out", "4.mlp_in"]
    assert isinstance(mixed({0: made, 4: made}), MixedSet)


def test_a_mixture_of_less_layers_is_filled_up():
    lm = random_model("gpt2", **SIZES)
    plt, sae = (random_dictionaries(kind, **SIZES | {"n_layers": 3}) for kind in ("plt", "sae"))
    assert present_layers(fitted(mixed({0: plt, 2: sae}), lm)) == [0, 2]


def test_what_all_sets_say_of_their_training_is_kept():
    plt, sae = random_dictionaries("plt", **SIZES), random_dictionaries("sae", **SIZES)
    common: Any = {"model": "somebody/pocket", "corpus": "text", "bos": True, "first": 2, "d_vocab": 64}
    plt.provenance = replace(
        plt.provenance, **common, tokens=10, limits={"0.mlp_in": 3.0}, config={"context": 8, "k": 1}, seed=1,
        normalisation={"read": [2.0] * LAYERS, "write": [3.0] * LAYERS},
    )  # fmt: skip
    more = {"model": "Pocket", "tokens": 7, "limits": {"0.mlp_in": 2.0, "1.attn_out": 5.0}, "seed": 2}
    sae.provenance = replace(sae.provenance, **common | more, config={"context": 8, "k": 2})
    found = mixed({0: plt, 2: sae}).provenance
    assert (found.model, found.corpus, found.bos, found.first, found.seed) == ("somebody/pocket", "text", True, 2, None)
    assert (found.tokens, found.config) == (7, {"context": 8})
    assert found.limits == {"0.mlp_in": 2.0, "1.attn_out": 5.0}
    assert found.normalisation == {"read": [2.0, 1.0, 1.0, 1.0, 1.0], "write": [3.0, 1.0, 1.0, 1.0, 1.0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "another"}, "have models 'random', 'another'; they must have one"),
        ({"first": 3}, "have first positions 1, 3"),
    ],
)
def test_sets_that_do_not_go_together_are_refused(change, message):
    plt, sae = random_dictionaries("plt", **SIZES), random_dictionaries("sae", **SIZES)
    sae.provenance = replace(sae.provenance, **change)
    with pytest.raises(DictionaryError, match=message):
        mixed({0: plt, 1: sae})


def test_what_cannot_be_taken_apart_is_refused():
    plt = random_dictionaries("plt", **SIZES)
    with pytest.raises(DictionaryError, match="layers of a CrossLayerTranscoder cannot be taken apart"):
        mixed({0: plt, 1: random_dictionaries("clt", **SIZES)})
    with pytest.raises(DictionaryError, match="There is no layer 7"):
        mixed({7: plt})
    with pytest.raises(DictionaryError, match="nothing to mix"):
        mixed({})
    with pytest.raises(DictionaryError, match=r"one width; got widths \[16, 32\]"):
        mixed({0: plt, 1: random_dictionaries("sae", n_layers=5, d_model=32)})
