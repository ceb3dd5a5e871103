"""Dictionaries of one model on another: what is refused, and what is used with a notice of how well it fits."""

import io
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from circuitsae.attribution import LogitTargets, attribute
from circuitsae.console import show_graph
from circuitsae.graph import AttributionGraph, load_graph
from circuitsae.replacement import ReplacementModel
from transcoders.dictionaries import DictionaryProvenance, TranscoderSet, random_dictionaries
from transcoders.dictionaries.provenance import has_other_weights
from transcoders.errors import DictionaryError
from transcoders.formats import load_dictionaries, save_dictionaries
from transcoders.loading import random_model
from transcoders.sites import Frame
from transcoders.training import TranscoderConfig, train

SIZES: Any = {"n_layers": 2, "d_model": 16, "dtype": torch.float64}
TOKENS = torch.tensor([0, 11, 22, 33, 11, 7])
TARGETS = LogitTargets([3])
BASE, TUNED = 0, 1


def dictionaries_of(seed: int | None, **changes) -> TranscoderSet:
    """Random ones that say that they are those of the random GPT-2 of a seed."""
    plt = random_dictionaries("plt", **SIZES, features=8).requires_grad_(False)
    model = random_model("gpt2", **SIZES, seed=seed or 0)
    fingerprint = None if seed is None else model.fingerprint()
    plt.provenance = DictionaryProvenance(model="base", fingerprint=fingerprint, **changes)
    return plt


def notices(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith(("circuitsae", "transcoders"))]


def test_a_tuned_siblings_are_used_with_a_notice_of_l0_and_fvu(caplog):
    tuned = random_model("gpt2", **SIZES, seed=TUNED)
    model = ReplacementModel(tuned, dictionaries_of(BASE, d_vocab=64))
    assert [tuned.name in said and "same sizes" in said for said in notices(caplog)] == [True]
    caplog.clear()
    graph = attribute(model, TOKENS, targets=TARGETS)
    trace = model.trace(TOKENS)
    fit = model.fit(trace)
    first, second = notices(caplog)
    assert f"L0 {fit.l0:.1f} and FVU {fit.fvu:.3f} on this prompt in {tuned.name}" in first
    assert f"leave {fit.fvu:.2f} of the variance" in second
    assert "'raw' frame" in second
    assert graph.provenance["fit"] == {"l0": fit.l0, "fvu": fit.fvu}


def test_l0_and_fvu_of_a_prompt_are_the_plain_sums():
    plt = dictionaries_of(None, first=2)
    model = ReplacementModel(random_model("gpt2", **SIZES), plt)
    reads = model.model.activations(TOKENS[None], [*plt.reads, *plt.writes])
    l0, fvu = [], []
    for layer in range(2):
        read, written = (reads[site][0, 2:] for site in (plt.reads[layer], plt.writes[layer]))
        active = plt[layer].encode(read)
        l0.append(float((active > 0).double().sum(-1).mean()))
        error = (written - plt[layer].decode(active)).square().sum()
        fvu.append(float(error / (written - written.mean(0)).square().sum()))
    fit = model.fit(model.trace(TOKENS))
    assert fit.l0 == pytest.approx(sum(l0) / 2)
    assert fit.fvu == pytest.approx(sum(fvu) / 2)


@pytest.mark.parametrize("tokens", [TOKENS[:1], TOKENS[:2]])
def test_a_prompt_too_short_for_a_variance_has_no_fvu(tokens, tmp_path, caplog):
    model = ReplacementModel(random_model("gpt2", **SIZES), dictionaries_of(None))
    graph = attribute(model, tokens, targets=TARGETS)
    assert graph.provenance["fit"]["fvu"] is None
    assert not any("variance" in said for said in notices(caplog))
    graph.save(tmp_path)
    assert load_graph(tmp_path).provenance["fit"] == graph.provenance["fit"]


def test_dictionaries_of_these_very_weights_are_not_suspected(caplog):
    model = ReplacementModel(random_model("gpt2", **SIZES), dictionaries_of(BASE))
    assert model.fit(model.trace(TOKENS)).fvu > 0.9
    attribute(model, TOKENS, targets=TARGETS)
    assert not notices(caplog)


