"""The page of the story, told of the embedded model's states: what it says is what the model does."""

import json
import re

import numpy as np
import pytest
import torch

import circuitsae as cs
from circuitsae.features import Verdict, suppress
from circuitsae.graph import NodeKind
from circuitsae.interventions import run_alternatives
from circuitsae.pocket.facts import STATES
from examples.smollm2 import story, story_page


@pytest.fixture(scope="module")
def told():
    """The story of the first state that the model knows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story, "CAPITAL_OF", {state.name: state.capital for state in STATES})
        patch.setattr(
            story,
            "FOUND_ON",
            {"country": ("The state of {} is", "Anyone living in {} is"), "last": ("The capital of {} is",)},
        )
        patch.setattr(story, "PLACES", story.PLACES[:1])
        model = cs.ReplacementModel(cs.load_model("pocket"), cs.load_dictionaries("pocket-plt"))
        options = story.Options(model="pocket", dictionaries="pocket-plt", k=20)
        countries = story.Countries(model, options)
        groups = {state: countries.features[state, story.PLACES[0]] for state in countries.known}
        yield story_page.Story(countries, story.ASKED, groups), groups


def test_the_first_part_is_the_state_s_features_and_its_removal_is_the_model_s(told):
    made, groups = told
    first = made.parts[0]
    own = {tuple(pair) for pair in groups[made.country].index.tolist()}
    assert {(node.layer, node.index) for node in first.nodes} <= own
    assert {node.pos for node in first.nodes} == {made.places["country"]}
    change = suppress(made.recording, groups[made.country]).intervention()
    (chunk,) = run_alternatives(made.model, [(made.recording, [change])], "model")
    after = chunk.logits[0, -1].softmax(-1)[made.answer.index]
    assert made.removals[first.name].after == pytest.approx(float(after), abs=1e-5)
    assert made.removals[first.name].before == pytest.approx(made.answer.probability)
    assert len(made.removals[first.name].controls) == story_page.CONTROLS


def test_what_is_passed_on_is_the_product_of_both_edges_over_the_activation(told):
    made, _ = told
    nodes, weights = made.graph.nodes, made.graph.weights.toarray()
    sources = made.parts[0].nodes
    passed = story_page.passed_on(made.graph, sources, made.answer)
    answer = nodes.index(made.answer)
    later = [row for row, node in enumerate(nodes) if node.kind is NodeKind.FEATURE and node.layer == 1]
    assert later
    for row in later:
        into = sum(weights[row, nodes.index(source)] for source in sources)
        assert passed[id(nodes[row])] == pytest.approx(into * weights[answer, row] / nodes[row].activation, rel=1e-4)


def test_a_label_names_the_states_in_whose_sentences_its_feature_fires(told):
    made, _ = told
    labels = {label.features[0]: label for label in made.labels().labels if len(label.features) == 1}
    firing = made.firing["country"]
    for node in made.parts[0].nodes:
        named = labels[f"{node.layer}.{node.index}"]
        fires = {made.known[i] for i in np.flatnonzero(firing.rate[:, node.layer, node.index] >= 0.5)}
        if named.text == "most countries":
            assert 2 * len(fires) > len(made.known)
        else:
            assert set(re.split(", | and .*", named.text)) - {""} <= fires
        assert named.rows["top examples"].verdict is Verdict.SUPPORTED


def test_a_label_that_does_not_hold_on_the_question_is_contradicted():
    fires = torch.tensor([True, False, False])
    assert story_page._separate(torch.tensor([1.0, 0.0, 0.0]), fires)
    assert not story_page._separate(torch.tensor([0.0, 0.0, 0.0]), fires)
    assert not story_page._separate(torch.tensor([1.0, 1.0, 1.0]), fires)


def test_the_page_is_small_and_opens_with_the_story(told, tmp_path):
    made, groups = told
    path = story_page.write_story(made.countries, story.ASKED, groups, tmp_path / "story.html")
    assert path.stat().st_size < 1_500_000
    found = re.search(r'id="graph-data">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)
    assert found
    data = json.loads(found[1])
    assert data["opened"]["note"] == made.told()
    assert data["opened"]["groups"][0][0].startswith(f"{made.country}, layer 0 – without: ")
    assert f"tok@{made.places['country']}" in data["opened"]["pinned"]
    assert {f"{node.layer}.{node.index}" for node in made.parts[0].nodes} & data["cards"].keys() <= data[
        "labels"
    ].keys()
    assert len(data["nodes"]["id"]) < 80
