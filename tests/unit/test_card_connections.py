"""Inputs and outputs on feature cards are the largest of `Connections`, in files, on pages, and of the pocket model."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import circuitsae as cs
from circuitsae.features import CollectConfig, Connections, FeatureCards, collect
from circuitsae.features.card_files import check_cards
from circuitsae.graph.checking import MalformedError
from circuitsae.pocket import load_cards
from circuitsae.pocket.corpus import CONTEXT, UNSEEN
from circuitsae.report.browser import write_browser
from circuitsae.report.cards import card_data
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import DictionaryError, InputError
from transcoders.random_models import random_model

LAYERS, WIDTH, FEATURES = 3, 16, 12
SIZES: Any = {"n_layers": LAYERS, "d_model": WIDTH, "dtype": torch.float64}
ROWS = torch.randint(24, (20, 8), generator=torch.Generator().manual_seed(0))
SETTINGS = CollectConfig(tokens=140, context=8, top=2, per_stratum=1, before=2, after=1, connections=4)


def make(kind: Any) -> Any:
    dictionaries: Any = random_dictionaries(kind, **SIZES, features=FEATURES)
    with torch.no_grad():
        (dictionaries.b_enc[1] if kind == "clt" else dictionaries[1].b_enc)[7] = -1e3  # never fires
    return random_model("gpt2", d_vocab=24, **SIZES), dictionaries


@pytest.fixture(scope="module", params=["clt", "plt"])
def case(request):
    """Cards, and the connections over the same rows."""
    model, dictionaries = make(request.param)
    cards = collect(model, dictionaries, ROWS, SETTINGS)
    return cards, Connections.collect(cs.ReplacementModel(model, dictionaries), ROWS, tokens=140)


@pytest.fixture
def cards(case) -> Any:
    return case[0]


def test_a_card_has_the_largest_of_all_connections(case):
    cards, found = case
    shown = 0
    for place in cards:
        card = cards.card(*place)
        if card.dead:
            assert card.inputs == card.outputs == ()
            continue
        for rows, frame in ((card.inputs, found.inputs(place)), (card.outputs, found.outputs(place))):
            frame = frame[frame["twera"] != 0]
            frame = frame.iloc[np.argsort(-frame["twera"].abs(), kind="stable")].head(SETTINGS.connections)
            assert [f"{row['layer']}.{row['feature']}" for row in rows] == frame["feature"].tolist()
            for column in ("twera", "weight"):
                assert [row[column] for row in rows] == pytest.approx(frame[column].tolist(), rel=1e-3, abs=1e-6)
            shown += len(rows)
    assert cards.card(1, 7).dead
    assert shown > 150


def test_all_at_once_are_those_of_each(case):
    _, found = case
    arrays = found.strongest(50)
    assert arrays["input_index"].shape == (LAYERS * FEATURES, 50)
    for number in np.flatnonzero(found.over.count):
        place = divmod(int(number), FEATURES)
        for side, frame in (("input", found.top_inputs(place, 50)), ("output", found.top_outputs(place, 50))):
            index, twera, weight = (arrays[f"{side}_{part}"][number] for part in ("index", "twera", "weight"))
            assert (index[len(frame) :] == -1).all()
            assert [f"{i // FEATURES}.{i % FEATURES}" for i in index[: len(frame)]] == frame["feature"].tolist()
            assert np.abs(twera[: len(frame)] - frame["twera"].to_numpy()).max(initial=0) < 1e-12
            assert np.abs(weight[: len(frame)] - frame["weight"].to_numpy()).max(initial=0) < 1e-12


def test_files_keep_them_and_cards_without_are_read(cards, tmp_path):
    loaded = FeatureCards.load(cards.save(tmp_path / "with"))
    assert [loaded.card(*place) for place in cards] == [cards.card(*place) for place in cards]
    assert loaded.manifest["tokens_connected"] == 140
    bare = without(cards)
    read: Any = FeatureCards.load(bare.save(tmp_path / "without"))
    assert not any(read.card(*place).inputs or read.card(*place).outputs for place in cards)


def without(cards: Any) -> Any:
    return replace(cards, arrays={k: v for k, v in cards.arrays.items() if not k.startswith(("input_", "output_"))})


def test_cards_that_are_there_can_be_given_them(case):
    cards, found = case
    given = without(cards).with_connections(found, SETTINGS.connections)
    assert given.arrays.keys() == cards.arrays.keys()
    assert all((array == cards.arrays[name]).all() for name, array in given.arrays.items())
    with pytest.raises(DictionaryError, match="cards were collected with dictionaries other, these are"):
        replace(cards, manifest={**cards.manifest, "dictionary": "other"}).with_connections(found)
    some = Connections.collect(found.model, ROWS, [(1, 0)], tokens=140)
    with pytest.raises(InputError, match="The pairs of 1 features were counted; those of all 36 are needed"):
        cards.with_connections(some)
    with pytest.raises(InputError, match="Give 1 connection or more to show; got 0"):
        found.strongest(0)


def test_pages_show_them(cards, tmp_path):
    place = next(place for place in cards if cards.card(*place).inputs and cards.card(*place).outputs)
    data = card_data(cards.card(*place).as_dict())
    for name in ("inputs", "outputs"):
        rows = getattr(cards.card(*place), name)
        assert [(row["layer"], row["feature"]) for row in data[name]] == [(r["layer"], r["feature"]) for r in rows]
        assert [row["twera"] for row in data[name]] == pytest.approx([row["twera"] for row in rows], rel=1e-3)
        assert data[name]
    write_browser(cards, tmp_path)
    assert '"inputs"' in (tmp_path / "cards" / f"{place[0]}-0.html").read_text()
    assert "inputs" not in card_data(without(cards).card(*place).as_dict())


def test_autoencoders_and_many_features_go_without(monkeypatch):
    model, sae = random_model("gpt2", d_vocab=24, **SIZES), random_dictionaries("sae", **SIZES, features=FEATURES)
    assert "input_index" not in collect(model, sae, ROWS, SETTINGS).arrays
    model, clt = make("clt")
    assert "input_index" not in collect(model, clt, ROWS, replace(SETTINGS, connections=0)).arrays
    monkeypatch.setattr("circuitsae.features.collection.run.CONNECTED_UP_TO", LAYERS * FEATURES - 1)
    assert "input_index" not in collect(model, clt, ROWS, SETTINGS).arrays


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            "input_index",
            lambda a: a.astype(np.int64) + FEATURES,
            "input_index names features that are in no layer below",
        ),
        ("input_index", lambda a: np.full_like(a, -2), "input_index names features that are in no layer below"),
        ("output_index", lambda a: np.full_like(a, 0), "output_index names features that are in no layer above"),
        ("output_index", lambda a: a + 100, "output_index names features that are in no layer above"),
        ("output_index", lambda a: a.astype(float), "output_index holds float64; expected whole numbers"),
        ("input_twera", lambda a: a * np.nan, "'input_twera' holds something that is no number"),
        ("output_weight", lambda a: a + np.inf, "'output_weight' holds something that is no number"),
        ("input_weight", lambda a: a[:, 1:], "input_weight has shape (36, 3), but the features that it is of (36, 4)"),
        ("input_index", lambda a: a[1:], "input_index has shape (35, 4); expected 36 rows"),
        ("output_twera", lambda a: a[0], "output_twera has shape (4,); expected 36 rows"),
        ("output_index", lambda a: None, "there is no output_index, but other arrays"),
    ],
)
def test_values_that_cannot_be_are_refused(cards, name, change, said):
    changed = change(cards.arrays[name])
    arrays = {k: v for k, v in {**cards.arrays, name: changed}.items() if v is not None}
    check_cards(cards.manifest, cards.arrays)
    with pytest.raises(MalformedError) as refused:
        check_cards(cards.manifest, arrays)
    assert said in str(refused.value)


@pytest.mark.parametrize("name", ["pocket", "pocket-plt"])
def test_the_pocket_models_cards_have_what_its_corpus_says(name):
    cards, place = load_cards(name), (2, 372)
    model = cs.ReplacementModel(cs.load_model("pocket"), cs.load_dictionaries(name))
    found = Connections.collect(model, UNSEEN, [place], tokens=20_000, context=CONTEXT)
    card = cards.card(*place)
    assert card is not None
    for rows, frame in ((card.inputs, found.top_inputs(place, 5)), (card.outputs, found.top_outputs(place, 5))):
        assert [f"{row['layer']}.{row['feature']}" for row in rows] == frame["feature"].tolist()
        assert [row["twera"] for row in rows] == pytest.approx(frame["twera"].tolist(), rel=1e-3)
