"""Does f hang on how it is measured? The circuit judged in every way that its prompts allow, one choice at a time.

Miller et al. 2024, "Transformer Circuit Faithfulness Metrics Are Not Robust".
"""

from typing import Any

import numpy as np

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import RESAMPLES, Chart, Estimate, Finding, Rule, untested
from circuitsae.audit.measurement.figures import scored
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import Choice, Judging, Subject
from circuitsae.validation.statistics import interval
from transcoders.errors import InputError

NEAR = (0.8, 1.2)
"""f that most would call faithful."""


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """max f − min f over the choices, all on the same prompts, with its interval over these.

    A choice that these prompts do not allow, or under which ablating everything does not change the metric beyond
    chance, has no f; its row says so.
    """
    rows, drawn, runs = [], [], 0
    for choice in subject.choices:
        tell(str(choice))
        try:
            judge = subject.judging(scored(subject, settings), choice=choice)
            metric = judge.metric([subject.kept])
            f = float(judge.of(metric)[0])
        except InputError as error:
            rows.append(_row(choice, str(error)))
            continue
        runs += judge.runs
        if why := _without_scale(judge, settings.seed):
            rows.append(_row(choice, why))
            continue
        draws = judge.drawn(metric, seed=settings.seed)[0]
        low, high = interval(draws)
        rows.append(_row(choice, "", f, low, high))
        drawn.append(draws)
    known = [row for row in rows if row["f"] is not None]
    if len(known) < 2:
        return untested(
            CRITERION.key,
            f"{len(known)} of {len(rows)} ways to judge this circuit give an f on these prompts; two are needed to "
            "compare.",
            "Prompts with roles, templates and wrong answers can be judged in more ways.",
        )
    least, most = (end(known, key=lambda row: row["f"]) for end in (min, max))
    # In a resample all choices have the same prompts.
    spread = np.nanmax(drawn, axis=0) - np.nanmin(drawn, axis=0)
    estimate = Estimate.of(most["f"] - least["f"], spread)
    near = sum(NEAR[0] <= row["f"] <= NEAR[1] for row in known)
    aside = f" ({len(rows) - len(known)} more give no f)" if len(rows) > len(known) else ""
    worst = max(known, key=lambda row: abs(1 - row["f"]))
    return CRITERION.finding(
        estimate,
        f"Judged in {len(known)} ways{aside} f runs from {least['f']:.2f} ({least['choice']}) to {most['f']:.2f} "
        f"({most['choice']}); {near} of them give {NEAR[0]:g} to {NEAR[1]:g}.",
        f"With {worst['choice']} f is {worst['f']:.2f}: a circuit for which that is nearer to 1, or a claim that names "
        "the one choice it is made for.",
        runs=runs,
        table=rows,
        chart=Chart([row["choice"] for row in known], [row["f"] for row in known], [row["low"] for row in known],
                    [row["high"] for row in known], y_title="f", lines={"the model": 1.0}),
    )  # fmt: skip


def _row(
    choice: Choice, why: str, f: float | None = None, low: float | None = None, high: float | None = None
) -> dict[str, Any]:
    return {"choice": str(choice), "f": f, "low": low, "high": high, "why": why}


def _without_scale(judge: Judging, seed: int) -> str:
    """Why f has no scale, if so: m(M) − m(∅) has 0 in its interval."""
    span = judge.ends[1] - judge.ends[0]
    rng = np.random.default_rng(seed)
    found = Estimate.of(float(span.mean()), span[rng.integers(0, len(span), (RESAMPLES, len(span)))].mean(1))
    if found.low * found.high > 0:
        return ""
    return f"Ablating everything changes the metric by {found}: nothing that f could be a share of."


CRITERION = Criterion(
    key="choices",
    family="measurement",
    question="Is the circuit as faithful under every choice of how it is measured?",
    figure="largest f − smallest f over choices",
    # Within 0.3, the same reader comes to the same verdict; a range of 1 lets the choice make it all or nothing.
    rule=Rule(confirms=0.3, refutes=1.0),
    measure=measure,
    runs=lambda subject, settings: 3 * len(subject.choices) * scored(subject, settings),
)
