"""Planted features are found with the rule they were planted by, scores are those of a plain count, files keep them."""

import json
import random
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
import torch
from scipy.sparse import csc_matrix

from circuitsae import load_dictionaries, load_model
from circuitsae.cli import main
from circuitsae.features import Evidence, Label, Ledger, Verdict
from circuitsae.features.labels import read_occurrences
from circuitsae.features.labels.label import LabelConfig, fires_at, label_features, label_occurrences, replace_rules
from circuitsae.features.labels.occurrences import Occurrences, Part
from circuitsae.features.labels.rules import Condition, Rule, detection
from circuitsae.features.labels.search import RuleSearch
from circuitsae.features.labels.surroundings import NAME, PIECE, classes_of, surroundings
from circuitsae.features.labels.wording import LENGTH, say
from circuitsae.graph.supernodes import NO_RULE, TOO_RARE
from circuitsae.pocket import DICTIONARY_DIR, MODEL_DIR, load_cards
from circuitsae.pocket.corpus import CONTEXT, SEPARATOR, UNSEEN, text_stream
from examples.pocket import recipe
from transcoders.data import Corpus
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import FileFormatError, InputError
from transcoders.formats import save_dictionaries
from transcoders.loading import random_model

WORDS = "the a store drink gave went saw to in of old red big dog and".split()  # noqa: SIM905
NAMES, NUMBERS = ["John", "Mary", "Tom", "Zoe"], ["7", "12", "18", "1900"]
VOCABULARY = ["<s>", ".", ",", *WORDS, *NAMES, *NUMBERS]
LENGTH_OF_ROW = 40


def text(rows: int, seed: int) -> list[list[str]]:
    """Rows of random sentences; which words come close together is chance."""
    rng = random.Random(seed)
    made = []
    for _ in range(rows):
        row = ["<s>"]
        while len(row) < LENGTH_OF_ROW:
            usual, rarer = rng.choices(WORDS, k=rng.randint(3, 6)), rng.choices(NAMES + NUMBERS + [","], k=2)
            row += [*rng.sample([*usual, *rarer], len(usual) + 2), "."]
        made.append(row[:LENGTH_OF_ROW])
    return made


def part(rows: list[list[str]], fires: list[np.ndarray]) -> Part:
    """A part on which features fire where the masks [row, pos] say."""
    tokens = np.array([[VOCABULARY.index(word) for word in row] for row in rows], np.int32)
    counted = np.ones(tokens.shape, bool)
    counted[:, 0] = False
    dense = np.stack([(mask & counted).ravel() for mask in fires], 1) * np.float32(0.5)
    return Part(tokens, counted, (csc_matrix(dense),))


def masked(rows: list[list[str]], holds: Callable[[list[str], int], Any]) -> np.ndarray:
    return np.array([[bool(holds(row, i)) for i in range(len(row))] for row in rows])


def sentence(row: list[str], i: int) -> list[str]:
    """The words before this one in its sentence."""
    start = max((j + 1 for j in range(i) if row[j] == "."), default=0)
    return row[start:i]


def rule(*conditions: tuple[str, ...], joined: Literal["and", "or"] = "and") -> Rule:
    made = [
        Condition(name.removeprefix("not "), tuple(values), name.startswith("not ")) for name, *values in conditions
    ]
    return Rule(tuple(made), joined)


