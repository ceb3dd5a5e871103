"""A head's score, split by what wrote query and key, is the model's own; each part is what its removal changes."""

import math
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch

import circuitsae.attribution.attention_scores as module
from circuitsae.attribution import LogitTargets, attribute, edge_heads, explain_attention
from circuitsae.graph import Node, NodeKind
from circuitsae.replacement import ReplacementModel
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import InputError
from transcoders.loading import random_model
from transcoders.sites import Site

TOKENS = torch.tensor([0, 11, 22, 33, 11, 7])
LAYER, QUERY, KEY, OTHER = 2, 5, 4, 3
FAMILIES: Any = (
    "gpt2", "opt", "gpt_neo", "gptj", "gpt_neox", "bloom", "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma2",
    "gemma3", "phi", "olmo2", "cohere2", "granite", "hunyuan",
)  # fmt: skip
UNSEEN = ("opt", "gpt_neo", "gptj")
"""Hugging Face's own attention runs, which shows its patterns alone."""
COARSE = {"gpt_neo": 1e-6, "gptj": 1e-6, "cohere2": 1e-6}
"""Their scores are computed in float32 whatever the model's precision."""


def _model(family: Any, kind: Any = "plt", skip: bool = True, features: int = 16) -> ReplacementModel:
    sizes = {"n_layers": 3, "d_model": 16, "dtype": torch.float64}
    dictionaries = random_dictionaries(kind, features=features, skip=skip, **sizes)
    return ReplacementModel(random_model(family, n_heads=4, d_vocab=64, **sizes), dictionaries)


def _capped(score: float, family: str) -> float:
    return 2 * math.tanh(score / 2) if family == "gemma2" else score


@pytest.mark.parametrize(
    ("family", "kind"), [(family, "clt") for family in FAMILIES] + [(family, "plt") for family in ("gpt2", "llama")]
)
def test_pairs_sum_to_the_models_own_score(family, kind):
    model = _model(family, kind)
    trace, tolerance = model.trace(TOKENS), COARSE.get(family, 1e-9)
    pattern = trace.frozen.constants[f"blocks.{LAYER}.attn.hook_pattern"][0]
    scores = f"blocks.{LAYER}.attn.hook_attn_scores"
    own = None if family in UNSEEN else model.model.run_hooked(TOKENS[None], read=[scores])[1][scores][0]
    splits: Any = (("nodes", 3), ("writers", 1))
    for sources, head in splits:
        reasons = explain_attention(model, trace, LAYER, head, QUERY, KEY, sources=sources)
        total = float(reasons.matrix().sum()) + reasons.constant
        assert total == pytest.approx(reasons.score, abs=1e-12)
        against = reasons.contrast(OTHER)
        assert float(against.matrix().sum()) + against.constant == pytest.approx(against.score, abs=1e-12)
        assert reasons.pattern == float(pattern[head, QUERY, KEY])
        if own is not None:
            assert _capped(total, family) == pytest.approx(float(own[head, QUERY, KEY]), abs=tolerance)
        odds = _capped(total, family) - _capped(total - against.score, family)
        moved = float((pattern[head, QUERY, KEY] / pattern[head, QUERY, OTHER]).log())
        assert odds == pytest.approx(moved, abs=1e-5 if own is not None else tolerance)  # many softmaxes are float32's


@torch.no_grad()
def _score_without(model, removed: dict[str, Any], held: dict[str, Any], head: int) -> float:
    """The score that the model computes where some values are held, and some are other ones."""
    edits = {name: lambda _, value=value: value for name, value in (held | removed).items()}
    name = f"blocks.{LAYER}.attn.hook_attn_scores"
    return float(model.model.run_hooked(TOKENS[None], read=[name], write=edits)[1][name][0, head, QUERY, KEY])


