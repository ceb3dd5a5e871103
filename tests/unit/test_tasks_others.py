"""The other prompts of a task, for a graph: which positions, and which answers, correspond."""

from typing import Any

import pytest
import torch

import circuitsae as cs
from circuitsae.attribution import LogitTargets, attribute
from circuitsae.tasks import load_task, others
from transcoders.errors import InputError

other_prompts: Any = others.other_prompts

PROMPT = "When John and Mary went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def model(pocket):
    return cs.ReplacementModel(pocket, cs.load_dictionaries("pocket"))


@pytest.fixture(scope="module")
def task(model):
    return load_task("ioi", model.model)


@pytest.fixture(scope="module")
def graph(model):
    return attribute(model, PROMPT, targets=LogitTargets([" Mary", " John", " the"])).prune()


def test_positions_play_the_same_part(model, task, graph):
    found = other_prompts(task, model.model, graph, count=30)
    assert len(found.prompts) == 30
    words = model.model.token_strings(torch.tensor(graph.token_ids))
    said = {role: words[pos] for role, pos in found.roles.items()}
    assert (said["IO"], said["S1"], said["S2"], said["END"]) == (" Mary", " John", " John", " to")
    assert sorted(found.roles.values()) == list(range(len(graph.token_ids)))  # every position has a name
    alike = [len(set(other.roles) & set(found.roles)) == len(found.roles) for other in found.prompts]
    assert any(alike)
    assert not all(alike)
    assert alike == sorted(alike, reverse=True)  # those of the same phrasing come first
    for other, same in zip(found.prompts, alike, strict=True):
        strings = model.model.token_strings(model.tokens(other.prompt))
        assert strings[other.roles["S1"]].strip() == strings[other.roles["S2"]].strip()
        assert strings[other.roles["IO"]] != strings[other.roles["S1"]]
        if same:
            fixed = [pos for role, pos in found.roles.items() if "@" in role]
            changed = [pos for pos in fixed if strings[pos] != words[pos]]
            assert len(changed) <= 2  # the place and the object
        assert not same or all(other.roles[role] == pos for role, pos in found.roles.items())


def test_the_answer_there_is_the_name_there(model, task, graph):
    found = other_prompts(task, model.model, graph)
    mary, john, the = (model.model.token_id(text) for text in (" Mary", " John", " the"))
    for other in found.prompts:
        tokens = model.tokens(other.prompt).tolist()
        assert other.answers[mary] == tokens[other.roles["IO"]]
        assert other.answers[john] == tokens[other.roles["S2"]]
        assert the not in other.answers


def test_edges_are_tested_there(model, task, graph):
    found = other_prompts(task, model.model, graph, count=2)
    check = cs.validate(model, graph, edges=10, claims=["graph"], controls=20, **found._asdict())
    assert set(check.prompts["prompt"]) == {0, 1}
    assert any(check.edges["prompts"].tolist())


def test_a_prompt_of_the_task_itself_is_found_and_left_out(model, task):
    example = task.examples[7]
    graph = attribute(model, example.clean, targets=LogitTargets(list(example.answers))).prune()
    found = other_prompts(task, model.model, graph, count=1000)
    assert len(found.prompts) == len(task) - 1
    own = model.tokens(example.clean).tolist()
    assert all(model.tokens(other.prompt).tolist() != own for other in found.prompts)


def test_where_several_tokens_are_right_the_same_ones_correspond(model):
    task = load_task("greater-than", model.model, 20)
    graph = attribute(model, task.examples[0].clean).prune()
    found = other_prompts(task, model.model, graph)
    assert len(found.prompts) == 19
    assert all(mine == there for other in found.prompts for mine, there in other.answers.items())
    assert any(other.answers for other in found.prompts)


def test_a_prompt_of_another_kind_is_refused(model, task):
    graph = attribute(model, "The capital of the state containing Dallas is").prune()
    with pytest.raises(InputError, match="none of the task 'ioi'"):
        other_prompts(task, model.model, graph)
