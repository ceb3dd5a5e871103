"""Which other tasks a circuit's model can do: those on which there is a behaviour that a circuit could harm."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from circuitsae.audit.criterion import Tell
from circuitsae.audit.internal.members import SURE, p_values
from circuitsae.audit.subject import Judging, Subject
from circuitsae.tasks.load import task_names
from transcoders.errors import InputError

RIGHT = 0.75
"""Of the prompts, the share on which m(M) > m(∅), at least; by chance it is a half."""


class Others(NamedTuple):
    """Tasks that the model can do, with prompts of each, and why others are left out."""

    judges: dict[str, Judging]
    left_out: dict[str, str]
    runs: int
    """Prompts run of tasks that are left out."""


def others(subject: Subject, names: Sequence[str], n: int, count: int, tell: Tell) -> Others:
    """The first `count` of the tasks named on which the model is above chance."""
    judges: dict[str, Judging] = {}
    left_out: dict[str, str] = {}
    runs = 0
    for name in names:
        if len(judges) == count:
            break
        tell(f"what the model does on {name}")
        try:
            judge = subject.judging_task(name, n)
            above = _above_chance(judge)
        except InputError as error:
            left_out[name] = str(error)
            continue
        if above:
            judges[name] = judge
        else:
            left_out[name] = "the model is not above chance"
            runs += judge.runs
    return Others(judges, left_out, runs)


def other_names(subject: Subject) -> list[str]:
    """The built-in tasks but the circuit's own."""
    return [name for name in task_names() if name != subject.task.replace("_", "-")]


def _above_chance(judge: Judging) -> bool:
    """m(M) exceeds m(∅) on most prompts and, in the mean, beyond noise."""
    change = judge.ends[1] - judge.ends[0]
    above = change.mean() > 0 and np.mean(change > 0) >= RIGHT
    return bool(above and p_values(judge, change[None])[0] <= SURE)