@pytest.mark.parametrize("kind", ["plt", "clt"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gpt_neox"])
def test_removing_what_wrote_the_key_takes_its_part_of_the_score(family, kind):
    """The norm's scale is held, and those of queries and keys; nothing else is."""
    model = _model(family, kind)
    trace = model.trace(TOKENS)
    stream_name = model.model.hook(Site(LAYER, "resid_pre"))
    stream = model.model.run_hooked(TOKENS[None], read=[stream_name])[1][stream_name]
    prefix = f"blocks.{LAYER}."
    held = {
        n: v for n, v in trace.frozen.constants.items() if n.startswith((prefix + "ln1.", prefix + "attn.")) and
        n.endswith("hook_scale")
    }  # fmt: skip
    reasons = explain_attention(model, trace, LAYER, 2, QUERY, KEY, sources="writers")
    parts: Any = reasons.by_key().set_index("source")["contribution"]
    layer, pos, number = next(row for row in trace.features.index.tolist() if row[1] == KEY and row[0] < LAYER)
    value = trace.features.value[(trace.features.index == torch.tensor([layer, pos, number])).all(1)]
    layers = [at for at in model.dictionaries.write_layers(layer) if at < LAYER]
    rows = [model.dictionaries.decoder_rows(layer, torch.tensor([number]), at)[0] for at in layers]
    written = {
        f"tok@{KEY}": trace.frozen.writes.embed[KEY],
        f"1.err@{KEY}": trace.errors[1, KEY],
        f"{layer}.{number}@{KEY}": value * sum(rows),
    }
    for source, vector in written.items():
        changed = stream.clone()
        changed[0, KEY] -= vector.detach()
        left = _score_without(model, {stream_name: changed}, held, 2)
        assert left - reasons.score == pytest.approx(-parts[source], abs=1e-9), source
        assert abs(parts[source]) > 1e-6


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_removing_a_node_takes_its_parts_of_the_score_through_all_earlier_heads(family):
    """All patterns and scales are held, and what MLPs write; then −c leaves with the query's and the key's part."""
    model = _model(family, skip=False)
    trace = model.trace(TOKENS)
    reasons = explain_attention(model, trace, LAYER, 1, QUERY, KEY)
    matrix = reasons.matrix()
    ids = [[source.id for source in side] for side in (reasons.query_sources, reasons.key_sources)]
    held = dict(trace.frozen.constants) | {"embed.hook_out": trace.frozen.writes.embed[None]}
    names = [model.model.hook(Site(layer, "mlp_out")) for layer in range(3)]
    held |= {name: written[None] for name, written in zip(names, trace.frozen.writes.mlp_out, strict=True)}
    for source, name, value in (
        ("tok@2", "embed.hook_out", trace.frozen.writes.embed[None]),
        ("0.err@1", names[0], trace.frozen.writes.mlp_out[:1]),
    ):
        changed = value.clone()
        pos = int(source[-1])
        changed[0, pos] -= trace.errors[0, pos] if "err" in source else value[0, pos]
        left = _score_without(model, {name: changed}, held, 1)
        i, j = (side.index(source) for side in ids)
        expected = -matrix[i].sum() - matrix[:, j].sum() + matrix[i, j]
        assert left - reasons.score == pytest.approx(float(expected), abs=1e-9)
        assert abs(expected) > 1e-6


def test_tables_are_sums_of_the_matrix(monkeypatch):
    model = _model("gpt2")
    reasons: Any = explain_attention(
        model, TOKENS, LAYER, 1, -1, KEY, names=lambda layer, feature: f"f{layer}-{feature}"
    )
    matrix, pairs = reasons.matrix(), reasons.contributions()
    assert reasons.query == QUERY
    assert reasons.by_query()["contribution"].sum() == pytest.approx(float(matrix.sum()))
    assert reasons.by_key()["contribution"].sum() == pytest.approx(float(matrix.sum()))
    kinds: Any = reasons.by_kind()
    features, tokens = (
        torch.tensor([source.kind == kind for source in side])
        for side, kind in ((reasons.query_sources, "feature"), (reasons.key_sources, "token"))
    )
    assert kinds.loc["feature", "token"] == pytest.approx(float(matrix[features][:, tokens].sum()))
    assert kinds.values.sum() == pytest.approx(float(matrix.sum()))
    largest = matrix.flatten().abs().sort(descending=True).values[: len(pairs)]
    assert pairs["contribution"].abs().tolist() == pytest.approx(largest.tolist())
    numbers = [[source.id for source in side] for side in (reasons.query_sources, reasons.key_sources)]
    for _, pair in pairs[:9].iterrows():
        place = numbers[0].index(pair["query"]), numbers[1].index(pair["key"])
        assert pair["contribution"] == pytest.approx(float(matrix[place]))
    texts = {source.id: source.text for source in reasons.key_sources}
    assert {name: text for name, text in texts.items() if text.startswith("f")} == {
        name: f"f{name.replace('.', '-').partition('@')[0]}" for name in texts if name[0].isdigit() and
        name.partition("@")[0].partition(".")[2].isdigit()
    }  # fmt: skip
    monkeypatch.setattr(module, "_AT_ONCE", 5)
    pd.testing.assert_frame_equal(reasons.contributions(30), pairs[:30])


def test_what_two_keys_have_in_common_cancels_in_a_contrast():
    reasons = explain_attention(_model("gpt2"), TOKENS, LAYER, 1, QUERY, KEY)
    contrast: Any = reasons.contrast(OTHER)
    assert contrast.other == OTHER
    assert contrast.by_key().set_index("source")["contribution"][f"{LAYER}.b_K"] == pytest.approx(0, abs=1e-12)
    with pytest.raises(InputError, match="of a contrast already"):
        contrast.contrast(2)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((3, 0, 5, 4), r"no head 3\.0; it has layers 0 to 2 with heads 0 to 3"),
        ((1, 4, 5, 4), r"no head 1\.4"),
        ((1, 0, 6, 4), r"no query position 6; the prompt has positions 0 to 5"),
        ((1, 0, 5, -7), r"no key position -7"),
        ((1, 0, 3, 4), r"Position 3 cannot look to 4"),
    ],
)
def test_what_is_not_there_is_refused_in_a_sentence(place, message):
    with pytest.raises(InputError, match=message):
        explain_attention(_model("gpt2", features=4), TOKENS, *place)


