"""On how many prompts is it so? Every prompt that the templates give, and the worst of them, not the mean alone."""

import numpy as np
from scipy import stats

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import Chart, Estimate, Finding, Rule
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import Subject

WORST = 0.01
"""The share of the prompts that is shown, worst first."""
LEAST, MOST = 5, 50
"""At least and at most so many are shown."""
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """The share of prompts on which the circuit's metric is nearer to the model's than to that of nothing kept.

    For a logit difference, of which a resampled prompt has the opposite, that is where it gives the same answer.
    Each prompt's f is 1 + (m(C) − m(M)) / (mean m(M) − mean m(∅)): their mean is f(C). Wilson's interval.
    """
    judge = subject.judging(settings.many)
    count = len(judge.prompts)
    tell(f"the circuit alone on {count} prompts")
    circuit, (empty, full) = judge.metric([subject.kept])[0], judge.ends
    same = np.abs(circuit - full) < np.abs(circuit - empty)
    f = 1 + (circuit - full) / (full.mean() - empty.mean())
    shown = min(count, MOST, max(LEAST, round(WORST * count)))
    order = np.argsort(-np.abs(1 - f), kind="stable")[:shown]
    rows = [
        {"prompt": judge.prompts[i].text, "template": judge.prompts[i].template, "f": float(f[i]),
         "circuit": float(circuit[i]), "model": float(full[i]), "nothing kept": float(empty[i])}
        for i in order.tolist()
    ]  # fmt: skip
    counted = stats.binomtest(int(same.sum()), count)
    low, high = counted.proportion_ci(method="wilson")
    found = Estimate(float(same.mean()), float(low), float(high))
    first = np.percentile(f, 1)
    levels = np.percentile(f, PERCENTILES).tolist()
    return CRITERION.finding(
        found,
        f"On {found} of {count} prompts the circuit does what the model does rather than what is left without it; "
        f"the first percentile of the prompts' f is {first:.2f}, the median {np.median(f):.2f}.",
        f"The {count - int(same.sum())} prompts on which it does not, the worst in the table, say what it lacks.",
        judged=judge,
        table=rows,
        chart=Chart(
            PERCENTILES, levels, x_title="percentile of the prompts", y_title="f of a prompt", lines={"the model": 1.0}
        ),
    )


CRITERION = Criterion(
    key="prompts",
    family="external",
    question="Does it hold on all prompts of the templates, and not in the mean alone?",
    figure="share of prompts on which the circuit does as the model does",
    rule=Rule(confirms=0.95, refutes=0.75),  # one prompt in twenty is an exception, one in four a second mechanism
    measure=measure,
    runs=lambda subject, settings: 3 * settings.many,
)
