"""One rule for the beginning-of-text token: what the dictionaries were trained with, else the model's own tokenizer."""

import json
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

import circuitsae
from circuitsae.attribution import attribute
from circuitsae.cli import main
from circuitsae.features.collection import CollectConfig, collect
from circuitsae.graph import load_graph
from circuitsae.interventions import Prompt
from circuitsae.replacement import ReplacementModel
from circuitsae.tasks.wording import encode
from circuitsae.validation import validate
from circuitsae.validation.measuring import reading_like
from transcoders import (
    load_dictionaries,
    load_model,
    open_corpus,
    pack_rows,
    random_dictionaries,
    random_model,
    save_dictionaries,
    take_rows,
)
from transcoders.dictionaries.provenance import reading_as_trained
from transcoders.errors import InputError, PromptError
from transcoders.language_model import LanguageModel
from transcoders.random_models import random_module
from transcoders.training import CLTConfig, SAEConfig, TranscoderConfig, train

TEXT = " w1 w2 w3"
BARE = [3, 4, 5]
SIZES: dict[str, Any] = {"n_layers": 2, "d_model": 16, "n_heads": 2, "d_vocab": 24, "context": 16}
QUICK: dict[str, Any] = {"features": 8, "tokens": 64, "batch": 16, "context": 8, "buffer_mb": 1}
DOCUMENTS = [" ".join(["", *(f"w{(i * j) % 20}" for j in range(12))]) for i in range(40)]


@pytest.fixture
def reader(word_tokenizer):
    """Makes a random GPT-2 behind a tokenizer of words."""

    def make(**rule) -> LanguageModel:
        model = random_model(**SIZES)
        model.tokenizer = word_tokenizer(**rule)
        return model

    return make


def dictionaries(kind: Any = "plt", **provenance):
    made = random_dictionaries(kind, d_model=16, features=12)
    made.provenance = replace(made.provenance, **provenance)
    return made


# the model's own rule


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "mistral"])
@pytest.mark.parametrize(("bos", "adds_bos"), [("<s>", True), ("<s>", False), (None, False)])
def test_texts_are_read_as_the_saved_tokenizer_reads_them(tmp_path, word_tokenizer, family, bos, adds_bos):
    """Whatever the family: TransformerLens would have it by a table of families, and every tokenizer add BOS."""
    sizes = {**SIZES, "n_kv_heads": 2, "d_head": 8, "d_mlp": 32}
    random_module(family, sizes, seed=0).save_pretrained(tmp_path)
    word_tokenizer(bos=bos, adds_bos=adds_bos).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.bos == (0 if bos else None)
    assert model.adds_bos == adds_bos
    assert model.to_tokens(TEXT).tolist() == [0] * adds_bos + BARE
    assert {row[0] == 0 for row in pack_rows(model, DOCUMENTS, context=8)} == {adds_bos}


def test_bos_is_given_or_left_out_as_wanted(reader):
    model = reader(adds_bos=True)
    assert model.to_tokens(TEXT, bos=False).tolist() == model.with_bos(False).to_tokens(TEXT).tolist() == BARE
    assert model.to_tokens(TEXT).tolist() == reader().to_tokens(TEXT, bos=True).tolist() == [0, *BARE]
    assert model.with_bos(None) is model
    assert model.with_bos(False).with_bos(True).to_tokens(TEXT).tolist() == [0, *BARE]
    assert model.with_bos(False).fingerprint() == model.fingerprint()


def test_bos_cannot_be_had_where_there_is_none(reader):
    with pytest.raises(PromptError, match="no beginning-of-text token"):
        reader(bos=None).to_tokens(TEXT, bos=True)
    assert reader(bos=None).to_tokens(TEXT, bos=False).tolist() == BARE


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_prompt_that_begins_with_bos_never_gets_two(reader, bos, adds_bos):
    model = reader(adds_bos=adds_bos)
    assert model.to_tokens("<s>" + TEXT, bos=bos).tolist() == [0, *BARE]
    assert encode(model, ["<s>" + TEXT, TEXT])[0].ids == [0, *BARE]


def test_texts_of_a_task_begin_alike_whether_or_not_the_first_has_bos_written_out(reader):
    encoded = encode(reader(adds_bos=True), ["<s>" + TEXT, TEXT])
    assert [e.ids for e in encoded] == [[0, *BARE], [0, *BARE]]
    assert encoded[1].position(TEXT.index("w2")) == 2


@pytest.mark.parametrize("bos", [True, False])
def test_rows_of_training_text_begin_with_one_bos_or_none(reader, bos):
    model = reader(adds_bos=True).with_bos(bos)
    rows = list(pack_rows(model, ["<s>" + text for text in DOCUMENTS], context=13))  # BOS and 12 words, then </s>
    words = [token for row in rows for token in row]
    assert all(len(row) == 13 for row in rows)
    if bos:
        assert all(row[0] == 0 and row[1] != 0 for row in rows)
    else:
        assert words == [i for text in DOCUMENTS for i in (*model.to_tokens("<s>" + text).tolist(), 1)][: len(words)]


