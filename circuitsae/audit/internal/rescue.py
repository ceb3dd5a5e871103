"""Does the behaviour come back with the circuit? All of it knocked out, then its parts restored."""

from collections.abc import Mapping

import numpy as np

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import Chart, Estimate, Finding, Rule
from circuitsae.audit.internal.members import strongest
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import Cut, Subject, Unit

STEPS = 8
"""In which parts are restored, the strongest first."""
ALONE = 8
"""Parts that are restored alone."""
RULE = Rule(confirms=0.75, refutes=0.5)
"""A knock-out that leaves 13 %, as necessity may, and a fall of as much on the way still confirm; half refutes."""


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """What restoring brings back less what it takes away again: 1 − f(M∖C) − Σ max(0, −Δf) over growing restorations.

    All restored is the model, f = 1. A circuit that was not needed has nothing to bring back; one whose parts oppose
    each other overshoots on the way. Parts of one path bring nothing back until the last of them is restored.
    """
    tell("parts by their scores")
    order, parts = strongest(subject, settings.few), subject.parts
    judge, few = subject.judging(settings.held_out), subject.judging(settings.few)
    counts = sorted({step * len(order) // STEPS for step in range(STEPS)})
    restored = [_units(parts, order[:count]) for count in counts]
    alone = [_units(parts, [name]) for name in order[:ALONE]]
    tell(f"{len(order)} parts restored in {len(counts)} steps on {len(judge.prompts)} prompts")
    metric = judge.metric([_without(subject, units) for units in restored])
    resampled = judge.drawn(metric, seed=settings.seed)
    curve, draws = np.append(judge.of(metric), 1.0), np.vstack([resampled, np.ones(resampled.shape[1])])
    tell(f"each of {len(alone)} parts restored alone")
    lone = few.estimates([_without(subject, units) for units in alone], seed=settings.seed)
    found = Estimate.of(float(_rescued(curve)), _rescued(draws))
    points = [Estimate.of(float(value), row) for value, row in zip(curve, draws, strict=True)]
    half = int(np.searchsorted([*counts, len(order)], len(order) / 2))
    rows: list[dict] = [
        {"restored": "nothing" if not count else f"{count} strongest parts", "f": point.value, "low": point.low,
         "high": point.high}
        for count, point in zip([*counts, len(order)], points, strict=True)
    ]  # fmt: skip
    rows += [{"restored": f"{name} alone", "f": one.value, "low": one.low, "high": one.high}
             for name, one in zip(order, lone, strict=False)]  # fmt: skip
    falls = float(np.maximum(0, -np.diff(curve)).sum())
    return CRITERION.finding(
        found,
        f"With the whole circuit out f is {points[0]}; with the {[*counts, len(order)][half]} strongest of its "
        f"{len(order)} parts restored {points[half]}, with all of them 1; on the way it falls by {falls:.2f}.",
        "A circuit whose removal leaves less would have more to bring back."
        if found.value + falls < RULE.confirms
        else "Parts that pull the same way would be restored without a fall.",
        judged=judge,
        runs=few.runs,
        table=rows,
        chart=Chart(
            [*counts, len(order)], curve.tolist(), [one.low for one in points], [one.high for one in points],
            x_title="strongest parts restored", y_title="f", lines={"the model": 1.0},
        ),
    )  # fmt: skip


def _rescued(curve: np.ndarray) -> np.ndarray:
    """Of curves [restoration, …]."""
    return np.asarray(curve[-1] - curve[0] - np.maximum(0, -np.diff(curve, axis=0)).sum(0))


def _units(parts: Mapping[str, frozenset[Unit]], names: list[str]) -> frozenset[Unit]:
    return frozenset(unit for name in names for unit in parts[name])


def _without(subject: Subject, restored: frozenset[Unit]) -> Cut:
    return Cut(subject.units - restored, all_but=True)


def _runs(subject: Subject, settings: Settings) -> int:
    n = len(subject.parts)
    return settings.held_out * (2 + min(STEPS, n)) + settings.few * (2 + min(ALONE, n))


CRITERION = Criterion(
    key="rescue",
    family="internal",
    question="Does restoring the circuit bring the behaviour back?",
    figure="f that restoring brings back, less what it takes away again",
    rule=RULE,
    measure=measure,
    runs=_runs,
)
