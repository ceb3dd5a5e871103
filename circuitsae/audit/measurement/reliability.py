"""Would other prompts have led to this circuit? Circuits of its size found anew, compared with it and each other.

EAP-IG's circuits vary with the prompts drawn (Méloux et al. 2025, arXiv 2510.00845).
"""

from itertools import combinations

import numpy as np

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import RESAMPLES, Chart, Estimate, Finding, Rule
from circuitsae.audit.measurement.figures import by_chance, jaccard, scored
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import Cut, Subject, Unit

FRESH = 21
"""The first of the draws of prompts that nothing else uses."""


def draws(settings: Settings) -> int:
    """Fresh draws of prompts; the other circuits are found on resamples of these."""
    return max(2, settings.resamples // 4)


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """The mean Jaccard index of the circuit and those found anew, with its interval over these."""
    n, fresh = scored(subject, settings), draws(settings)
    found: dict[str, frozenset[Unit]] = {}
    for draw in range(fresh):
        tell(f"scoring {n} other prompts, {draw + 1} of {fresh}")
        scores, rng = subject.scores(n, FRESH + draw), np.random.default_rng([settings.seed, draw])
        count = len(next(iter(scores.values())))
        found[f"draw {draw + 1}"] = subject.selected(scores)
        for again in range(1, settings.resamples // fresh):
            among = rng.integers(0, count, count).tolist()
            found[f"draw {draw + 1}, resample {again}"] = subject.selected(scores, among)
    circuits = list(found.values())
    own = np.array([jaccard(subject.units, circuit) for circuit in circuits])
    each_other = float(np.mean([jaccard(a, b) for a, b in combinations(circuits, 2)]))
    judge = subject.judging(settings.few)
    tell(f"judging {len(circuits)} circuits found anew")
    f = judge.estimates([Cut(circuit) for circuit in circuits], seed=settings.seed)
    rng = np.random.default_rng(settings.seed)
    drawn = own[rng.integers(0, len(own), (RESAMPLES, len(own)))].mean(1)
    estimate, chance = Estimate.of(float(own.mean()), drawn), by_chance(len(subject.units), subject.candidates)
    rows = [{"circuit": name, "units": len(circuit), "jaccard": float(same), "f": one.value, "f_low": one.low,
             "f_high": one.high} for (name, circuit), same, one in zip(found.items(), own, f, strict=True)]  # fmt: skip
    return CRITERION.finding(
        estimate,
        f"Circuits of this size found anew on {n} other prompts share {estimate} of their units with it (Jaccard; by "
        f"chance {chance:.2f}) and {each_other:.2f} with each other; their f is {min(e.value for e in f):.2f} to "
        f"{max(e.value for e in f):.2f}.",
        "Units chosen on more prompts would agree more, and so would a circuit without those that come and go.",
        judged=judge,
        runs=subject.scoring * n * fresh,
        table=rows,
        chart=Chart(list(found), own.tolist(), y_title="Jaccard index with the circuit",
                    lines={"by chance": chance, "each other": each_other, "confirms": _RULE.confirms}),
    )  # fmt: skip


_RULE = Rule(confirms=0.8, refutes=0.5)
"""0.8 is the bar of `reproduce`; below a half, most of what either circuit names is not in the other."""
CRITERION = Criterion(
    key="reliability",
    family="measurement",
    question="Would other prompts have led to the same circuit?",
    figure="Jaccard index with circuits found anew",
    rule=_RULE,
    measure=measure,
    runs=lambda subject, settings: (
        (2 + settings.resamples) * settings.few + subject.scoring * scored(subject, settings) * draws(settings)
    ),
)
