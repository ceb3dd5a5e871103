"""Built-in tasks: what the pairs are, where the roles stand, what the tokenizer refuses, what pocket does on them."""

import re
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

import circuitsae
from circuitsae.pocket.facts import HELD_OUT_CITIES, STATE_OF
from circuitsae.pocket.words import NAMES, held_out, pair_held_out
from circuitsae.tasks import Example, PatchPair, Task, behaviour, load_task, task_names
from circuitsae.tasks.ioi import PUBLISHED_TEMPLATES
from examples.pocket.measure import Behaviours
from transcoders import random_model
from transcoders.errors import InputError, PromptError
from transcoders.language_model import LanguageModel


def _said(model: LanguageModel, pair: PatchPair, role: str, *, corrupt: bool = False) -> list[str]:
    rows = pair.corrupt if corrupt else pair.clean
    at = rows[torch.arange(len(pair)), pair.roles[role]]
    return [piece.strip() for piece in model.token_strings(at)]


def _name(answer: object) -> str:
    return str(answer).strip()


@pytest.fixture(params=task_names())
def read(
    request: pytest.FixtureRequest, pocket: LanguageModel, digit_model: LanguageModel
) -> tuple[str, LanguageModel]:
    """Every task, and a model that has its words."""
    return request.param, digit_model if request.param in ("facts", "antonyms") else pocket


def test_pairs_differ_have_equal_length_and_end_where_the_answer_follows(read: tuple[str, LanguageModel]) -> None:
    name, model = read
    task = load_task(name, model, 60, seed=3)
    pairs = task.tokens(model)
    assert sorted(torch.cat([pair.index for pair in pairs]).tolist()) == list(range(60))
    assert [pair.clean.shape[1] for pair in pairs] == sorted({pair.clean.shape[1] for pair in pairs})
    for pair in pairs:
        assert (pair.clean != pair.corrupt).any(1).all()
        for row, i in enumerate(pair.index.tolist()):
            example = task.examples[i]
            # One by one, as the model itself would read the text.
            assert pair.clean[row].tolist() == model.to_tokens(example.clean).tolist()
            assert pair.corrupt[row].tolist() == model.to_tokens(example.corrupt).tolist()
            answers = [model.token_id(str(a)) for a in example.answers]
            assert [t for t in pair.answers[row].tolist() if t >= 0] == answers
            assert not set(example.answers) & set(example.wrong)
        assert pair.roles["END"].tolist() == [pair.clean.shape[1] - 1] * len(pair)


def test_roles_stand_on_their_words(read: tuple[str, LanguageModel]) -> None:
    name, model = read
    task = load_task(name, model, 60)
    for pair in task.tokens(model):
        for role in pair.roles.keys() - {"END", "S1+1"}:
            words = [task.examples[i].clean[slice(*task.examples[i].roles[role])] for i in pair.index.tolist()]
            # A subject of several tokens is placed at the last one, here a word.
            for said, word in zip(_said(model, pair, role), words, strict=True):
                assert said in (word, word.split()[-1])


def test_same_seed_same_examples_and_another_seed_others(read: tuple[str, LanguageModel]) -> None:
    assert load_task(*read, 30, seed=5) == load_task(*read, 30, seed=5)
    assert load_task(*read, 30, seed=5) != load_task(*read, 30, seed=6)


def test_thousands_of_examples_take_about_a_second(read: tuple[str, LanguageModel]) -> None:
    start = time.process_time()
    assert len(load_task(*read, 1000)) == 1000
    # A second each for 1,000 would be slow already.
    assert time.process_time() - start < 1


def test_ioi_is_balanced_and_abc_names_are_all_distinct(pocket: LanguageModel) -> None:
    task = load_task("ioi", pocket, 360)
    counts = Counter(example.template for example in task.examples)
    assert set(counts.values()) == {10}
    assert len(counts) == 36
    for pair in task.tokens(pocket):
        clean = {role: _said(pocket, pair, role) for role in ("IO", "S1", "S2")}
        corrupt = {role: _said(pocket, pair, role, corrupt=True) for role in ("IO", "S1", "S2")}
        for row, i in enumerate(pair.index.tolist()):
            example = task.examples[i]
            io, subject = _name(example.answers[0]), _name(example.wrong[0])
            assert [clean[role][row] for role in ("IO", "S1", "S2")] == [io, subject, subject]
            assert len({io, subject, *(corrupt[role][row] for role in corrupt)}) == 5
            assert pair_held_out(io, subject)
            assert (pair.roles["IO"][row] < pair.roles["S1"][row]) == example.template.endswith("ABBA")
        assert torch.equal(pair.roles["S1+1"], pair.roles["S1"] + 1)
        # Names aside the two prompts are the same.
        changed = pair.clean != pair.corrupt
        assert changed.sum(1).tolist() == [3] * len(pair)


