"""Tokens that are parts of one character: what the tokenizer says of the whole text is the oracle."""

import json
import re

import pytest

import circuitsae
from circuitsae.attribution import LogitTargets
from circuitsae.graph.exchange import write_graph
from circuitsae.report.data import page_data
from transcoders.token_text import join_tokens, token_text, with_characters

TEXTS = ["café", "a 🙂 b", "€€", "naïve 日本語 text", "👩‍🔬", "⟨C3⟩ é <0xC3>"]


def _models(pocket, gpt2_tokens):
    return {"pocket": pocket, "gpt2": gpt2_tokens}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["pocket", "gpt2"])
def test_every_piece_is_readable_and_together_they_spell_the_text(pocket, gpt2_tokens, name, text):
    model = _models(pocket, gpt2_tokens)[name]
    tokens = model.to_tokens(text, bos=False)
    strings = model.token_strings(tokens)
    assert len(strings) == len(tokens)
    assert not any("�" in string for string in strings)
    assert join_tokens(strings) == text == model.tokenizer.decode(tokens)
    alone = [model.token_string(int(token)) for token in tokens]
    assert join_tokens(alone) == text
    known = {}  # the text identifies the token
    for token, string in zip(tokens.tolist(), alone, strict=True):
        assert known.setdefault(string, token) == token


def test_pieces_carry_their_character_and_their_bytes(pocket):
    strings = pocket.token_strings(pocket.to_tokens("é🙂", bos=False))
    assert strings == ["é⟨C3⟩", "é⟨A9⟩", "🙂⟨F0⟩", "🙂⟨9F⟩", "🙂⟨99⟩", "🙂⟨82⟩"]


@pytest.mark.parametrize(
    ("alone", "beside"),
    [
        ([" <0xF0><0x9F>", "<0x99><0x82>", "!"], [" 🙂⟨F0 9F⟩", "🙂⟨99 82⟩", "!"]),
        (["<0xC3>", "<0xA9><0xC3>", "<0xA9>"], ["é⟨C3⟩", "é⟨A9⟩é⟨C3⟩", "é⟨A9⟩"]),
        (["<0xC3>", "a", "<0x82>"], ["<0xC3>", "a", "<0x82>"]),  # bytes that make up nothing stay bytes
        (["<", "0x", "C3", ">"], ["<", "0x", "C3", ">"]),  # and what somebody typed stays that
    ],
)
def test_neighbours(alone, beside):
    assert with_characters(alone) == beside
    assert join_tokens(alone) == join_tokens(beside)


def test_byte_pieces_of_both_kinds_of_vocabulary():
    assert token_text("<0xF0>", "�") == "<0xF0>"  # SentencePiece
    assert token_text("ĠðŁ", " �") == " <0xF0><0x9F>"  # GPT-2
    assert token_text("ï¿½", "�") == "�"  # the character itself


def test_graph_page_and_export_show_the_character(pocket, tmp_path):
    model = circuitsae.ReplacementModel(pocket, circuitsae.load_dictionaries("pocket"))
    piece = pocket.to_tokens("é", bos=False)[0]
    graph = circuitsae.attribute(model, "café", targets=LogitTargets([int(piece)]), max_features=5)
    assert graph.tokens[-2:] == ("é⟨C3⟩", "é⟨A9⟩")
    texts = {node.id: node.text for node in graph.nodes}
    assert texts[f"tok@{len(graph.tokens) - 1}"] == "é⟨A9⟩"
    assert texts[f"logit.{int(piece)}@{len(graph.tokens) - 1}"] == "<0xC3>"
    assert page_data(graph)["tokens"][-2:] == ["é⟨C3⟩", "é⟨A9⟩"]
    exported = json.loads(write_graph(graph, tmp_path / "graph.json").read_text("utf-8"))
    assert exported["metadata"]["prompt_tokens"][-1] == "é⟨A9⟩"
    assert exported["metadata"]["prompt"] == "café"
    assert re.search("café", graph._repr_html_())
