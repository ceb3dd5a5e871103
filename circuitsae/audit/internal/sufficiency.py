"""Is the circuit enough? f of the circuit alone, on prompts that it was neither found nor sized on."""

import numpy as np

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import Chart, Estimate, Finding, Rule
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import Subject


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """|1 − f(C)| with its interval over prompts: too much is as far off as too little."""
    judge = subject.judging(settings.held_out)
    tell(f"the circuit alone on {len(judge.prompts)} prompts")
    metric = judge.metric([subject.kept])
    f, drawn = float(judge.of(metric)[0]), judge.drawn(metric, seed=settings.seed)[0]
    found, off = Estimate.of(f, drawn), Estimate.of(abs(1 - f), np.abs(1 - drawn))
    lacking = "More units" if f < 1 else "Units that oppose the behaviour, which the circuit leaves out,"
    return CRITERION.finding(
        off,
        f"With everything outside ablated ({subject.usual.ablation}), the circuit gives {found} of what the model "
        f"does on {len(judge.prompts)} held-out prompts.",
        f"{lacking} would take away the {off.value:.2f} that f is off; more prompts would narrow its interval.",
        judged=judge,
        chart=Chart(["circuit"], [f], [found.low], [found.high], y_title="f", lines={"the model": 1.0}),
    )


CRITERION = Criterion(
    key="sufficiency",
    family="internal",
    question="Does the circuit alone do what the model does?",
    figure="|1 − f| of the circuit alone",
    rule=Rule(confirms=0.13, refutes=0.5),  # 87 % is what Wang et al. 2022 print of IOI
    measure=measure,
    runs=lambda subject, settings: 3 * settings.held_out,
)