def test_ioi_flip_changes_only_the_second_subject(pocket: LanguageModel) -> None:
    for pair in load_task("ioi", pocket, 100, corruption="flip").tokens(pocket):
        assert (pair.clean != pair.corrupt).nonzero()[:, 1].tolist() == pair.roles["S2"].tolist()
        assert _said(pocket, pair, "S2", corrupt=True) == _said(pocket, pair, "IO")


def test_ioi_has_the_fifteen_published_templates(gpt2_tokens: LanguageModel) -> None:
    task = load_task("ioi", gpt2_tokens, 300)
    assert len(PUBLISHED_TEMPLATES) == len(set(PUBLISHED_TEMPLATES)) == 15
    assert Counter(int(e.template.split()[0]) for e in task.examples) == dict.fromkeys(range(15), 20)
    assert task.refused == ("Ella", "Irene")
    assert sum(len(pair) for pair in task.tokens(gpt2_tokens)) == 300


def test_greater_than_starts_in_every_year_equally_often(pocket: LanguageModel) -> None:
    task = load_task("greater-than", pocket, 194)
    (pair,) = task.tokens(pocket)
    assert Counter(_said(pocket, pair, "YY")) == {f"{year:02d}": 2 for year in range(2, 99)}
    assert set(_said(pocket, pair, "YY", corrupt=True)) == {"01"}
    assert _said(pocket, pair, "END") == _said(pocket, pair, "XX1")
    said = zip(*(_said(pocket, pair, role) for role in ("noun", "XX1", "YY")), strict=True)
    for i, (noun, century, yy) in zip(pair.index.tolist(), said, strict=True):
        example, year = task.examples[i], int(yy)
        assert [int(str(a)) for a in example.answers] == list(range(year + 1, 100))
        assert [int(str(a)) for a in example.wrong] == list(range(year + 1))
        assert held_out("span", noun, int(century), year)


def test_greater_than_refuses_the_years_that_gpt2_splits_otherwise(gpt2_tokens: LanguageModel) -> None:
    task = load_task("greater-than", gpt2_tokens, 970)
    # " 1860" and every year of the 1900s are single tokens of GPT-2.
    assert {"1240", "1280", "1860", "1899"} & set(task.refused) == {"1280", "1860"}
    assert {f"19{year:02d}" for year in range(2, 99)} <= set(task.refused)
    (pair,) = task.tokens(gpt2_tokens)
    assert set(Counter(_said(gpt2_tokens, pair, "YY")).values()) == {10}
    assert _said(gpt2_tokens, pair, "XX1") == _said(gpt2_tokens, pair, "END")


def test_two_hop_answers_are_capitals_and_the_pair_is_of_two_states(pocket: LanguageModel) -> None:
    task = load_task("two-hop", pocket, 150)
    for example in task.examples:
        city = example.clean[slice(*example.roles["city"])]
        assert city in HELD_OUT_CITIES
        assert example.answers == (f" {STATE_OF[city].capital}",)
        assert example.facts["state"] == STATE_OF[city].name != example.facts["corrupt_state"]
        assert example.facts["state"] not in re.sub(city, "", example.clean)
        (other,) = (name for name in HELD_OUT_CITIES if example.clean.replace(city, name) == example.corrupt)
        assert example.wrong == (f" {STATE_OF[other].capital}",)


def test_two_hop_on_gpt2_leaves_out_capitals_that_split(gpt2_tokens: LanguageModel) -> None:
    task = load_task("two-hop", gpt2_tokens, 200)
    assert {"Baton Rouge", "Salt Lake City", "Juneau"} <= set(task.refused)
    assert sum(len(pair) for pair in task.tokens(gpt2_tokens)) == 200


