"""Virtual weights are what the model's own modules say, edges of graphs are made of them, expectations are loops."""

import re
from typing import Any

import numpy as np
import pytest
import torch

import circuitsae as cs
from circuitsae.cli import main
from circuitsae.features import Connections, co_activation, coactivation, virtual_weights
from circuitsae.features.global_weights import input_weights, output_weights
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import InputError
from transcoders.random_models import random_model, random_module

LAYERS, WIDTH, FEATURES, HEADS = 3, 16, 6, 4
PLACES = [(layer, feature) for layer in range(LAYERS) for feature in range(FEATURES)]
NAMES = [f"{layer}.{feature}" for layer, feature in PLACES]
SITES = [
    ("gpt2", "plt", "mlp_in", "mlp_out"),
    ("gpt2", "clt", "mlp_normed", "mlp_out"),
    ("gpt2", "clt", "resid_mid", "mlp_out"),
    ("llama", "clt", "mlp_in", "mlp_out"),
    ("gptj", "clt", "mlp_in", "mlp_out"),
    ("gemma2", "clt", "mlp_in", "mlp_out"),
    ("gemma2", "plt", "mlp_in", "mlp_added"),
    ("granite", "clt", "mlp_in", "mlp_out"),
]


def make(family, kind, read="mlp_in", write="mlp_out", **how) -> Any:
    sizes: Any = {"n_layers": LAYERS, "d_model": WIDTH, "dtype": torch.float64}
    how = {"features": FEATURES, "read": read, "write": write, **how}
    dictionaries = random_dictionaries(kind, **sizes, **how)
    return cs.ReplacementModel(random_model(family, n_heads=HEADS, d_vocab=24, **sizes), dictionaries)


def added(block, norm, x):
    """What a block's output is in the stream, its norm's own module run at scale 1."""
    if (part := block.norm(norm)) is not None:
        return part.linear(x)
    return x * (block.residual_factor or 1)


def read(model, layer, stream):
    """What the features of a layer make of vectors in the stream, by the norm's own module at scale 1."""
    block, dictionaries = model.model.parts.blocks[layer], model.dictionaries
    kind, norm = dictionaries.reads[layer].kind, block.norm(block.mlp_norm)
    if kind != "resid_mid":
        stream = norm.linear(stream)
        stream = stream / norm.weight() if kind == "mlp_normed" else stream
    return stream @ dictionaries.encoder_rows(layer, torch.arange(FEATURES)).T


@torch.no_grad()
def dense(model, through=None):
    """V of all features, each decoder carried forward; `through`: a layer's attention on a text of one token."""
    dictionaries, blocks = model.dictionaries, model.model.parts.blocks
    out = torch.zeros(len(PLACES), len(PLACES), dtype=torch.float64)
    for s in range(LAYERS):
        for at in dictionaries.write_layers(s):
            decoders = dictionaries.decoder_rows(s, torch.arange(FEATURES), at)
            written = (
                decoders if dictionaries.writes[at].kind == "mlp_added" else added(blocks[at], "ln2_post", decoders)
            )
            for t in range(LAYERS):
                if at < t and through is None:
                    out[s * FEATURES :, t * FEATURES :][:FEATURES, :FEATURES] += read(model, t, written)
                elif through is not None and at < through and through <= t - blocks[t].parallel:
                    carried = attended(model, through, written)
                    out[s * FEATURES :, t * FEATURES :][:FEATURES, :FEATURES] += read(model, t, carried)
    return out


def attended(model, layer, x):
    """What a layer's attention adds where every text is one token: all heads look at it, less what biases add."""
    block = model.model.parts.blocks[layer]
    with model.model.parts.recorded_calls() as calls:
        model.model.run(torch.zeros(1, 1, dtype=torch.long))
    normed = x if (norm := block.norm("ln1")) is None else norm.linear(x)
    out = block.attention.run(torch.stack([normed, torch.zeros_like(normed)]).flatten(0, 1)[:, None], calls[layer])
    out = out[: len(x), 0] - out[len(x) :, 0]
    return added(block, "ln1_post", out)


@pytest.mark.parametrize(("family", "kind", "reads", "writes"), SITES)
def test_virtual_weights_are_decoders_carried_by_the_models_own_modules(family, kind, reads, writes):
    model = make(family, kind, reads, writes)
    found, expected = virtual_weights(model, PLACES, PLACES), dense(model)
    assert expected.abs().max() > 0.1
    assert (found - expected).abs().max() < 1e-9
    for place in (PLACES[0], PLACES[8], PLACES[-1]):
        number = PLACES.index(place)
        assert (input_weights(model, place) - expected[:, number]).abs().max() < 1e-9
        assert (output_weights(model, place) - expected[number]).abs().max() < 1e-9