def test_of_dictionaries_that_do_not_say_their_weights_only_a_bad_fit_is_said(caplog):
    plt = dictionaries_of(None)
    model = ReplacementModel(random_model("gpt2", **SIZES), plt)
    attribute(model, TOKENS, targets=TARGETS)
    assert [("variance" in said, "raw" in said) for said in notices(caplog)] == [(True, True)]
    caplog.clear()
    good = random_dictionaries("plt", **SIZES, features=64).requires_grad_(False)
    model.dictionaries = TranscoderSet(good.layers, plt.provenance)
    _teach(model)
    attribute(model, TOKENS, targets=TARGETS)
    assert model.fit(model.trace(TOKENS)).fvu < 0.9
    assert not notices(caplog)


@torch.no_grad()
def _teach(model):
    """Decoders by least squares on one prompt."""
    for layer in range(2):
        read, written = (
            side[layer, 1:]
            for side in (model.trace(TOKENS).frozen.reads.by_layer, model.trace(TOKENS).frozen.writes.mlp_out)
        )
        d = model.dictionaries[layer]
        d.b_dec.copy_(written.mean(0))
        d.W_dec.copy_(torch.linalg.pinv(d.encode(read)) @ (written - written.mean(0)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"d_vocab": 65},
            r"trained on base, are for a vocabulary of 65 tokens, but random-gpt2-1 has a vocab.* 64 tokens",
        ),
        ({"frame": Frame("folded")}, "'folded' frame"),
    ],
)
def test_another_models_are_refused(changes, message):
    with pytest.raises(DictionaryError, match=message):
        ReplacementModel(random_model("gpt2", **SIZES, seed=TUNED), dictionaries_of(BASE, **changes))


def test_another_width_is_refused_with_both_figures():
    with pytest.raises(DictionaryError, match="mlp_in of width 16, but random-gpt2-0 has mlp_in of width 32"):
        ReplacementModel(random_model("gpt2", n_layers=2, d_model=32), dictionaries_of(BASE))


def test_rounded_weights_are_not_told_apart():
    model = random_model("gpt2", **SIZES | {"dtype": torch.bfloat16})
    assert has_other_weights(dictionaries_of(BASE).provenance, model) is None


def test_training_records_the_vocabulary(tmp_path):
    model = random_model("gpt2", n_layers=1, d_model=8, n_heads=2, d_vocab=40)
    rows = torch.randint(0, 40, (40, 8), generator=torch.Generator().manual_seed(0))
    trained = train(model, rows, TranscoderConfig(features=8, tokens=64, batch=16))
    save_dictionaries(trained, tmp_path)
    assert load_dictionaries(tmp_path).provenance.d_vocab == 40
    record = json.loads((tmp_path / "config.json").read_text())
    del record["provenance"]["d_vocab"], record["provenance"]["first"]  # as older releases wrote it
    (tmp_path / "config.json").write_text(json.dumps(record))
    loaded = load_dictionaries(tmp_path).provenance
    assert (loaded.d_vocab, loaded.first) == (None, 1)


@pytest.mark.parametrize(
    ("fit", "line"),
    [
        ({"l0": 17.06, "fvu": 0.0114}, "Dictionaries on this prompt: L0 17.1, FVU 0.011"),
        ({"l0": 3.0, "fvu": None}, "Dictionaries on this prompt: L0 3.0"),
        (None, None), ("much", None), ({"l0": "17"}, None),
    ],
)  # fmt: skip
def test_the_fit_is_shown_where_a_graph_says_it(fit, line):
    model = ReplacementModel(random_model("gpt2", **SIZES), dictionaries_of(BASE))
    graph: AttributionGraph = attribute(model, TOKENS, targets=TARGETS)
    console = Console(record=True, width=100, file=io.StringIO())
    show_graph(console, replace(graph, provenance={**graph.provenance, "fit": fit}))
    shown = [row for row in console.export_text().splitlines() if row.startswith("Dictionaries")]
    assert shown == ([] if line is None else [line])