# what dictionaries were trained with


@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("form", ["native", "circuit-tracer"])
def test_training_records_how_its_rows_begin_and_prompts_follow(reader, tmp_path, caplog, asked, adds_bos, form):
    model = reader(adds_bos=adds_bos)
    config = TranscoderConfig(**QUICK, bos=asked)
    save_dictionaries(train(model, DOCUMENTS, config, progress=False), tmp_path, format=form)
    loaded = load_dictionaries(tmp_path)
    expected = adds_bos if asked is None else asked
    assert loaded.provenance.trained_with_bos(model) is expected
    other = reader(adds_bos=not adds_bos)
    assert ReplacementModel(other, loaded).tokens(TEXT).tolist() == [0] * expected + BARE
    assert "do not say" not in caplog.text


def test_rows_of_tokens_are_recorded_as_they_are(reader):
    model, rows = reader(), torch.randint(1, 20, (12, 8), generator=torch.Generator().manual_seed(0))
    begun = rows.clone()
    begun[:, 0] = 0
    for given, expected in ((rows, False), (begun, True)):
        assert train(model, given, SAEConfig(**QUICK), progress=False).provenance.bos is expected
    assert train(None, torch.randn(64, 16), SAEConfig(**QUICK), progress=False).provenance.bos is None


def test_training_without_bos_leaves_out_the_first_token_of_a_row(reader):
    """Position 0 has no features, whatever stands there."""
    model = reader(bos=None)
    trained = train(model, DOCUMENTS, CLTConfig(**QUICK), progress=False)
    assert trained.provenance.bos is False
    graph = attribute(ReplacementModel(model, trained), TEXT)
    assert graph.provenance["bos"] is False
    assert not any(n.kind == "feature" and n.pos == 0 for n in graph.nodes)
    assert any(n.kind == "error" and n.pos == 0 for n in graph.nodes)  # no constant: another prompt has another token


def test_dictionaries_trained_together_share_the_rule(reader):
    with pytest.raises(InputError, match="share their bos"):
        train(reader(), DOCUMENTS, [SAEConfig(**QUICK), SAEConfig(**QUICK, bos=True)], progress=False)


@pytest.mark.parametrize("settings", [{"prepend_bos": True}, {"metadata": {"prepend_bos": True}}])
def test_what_other_tools_record_is_read(reader, settings):
    assert ReplacementModel(reader(), dictionaries(config=settings)).tokens(TEXT).tolist() == [0, *BARE]


def test_dictionaries_trained_with_a_token_that_the_model_lacks_say_so(reader, caplog):
    assert ReplacementModel(reader(bos=None), dictionaries(bos=True)).tokens(TEXT).tolist() == BARE
    assert "has none; prompts go without" in caplog.text


@pytest.mark.parametrize("adds_bos", [True, False])
def test_without_a_record_the_tokenizer_decides_and_one_line_says_so(reader, caplog, adds_bos):
    unknown = dictionaries(config={"prepend_bos": "yes", "metadata": None})
    model = ReplacementModel(reader(adds_bos=adds_bos), unknown)
    assert model.tokens(TEXT).tolist() == [0] * adds_bos + BARE
    ReplacementModel(model.model, unknown).tokens(TEXT)
    assert caplog.text.count("do not say whether they were trained with") == 1
    assert f"{'with' if adds_bos else 'without'} <s> first" in caplog.text


def test_who_says_so_needs_no_line(reader, caplog):
    for model in (reader().with_bos(True), reader()):
        said = ReplacementModel(model, dictionaries(bos=False), bos=True)
        assert said.tokens(TEXT).tolist() == [0, *BARE]
    assert ReplacementModel(reader().with_bos(True), dictionaries(bos=False)).tokens(TEXT).tolist() == [0, *BARE]
    assert caplog.text == ""


@pytest.mark.parametrize(("family", "expected"), [("gpt2", True), ("gpt_neox", False)])
def test_our_files_without_a_record_are_read_as_they_were_trained(word_tokenizer, caplog, family, expected):
    model = random_model(family, **SIZES)
    model.tokenizer = word_tokenizer(adds_bos=not expected)
    old = dictionaries(corpus="some.txt", config=TranscoderConfig().to_json())
    assert reading_as_trained(model, old.provenance).adds_bos is expected
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["pocket", "pocket-plt", "pocket-sae"])
def test_the_pocket_model_and_its_dictionaries_begin_with_bos_as_ever(pocket, caplog, name):
    caplog.set_level(logging.WARNING)
    assert pocket.to_tokens("Hi").tolist()[0] == 0
    assert reading_as_trained(pocket, circuitsae.load_dictionaries(name).provenance).to_tokens("Hi").tolist()[0] == 0
    assert caplog.text == ""


