"""A task's other prompts, for a graph of one of its prompts: which positions and which answers correspond."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from circuitsae.graph import AttributionGraph
from circuitsae.tasks.task import Task
from circuitsae.validation.prompts import Answered
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

ALIKE = 0.5
"""Of a prompt's tokens, the least share that an example of its phrasing has too."""


class OtherPrompts(NamedTuple):
    """What `validate` takes to test a graph's edges on a task: `validate(model, graph, **others._asdict())`."""

    prompts: list[Answered]
    roles: dict[str, int]
    """Of the graph's own prompt."""


@dataclass(frozen=True)
class _Row:
    tokens: tuple[int, ...]
    roles: dict[str, int]
    template: str
    answers: tuple[int, ...]
    wrong: tuple[int, ...]

    def shape(self) -> tuple[int, ...]:
        """Which tokens are the same, the answer among them: whose name is said where."""
        row = (*self.tokens, *self.answers[:1])
        return tuple(map(row.index, row))


def other_prompts(task: Task, model: LanguageModel, graph: AttributionGraph, count: int = 20) -> OtherPrompts:
    """At most `count` examples of a task as prompts on which the edges of a graph are tested.

    The graph's prompt is one of the task's examples, or has the phrasing of one: as many tokens, half of them the same,
    and repeats, the likeliest token of the graph as answer, at the same positions. It takes that example's roles; in
    examples of the same phrasing and length every other position corresponds too. These come first. Where both have
    one answer (one wrong answer) these correspond, where there are several the same tokens.

    Raises `InputError` for a graph whose prompt is none of the task's.
    """
    examples = _rows(task, model)
    own = _own(examples, graph, task.name)
    others = [example for example in examples if example.tokens != own.tokens]
    others.sort(key=lambda example: _phrasing(example) != _phrasing(own))
    prompts = [
        Answered(model.check_tokens(torch.tensor(e.tokens)), _every_position(e), e.template, _answers(own, e))
        for e in others[:count]
    ]
    return OtherPrompts(prompts, _every_position(own))


def _rows(task: Task, model: LanguageModel) -> list[_Row]:
    rows = {}
    for pair in task.fitting(model).tokens(model):
        for i, (number, prompt) in enumerate(zip(pair.index.tolist(), pair.prompts(), strict=True)):
            answers, wrong = (tuple(t for t in ids[i].tolist() if t >= 0) for ids in (pair.answers, pair.wrong))
            rows[number] = _Row(tuple(pair.clean[i].tolist()), dict(prompt.roles), prompt.template, answers, wrong)
    return [rows[number] for number in sorted(rows)]


def _own(examples: Sequence[_Row], graph: AttributionGraph, name: str) -> _Row:
    """The graph's prompt as an example."""
    tokens = tuple(graph.token_ids)
    for example in examples:
        if example.tokens == tokens:
            return example
    top = graph.top_logits()[0]
    answer = top.terms[0].token if top.terms else -1 if top.explained else top.index
    shape = _Row(tokens, {}, "", (answer,), ()).shape()
    same = {
        sum(a == b for a, b in zip(example.tokens, tokens, strict=True)): example
        for example in reversed(examples)
        if len(example.tokens) == len(tokens) and example.shape() == shape
    }
    if not same or max(same) < ALIKE * len(tokens):
        raise InputError(
            f"The graph's prompt is none of the task {name!r}: no example has its length, its phrasing and its "
            "repeats; trace one of the task's prompts, or give prompts and roles yourself."
        )
    example = same[max(same)]
    wrong = tuple(tokens[example.tokens.index(token)] for token in example.wrong if token in example.tokens)
    return _Row(tokens, example.roles, example.template, (answer,), wrong)


def _phrasing(row: _Row) -> tuple[str, int]:
    return row.template, len(row.tokens)


def _every_position(row: _Row) -> dict[str, int]:
    """The roles, and names for all other positions that only prompts of the same phrasing and length share."""
    named = {pos: role for role, pos in row.roles.items()}
    template, length = _phrasing(row)
    rest = {f"{template} ({length})@{pos}": pos for pos in range(length) if pos not in named}
    return {role: pos for pos, role in named.items()} | rest


def _answers(own: _Row, other: _Row) -> dict[int, int]:
    """The token of the other prompt for each of the graph's."""
    found = {}
    for mine, theirs in ((own.wrong, other.wrong), (own.answers, other.answers)):
        if len(mine) == len(theirs) == 1:
            found[mine[0]] = theirs[0]
        else:
            found |= {token: token for token in mine if token in theirs}
    return found
