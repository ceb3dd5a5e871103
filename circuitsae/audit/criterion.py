"""What a criterion is: a question, bars that are stated beforehand, and how it is measured."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from circuitsae.audit.finding import Chart, Estimate, Finding, Rule
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import Judging, Subject

Family = Literal["claim", "measurement", "internal", "external"]
FAMILIES: tuple[Family, ...] = ("claim", "measurement", "internal", "external")
"""In the order in which they build on each other."""
Tell = Callable[[str], object]


Measure = Callable[[Subject, Settings, Tell], Finding]
"""Puts a subject to one criterion's test."""


@dataclass(frozen=True)
class Criterion:
    """One question about a circuit."""

    key: str
    """One word or two, by which it is asked for."""
    family: Family
    question: str
    figure: str
    """What the estimate is, in a few words: "f on held-out prompts"."""
    rule: Rule | None
    """Its bars; None where the status follows otherwise, as its question says."""
    measure: Measure
    runs: Callable[[Subject, Settings], int]
    """How many prompts it will run, about: what its cost is proportional to."""

    def finding(
        self,
        estimate: Estimate,
        said: str,
        change: str,
        *,
        judged: Judging | None = None,
        runs: int = 0,
        table: list[dict] | None = None,
        chart: Chart | None = None,
    ) -> Finding:
        """A finding whose status follows from the rule."""
        assert self.rule is not None
        return Finding(
            criterion=self.key,
            status=self.rule.status(estimate),
            said=said,
            change=change,
            estimate=estimate,
            table=table or (),
            chart=chart,
            runs=runs + (judged.runs if judged else 0),
        )