PLANTED = {
    "token": (lambda row, i: row[i] in ("John", "drink"), rule(("token", "John", "drink"))),
    "previous": (lambda row, i: row[i - 1] in ("and", "of"), rule(("previous", "and", "of"))),
    "two back": (lambda row, i: i > 1 and row[i - 2] == "gave", rule(("two back", "gave"))),
    "three back": (lambda row, i: i > 2 and row[i - 3] == "gave", rule(("three back", "gave"))),
    "next": (lambda row, i: row[i + 1 : i + 2] in (["in"], ["to"]), rule(("next", "in", "to"))),
    "number": (lambda row, i: row[i].isdigit(), rule(("class", "number"))),
    "after a number": (lambda row, i: row[i - 1].isdigit(), rule(("previous class", "number"))),
    "second time": (lambda row, i: row[:i].count(row[i]) == 1, rule(("repeats", "second time"))),
    "pair": (lambda row, i: (row[i - 1], row[i]) in list(pairwise(row[:i])), rule(("repeats", "pair seen before"))),
    "first": (lambda row, i: row[i - 1] == "." or i == 0, rule(("previous", "."))),
    "third": (lambda row, i: len(sentence(row, i)) == 2, rule(("place", "third of a sentence"))),
    "sentence has": (lambda row, i: "Tom" in sentence(row, i), rule(("sentence has", "Tom"))),
    "text has": (lambda row, i: "Tom" in row[:i], rule(("text has", "Tom"))),
    "everywhere but": (lambda row, i: row[i] not in ("the", "."), rule(("not token", ".", "the"))),
    "both": (
        lambda row, i: row[i] in ("Zoe", "7") and row[i - 1] in WORDS[:4],
        rule(("token", "Zoe", "7"), ("previous", *WORDS[:4])),
    ),
    "but not": (
        lambda row, i: row[i] in WORDS[:8] and row[i - 1] not in (".", "John", "7"),
        rule(("token", *WORDS[:8]), ("not previous", ".", "John", "7")),
    ),
    "either": (
        lambda row, i: row[i] == "dog" or row[i - 1] in ("the", "a"),
        rule(("token", "dog"), ("previous", "a", "the"), joined="or"),
    ),
    "a number in a sentence with a name": (
        lambda row, i: row[i].isdigit() and "Mary" in sentence(row, i),
        rule(("class", "number"), ("sentence has", "Mary")),
    ),
    "a number that comes again": (
        lambda row, i: row[i].isdigit() and row[i] in row[:i], rule(("class", "number"), ("repeats", "seen before")),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted() -> Occurrences:
    """All planted features, one that fires by chance, one that is rare and one that is dead."""
    rng = np.random.default_rng(0)
    parts = []
    for rows in (text(90, 1), text(60, 2)):
        masks = [masked(rows, holds) for holds, _ in PLANTED.values()]
        chance, never = rng.random(masks[0].shape) < 0.05, np.zeros(masks[0].shape, bool)
        rare = never.copy()
        rare[:3, 5] = True
        parts.append(part(rows, [*masks, chance, rare, never]))
    return Occurrences(parts[0], parts[1], dict(enumerate(f" {word}" for word in VOCABULARY)), "text")


@pytest.fixture(scope="module")
def labelled(planted) -> Ledger:
    return label_occurrences(planted)


def canonical(found: Rule) -> tuple:
    return found.joined, {(c.attribute, frozenset(c.values), c.negated) for c in found.conditions}


@pytest.mark.parametrize("name", list(PLANTED))
def test_a_planted_feature_is_found_with_its_rule(labelled, name):
    label = labelled.of(f"0.{list(PLANTED).index(name)}")[0]
    measured = label.rows["detection"].measurement
    assert canonical(Rule.from_json(measured["rule"])) == canonical(PLANTED[name][1])
    assert measured["balanced_accuracy"] == 1
    assert label.rows["detection"].verdict is Verdict.SUPPORTED
    assert label.source == "rules"


def test_what_no_rule_tells_is_said_so(labelled):
    chance, rare, dead = (labelled.of(f"0.{len(PLANTED) + i}") for i in range(3))
    assert chance[0].text == NO_RULE
    assert chance[0].rows["detection"].verdict is Verdict.OPEN
    assert chance[0].rows["detection"].measurement.get("balanced_accuracy", 0.5) < 0.6
    assert rare[0].text == TOO_RARE
    assert rare[0].rows["detection"].measurement["fires_on"] == 3
    assert dead == []
    counted = labelled.provenance["layers"][0]
    assert counted == {
        "features": len(PLANTED) + 3, "firing": len(PLANTED) + 2, "too_rare": 1, "labelled": len(PLANTED), "median": 1.0
    }  # fmt: skip


def test_a_score_is_that_of_a_plain_count(planted):
    rng = np.random.default_rng(3)
    fires = rng.random(200) < 0.3
    named = fires ^ (rng.random(200) < 0.2)
    found = detection(named, fires)
    assert found is not None
    hits = sum(n and f for n, f in zip(named, fires, strict=True))
    silent = sum(not n and not f for n, f in zip(named, fires, strict=True))
    expected = (hits / fires.sum() + silent / (200 - fires.sum())) / 2
    assert found.balanced_accuracy == pytest.approx(expected, abs=1e-12)
    assert detection(named, np.ones(200, bool)) is None


def test_no_single_word_does_better_than_the_rule_that_is_found(planted):
    """Against a plain loop over words and places, for a feature that fires at random on some words more than others."""
    rng = np.random.default_rng(5)
    rows = text(60, 7)
    often = {word: rng.random() ** 3 for word in VOCABULARY}
    mask = masked(rows, lambda row, i: rng.random() < often[row[i - 1]])
    held = part(rows, [mask])
    found = surroundings(held, planted.text_of)
    fires = mask[:, 1:].ravel()
    best = RuleSearch(found).best(fires)
    assert best is not None
    score = detection(best.holds(found), fires)
    scores = [
        detection(masked(rows, lambda row, i, w=word, k=k: i >= k and row[i - k] == w)[:, 1:].ravel(), fires)
        for word in VOCABULARY for k in range(4)
    ]  # fmt: skip
    assert score is not None
    assert score.balanced_accuracy > max(s.balanced_accuracy for s in scores if s) + 0.05


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (" John", {"capitalised word"}),
        (" 1765", {"number", "number of four digits"}),
        (" 17", {"number", "number of two digits"}),
        ("ing", {"lower-case word"}),
        (" walks", {"lower-case word", "word in -s"}),
        (" USA", {"word in capitals"}),
        ('?"', {"punctuation mark"}),
        ("\n", {"line break"}),
        (" ", set()),
    ],
)
def test_classes(token, expected):
    assert set(classes_of(token)) == expected