@pytest.mark.parametrize(("family", "kind", "reads", "writes"), SITES)
def test_heads_of_a_layer_are_its_attention_on_one_token(family, kind, reads, writes):
    model = make(family, kind, reads, writes)
    for layer in range(LAYERS):
        found = sum(virtual_weights(model, PLACES, PLACES, head=(layer, head)) for head in range(HEADS))
        expected = dense(model, through=layer)
        assert (found - expected).abs().max() < 1e-9
        assert layer in (0, LAYERS - 1) or expected.abs().max() > 0.01


def test_a_head_of_grouped_attention_has_the_values_of_its_group():
    model = make("llama", "plt")
    block, dictionaries = model.model.parts.blocks[1], model.dictionaries
    sizes: dict[str, int | None] = {
        "n_layers": LAYERS,
        "d_model": WIDTH,
        "n_heads": HEADS,
        "n_kv_heads": 2,
        "d_vocab": 24,
        "context": 64,
        "d_mlp": None,
    }
    attention = random_module("llama", sizes, 0).double().model.layers[1].self_attn
    W_V = attention.v_proj.weight.detach().T.unflatten(1, (2, -1))
    W_O = attention.o_proj.weight.detach().T.unflatten(0, (HEADS, -1))
    stream = block.norm("ln1").linear(dictionaries[0].W_dec.detach())
    for head in range(HEADS):
        expected = read(model, 2, stream @ W_V[:, head // 2] @ W_O[head])
        found = virtual_weights(model, PLACES[:FEATURES], PLACES[-FEATURES:], head=(1, head))
        assert (found - expected).abs().max() < 1e-9


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "plt"), ("llama", "clt")])
def test_edges_between_neighbouring_layers_are_virtual_weights_with_pattern_and_scales(family, kind):
    """A[t@p, s@q] = a_s / σ_t(p) · (V[s, t] 1(p = q) + Σ_h pattern_h[p, q] / σ_h(q) · V_h[s, t]), nothing else."""
    model = make(family, kind)
    tokens = torch.arange(6)
    trace, graph = model.trace(tokens), cs.attribute(model, tokens)
    held, checked = trace.frozen.constants, 0
    V = virtual_weights(model, PLACES, PLACES)
    V_h = torch.stack([
        torch.stack([virtual_weights(model, PLACES, PLACES, head=(layer, h)) for h in range(HEADS)])
        for layer in range(LAYERS)
    ])  # fmt: skip
    features = [(row, node) for row, node in enumerate(graph.nodes) if node.kind == "feature"]
    weights = graph.weights.toarray()
    for t, target in features:
        for s, source in features:
            if source.layer != target.layer - 1 or source.pos > target.pos:
                continue
            name, p, q = f"blocks.{target.layer}.", target.pos, source.pos
            pair = PLACES.index((source.layer, source.index)), PLACES.index((target.layer, target.index))
            pattern = held[name + "attn.hook_pattern"][0, :, p, q] / held[name + "ln1.hook_scale"].reshape(-1)[q]
            V_all = (p == q) * V[pair] + pattern @ V_h[target.layer, :, pair[0], pair[1]]
            expected = source.activation * V_all / held[name + "ln2.hook_scale"].reshape(-1)[p]
            assert weights[t, s] == pytest.approx(float(expected), abs=1e-9)
            checked += 1
    assert checked > 100


