"""The circuit of heads by roles, measured and drawn (Wang et al. 2022, figure 2)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from circuitsae.components import Judge, RoleCircuit, problems_of, role_circuit
from circuitsae.report.circuit_of_heads import Look
from circuitsae.reproduce.result import Reproduction
from circuitsae.tasks import Task
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

PROMPTS = 24
"""At most so many, for every pair of roles is a run of them."""


def picture_stage(
    report: Reproduction, model: LanguageModel, task: Task, found: Sequence[Mapping[Any, Any]] | None
) -> None:
    """The circuit by roles as a section of the report, and as its picture."""
    made = circuit_of_roles(model, task, found or ())
    if made is not None:
        report.picture = made.picture()
        report.section("The circuit by roles", " ".join(report.picture.sentences), made.drawn,
                       report.picture.to_figure())  # fmt: skip


def circuit_of_roles(model: LanguageModel, task: Task, found: Sequence[Mapping[Any, Any]]) -> RoleCircuit | None:
    """The circuit of the heads (and MLPs) that were found in a role: a mapping each, as `head_roles` has them.

    A component of several roles is in the box of the last of them, which asks for most.
    None where nothing was found, or the metric does not tell clean from corrupt prompts.
    """
    few = task.take(slice(PROMPTS))
    if not found or not few.examples:
        return None
    classes, rows = _boxes(found)
    try:
        judge = Judge(problems_of(model, few))
    except InputError:
        return None
    at = _places(model, few)
    own = {role: row for role, row in rows.items() if isinstance(row.get("from"), str)}
    return role_circuit(
        judge,
        classes,
        positions={role: str(row["from"]) for role, row in own.items()},
        places={name: at[name] for name in at if any(name in _ends(row, at) for row in own.values())},
        looks=[Look(role, _ends(row, at)[1], _mean(found, classes[role], row)) for role, row in own.items()],
        measure=few.metric.replace("_", " "),
    )


def _boxes(found: Sequence[Mapping[Any, Any]]) -> tuple[dict[str, list[str]], dict[str, Mapping[Any, Any]]]:
    """Components by what they do, and of each role a row that says where it looks."""
    last = {str(row["head"]): row for row in found}
    classes: dict[str, list[str]] = {}
    rows: dict[str, Mapping[Any, Any]] = {}
    for head, row in last.items():
        classes.setdefault(str(row["role"]), []).append(head)
        rows.setdefault(str(row["role"]), row)
    return classes, rows


def _ends(row: Mapping[Any, Any], places: Mapping[str, str]) -> tuple[str, str]:
    """Query and key of a role; of a key at a distance from a position, such as B1+5, the position."""
    key = str(row["to"])
    return str(row["from"]), key if key in places else re.sub(r"[+-]\d+$", "", key)


def _mean(found: Sequence[Mapping[Any, Any]], heads: Sequence[str], like: Mapping[Any, Any]) -> float:
    """The mean attention of a box's heads from its position to the place that it looks at."""
    values = [float(row["attention"]) for row in found if row["head"] in heads and row["role"] == like["role"]]
    return sum(values) / len(values)


@torch.no_grad()
def _places(model: LanguageModel, task: Task) -> dict[str, str]:
    """The task's positions in the order in which they stand in its first prompts, each with the token there."""
    pair = next(iter(task.tokens(model)))
    at = {name: int(rows[0]) for name, rows in pair.roles.items() if int(rows[0]) >= 0}
    words = model.token_strings(pair.clean[0])
    return {name: words[at[name]] for name in sorted(at, key=lambda name: (at[name], name))}
