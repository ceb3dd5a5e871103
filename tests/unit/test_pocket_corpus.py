"""The pocket model's facts, word lists, corpus stream and evaluation prompts."""

import random
import re
from itertools import combinations, islice

import torch

from circuitsae.pocket import corpus, families, prompts, words
from circuitsae.pocket.facts import CAPITALS, CITIES, HELD_OUT_CITIES, STATE_OF, STATES, TRAINED_CITIES
from examples.pocket.tokenizer import load_tokenizer


def test_fifty_states_with_distinct_capitals_and_unambiguous_cities():
    names = [state.name for state in STATES]
    assert len(names) == len(set(names)) == 50
    everything = [*names, *CAPITALS, *CITIES]
    assert len(everything) == len(set(everything))
    assert not set(everything) & set(words.NAMES)
    assert all(len(state.cities) == 4 for state in STATES)
    assert STATE_OF["Dallas"].capital == "Austin"


def test_a_fifth_of_the_cities_is_held_out_and_every_state_keeps_some():
    assert len(HELD_OUT_CITIES) == round(0.2 * len(CITIES))
    assert all(len(HELD_OUT_CITIES & set(state.cities)) <= 1 for state in STATES)
    assert "Dallas" in TRAINED_CITIES


def test_no_document_names_a_held_out_city_with_its_capital():
    pattern = re.compile("|".join(rf"\b{re.escape(city)}\b" for city in HELD_OUT_CITIES))
    seen = set()
    for text in islice(corpus.documents(11), 20_000):
        for city in pattern.findall(text):
            seen.add(city)
            assert STATE_OF[city].capital not in text, text
    assert seen == HELD_OUT_CITIES


def test_two_hop_sentences_never_use_held_out_cities():
    rng = random.Random(3)
    stems = [template.split("{city}") for template in families.TWO_HOP_TEMPLATES]
    seen = set()
    for _ in range(10_000):
        text = families.two_hop(rng)
        seen.update(text[len(start) :].split(end)[0] for start, end in stems if text.startswith(start) and end in text)
    assert not seen & HELD_OUT_CITIES
    assert seen >= set(TRAINED_CITIES)


def test_held_out_name_pairs_are_never_cast_together():
    assert words.pair_held_out("Mary", "John")
    pattern = re.compile(r"\b(" + "|".join(words.NAMES) + r")\b")
    rng = random.Random(5)
    for family in (f for f in corpus.MIXTURE if f is not families.induction):
        for _ in range(1_000):
            text = family(rng).replace("Saint Paul", "")
            unrelated = re.split(r"(?<=[.!?]) ", text) if family is families.sentences else [text]
            for unit in unrelated:
                assert not any(words.pair_held_out(a, b) for a, b in combinations(set(pattern.findall(unit)), 2)), unit


def test_streams_depend_on_the_seed_alone():
    assert list(islice(corpus.text_stream(4), 20)) == list(islice(corpus.text_stream(4), 20))
    assert list(islice(corpus.text_stream(4), 20)) != list(islice(corpus.text_stream(5), 20))
    tokenizer = load_tokenizer()
    first, again = (corpus.batch(tokenizer, 0, 7, 8, 96) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (8, 96)
    assert (first[:, 0] == 0).all()
    assert not torch.equal(first, corpus.batch(tokenizer, 0, 8, 8, 96))


def test_one_batch_in_twelve_is_long():
    lengths = [corpus.batch_shape(step)[1] for step in range(24)]
    assert lengths.count(512) == 2
    assert lengths.count(96) == 22


def test_held_out_text_has_the_tokens_asked_for():
    tokenizer = load_tokenizer()
    texts = corpus.held_out_text(2_000, 1, tokenizer=tokenizer)
    assert 2_000 <= sum(len(tokenizer.encode(text).ids) for text in texts) < 3_000
    assert not set(texts) & set(islice(corpus.text_stream(1), 200))


def test_greater_than_documents_end_later_than_they_start():
    rng = random.Random(0)
    for _ in range(500):
        start, end = re.findall(r"\d{4}", families.greater_than(rng))
        assert start[:2] == end[:2]
        assert start < end


def test_prompts_are_seeded_held_out_and_single_token():
    tokenizer = load_tokenizer()
    ioi = prompts.ioi_prompts(40, 2)
    assert ioi == prompts.ioi_prompts(40, 2)
    assert all(words.pair_held_out(p.answer.strip(), p.wrong.strip()) for p in ioi)
    assert all(p.text.endswith(" to") and p.text.count(p.wrong.strip()) >= 2 for p in ioi)
    single = [*ioi, *prompts.agreement_prompts(40, 2), *prompts.two_hop_prompts(held_out_cities=True)]
    assert all(len(tokenizer.encode(word).ids) == 1 for p in single for word in (p.answer, p.wrong))
    assert all(len(tokenizer.encode(text).ids) == 48 for text in prompts.induction_prompts(10, 0))
