"""Does the behaviour follow the dose? The circuit scaled between ablated and whole, in the model as it is."""

import numpy as np
from jaxtyping import Float
from scipy import stats

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import Chart, Estimate, Finding, Rule
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import Cut, Subject

DOSES = (0.0, 0.25, 0.5, 0.75, 1.0)
BEYOND = 1.5
"""Shown, and not judged: more than the model itself ever writes."""
FLAT = 0.01
"""A prompt whose metric moves by less than this share of m(M) − m(∅) does not respond: its correlation counts as 0."""
BENT = 0.2
"""Up to this share of its range from a straight line, a response is called near-linear."""


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """Mean over prompts of the rank correlation between dose and metric, the sign being that of m(M) − m(∅)."""
    judge = subject.judging(settings.few)
    doses = (*DOSES, BEYOND)
    reach = {"units": subject.units} | ({"whole components": subject.whole} if subject.whole != subject.units else {})
    tell(f"{len(doses)} doses of {' and of '.join(reach)} on {len(judge.prompts)} prompts")
    metric = judge.metric([Cut(units, True, dose) for units in reach.values() for dose in doses])
    metric = metric.reshape(len(reach), len(doses), -1)
    span = float(np.diff(judge.ends.mean(1))[0])
    found = [Estimate.mean(follows(each[: len(DOSES)], span), settings.seed) for each in metric]
    f = judge.of(metric)
    drawn = [judge.drawn(each, seed=settings.seed) for each in metric]
    level = [[Estimate.of(float(f[i, j]), drawn[i][j]) for j in range(len(doses))] for i in range(len(reach))]
    rows = [
        {"scaled": name, "dose": dose, "f": at.value, "low": at.low, "high": at.high}
        for name, levels in zip(reach, level, strict=True)
        for dose, at in zip(doses, levels, strict=True)
    ]
    bend = bent(f[0, : len(DOSES)])
    shape = "near-linearly" if bend <= BENT else "not in proportion"
    wide = f"; of whole components the correlation is {found[1]}" if len(found) > 1 else ""
    return CRITERION.finding(
        found[0],
        f"Scaled from ablated to whole in the model, the circuit takes f from {f[0, 0]:.2f} to {f[0, 4]:.2f}, {shape} "
        f"(up to {bend:.2f} of that off a line), and to {f[0, 5]:.2f} at dose {BEYOND:g}; dose and metric correlate by "
        f"rank at {found[0]} over {len(judge.prompts)} prompts{wide}.",
        "Units whose ablation the rest of the model makes up for flatten the response; prompts that respond in every "
        "step would raise the correlation.",
        judged=judge,
        table=rows,
        chart=Chart(
            [row["dose"] for row in rows], [row["f"] for row in rows], [row["low"] for row in rows],
            [row["high"] for row in rows], [row["scaled"] for row in rows], "dose", "f", {"the model": 1.0},
        ),
    )  # fmt: skip


def follows(metric: Float[np.ndarray, "dose example"], span: float) -> Float[np.ndarray, "example"]:
    """Spearman's ρ of dose and metric on each prompt, in the direction of `span`; 0 where the metric hardly moves."""
    ranks = stats.rankdata(np.sign(span) * metric, axis=0)
    dose = np.arange(len(metric))[:, None] - (len(metric) - 1) / 2
    centred = ranks - ranks.mean(0)
    size = np.sqrt((centred**2).sum(0) * (dose**2).sum())
    rho = np.divide((centred * dose).sum(0), size, out=np.zeros(metric.shape[1]), where=size > 0)
    return np.where(np.ptp(metric, axis=0) < FLAT * abs(span), 0.0, rho)


def bent(f: Float[np.ndarray, "dose"]) -> float:
    """The largest distance from the straight line between the ends, as a share of their difference."""
    line = f[0] + np.array(DOSES) * (f[-1] - f[0])
    return float(np.abs(f - line).max() / max(abs(f[-1] - f[0]), 1e-12))


CRITERION = Criterion(
    key="doses",
    family="external",
    question="Does the behaviour follow the dose of the circuit?",
    figure="rank correlation of dose and metric",
    rule=Rule(confirms=0.9, refutes=0.5),  # of five doses, one pair of neighbours exchanged is 0.9; of two, 0.8
    measure=measure,
    runs=lambda subject, settings: 14 * settings.few,
)
