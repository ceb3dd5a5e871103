"""The story of one fact, told of the embedded model's states."""

import pandas as pd
import pytest

import circuitsae as cs
from circuitsae.pocket.facts import STATES
from examples.smollm2 import story
from transcoders.errors import InputError


@pytest.fixture(scope="module")
def model():
    return cs.ReplacementModel(cs.load_model("pocket"), cs.load_dictionaries("pocket-plt"))


def options(**settings):
    return story.Options(model="pocket", dictionaries="pocket-plt", k=20, others=2, **settings)


@pytest.fixture
def states(model, monkeypatch):
    monkeypatch.setattr(story, "CAPITAL_OF", {state.name: state.capital for state in STATES})
    monkeypatch.setattr(story, "FOUND_ON", {"country": ("The state of {} is", "Anyone living in {} is")})
    monkeypatch.setattr(story, "PLACES", (story.Place("the name, layer 0", "country", range(1)),))
    return story.Countries(model, options())


def test_a_state_s_features_in_another_s_place_make_its_capital_the_answer(states):
    frame = story.measure(states)
    assert len(states.known) >= 4
    assert len(frame) == len(states.known) * 2 * 3
    means: pd.DataFrame = story.summary(frame).set_index("what")
    assert means.loc["swapped", "moved"] > means.loc["control", "moved"] + 0.2
    assert means.loc["swapped", "new"] > means.loc["control", "new"]
    text = story.page(frame, states)
    assert f"of {len(states.known)} countries: {', '.join(states.known)}." in text
    assert f"| the name, layer 0 | swapped | {means.loc['swapped', 'before']:.3f} |" in text


def test_a_model_that_knows_no_capital_has_no_story(model):
    with pytest.raises(InputError, match="pocket answers with the capital of 0 countries, and the story needs two"):
        story.Countries(model, options())