def test_names_and_pieces_are_told_by_their_neighbours():
    texts = dict(enumerate(["<s>", " John", " saw", " Mar", "y", "."]))
    one = Part(np.arange(6, dtype=np.int32)[None], np.ones((1, 6), bool), (csc_matrix((6, 1)),))
    found = surroundings(one, texts)
    names, pieces = (found.having([found.index["class", value]]).tolist() for value in (NAME, PIECE))
    assert names == [False, True, False, True, False, False]
    assert pieces == [False, False, False, False, True, False]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (rule(("token", "John", "Mary"), ("previous", "and")), "“John”, “Mary” after “and”"),
        (rule(("class", "number")), "numbers"),
        (rule(("class", NAME), ("repeats", "second time")), "name-like words for the second time"),
        (rule(("not token", "\n")), "everywhere but “⏎”"),
        (rule(("token", "."), ("not next", "\n")), "“.”, but not before “⏎”"),
        (rule(("place", "first of a sentence"), ("token", "The"), joined="or"), "first of a sentence or “The”"),
        (rule(("token", *(f"word{i}" for i in range(9)))), "“word0”, “word1”, “word2”, “word3” …"),
        (rule(("token", "x" * 500)), f"“{'x' * 15}…”"),
    ],
)
def test_wording(said, expected):
    assert say(said) == expected
    assert len(expected) <= LENGTH
    assert Rule.from_json(json.loads(json.dumps(said.to_json()))) == said


def test_rules_ask_for_what_there_is():
    with pytest.raises(InputError, match="'colour'"):
        Condition("colour", ("red",))


def test_occurrences_are_what_a_dense_pass_finds():
    model = random_model("gpt2", n_layers=2, d_model=16, d_vocab=32, dtype=torch.float64)
    dictionaries = random_dictionaries("clt", n_layers=2, d_model=16, features=24, dtype=torch.float64)
    rows = torch.randint(1, 32, (30, 8), generator=torch.Generator().manual_seed(0))
    found = read_occurrences(model, dictionaries, rows, tokens=1000, held_out=1000)
    assert (len(found.search.tokens), len(found.held_out.tokens)) == (20, 10)
    reads = model.activations(rows[20:], set(dictionaries.reads))
    features = dictionaries.encode(torch.stack([reads[site].flatten(0, 1) for site in dictionaries.reads]))
    dense = torch.zeros(2, 80, 24)
    dense[tuple(features.index.unbind(1))] = features.value.detach().float()
    dense[:, ::8] = 0  # without BOS's place
    for layer in range(2):
        assert np.allclose(found.held_out.fires[layer].toarray(), dense[layer].numpy(), atol=1e-6)
    assert found.held_out.n_counted == 70
    with pytest.raises(InputError, match="One row"):
        read_occurrences(model, dictionaries, rows[:1])


def test_people_keep_their_labels():
    def by_rules(text: str) -> Label:
        row = Evidence("detection", Verdict.SUPPORTED, {"balanced_accuracy": 0.934}, "circuitsae features label")
        return Label(text, ("0.1",), {"detection": row}, "rules")

    old = Ledger([Label("names", ("0.1",)), by_rules("“John”")])
    ledger = replace_rules(old, Ledger([by_rules("“Mary”")]))
    assert [label.text for label in ledger.of("0.1")] == ["names", "“Mary”"]
    assert ledger.display("0.1") == "hypothesis: names"
    assert Ledger([by_rules("“Mary”")]).display("0.1@3") == "“Mary” (.93)"