def test_a_key_beyond_the_window_and_unknown_sources_are_refused():
    model = _model("mistral", features=4)
    with pytest.raises(InputError, match=r"Head 1\.0 does not see 0 from 5"):
        explain_attention(model, TOKENS, 1, 0, 5, 0)
    with pytest.raises((InputError, TypeError), match="(?s)'heads'.*'nodes'.*'writers'"):
        explain_attention(model, TOKENS, 1, 0, 5, 5, sources="heads")  # pyright: ignore[reportArgumentType]


# heads carried by an edge


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "gemma2", "granite"])
@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_the_heads_of_each_layer_sum_to_the_edge(family, kind):
    model = _model(family, kind, features=8)
    trace, graph = model.trace(TOKENS), attribute(model, TOKENS, targets=LogitTargets([3, 5]))
    edges, tried = graph.weights.tocoo(), 0
    for row, column, weight in list(zip(edges.row, edges.col, edges.data, strict=True))[::83]:
        source, target = graph.nodes[column], graph.nodes[row]
        if source.pos < 0:
            continue
        by_layer: Any = edge_heads(model, trace, source, target).groupby("layer")["weight"].sum()
        assert by_layer.tolist() == pytest.approx([weight] * len(by_layer), abs=1e-9 * abs(edges.data).max())
        last = target.layer - (target.kind is NodeKind.LOGIT or family == "gptj")
        assert by_layer.index.tolist() == list(range(source.layer + 1, last + 1))
        tried += len(by_layer)
    assert tried > 5


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
@torch.no_grad()
def test_a_heads_part_is_what_the_edge_loses_without_it(family):
    """The frozen model runs with the head's pattern at zero; its write of the token is all that is lost."""
    model = _model(family, "clt", features=8)
    trace = model.trace(TOKENS)
    source, logit = Node(NodeKind.TOKEN, -1, 2, 22), Node(NodeKind.LOGIT, 3, 5, 7)
    parts: Any = edge_heads(model, trace, source, logit).set_index(["layer", "head"])["weight"]

    def edge() -> float:
        frozen, vector = trace.frozen, model.model.W_U[:, 7] - model.model.W_U.mean(1)
        both = []
        for size in (0, 1):
            embed = torch.zeros_like(frozen.writes.embed)
            embed[2] = size * frozen.writes.embed[2]
            position = None if frozen.writes.position is None else torch.zeros_like(frozen.writes.position)
            writes = replace(frozen.writes, embed=embed, position=position, mlp_out=frozen.writes.mlp_out * 0)
            both.append(float(frozen(writes).final[5] @ vector))
        return both[1] - both[0]

    whole = edge()
    assert whole == pytest.approx(parts[0].sum(), abs=1e-9)
    for layer, head in ((0, 1), (2, 3)):
        pattern = trace.frozen.constants[f"blocks.{layer}.attn.hook_pattern"]
        before = pattern[0, head].clone()
        pattern[0, head] = 0
        assert whole - edge() == pytest.approx(parts[layer, head], abs=1e-9)
        pattern[0, head] = before
        assert abs(parts[layer, head]) > 1e-6


def test_edges_that_cannot_be_are_refused_in_a_sentence():
    model = _model("gpt2", features=8)
    trace = model.trace(TOKENS)
    logit = Node(NodeKind.LOGIT, 3, 5, 7)
    for source, target, message in (
        (Node(NodeKind.BIAS, 0, -1, text="b_dec"), logit, r"0\.b_dec is no source .* at one position"),
        (Node(NodeKind.FEATURE, 0, 3, 1000), logit, r"0\.1000@3 is no source"),
        (Node(NodeKind.TOKEN, -1, 2), Node(NodeKind.FEATURE, 1, 3, 1000), r"1\.1000@3 is no target"),
        (Node(NodeKind.TOKEN, -1, 2), Node(NodeKind.LOGIT, 3, 4, 7), r"no logit of the prompt's last position, 5"),
    ):
        with pytest.raises(InputError, match=message):
            edge_heads(model, trace, source, target)
    feature = Node(NodeKind.FEATURE, *trace.features.index[0].tolist())
    with pytest.raises(InputError, match=r"cannot reach"):
        edge_heads(model, trace, Node(NodeKind.ERROR, 2, 5), feature)
