"""Is it the circuit of the behaviour, or of one way to word it? f within each template, and in other words."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import RESAMPLES, Chart, Estimate, Finding, Rule, untested
from circuitsae.audit.measurement.figures import closeness
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import Judging, Subject
from circuitsae.validation.statistics import LEVEL

LEAST = 4
"""Prompts of a template below which it is left out."""
OTHER = "other templates"


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
    judge = subject.judging(_prompts(subject, settings))
    tell(f"{len(judge.prompts)} prompts by template")
    metric, names = judge.metric([subject.kept])[0], [shown.template for shown in judge.prompts]
    span = float(judge.ends[1].mean() - judge.ends[0].mean())
    counts = Counter(names)
    groups = [
        _group(judge, metric, name, [i for i, own in enumerate(names) if own == name], span, settings.seed)
        for name, count in counts.items()
        if count >= LEAST
    ]
    left_out, other, runs = len(counts) - len(groups), subject.paraphrased(), judge.runs
    if other is not None:
        tell(OTHER)
        worded = other.judging(settings.held_out)
        own = worded.metric([subject.kept])[0]
        groups.append(_group(worded, own, OTHER, range(len(worded.prompts)), span, settings.seed))
        runs += worded.runs
    if len(groups) < 2:
        return untested(
            CRITERION.key,
            f"There is {len(groups)} wording with {LEAST} prompts or more, other templates included; two are needed to "
            "compare.",
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


def _prompts(subject: Subject, settings: Settings) -> int:
    return 4 * settings.held_out if subject.kind == "heads" else settings.held_out


def _group(judge: Judging, metric: np.ndarray, name: str, rows: Sequence[int], span: float, seed: int) -> Group:
    """f on the prompts at `rows`, with resamples of these."""
    at = list(rows)
    gap = (judge.ends[1] - metric)[at] / span
    f = 1 - gap[np.random.default_rng(seed).integers(0, len(at), (RESAMPLES, len(at)))].mean(1)
    behaviour = float((judge.ends[1] - judge.ends[0])[at].mean() / span)
    return Group(name, len(at), float(1 - gap.mean()), f, behaviour)


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
    runs=lambda subject, settings: 3 * _prompts(subject, settings) + 3 * settings.held_out,
)
