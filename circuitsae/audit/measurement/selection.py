"""How much of f comes from having been chosen? f where the circuit was found against f on prompts it never saw."""

import numpy as np
from scipy import stats

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import Chart, Estimate, Finding, Rule
from circuitsae.audit.measurement.figures import closeness
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import FOUND, Cut, Subject
from circuitsae.validation.statistics import corrected

MOST = 60
"""Members that are tried: those with most units."""
Q = 0.05
"""The share of false discoveries among members called significant (Benjamini & Hochberg 1995)."""


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """c(C) on the prompts that circuits are found on less c(C) on held-out ones, c = 1 − |1 − f|, with the interval.

    Of each member, the change of the metric when its units leave the circuit, on held-out prompts: a t test over
    prompts, corrected for the number of members.
    """
    both = [subject.judging(settings.held_out, draw=FOUND), subject.judging(settings.held_out)]
    tell(f"{len(both[0].prompts)} prompts that circuits are found on, {len(both[1].prompts)} held out")
    metric = [judge.metric([subject.kept]) for judge in both]
    f = [float(judge.of(own)[0]) for judge, own in zip(both, metric, strict=True)]
    drawn = [closeness(judge.drawn(own, seed=settings.seed + i)[0])
             for i, (judge, own) in enumerate(zip(both, metric, strict=True))]  # fmt: skip
    found, held = closeness(f)
    optimism = Estimate.of(float(found - held), drawn[0] - drawn[1])
    rows, runs = _members(subject, settings, tell)
    sure = sum(row["q"] <= Q for row in rows)
    shown = sorted(rows, key=lambda row: -abs(row["effect"]))
    return CRITERION.finding(
        optimism,
        f"Chosen among {subject.candidates} candidates, the circuit has f {f[0]:.2f} on prompts that circuits are "
        f"found on and {f[1]:.2f} on held-out ones: {optimism} nearer to 1 for having been chosen. On held-out prompts "
        f"taking out {sure} of {len(rows)} members changes the metric beyond chance (q ≤ {Q:g}).",
        "More prompts to choose units on lessen the optimism; members that are not significant may leave the circuit.",
        runs=runs + sum(judge.runs for judge in both),
        table=shown,
        chart=Chart([row["member"] for row in shown], [row["effect"] for row in shown], [row["low"] for row in shown],
                    [row["high"] for row in shown], y_title="change of f without it", lines={"none": 0.0}),
    )  # fmt: skip


def _members(subject: Subject, settings: Settings, tell: Tell) -> tuple[list[dict], int]:
    """A row per member: its effect as a change of f, with its 95 % interval, p and q."""
    parts = sorted(subject.parts.items(), key=lambda part: -len(part[1]))[:MOST]
    judge = subject.judging(settings.few)
    tell(f"taking out {len(parts)} members")
    whole, *without = judge.metric([subject.kept, *(Cut(subject.units - units) for _, units in parts)])
    scale = float(judge.ends[1].mean() - judge.ends[0].mean())
    rows = []
    for (name, units), row in zip(parts, without, strict=True):
        change = (row - whole) / scale
        # Changes without any spread are certain, whichever they are.
        if len(change) < 2 or np.ptp(change) <= 1e-9:
            low = high = p = float(change.mean())
            p = float(abs(p) <= 1e-9)
        else:
            test = stats.ttest_1samp(change, 0)
            low, high = test.confidence_interval()
            p = test.pvalue  # pyright: ignore[reportAttributeAccessIssue]
        rows.append({"member": name, "units": len(units), "effect": float(change.mean()), "low": float(low),
                     "high": float(high), "p": float(p)})  # fmt: skip
    q = corrected(np.array([row["p"] for row in rows]))
    return [{**row, "q": float(value)} for row, value in zip(rows, q, strict=True)], judge.runs


CRITERION = Criterion(
    key="selection",
    family="measurement",
    question="How much of f is owed to having been chosen on these prompts?",
    figure="1 − |1 − f| where it was found, less that on held-out prompts",
    # 0.05: what is read off a plot as no difference. 0.2: a circuit of .9 that is in truth one of .7.
    rule=Rule(confirms=0.05, refutes=0.2),
    measure=measure,
    runs=lambda subject, settings: 6 * settings.held_out + (3 + min(MOST, len(subject.parts))) * settings.few,
)
