"""Do two tasks' circuits come apart? Each taken out on each task."""

import numpy as np

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import Chart, Estimate, Finding, Rule, untested
from circuitsae.audit.internal.other_tasks import other_names, others
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import FOUND, Cut, Subject

RULE = Rule(confirms=0.25, refutes=0.05)
"""A quarter of a behaviour is a difference that a reader sees; within a twentieth the circuits do the same."""


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """min(A on a, B on b) − max(A on b, B on a), with what is lost of f once A or B is out of the model.

    b is the first other task that the model can do, B its circuit: the best units by score, as many as A has. Nodes
    are taken out at every position.
    """
    found = others(subject, other_names(subject), settings.few, 1, tell)
    if not found.judges:
        return untested(
            "dissociation",
            "The model does no other task above chance, so there is no second circuit.",
            "A model that does another of the built-in tasks would let it be tested.",
        )
    ((name, other),) = found.judges.items()
    tell(f"the circuit of {name}")
    second = subject.on_task(name).rediscovered(settings.few, FOUND)
    if not second:
        return untested(
            "dissociation",
            f"The {len(subject.units)} best units of {name} lie on no path to the logits.",
            "A circuit of more units would let it be tested.",
        )
    cuts = [Cut(subject.anywhere(units), all_but=True) for units in (subject.units, second)]
    tell(f"each circuit out on {subject.task or 'its own prompts'} and on {name}")
    judges = (subject.judging(settings.held_out), other)
    metric = [judge.metric(cuts) for judge in judges]
    lost = np.array([1 - judge.of(values) for judge, values in zip(judges, metric, strict=True)])
    drawn = np.array([1 - judge.drawn(values, seed=settings.seed + i)
                      for i, (judge, values) in enumerate(zip(judges, metric, strict=True))])  # fmt: skip
    apart = Estimate.of(float(_apart(lost)), _apart(drawn))
    tasks, shared = (subject.task or "own", name), len(subject.units & second) / len(subject.units | second)
    rows = [
        {"circuit": circuit, "task": task, "lost": one.value, "low": one.low, "high": one.high}
        for j, circuit in enumerate(tasks) for i, task in enumerate(tasks)
        for one in [Estimate.of(float(lost[i, j]), drawn[i, j])]
    ]  # fmt: skip
    return CRITERION.finding(
        apart,
        f"Its own circuit out costs {tasks[0]} {lost[0, 0]:.2f} of f and {name} {lost[1, 0]:.2f}; that of {name} "
        f"costs {name} {lost[1, 1]:.2f} and {tasks[0]} {lost[0, 1]:.2f}. They share {shared:.0%} of their units.",
        "Without units that both circuits hold, or with another task than the one compared, they would come apart more."
        if shared
        else "Circuits that hold more of their own task's behaviour would come apart more.",
        runs=sum(judge.runs for judge in judges) + found.runs,
        table=rows,
        chart=Chart(
            [f"{row['circuit']} out" for row in rows], [row["lost"] for row in rows], [row["low"] for row in rows],
            [row["high"] for row in rows], [f"on {row['task']}" for row in rows], y_title="f lost",
        ),
    )  # fmt: skip


def _apart(lost: np.ndarray) -> np.ndarray:
    """Of what is lost [task, circuit, …]."""
    return np.asarray(np.minimum(lost[0, 0], lost[1, 1]) - np.maximum(lost[0, 1], lost[1, 0]))


CRITERION = Criterion(
    key="dissociation",
    family="internal",
    question="Do this circuit and another task's each harm their own task most?",
    figure="least of the own effects minus largest of the crossed ones, in f",
    rule=RULE,
    measure=measure,
    runs=lambda subject, settings: 4 * settings.held_out + 5 * settings.few,
)
