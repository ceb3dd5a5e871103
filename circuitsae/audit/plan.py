"""What an audit will cost, from a trial of a few prompts, before anything long runs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from circuitsae.audit.criteria import CRITERIA
from circuitsae.audit.criterion import Criterion
from circuitsae.audit.run import chosen_criteria
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import Cut, Subject
from transcoders.training.planning import peak_memory

TRIAL, CUTS = 8, 4
"""Prompts of the trial, and ways in which the circuit is cut on each."""


@dataclass(frozen=True)
class Planned:
    """The cost of one criterion."""

    criterion: str
    family: str
    runs: int
    """Prompts to run, about."""
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The cost of each criterion, and of all."""

    criteria: tuple[Planned, ...]
    per_run: float
    """Seconds of a prompt with the circuit cut, in the trial."""
    memory: int
    """Bytes that the process held at most, trial and model included."""

    @property
    def runs(self) -> int:
        return sum(one.runs for one in self.criteria)

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.criteria)


def plan(
    subject: Subject, *, settings: Settings = Settings(), only: Sequence[str] = (),
    criteria: Sequence[Criterion] = CRITERIA,
) -> Plan:  # fmt: skip
    """The cost of an audit with these arguments: the prompts that each criterion runs × the seconds of one in a trial.

    Gradients count as runs of the prompts that they are taken of. Raises `InputError` for a criterion that there is
    not.
    """
    chosen = chosen_criteria(criteria, only)
    judge = subject.judging(TRIAL)
    judge.f([subject.kept])  # what is made once: means, clean and corrupt runs
    cuts = [subject.kept, Cut(subject.kept.units, all_but=True)] * (CUTS // 2)
    start = time.perf_counter()
    judge.metric(cuts)
    per_run = (time.perf_counter() - start) / (len(cuts) * len(judge.prompts))
    rows = []
    for criterion in chosen:
        runs = criterion.runs(subject, settings)
        rows.append(Planned(criterion.key, criterion.family, runs, runs * per_run))
    return Plan(tuple(rows), per_run, peak_memory(subject.model.device))