def test_induction_repeats_and_its_corruptions_break_the_repeat(pocket: LanguageModel) -> None:
    for corruption in ("words", "query"):
        (pair,) = load_task("induction", pocket, 100, corruption=corruption).tokens(pocket)
        rows = torch.arange(len(pair))
        assert torch.equal(pair.roles["B1"], pair.roles["A1"] + 1)
        assert torch.equal(pair.clean[rows, pair.roles["A1"]], pair.clean[:, -1])
        assert torch.equal(pair.clean[rows, pair.roles["B1"]], pair.answers[:, 0])
        assert len(set(pair.roles["copy"].tolist())) == 6
        for row in rows.tolist():
            clean, corrupt = pair.clean[row, 1:].tolist(), pair.corrupt[row, 1:].tolist()
            answer, wrong = int(pair.answers[row, 0]), int(pair.wrong[row, 0])
            assert wrong in clean
            if corruption == "words":
                assert answer not in corrupt
                assert wrong not in corrupt
            else:
                assert corrupt[:-1] == clean[:-1]
                assert (corrupt[-1], wrong) in pairwise(corrupt[:-1])


def test_agreement_turns_the_subject_and_nothing_else(pocket: LanguageModel) -> None:
    task = load_task("agreement", pocket, 200)
    assert Counter(example.facts["number"] for example in task.examples) == {"singular": 100, "plural": 100}
    for pair in task.tokens(pocket):
        assert (pair.clean != pair.corrupt).nonzero()[:, 1].tolist() == pair.roles["subject"].tolist()
        nouns = zip(_said(pocket, pair, "subject"), _said(pocket, pair, "distractor"), strict=True)
        for i, (subject, distractor) in zip(pair.index.tolist(), nouns, strict=True):
            assert subject.endswith("s") == (task.examples[i].answers[0] in (" are", " were"))
            assert distractor.endswith("s") != subject.endswith("s")


def test_docstring_asks_for_the_third_argument(pocket: LanguageModel) -> None:
    for corruption, changed in (("random", 6), ("definition", 4)):
        (pair,) = load_task("docstring", pocket, 50, corruption=corruption).tokens(pocket)
        assert (pair.clean != pair.corrupt).sum(1).tolist() == [changed] * 50
        assert torch.equal(pair.clean[torch.arange(50), pair.roles["C_def"]], pair.answers[:, 0])
        assert _said(pocket, pair, "A_def") == _said(pocket, pair, "A_doc")


def test_pocket_does_what_its_page_says(pocket: LanguageModel) -> None:
    import json

    from circuitsae.pocket import MODEL_DIR

    said = Behaviours(**json.loads((MODEL_DIR / "measurements.json").read_text())["behaviours"])

    def mean(name: str, n: int, measures: tuple[str, ...], **options: Any) -> dict[str, tuple[float, float]]:
        frame = behaviour(pocket, load_task(name, pocket, n, **options), measures=measures)
        return {row["measure"]: (row["clean"], row["clean_se"]) for row in frame.to_dict("records")}

    def agrees(found: tuple[float, float], expected: float) -> bool:
        return abs(found[0] - expected) < 3.5 * found[1]

    ioi = mean("ioi", 150, ("logit_diff", "top1"))
    assert ioi["top1"][0] == pytest.approx(said.ioi_accuracy, abs=0.01)
    assert agrees(ioi["logit_diff"], said.ioi_logit_diff)
    assert agrees(mean("greater-than", 97, ("prob_diff",))["prob_diff"], said.greater_than)
    assert mean("agreement", 100, ("accuracy",))["accuracy"][0] == said.agreement_accuracy
    assert mean("two-hop", 100, ("top1",))["top1"][0] == said.two_hop_held_out_all
    losses = mean("induction", 40, ("first_copy_loss", "second_copy_loss"), length=(24, 24), total=47)
    assert losses["first_copy_loss"][0] == pytest.approx(said.induction_first, rel=0.02)
    assert agrees(losses["second_copy_loss"], said.induction_second)


def test_behaviour_on_corrupt_prompts_and_kl_with_itself(pocket: LanguageModel) -> None:
    flipped = load_task("ioi", pocket, 64, corruption="flip")
    frame = behaviour(pocket, flipped, measures=("logit_diff", "kl"), batch_size=7).set_index("measure")
    assert frame.loc["logit_diff", "corrupt"] < -4
    assert frame.loc["kl", "clean"] == pytest.approx(0, abs=1e-6)
    assert frame.loc["kl", "corrupt"] > 1
    assert frame["n"].tolist() == [64, 64]


