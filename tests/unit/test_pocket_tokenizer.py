"""The pocket tokenizer: listed words are single tokens, and every text decodes to itself."""

import random

import pytest

from circuitsae.pocket import MODEL_DIR, words
from circuitsae.pocket.facts import ENTITIES
from examples.pocket.tokenizer import EOT, build_tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_names_places_and_corpus_words_are_single_tokens(tokenizer):
    listed = [*words.NAMES, *ENTITIES, *words.SPANS, *words.INDUCTION_WORDS]
    assert [word for word in listed if len(tokenizer.encode(" " + word).ids) != 1] == []
    assert [word for word in (*words.NAMES, *ENTITIES) if len(tokenizer.encode(word).ids) != 1] == []


def test_a_year_is_a_century_and_two_digits(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode(" 1732").ids] == [" 17", "32"]
    assert all(len(tokenizer.encode(f"{n:02d}").ids) == len(tokenizer.encode(f" {n:02d}").ids) == 1 for n in range(100))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n \t x ",
        " New Yorker in New York",
        "Saint  Paul",
        "Ünï 🦊 e\u0301 \u200d 漢字\x00",
        "12345 a1b2",
        "it's I'LL",
    ],
)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_round_trip_of_random_unicode(tokenizer):
    rng = random.Random(0)
    planes = [
        range(0x20, 0x250),
        range(0x300, 0x370),
        range(0x2000, 0x2070),
        range(0x4E00, 0x4F00),
        range(0x1F300, 0x1F650),
    ]
    for _ in range(500):
        text = "".join(chr(rng.choice(rng.choice(planes))) for _ in range(rng.randint(1, 40)))
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_end_of_text_is_token_zero(tokenizer):
    assert tokenizer.encode(EOT).ids == [0]
    assert tokenizer.get_vocab_size() == max(tokenizer.get_vocab().values()) + 1


def test_auto_tokenizer_agrees_without_a_network(tokenizer):
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)
    assert auto.bos_token_id == auto.eos_token_id == auto.unk_token_id == 0
    for text in ("When John and Mary went to New York in 1732,", "Ünï 🦊\n\n  x", " Salt Lake City"):
        assert auto(text)["input_ids"] == [0, *tokenizer.encode(text).ids]  # every row it was trained on begins so
        assert auto.decode(auto(text)["input_ids"], skip_special_tokens=True) == text


def test_the_recipe_rebuilds_the_saved_tokenizer(tokenizer):
    assert build_tokenizer(0).to_str() == tokenizer.to_str()
