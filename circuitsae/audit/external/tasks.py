"""Does the circuit do the other tasks that it is claimed to do? Kept alone on their prompts."""

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import Chart, Estimate, Finding, Rule, untested
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import Judging, Subject
from transcoders.errors import InputError

OTHERS = ("ioi", "greater-than", "induction")
"""Shown beside, as tasks that it is not claimed to do."""


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """f of the circuit alone on each task that is claimed, the least of them being judged."""
    claimed = () if subject.claim is None else subject.claim.extends_to
    if not claimed:
        return untested(
            "tasks", "No other task is claimed to be done by this circuit.",
            "Name some under extends_to in the claim file.",
        )  # fmt: skip
    rows, found, judges = [], [], []
    for task in (*claimed, *(other for other in OTHERS if other not in (*claimed, subject.task))):
        tell(f"the circuit alone on {task}")
        try:
            judge = subject.judging_task(task, settings.few)
            judges.append(judge)
            estimate = _worth(judge, subject, settings)
        except InputError as error:
            if task in claimed:
                return untested("tasks", f"{task} cannot be measured: {error}", "Claim tasks that the model does.")
            rows.append({"task": task, "claimed": False, "why not": str(error)})
            continue
        rows.append({"task": task, "claimed": task in claimed, "f": estimate.value, "low": estimate.low,
                     "high": estimate.high})  # fmt: skip
        if task in claimed:
            found.append((task, estimate))
    worst, least = min(found, key=lambda each: each[1].low)
    drawn = [row for row in rows if "f" in row]
    return CRITERION.finding(
        least,
        f"Of {len(found)} other tasks that the circuit is claimed to do, it gives least of {worst}: {least} of what "
        f"the model does on {settings.few} prompts.",
        f"Units that {worst} takes beside these would raise it.",
        runs=sum(judge.runs for judge in judges),
        table=rows,
        chart=Chart(
            [row["task"] for row in drawn], [row["f"] for row in drawn], [row["low"] for row in drawn],
            [row["high"] for row in drawn], ["claimed" if row["claimed"] else "not claimed" for row in drawn],
            y_title="f of the circuit alone", lines={"the model": 1.0},
        ),
    )  # fmt: skip


def _worth(judge: Judging, subject: Subject, settings: Settings) -> Estimate:
    """f of the circuit. Raises `InputError` where the model does no better than with everything ablated."""
    empty, full = judge.ends.mean(1)
    if full <= empty:
        raise InputError(f"the metric is {full:.3g} in the model and {empty:.3g} with everything ablated.")
    return judge.estimates([subject.kept], seed=settings.seed)[0]


def _runs(subject: Subject, settings: Settings) -> int:
    claimed = () if subject.claim is None else subject.claim.extends_to
    tasks = {*claimed, *OTHERS} - {subject.task} if claimed else ()
    return 3 * settings.few * len(tasks)


CRITERION = Criterion(
    key="tasks",
    family="external",
    question="Does it do the other tasks that it is claimed to do?",
    figure="least f of the circuit alone on a task claimed",
    rule=Rule(
        confirms=0.5, refutes=0.2
    ),  # more than half of the task is done by these units; less than a fifth is next to nothing
    measure=measure,
    runs=_runs,
)