# graphs


@pytest.mark.parametrize("bos", [True, False])
def test_a_graph_records_it_and_other_texts_are_read_likewise(reader, tmp_path, bos):
    model = ReplacementModel(reader(), dictionaries("clt", bos=not bos))
    graph = attribute(model, TEXT, bos=bos)
    assert graph.token_ids == (*([0] * bos), *BARE)
    assert model.trace(TEXT, bos=bos).tokens.tolist() == list(graph.token_ids)
    assert graph.provenance["bos"] is bos
    graph.save(tmp_path)
    assert load_graph(tmp_path).provenance["bos"] is bos
    assert reading_like(model, graph).tokens(TEXT).tolist() == list(graph.token_ids)
    last = Prompt(TEXT, {"last": -1})
    same = validate(model, graph, edges=10, controls=0, prompts=[last], roles={"last": -1})
    assert len(same.prompts) == 10  # as many tokens, so that every edge has a place there
    effect = same.edges.set_index(["source", "target"])["model_measured"]
    there = same.prompts.set_index(["source", "target"])["model_measured"]
    assert (there - effect.loc[there.index]).abs().max() < 1e-4
    alone, beside = (validate(model, graph, edges=30, controls=0, elsewhere=texts).edges for texts in ([], [TEXT]))
    assert alone["graph_ratio"].equals(beside["graph_ratio"])  # the same tokens, so that no feature has other values


def test_an_old_graph_is_read_by_its_tokens(reader):
    model = ReplacementModel(reader(), dictionaries(bos=False))
    graph = attribute(model, torch.tensor([0, *BARE]))
    old = replace(graph, provenance={k: v for k, v in graph.provenance.items() if k != "bos"})
    assert reading_like(model, old).tokens(TEXT).tolist() == [0, *BARE]
    unknown = replace(old, token_ids=(-1,) * 4)
    assert reading_like(model, unknown).tokens(TEXT).tolist() == BARE


def test_cards_read_rows_as_the_dictionaries_were_trained_or_as_told(reader):
    model, config = reader(), CollectConfig(tokens=140, context=8)
    for told, trained, expected in ((None, True, True), (False, True, False), (True, None, True)):
        made = dictionaries(bos=trained)
        documents = list(open_corpus(DOCUMENTS).training())
        rows = take_rows(model.with_bos(expected), documents, rows=20, context=8)
        cards, same = collect(model, made, DOCUMENTS, config, bos=told), collect(model, made, rows, config)
        assert cards.frame().firing_rate.tolist() == same.frame().firing_rate.tolist()
        other = collect(model, made, DOCUMENTS, config, bos=not expected)
        assert cards.frame().firing_rate.tolist() != other.frame().firing_rate.tolist()


# the command line


def test_trace_takes_the_flag_and_validate_follows_the_graph(tmp_path):
    arguments = ["The cat", "--no-bos", "--validate", "0", "--max-features", "5", "--out", str(tmp_path / "g")]
    main(["trace", *arguments])
    graph = load_graph(tmp_path / "g")
    assert graph.provenance["bos"] is False
    assert 0 not in graph.token_ids
    main(["validate", str(tmp_path / "g"), "--edges", "2", "--controls", "1"])
    assert json.loads((tmp_path / "g" / "validation.json").read_text())


COMMANDS = {
    "trace": ["x"],
    "intervene": ["x", "--feature", "0.1@1", "--zero"],
    "steer": ["--feature", "0.1", "x", "--held-out", "y", "--target", " z"],
    "features collect": ["pocket", "--out", "cards"],
    "evaluate": ["pocket", "pocket"],
    "train": ["pocket", "--out", "o"],
    "reproduce": ["ioi"],
}


class _Reached(Exception):  # noqa: N818
    """Where a command first asks for the rule."""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("flag", "expected"), [("--bos", True), ("--no-bos", False), (None, None)])
def test_every_command_that_reads_text_takes_the_flag(tmp_path, monkeypatch, command, flag, expected):
    from transcoders.dictionaries import provenance

    asked = []

    def reached(*given, **named):
        asked.append(named["bos"] if "bos" in named else given[-1])
        raise _Reached

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("circuitsae.replacement.reading_as_trained", reached)
    monkeypatch.setattr("circuitsae.features.reading.reading_as_trained", reached)
    monkeypatch.setattr(provenance, "reading_as_trained", reached)
    if command in ("train", "reproduce"):
        monkeypatch.setattr(LanguageModel, "with_bos", reached)
    with pytest.raises(_Reached):
        main([*command.split(), *COMMANDS[command], *([flag] if flag else [])])
    assert asked == [expected]
