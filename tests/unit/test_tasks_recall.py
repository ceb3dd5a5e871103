"""Tasks that ask about one subject, greater-than by digits, and the examples that a model gets right."""

from collections import Counter
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest

from circuitsae.reproduce import Settings, reproduce, run
from circuitsae.reproduce.circuit import FoundCircuit
from circuitsae.tasks import Task, behaviour, known_examples, load_task
from circuitsae.tasks.antonyms import PAIRS
from circuitsae.tasks.facts import CAPITAL_OF, CITY_OF
from circuitsae.tasks.pronouns import MEN, WOMEN
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel


def _subject(task: Task, role: str) -> list[str]:
    return [example.clean[slice(*example.roles[role])] for example in task.examples]


def test_facts_are_of_both_relations_and_the_wrong_city_is_the_other_subjects(digit_model: LanguageModel) -> None:
    task = load_task("facts", digit_model, 160)
    assert Counter(example.template for example in task.examples) == {"capital 0": 80, "landmark 0": 80}
    city = {**CAPITAL_OF, **CITY_OF}
    for example, subject in zip(task.examples, _subject(task, "subject"), strict=True):
        (other,) = (name for name in city if example.clean.replace(subject, name) == example.corrupt)
        assert (example.answers, example.wrong) == ((f" {city[subject]}",), (f" {city[other]}",))
    # The only country of two words has no counterpart.
    assert task.refused == ("South Korea", "the Arc de Triomphe")
    counts = Counter(_subject(task, "subject"))
    assert counts["France"] == counts["Egypt"]
    one = load_task("facts", digit_model, 10, relations=("landmark",))
    assert {example.template for example in one.examples} == {"landmark 0"}


def test_antonyms_go_both_ways_and_no_word_has_two(digit_model: LanguageModel) -> None:
    words = [word for pair in PAIRS for word in pair]
    assert len(set(words)) == len(words)
    task = load_task("antonyms", digit_model, 2 * len(words))
    assert Counter(_subject(task, "word")) == dict.fromkeys(words, 2)
    for example, word in zip(task.examples, _subject(task, "word"), strict=True):
        assert {(word, example.answers[0]), (example.answers[0], word)} & set(PAIRS)
        assert example.wrong != example.answers
    mine = load_task("antonyms", digit_model, 4, pairs=[("hot", "cold"), ("big", "small")])
    assert set(_subject(mine, "word")) == {"hot", "cold", "big", "small"}


def test_pronouns_are_those_of_the_names(digit_model: LanguageModel, pocket: LanguageModel) -> None:
    for model in (digit_model, pocket):
        task = load_task("pronouns", model, 64)
        for example, name in zip(task.examples, _subject(task, "name"), strict=True):
            own, others, right, wrong = (MEN, WOMEN, " he", " she") if name in MEN else (WOMEN, MEN, " she", " he")
            assert name in own
            assert any(example.clean.replace(name, other) == example.corrupt for other in others)
            assert (example.answers, example.wrong) == ((right,), (wrong,))


def test_gpt2_has_the_words_but_a_few(gpt2_tokens: LanguageModel) -> None:
    for name in ("facts", "antonyms", "pronouns"):
        task = load_task(name, gpt2_tokens, 80)
        assert sum(len(pair) for pair in task.tokens(gpt2_tokens)) == 80
        assert len(task.refused) < 12


