"""Do the scores by which units were chosen foretell what ablating each of them does?"""

import numpy as np

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import Chart, Estimate, Finding, Rule, untested
from circuitsae.audit.measurement.figures import scored
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import FOUND, WHOLE, Cut, Subject, unit_name
from circuitsae.validation.statistics import RESAMPLES, agreement

EACH = 30
"""Units of largest score, and as many of the others."""


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """The rank correlation of score and effect, m(M∖{u}) − m(M), over the strongest units and as many random ones.

    Scores are of the prompts that circuits are found on, effects of held-out ones, with the ablation that the scores
    are about; the interval is a bootstrap over units.
    """
    n = scored(subject, settings)
    tell(f"scoring {n} prompts")
    choice, sign = subject.foretold
    score = {unit: sign * float(values.mean()) for unit, values in subject.scores(n, FOUND).items()}
    ranked = sorted(score, key=lambda unit: -abs(score[unit]))
    rng = np.random.default_rng(settings.seed)
    rest = ranked[EACH:]
    units = ranked[:EACH] + [rest[i] for i in rng.choice(len(rest), min(EACH, len(rest)), replace=False)]
    if len(units) < 3:
        return untested(CRITERION.key, f"There are {len(units)} units to compare; a rank correlation takes 3.",
                        "A model with more units.")  # fmt: skip
    judge = subject.judging(settings.few, choice=choice)
    tell(f"ablating {len(units)} units, one at a time")
    whole, *without = judge.metric([WHOLE, *(Cut(frozenset([unit]), all_but=True) for unit in units)])
    effect = np.array([(row - whole).mean() for row in without])
    told = np.array([score[unit] for unit in units])
    found = agreement(told, effect, bootstrap=RESAMPLES, seed=settings.seed)
    estimate = Estimate(found.spearman, *found.intervals["spearman"])
    slope = Estimate(found.slope, *found.intervals["slope"])
    rows = [{"unit": unit_name(unit), "in_circuit": unit in subject.units, "score": float(t), "effect": float(e)}
            for unit, t, e in zip(units, told, effect, strict=True)]  # fmt: skip
    return CRITERION.finding(
        estimate,
        f"Scores and effects of {len(units)} units go together in rank by {estimate}; an effect is {slope} times what "
        f"the score foretells, and {100 * found.within:.0f} % are within a factor of two.",
        "Scores measured instead of estimated, or by a method that follows saturated softmaxes and norms, would "
        "foretell the effects better.",
        judged=judge,
        runs=subject.scoring * n,
        table=rows,
        chart=Chart(told.tolist(), effect.tolist(), x_title="score: what ablating the unit is to change",
                    y_title="effect of ablating it",
                    series=["in the circuit" if row["in_circuit"] else "not in it" for row in rows]),
    )  # fmt: skip


CRITERION = Criterion(
    key="calibration",
    family="measurement",
    question="Do scores foretell the effects of ablating units?",
    figure="rank correlation of score and effect",
    # 0.8: the order of units is the effects' but for neighbours. Below 0.4 a score explains less than a sixth of ranks.
    rule=Rule(confirms=0.8, refutes=0.4),
    measure=measure,
    runs=lambda subject, settings: (1 + 2 * EACH) * settings.few + subject.scoring * scored(subject, settings),
)