def test_a_large_ledger_says_once_what_its_labels_share(labelled, tmp_path):
    many = Ledger([*labelled.labels * 2, Label("months", ("0.0",), {}, "someone")], {"model": "text"})
    path = many.save(tmp_path)
    assert Ledger.load(path) == many
    document = json.loads(path.read_text())
    assert path.read_text().count("label_occurrences") <= 4  # rows without a score say their command themselves
    document["tables"]["detection"]["names"].pop()
    path.write_text(json.dumps(document))
    with pytest.raises(FileFormatError, match="its table has"):
        Ledger.load(path)
    del document["tables"]
    path.write_text(json.dumps(document))
    with pytest.raises(FileFormatError, match="no table says"):
        Ledger.load(path)


@pytest.mark.parametrize(
    "name", [name for name in ("clt", "plt", "sae") if (DICTIONARY_DIR / name / "ledger.json").is_file()]
)
def test_labels_of_the_pocket_dictionaries_hold_on_other_text(name):
    """The model is run on text that no label has seen, and every token counted again."""
    ledger = Ledger.load(DICTIONARY_DIR / name)
    fresh = Corpus("fresh", lambda: text_stream("labels"), SEPARATOR)
    found = read_occurrences(
        load_model("pocket"), load_dictionaries(f"pocket-{name}"), fresh, tokens=90, held_out=2000, context=CONTEXT
    )
    words = surroundings(found.held_out, found.text_of)
    often = [
        x for x in ledger.labels if x.rows["detection"].measurement.get("fires_on", 0) > 2000 and x.text != NO_RULE
    ]
    apart = []
    for label in often[:: len(often) // 12]:
        measured = label.rows["detection"].measurement
        layer, feature = map(int, label.features[0].split("."))
        fires = fires_at(found.held_out, words, layer, feature)
        rule = Rule.from_json(measured["rule"])
        assert label.text == say(rule)
        again = detection(rule.holds(words), fires)
        assert again is not None
        apart.append(again.balanced_accuracy - measured["balanced_accuracy"])
    assert np.abs(apart).max() < 0.12
    assert np.abs(apart).mean() < 0.04


def test_the_pocket_dictionaries_come_with_labels_that_load_quickly():
    start = time.process_time()
    ledger = Ledger.load(DICTIONARY_DIR / "clt")
    assert time.process_time() - start < 1  # .1 s on an idle core
    cards = load_cards("pocket").with_labels(ledger)
    for label in ledger.labels[:: len(ledger.labels) // 20]:
        layer, feature = map(int, label.features[0].split("."))
        card: Any = cards.card(layer, feature)
        shown = card.label
        assert shown is not None
        assert shown["display"] == label.display == ledger.display(label.features[0])
        assert shown["status"] == "hypothesis"


def test_labels_from_the_command_line(tmp_path, capsys):
    dictionaries = tmp_path / "clt"
    save_dictionaries(random_dictionaries("clt", n_layers=4, d_model=128, features=6), dictionaries)
    Ledger([Label("names", ("1.2",))]).save(dictionaries)
    arguments = ["pocket", "--dictionaries", str(dictionaries), "--tokens", "0.5k", "--held-out", "0.5k"]
    main(["features", "label", *arguments])
    said = capsys.readouterr().out
    assert str(dictionaries / "ledger.json") in said
    ledger = Ledger.load(dictionaries)
    assert ledger.labels[0] == Label("names", ("1.2",))
    made = [label for label in ledger.labels if label.source == "rules"]
    assert len(made) == sum(layer["firing"] for layer in ledger.provenance["layers"])
    assert (
        made[0].rows["detection"].command
        == f"circuitsae features label {' '.join(arguments[:3])} --tokens 500 --held-out 500"
    )
    # The same from Python.
    model, loaded = load_model("pocket"), load_dictionaries(dictionaries)
    config = LabelConfig(tokens=500, held_out=500, context=CONTEXT)
    again = label_features(model, loaded, UNSEEN, config, command=made[0].rows["detection"].command)
    assert again.labels == made


def test_the_recipe_of_the_pocket_model_labels_its_dictionaries(tmp_path):
    (tmp_path / "model").symlink_to(MODEL_DIR)
    save_dictionaries(
        random_dictionaries("clt", n_layers=4, d_model=128, features=8), tmp_path / "dictionaries" / "clt"
    )
    recipe.label_dictionaries(
        recipe.Run(out=tmp_path, work=tmp_path, config=recipe.quick_config(), quick=True, progress=False)
    )
    ledger = Ledger.load(tmp_path / "dictionaries" / "clt")
    assert {label.source for label in ledger.labels} == {"rules"}
    assert [layer["features"] for layer in ledger.provenance["layers"]] == [8] * 4
