"""Would the method have found it? Circuits are planted in small models, and looked for as this one's kind is.

The planted circuits (`circuitsae.audit.planted`, `planted_features`) sit among idle parts and noise; what is found is
held against what was planted:

    F1 = 2 · precision · recall / (precision + recall).

The audited model takes no part, so that one measurement serves every audit of its kind with the same ablation.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import Chart, Finding, Rule, untested
from circuitsae.audit.measurement.recovery import (
    Recovered,
    by_faithfulness,
    by_size,
    mean_f1,
    recovered,
    recovered_features,
)
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import Subject
from circuitsae.components.problem import Ablation

RULE = Rule(confirms=0.9, refutes=0.5)
"""Nine units of ten right, both ways, is what a reader takes a found circuit for; half of them wrong is no circuit."""


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """Mean F1 of planted circuits on `settings.few` prompts each, edges with the subject's own ablation.

    Of features the size of a circuit is chosen as `reproduce` does, by zero ablation.
    """
    ablation, unit = subject.usual.ablation, "nodes" if subject.kind == "features" else "edges"
    if subject.kind == "heads" and ablation == "noise":
        return untested(
            CRITERION.key, "Which edges of a planted circuit noise disturbs depends on its draw; they are not known.",
            "Judging by resample, mean or zero ablation would let it.",
        )  # fmt: skip
    tell(f"{unit} of planted circuits")
    cut: Ablation = "mean" if ablation == "role mean" else ablation
    rows, sized = _found(subject.kind, "zero" if subject.kind == "features" else cut, settings.few)
    found = mean_f1(rows, settings.seed)
    precision, recall = (float(np.mean([getattr(row, name) for row in rows])) for name in ("precision", "recall"))
    worst = min(rows, key=lambda row: row.f1)
    return CRITERION.finding(
        found,
        f"Of {len(rows)} circuits planted in small models, the method finds {recall:.0%} of the {unit}, and "
        f"{precision:.0%} of what it finds was planted (F1 {found}; worst {worst.f1:.2f}, {worst.program}); the best "
        f"by score, as many as were planted, come to F1 {mean_f1(sized, settings.seed)}.",
        f"A method that finds {'fewer ' + unit + ' beside' if precision < recall else 'more of'} the planted ones of "
        f"{worst.program} would raise it.",
        table=[
            {"method": method, **row._asdict(), "f1": row.f1}
            for method, kind in (("fewest that reach the target", rows), ("best by score", sized)) for row in kind
        ],
        chart=_chart(rows),
    )  # fmt: skip


@lru_cache(maxsize=8)
def _found(
    kind: Literal["heads", "features"], ablation: Ablation, prompts: int
) -> tuple[Sequence[Recovered], Sequence[Recovered]]:
    """Once in a process: circuits by faithfulness, and by size."""
    if kind == "features":
        return recovered_features(prompts=prompts)
    return recovered(ablation, by_faithfulness, prompts=prompts), recovered(ablation, by_size, prompts=prompts)


def _chart(rows: Sequence[Recovered]) -> Chart:
    names = list(dict.fromkeys(row.program for row in rows))
    each = [mean_f1([row for row in rows if row.program == name]) for name in names]
    return Chart(
        names, [one.value for one in each], [one.low for one in each], [one.high for one in each], y_title="F1",
        lines={"confirms": RULE.confirms, "refutes": RULE.refutes},
    )  # fmt: skip


CRITERION = Criterion(
    key="sensitivity",
    family="measurement",
    question="Does the method find circuits that were planted, and nothing beside them?",
    figure="F1 of planted circuits",
    rule=RULE,
    measure=measure,
    runs=lambda subject, settings: 0,  # none of the audited model's
)