@pytest.fixture(scope="module")
def small():
    """A model with features of which some never fire, rows of tokens, and dense activations [token, feature]."""
    model = make("gpt2", "clt", activation="jumprelu")
    rows = torch.randint(24, (7, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.dictionaries.b_enc[1, 3] = -1e3
        found = []
        for row in rows:
            features = model.trace(row).features
            here = torch.zeros(5, len(PLACES), dtype=torch.float64)
            layer, pos, feature = features.index.unbind(1)
            here[pos, layer * FEATURES + feature] = features.value.float().double()
            found.append(here[model.first :])
    return model, rows, torch.cat(found).numpy()


def brute_force(model, a):
    """ERA and TWERA of all pairs, token by token."""
    V, n = virtual_weights(model, PLACES, PLACES).numpy(), len(PLACES)
    era, twera = np.zeros((n, n)), np.zeros((n, n))
    for s in range(n):
        for t in range(n):
            for token in a:
                era[s, t] += (token[t] > 0) * V[s, t] * token[s] / len(a)
                twera[s, t] += token[t] * V[s, t] * token[s]
            if (total := a[:, t].sum()) > 0:
                twera[s, t] /= total
    return V, era, twera


def test_expected_attributions_are_a_loop_over_tokens(small, monkeypatch):
    model, rows, a = small
    monkeypatch.setattr(coactivation, "rows_at_once", lambda *_: 2)
    found = Connections.collect(model, rows, tokens=rows.numel())
    V, era, twera = brute_force(model, a)
    assert found.over.tokens == len(a)
    assert (found.over.count == (a > 0).sum(axis=0)).all()
    assert np.abs(found.era().toarray() - era).max() < 1e-9
    assert np.abs(found.twera().toarray() - twera).max() < 1e-9
    assert np.abs(era).max() > 0.01
    on, both = (a > 0).sum(axis=0), ((a > 0)[:, :, None] & (a > 0)[:, None, :]).sum(axis=0)
    for number, place in enumerate(PLACES):
        if not on[number]:
            continue
        for frame, side in ((found.inputs(place), np.s_[:, number]), (found.outputs(place), np.s_[number, :])):
            rows_of = [NAMES.index(name) for name in frame["feature"]]
            for column, expected in (("weight", V), ("era", era), ("twera", twera)):
                assert np.abs(frame[column].to_numpy() - expected[side][rows_of]).max(initial=0) < 1e-9
            active = on[rows_of] if side[0] == number else on[number]
            assert frame["together"].to_numpy() == pytest.approx(both[number, rows_of] / active)
            assert (frame["never_together"] == (both[number, rows_of] == 0)).all()
        layer_of = np.array(PLACES)[:, 0]
        for frame, there in (
            (found.inputs(place), layer_of < place[0]), (found.outputs(place), layer_of > place[0])
        ):  # fmt: skip
            assert frame["feature"].tolist() == [NAMES[i] for i in np.flatnonzero(there & (on > 0))]


def test_some_features_have_the_connections_that_all_give_them(small):
    model, rows, _ = small
    every = Connections.collect(model, rows, tokens=rows.numel())
    some = Connections.collect(model, rows, [(2, 1), (1, 0)], tokens=rows.numel())
    columns = [PLACES.index((1, 0)), PLACES.index((2, 1))]
    assert some.over.columns.tolist() == columns
    assert np.abs(some.twera().toarray() - every.twera().toarray()[:, columns]).max() < 1e-12
    assert np.abs(some.era().toarray() - every.era().toarray()[:, columns]).max() < 1e-12
    for place in ((1, 0), (2, 1)):
        for side in ("inputs", "outputs"):
            assert getattr(some, side)(place).equals(getattr(every, side)(place))


def test_the_top_is_sorted_by_magnitude_and_the_largest_weights_show_interference(small):
    model, rows, _ = small
    found = Connections.collect(model, rows, tokens=rows.numel())
    whole = found.inputs((2, 1))
    assert any(whole["never_together"])
    for by in ("twera", "era", "weight"):
        top = found.top_inputs((2, 1), 4, by=by)
        assert top[by].abs().tolist() == sorted(whole[by].abs(), reverse=True)[: len(top)]
        assert top[by].abs().is_monotonic_decreasing
    assert not any(found.top_inputs((2, 1), 99)["never_together"])
    assert len(found.top_outputs((2, 1))) == 0


def test_what_is_wrong_is_said_in_a_sentence(small, monkeypatch):
    model, rows, _ = small
    over = co_activation(model, rows, [(1, 0), (1, 3)])
    found = Connections(model, over)
    cases = [
        (lambda: virtual_weights(model, [(3, 0)], [(1, 0)]), "There is no feature 3.0; the layers are 0 to 2."),
        (lambda: virtual_weights(model, [(0, 0)], [(1, 6)]), "There is no feature 1.6; layer 1 has 6 features"),
        (lambda: virtual_weights(model, [(0, 0)], [(1, -1)]), "There is no feature 1.-1; layer 1 has 6"),
        (lambda: input_weights(model, (1, 0), head=(0, 4)), "There is no head 0.4; layer 0 has 4 heads"),
        (lambda: output_weights(model, (1, 0), head=(7, 0)), "There is no head 7.0; the layers are 0 to 2."),
        (lambda: co_activation(model, rows, [(9, 9)]), "There is no feature 9.9"),
        (lambda: co_activation(model, rows, tokens=0), "got tokens = 0"),
        (lambda: co_activation(model, rows[:0]), "does not fill a single row of 5 tokens"),
        (lambda: found.top_inputs((0, 2)), "Feature number 2 is not among the 2 whose pairs were counted"),
        (lambda: found.top_inputs((1, 3)), "Feature 1.3 is never active on these 28 tokens"),
        (lambda: found.top_inputs((1, 0), by="size"), "no column 'size' to sort by"),
        (lambda: found.top_inputs((1, 0), 0), "Give 1 connection or more to show; got 0."),
    ]
    for call, said in cases:
        with pytest.raises(InputError, match=re.escape(said)):
            call()
    monkeypatch.setattr(coactivation, "MOST", 17)
    with pytest.raises(InputError, match="All pairs of 18 features are more than those of 17; name some features"):
        co_activation(model, rows)


def test_the_command_shows_inputs_outputs_and_interference(capsys):
    main(["connections", "2.351", "--tokens", "400", "--top", "3", "--wide"])
    said = capsys.readouterr().out
    assert "Inputs of 2.351" in said
    assert "Outputs of 2.351" in said
    assert re.search(r"of the 3 largest weights into it", said)


@pytest.mark.parametrize("name", ["2", "2.x", "2.857@3", "a.b"])
def test_a_word_that_names_no_feature_is_refused(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["connections", name])
    assert stopped.value.code == 2
    assert "names no feature; write it like 2.311" in capsys.readouterr().err