def test_years_read_digit_by_digit_ask_for_the_tens(digit_model: LanguageModel) -> None:
    task = load_task("greater-than", digit_model, 178)
    assert task.metric == "prob_diff"
    (pair,) = task.tokens(digit_model)
    tens, starts = pair.clean.gather(1, pair.roles["YY"][:, None])[:, 0], []
    assert digit_model.token_strings(tens) == [example.clean[slice(*example.roles["YY"])] for example in task.examples]
    for example in task.examples:
        begin, end = example.roles["YY"]
        start = int(example.clean[begin : end + 1])
        starts.append(start)
        century = example.clean[-2:]
        # Right is a digit with which a later year of the century begins.
        later = sorted({f"{year:02d}"[0] for year in range(start + 1, 100)})
        assert list(example.answers) == later
        assert sorted((*example.answers, *example.wrong)) == list("0123456789")
        assert example.boundary == (later[0], str(start // 10 - 1))
        assert example.clean[begin - 2 : begin] == century
        assert example.clean[slice(*example.roles["XX1"])] == century[1]
        assert f" {century}01 " in example.corrupt
    assert Counter(starts) == dict.fromkeys(range(10, 99), 2)
    assert pair.roles["YY"].tolist() == (pair.roles["XX1"] + 1).tolist()


def test_a_tokenizer_with_neither_form_of_years_says_so(digit_model: LanguageModel) -> None:
    from transcoders import random_model

    class Spaced:
        """The digits' tokenizer, which reads a text that begins with a digit as if with a space before it."""

        is_fast = True

        def __getattr__(self, name: str) -> Any:
            return getattr(digit_model.tokenizer, name)

        def __call__(self, texts: list[str], **options: Any) -> Any:
            return digit_model.tokenizer([f" {t}" if t[0].isdigit() else t for t in texts], **options)

    model = random_model("gpt2", n_layers=1, d_model=8, n_heads=2, d_vocab=digit_model.d_vocab)
    model.tokenizer = Spaced()
    with pytest.raises(InputError, match="all digits, as one token each, but .* splits 0, 1, 2, 3, .*; choose another"):
        load_task("greater-than", model)


def test_examples_that_the_model_gets_right_are_kept_and_counted(pocket: LanguageModel) -> None:
    task = load_task("docstring", pocket, 40)
    right = []
    for i, example in enumerate(task.examples):
        logits = pocket.run(pocket.to_tokens(example.clean)[None])[0][0, -1]
        best, *wrong = (logits[pocket.token_id(str(answer))] for answer in (*example.answers, *example.wrong))
        right += [i] if best > max(wrong) else []
    kept = known_examples(pocket, task, batch_size=7)
    assert kept.examples == task.take(right).examples
    assert 0 < len(kept) < 40
    assert str(kept.known) == f"{len(right)} of 40 examples, those that pocket gets right (accuracy > 0)"
    assert behaviour(pocket, kept, measures=("accuracy",))["clean"].item() == 1
    assert load_task("docstring", pocket, 40, known=True) == kept
    assert len(known_examples(pocket, task, measure="logit_diff")) >= len(kept)
    # Without wrong answers right is what outranks all tokens.
    alone = replace(task, examples=tuple(replace(example, wrong=()) for example in task.examples))
    ioi = load_task("ioi", pocket, 20)
    lone = replace(ioi, examples=tuple(replace(example, wrong=()) for example in ioi.examples))
    assert known_examples(pocket, lone).known == (20, 20, "top1", "pocket")
    with pytest.raises(InputError, match=r"pocket gets none of the 40 examples of 'docstring' right \(top1 > 0\)"):
        known_examples(pocket, alone)
    with pytest.raises(InputError, match="'kl' does not say what is right; choose one of: accuracy, top1"):
        known_examples(pocket, task, measure="kl")


def test_a_reproduction_takes_known_prompts_where_it_is_told_to(pocket: LanguageModel) -> None:
    assert Settings().prompts("ioi", pocket, 6, 3) == load_task("ioi", pocket, 6, 3)
    known = Settings(known=True, seed=2).prompts("docstring", pocket, 5)
    both = load_task("docstring", pocket, 10, 2)
    assert known == known_examples(pocket, both).take(slice(5))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("facts", {}, "at least 2 cities of one token each, but pocket has 1; those that its tokenizer splits: Paris"),
        ("facts", {"relations": ["river"]}, "no relation 'river' among the facts; choose from: capital, landmark"),
        ("antonyms", {}, "at least 20 words of one token each, but pocket has 8; .*: hot, big, fast"),
        ("antonyms", {"pairs": [("hot", "happy")]}, "1 of the 2 words given are not one token each in pocket: hot"),
        ("antonyms", {"pairs": [("sad", "happy"), ("clean", "dirty")], "n": 0}, "n of at least 1"),
        ("pronouns", {"templates": ["She said that"]}, r"'She said that' does not have the slot \{name\} exactly once"),
    ],
)
def test_what_a_model_or_a_caller_lacks_is_said(
    name: str, options: dict[str, Any], message: str, pocket: LanguageModel
) -> None:
    with pytest.raises(InputError, match=message):
        load_task(name, pocket, **options)


def test_behaviour_is_of_all_prompts_and_roles_of_known_ones(
    digit_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Task] = []
    monkeypatch.setattr(run, "component_stage", lambda *given: Mock(spec=FoundCircuit, nodes=(), circuit=frozenset()))
    monkeypatch.setattr(run, "stability_stage", lambda *given: None)
    monkeypatch.setattr(run, "role_stage", lambda report, model, task, *rest, **how: taken.append(task))
    report = reproduce("greater-than", digit_model, settings=Settings(behaviour=60, known=True))
    assert report.sections[0].text.startswith("Means over 60 prompts")
    everything = load_task("greater-than", digit_model, 60, 1)
    assert taken == [known_examples(digit_model, everything)]
    assert str(taken[0].known) in report.sections[1].text
    assert 0 < len(taken[0]) < 60
