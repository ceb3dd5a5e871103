"""Is it the circuit of the behaviour, or of one way to word it? f within each template, and in other words."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import RESAMPLES, Chart, Estimate, Finding, Rule, untested
from circuitsae.audit.measurement.figures import closeness
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import HELD, Subject
from circuitsae.validation.statistics import LEVEL

LEAST = 4
"""Prompts of a template below which it is left out."""
OTHER = "other templates"
MORE = (41, 42, 43)
"""Draws of prompts beside the usual one."""


@dataclass(frozen=True)
class Group:
    """Some of the prompts: f on them, and resamples of it."""

    name: str
    prompts: int
    f: float
    drawn: np.ndarray
    behaviour: float
    """How much ablating everything changes the metric here, as a share of what it does over all prompts."""

    def estimate(self, groups: int) -> Estimate:
        """1 − |1 − f| with an interval that holds for all of so many groups at once (Bonferroni)."""
        out = (1 - LEVEL) / 2 / groups
        low, high = np.quantile(closeness(self.drawn), [out, 1 - out])
        return Estimate(float(closeness(self.f)), float(low), float(high))


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """1 − |1 − f| where it is lowest: in one of the task's templates, or over templates that it lacks by default.

    Of a template T, f = 1 − (m_T(M) − m_T(C)) / (m(M) − m(∅)): what the circuit misses there, in units of what there is
    over all of the task's prompts, so that f overall is the mean of these. The interval holds for all templates at
    once, since the lowest is sought.
    """
    values, names, runs = _judged(subject, settings, draws(subject), tell)
    span = float(values[1].mean() - values[0].mean())
    counts = Counter(names)
    groups = [
        _group(values[:, [own == name for own in names]], name, span, settings.seed)
        for name, count in counts.items()
        if count >= LEAST
    ]
    left_out, other = len(counts) - len(groups), subject.paraphrased()
    if other is not None:
        worded, _, more = _judged(other, settings, [HELD], tell)
        groups.append(_group(worded, OTHER, span, settings.seed))
        runs += more
    if len(groups) < 2:
        return untested(
            CRITERION.key,
            f"{len(groups)} of the task's templates, and of those that it lacks, have {LEAST} prompts or more; two are "
            "needed to compare.",
            "Prompts of at least two templates, or more prompts.",
        )
    found = {group.name: group.estimate(len(groups)) for group in groups}
    worst = min(groups, key=lambda group: found[group.name].value)
    rows = [
        {"template": g.name, "prompts": g.prompts, "f": g.f, "low": found[g.name].low, "high": found[g.name].high,
         "behaviour": g.behaviour}
        for g in groups
    ]  # fmt: skip
    aside = f" ({left_out} with fewer than {LEAST} prompts left out)" if left_out else ""
    return CRITERION.finding(
        found[worst.name],
        f"Over {len(groups)} templates{aside} f is {min(g.f for g in groups):.2f} to {max(g.f for g in groups):.2f}; "
        f"farthest from 1 in {worst.name!r}, {worst.f:.2f}, where 1 − |1 − f| is {found[worst.name]}."
        + "".join(f" In templates that the task lacks it is {g.f:.2f}." for g in groups if g.name == OTHER),
        f"Units that {worst.name!r} takes and the others do not, or a claim that leaves it out; more prompts of each "
        "template would narrow the intervals.",
        runs=runs,
        table=rows[:200],
        chart=_chart(groups, found),
    )


def draws(subject: Subject) -> list[int]:
    """Draws of prompts, taken one after the other: many prompts of each template are more than memory may hold."""
    return [HELD, *MORE] if subject.kind == "heads" else [HELD]


def _judged(
    subject: Subject, settings: Settings, some: Sequence[int], tell: Tell
) -> tuple[Float[np.ndarray, "3 example"], list[str], int]:
    """m(∅), m(M) and m(C) of every prompt, its template, and how many were run."""
    values, names, runs = [], [], 0
    for number, draw in enumerate(some, 1):
        judge = subject.judging(settings.held_out, draw=draw)
        tell(f"{len(judge.prompts)} prompts by template, {number} of {len(some)}")
        values.append(np.concatenate([judge.ends, judge.metric([subject.kept])]))
        names += [shown.template for shown in judge.prompts]
        runs += judge.runs
    return np.concatenate(values, axis=1), names, runs


def _group(values: Float[np.ndarray, "3 example"], name: str, span: float, seed: int) -> Group:
    """f on prompts with these m(∅), m(M) and m(C), with resamples of them."""
    empty, full, own = values
    gap, count = (full - own) / span, len(own)
    f = 1 - gap[np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))].mean(1)
    return Group(name, count, float(1 - gap.mean()), f, float((full - empty).mean() / span))


def _chart(groups: Sequence[Group], found: Mapping[str, Estimate]) -> Chart:
    shown = [found[group.name] for group in groups]
    return Chart(
        [group.name for group in groups], [one.value for one in shown], [one.low for one in shown],
        [one.high for one in shown], y_title="1 − |1 − f|", lines={"the model": 1.0},
    )  # fmt: skip


CRITERION = Criterion(
    key="invariance",
    family="measurement",
    question="Is the circuit as faithful in every wording?",
    figure="1 − |1 − f| in the template where it is lowest",
    # 0.8 is what a faithful circuit is held to overall; below a half, most of the behaviour there is something else's.
    rule=Rule(confirms=0.8, refutes=0.5),
    measure=measure,
    runs=lambda subject, settings: 3 * (len(draws(subject)) + 1) * settings.held_out,
)
