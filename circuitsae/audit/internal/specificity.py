"""Is it this task's circuit? What taking it out changes on other tasks and on plain text, against its own task."""

import numpy as np

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import RESAMPLES, Chart, Estimate, Finding, Rule, untested
from circuitsae.audit.internal.other_tasks import Others, other_names, others
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import TEXT, Cut, Subject

TASKS = 5
LEAST = 0.1
"""Of f; where less is lost on its own task there is no effect whose share elsewhere could be told."""
RULE = Rule(confirms=0.2, refutes=0.5)
"""A fifth of its own effect is beside the point; what harms others half as much is no one task's."""


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
    out = Cut(subject.anywhere(subject.units), all_but=True)
    own = subject.judging(settings.held_out)
    tell(f"the circuit out on its own task and on {', '.join(found.judges)}")
    judges = {subject.task or "own": own, **found.judges}
    metric = {name: judge.metric([out]) for name, judge in judges.items()}
    lost = {name: 1 - judge.drawn(metric[name], seed=settings.seed)[0] for name, judge in judges.items()}
    each = {name: Estimate.of(1 - float(judge.of(metric[name])[0]), lost[name]) for name, judge in judges.items()}
    first, *names = judges
    home = each[first]
    share = Estimate(np.nan, np.nan, np.nan)
    if home.low >= LEAST:
        drawn = np.abs(np.array([lost[name] for name in names]))
        tasks = np.random.default_rng(settings.seed).integers(0, len(names), (len(names), RESAMPLES))
        value = float(np.mean([abs(each[name].value) for name in names])) / home.value
        share = Estimate.of(value, np.take_along_axis(drawn, tasks, 0).mean(0) / lost[first])
    rows = [{"task": name, "lost": one.value, "low": one.low, "high": one.high, "own": name == first, "why not": ""}
            for name, one in each.items()]  # fmt: skip
    rows += [{"task": name, "lost": None, "low": None, "high": None, "own": False, "why not": why[:200]}
             for name, why in found.left_out.items()]  # fmt: skip
    worst = max(names, key=lambda name: abs(each[name].value))
    said = f"Out, the circuit takes {home} of f from its own task and {each[worst]} from {worst}, the worst of others"
    return CRITERION.finding(
        share,
        f"{said}; over {len(names)} others ({', '.join(names)}) the mean is {share} of that."
        if home.low >= LEAST
        else f"{said}; on its own it does too little to tell whether it is specific.",
        f"A circuit without the units that {worst} needs as well would be more specific."
        if home.low >= LEAST
        else f"A circuit that takes at least {LEAST:g} from its own task would let it be told.",
        runs=sum(judge.runs for judge in judges.values()) + found.runs,
        table=rows,
        chart=Chart(
            list(judges), [one.value for one in each.values()], [one.low for one in each.values()],
            [one.high for one in each.values()], y_title="f lost without the circuit", lines={"none": 0.0},
        ),
    )  # fmt: skip


def _reasons(found: Others) -> str:
    return "; ".join(f"{name}: {why}" for name, why in list(found.left_out.items())[:2])


CRITERION = Criterion(
    key="specificity",
    family="internal",
    question="Does taking the circuit out leave other behaviour alone?",
    figure="mean change on other tasks as a share of that on its own",
    rule=RULE,
    measure=measure,
    runs=lambda subject, settings: 3 * settings.held_out + 3 * settings.few * (TASKS + 2),
)