def test_prompts_carry_roles_into_interventions(pocket: LanguageModel) -> None:
    from circuitsae.interventions import Library, Prompt

    (pair, *_) = load_task("ioi", pocket, 40).tokens(pocket)
    prompt = pair.prompts()[0]
    assert isinstance(prompt, Prompt)
    repl = circuitsae.ReplacementModel(pocket, circuitsae.load_dictionaries("pocket"))
    assert Library(repl)[prompt].positions(("IO", "END")) == [int(pair.roles["IO"][0]), pair.clean.shape[1] - 1]
    assert torch.equal(torch.as_tensor(pair.prompts(corrupt=True)[1].prompt), pair.corrupt[1])


def test_what_splits_is_refused_with_the_list(pocket: LanguageModel) -> None:
    with pytest.raises(InputError, match="2 of the 7 names given are not one token each in pocket: Wolfgang, X"):
        load_task("ioi", pocket, names=[*NAMES[:5], "Wolfgang", "Xanthippe"])
    with pytest.raises(InputError, match="at least 5 names"):
        load_task("ioi", pocket, names=["Mary", "John"])
    good = Example(clean="Mary saw", corrupt="John saw", answers=(" Mary",))
    long = replace(good, clean="Xanthippe saw")
    split = replace(good, answers=(" Wolfgang",))
    task = Task("mine", (good, long, split))
    with pytest.raises(PromptError, match=r"2 of the 3 examples of 'mine'.*'Xanthippe saw' has .*' Wolfgang' after"):
        task.tokens(pocket)
    fitted = task.fitting(pocket)
    assert fitted.examples == (good,)
    assert [reason.split(" after")[0][:14] for reason in fitted.refused] == ["'Xanthippe saw", "' Wolfgang'"]
    with pytest.raises(PromptError, match="1 of the 1"):
        Task("mine", (split,)).fitting(pocket)


def test_a_model_without_tokenizer_and_a_short_context_say_so(pocket: LanguageModel) -> None:
    with pytest.raises(PromptError, match="has no tokenizer"):
        load_task("ioi", random_model("gpt2"))
    long = Example(clean="red " * 600, corrupt="blue " * 600, answers=(" red",))
    with pytest.raises(PromptError, match="at most 512"):
        Task("long", (long,)).tokens(pocket)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("iou", {}, r"no task 'iou'; did you mean 'ioi'\?"),
        ("addition", {}, r"no task 'addition'; the tasks are: ioi"),
        ("ioi", {"corrupton": "abc"}, r"no option 'corrupton'; its options are: corruption, templates"),
        ("ioi", {"corruption": "xyz"}, r"ioi has no corruption 'xyz'; choose one of: abc, flip"),
        ("ioi", {"templates": ["{A} gave {S} to"]}, r"does not have the slot \{B\} exactly once"),
        ("ioi", {"n": 0}, r"n of at least 1"),
        ("ioi", {"corrupt": "corrupted_hard"}, r"names a field of a file"),
        ("induction", {"corruption": "xyz"}, r"induction has no corruption 'xyz'"),
        ("induction", {"length": (8, 20)}, r"Sequences of 8 to 20 words do not fit prompts of 16"),
        ("two-hop", {"cities": ["Paris"]}, r"No state is known for Paris"),
        ("two-hop", {"templates": ["The capital is"]}, r"slot \{city\}"),
        ("greater-than", {"templates": ["The {span} of {start}"]}, r"at its end, \{century\}"),
        ("greater-than", {"centuries": [7]}, r"at least 1 years"),
        ("docstring", {"corruption": "xyz"}, r"choose one of: random, definition"),
    ],
)
def test_bad_requests_get_one_sentence(name: str, options: dict[str, Any], message: str, pocket: LanguageModel) -> None:
    with pytest.raises(InputError, match=message):
        load_task(name, pocket, **options)


def test_take_and_split_keep_rows_together(pocket: LanguageModel) -> None:
    task = load_task("induction", pocket, 10)
    (pair,) = task.tokens(pocket)
    parts = pair.split(4)
    assert [len(part) for part in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([part.clean for part in parts]), pair.clean)
    some = pair.take([7, 2])
    assert some.index.tolist() == [7, 2]
    assert some.templates == (pair.templates[7], pair.templates[2])
    assert torch.equal(some.roles["B1"], pair.roles["B1"][[7, 2]])
    assert task.take([7, 2]).examples == (task.examples[7], task.examples[2])
