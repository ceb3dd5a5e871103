"""Did what was predicted come true? The claim file's predictions, each put to its test."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from circuitsae.audit.claim import Prediction
from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.external.by_role import Members, members
from circuitsae.audit.finding import RESAMPLES, Chart, Estimate, Finding, Rule, untested
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import Cut, Judging, Subject, Unit
from transcoders.errors import InputError


class Tested(NamedTuple):
    """A prediction, what it is about, and the change of f in the prompts and in resamples of them."""

    prediction: Prediction
    about: Sequence[str]
    change: float
    drawn: Float[np.ndarray, "resample"]

    @property
    def held(self) -> Float[np.ndarray, "resample"]:
        """In which resamples it came true."""
        least, most = self.prediction.expect.range()
        return ((self.drawn >= least) & (self.drawn <= most)).astype(float)

    @property
    def came_true(self) -> bool:
        least, most = self.prediction.expect.range()
        return least <= self.change <= most

    @property
    def verdict(self) -> str:
        """held, failed, or undecided: the interval reaches over the bound."""
        low, high = (found := Estimate.of(self.change, self.drawn)).low, found.high
        least, most = self.prediction.expect.range()
        if low >= least and high <= most:
            return "held"
        return "failed" if high < least or low > most else "undecided"


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """The share of the predictions that came true, its interval over resamples of the prompts of all of them.

    The change is f − 1 of the model with the units ablated or scaled, or of the units alone. One about nobody, such as
    a role that no head has, has not come true.
    """
    predictions = () if subject.claim is None else subject.claim.predictions
    if not predictions:
        return untested("prediction", "Nothing was predicted.", "List predictions in the claim file, and audit then.")
    tell("who has the roles")
    roles = members(subject, settings.few)
    judges: dict[str, Judging] = {}
    tested: list[Tested] = []
    for prediction in predictions:
        tell(str(prediction))
        task = prediction.on or subject.task
        try:
            if task not in judges:
                own = task == subject.task
                judges[task] = subject.judging(settings.few) if own else subject.judging_task(task, settings.few)
            tested.append(_tested(subject, prediction, roles, judges[task], settings))
        except InputError as error:
            return untested("prediction", f"It cannot be tested that {prediction}: {error}", "Predict something else.")
    rows = [_row(each) for each in tested]
    value = sum(each.came_true for each in tested) / len(tested)
    found = Estimate.of(value, np.mean([each.held for each in tested], 0))
    broken = [str(each.prediction) for each in tested if not each.came_true]
    return CRITERION.finding(
        found,
        f"{len(tested) - len(broken)} of {len(tested)} predictions came true"
        + (f"; not so: {'; '.join(broken)}." if broken else "."),
        "Predictions that fail refute what they were drawn from; more of them, stated before, would test more of it.",
        runs=sum(judge.runs for judge in judges.values()),
        table=rows,
        chart=Chart(
            [str(each.prediction) for each in tested], [row["change"] for row in rows], [row["low"] for row in rows],
            [row["high"] for row in rows], [row["verdict"] for row in rows], y_title="change of f",
            lines={"no change": 0.0},
        ),
    )  # fmt: skip


def _tested(subject: Subject, prediction: Prediction, roles: Members, judge: Judging, settings: Settings) -> Tested:
    names = roles[prediction.role] if prediction.role else prediction.units
    anyone = not (prediction.role or prediction.units)
    units: frozenset[Unit] = subject.units if anyone else frozenset().union(*(subject.named(name) for name in names))
    if not units:
        return Tested(prediction, (), np.nan, np.full(RESAMPLES, np.nan))
    metric = judge.metric([_cut(prediction, units)])
    drawn = judge.drawn(metric, seed=settings.seed)[0] - 1
    return Tested(prediction, names or ("the circuit",), float(judge.of(metric)[0]) - 1, drawn)


def _cut(prediction: Prediction, units: frozenset[Unit]) -> Cut:
    match prediction.change:
        case "ablate":
            return Cut(units, all_but=True)
        case "scale":
            return Cut(units, all_but=True, left=prediction.dose)
        case "keep":
            return Cut(units)


def _row(tested: Tested) -> dict[str, Any]:
    found = Estimate.of(tested.change, tested.drawn)
    verdict = tested.verdict if tested.about else "failed: nobody has the role"
    return {"prediction": str(tested.prediction), "units": ", ".join(tested.about), "change": found.value,
            "low": found.low, "high": found.high, "verdict": verdict}  # fmt: skip


def _runs(subject: Subject, settings: Settings) -> int:
    predictions = () if subject.claim is None else subject.claim.predictions
    tasks = {prediction.on or subject.task for prediction in predictions}
    return settings.few * (len(predictions) + 2 * len(tasks))


CRITERION = Criterion(
    key="prediction",
    family="external",
    question="Did what was predicted come true?",
    figure="share of the predictions that came true",
    rule=Rule(confirms=0.8, refutes=0.5),  # four of five; no more than a coin's half
    measure=measure,
    runs=_runs,
)
