"""Is it this task's circuit? What taking it out changes on other tasks and on plain text, against its own task."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import RESAMPLES, Chart, Estimate, Finding, Rule, untested
from circuitsae.audit.internal.members import listed, strongest
from circuitsae.audit.internal.other_tasks import Others, other_names, others
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import TEXT, Cut, Judging, Subject

TASKS = 5
PARTS = 8
"""The strongest ones, each taken out of the task that suffers most: which of them other tasks need."""
LEAST = 0.1
"""Of f; where less is lost on its own task there is no effect whose share elsewhere could be told."""
RULE = Rule(confirms=0.2, refutes=0.5)
"""A fifth of its own effect is beside the point; what harms others half as much is no one task's."""


@dataclass(frozen=True)
class _Lost:
    """What is lost of f on one task, and the same of resamples of its prompts."""

    estimate: Estimate
    drawn: np.ndarray

    @classmethod
    def of(cls, judge: Judging, cut: Cut, seed: int) -> "_Lost":
        metric = judge.metric([cut])
        drawn = 1 - judge.drawn(metric, seed=seed)[0]
        return cls(Estimate.of(1 - float(judge.of(metric)[0]), drawn), drawn)


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """Mean over other tasks t of |1 − f_t(M∖C)|, over 1 − f(M∖C) on its own.

    f_t goes from everything ablated to the model on that task's prompts, on plain text with m = log p of the next
    token. Nodes at roles are taken out at every position, as other texts have no such roles. The interval is over
    prompts and over tasks, so few tasks make it wide.
    """
    found = others(subject, [TEXT, *other_names(subject)], settings.few, TASKS + 1, tell)
    if not found.judges:
        return untested(
            "specificity",
            f"The model does no other task above chance: {_reasons(found)}",
            "A model with a tokenizer that does other tasks, or a task's circuit in one, would let it be tested.",
        )
    tell(f"the circuit out on its own task and on {', '.join(found.judges)}")
    own, out = subject.judging(settings.held_out), Cut(subject.anywhere(subject.units), all_but=True)
    home = _Lost.of(own, out, settings.seed)
    away = {name: _Lost.of(judge, out, settings.seed) for name, judge in found.judges.items()}
    worst = max(away, key=lambda name: abs(away[name].estimate.value))
    parts = _parts(subject, found.judges[worst], settings.few)
    told = home.estimate.low >= LEAST
    share = _share(home, away, settings.seed) if told else Estimate(np.nan, np.nan, np.nan)
    harm = sorted(parts, key=lambda name: -abs(parts[name]))[:3]
    said = f"Out, the circuit takes {home.estimate} of f from its own task and {away[worst].estimate} from {worst}"
    return CRITERION.finding(
        share,
        f"{said}, the worst of {len(away)} others ({', '.join(away)}), in the mean {share} of its own."
        if told
        else f"{said}; on its own task it does too little to tell whether it is specific.",
        f"{worst} needs {listed([f'{name} ({parts[name]:.2f})' for name in harm])} by themselves; a circuit without "
        "the units that others need as well would be more specific."
        if told
        else f"A circuit that takes at least {LEAST:g} from its own task would let it be told.",
        runs=own.runs + sum(judge.runs for judge in found.judges.values()) + found.runs,
        table=_rows(subject.task or "own", home, away, found, {worst: parts}),
        chart=_chart({subject.task or "own": home, **away}),
    )


def _share(home: _Lost, away: Mapping[str, _Lost], seed: int) -> Estimate:
    drawn = np.abs(np.array([lost.drawn for lost in away.values()]))
    tasks = np.random.default_rng(seed).integers(0, len(away), (len(away), RESAMPLES))
    value = float(np.mean([abs(lost.estimate.value) for lost in away.values()])) / home.estimate.value
    return Estimate.of(value, np.take_along_axis(drawn, tasks, 0).mean(0) / home.drawn)


def _parts(subject: Subject, judge: Judging, n: int) -> dict[str, float]:
    """What is lost of f on a task without each of the strongest parts."""
    names = strongest(subject, n)[:PARTS]
    f = judge.f([Cut(subject.anywhere(subject.parts[name]), all_but=True) for name in names])
    return dict(zip(names, (1 - f).tolist(), strict=True))


def _rows(
    own: str, home: _Lost, away: Mapping[str, _Lost], found: Others, parts: Mapping[str, Mapping[str, float]]
) -> list[dict]:
    each = {own: home.estimate, **{name: lost.estimate for name, lost in away.items()}}
    rows: list[dict] = [
        {"task": name, "out": "circuit", "lost": one.value, "low": one.low, "high": one.high, "why not": ""}
        for name, one in each.items()
    ]
    rows += [{"task": task, "out": name, "lost": value, "low": None, "high": None, "why not": ""}
             for task, lost in parts.items() for name, value in lost.items()]  # fmt: skip
    return rows + [
        {"task": name, "out": "", "lost": None, "low": None, "high": None, "why not": why[:200]}
        for name, why in found.left_out.items()
    ]


def _chart(lost: Mapping[str, _Lost]) -> Chart:
    each = [one.estimate for one in lost.values()]
    return Chart(
        list(lost), [one.value for one in each], [one.low for one in each], [one.high for one in each],
        y_title="f lost without the circuit", lines={"none": 0.0},
    )  # fmt: skip


def _reasons(found: Others) -> str:
    return "; ".join(f"{name}: {why}" for name, why in list(found.left_out.items())[:2])


def _runs(subject: Subject, settings: Settings) -> int:
    return 3 * settings.held_out + settings.few * (3 * (TASKS + 2) + min(PARTS, len(subject.parts)))


CRITERION = Criterion(
    key="specificity",
    family="internal",
    question="Does taking the circuit out leave other behaviour alone?",
    figure="mean change on other tasks as a share of that on its own",
    rule=RULE,
    measure=measure,
    runs=_runs,
)
