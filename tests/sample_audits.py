"""A made-up audit with every status: what its page, its words and a comparison are tested on, without any model."""

from circuitsae.audit.finding import Chart, Estimate, Finding, Rule
from circuitsae.audit.result import Audit
from circuitsae.audit.settings import Settings

_MADE: list[tuple[str, str, Rule | None, tuple[float, float, float] | None]] = [
    ("stated", "claim", None, None),
    ("reliability", "measurement", Rule(0.8, 0.5), (0.9, 0.85, 0.95)),
    ("sufficiency", "internal", Rule(0.13, 0.5), (0.01, 0.0, 0.3)),
    ("necessity", "internal", Rule(0.9, 0.5), (0.3, 0.2, 0.4)),
    ("models", "external", Rule(0.5, 0.2), None),
    ("prompts", "external", Rule(0.5, 0.0), (0.2, -1.5, 0.4)),
]


def sample_audit(*, shift: float = 0.0, text: str = "words", task: str = "ioi") -> Audit:
    """`shift` is added to every estimate; `text` stands wherever a text may."""
    criteria, findings = [], []
    for key, family, rule, at in _MADE:
        stated, bars = ("", None) if rule is None else (str(rule), [rule.confirms, rule.refutes])
        criteria.append({"key": key, "family": family, "question": text, "figure": text, "rule": stated, "bars": bars})
        estimate = None if at is None else Estimate(*(x + shift for x in at))
        status = "untested" if estimate is None or rule is None else rule.status(estimate)
        chart = Chart([text, "a1.h0"], [0.5, 0.7], [0.4, 0.6], [0.6, 0.8], [text, "b"], text, text, {text: 0.6})
        findings.append(
            Finding(
                criterion=key, status="confirmed" if rule is None else status, said=f"{key} said {text}",
                change=f"{key} changes with {text}", estimate=estimate, table=({text: text, "f": 0.5, "held": True},),
                chart=None if at is None else chart, runs=100, seconds=1.5,
            )
        )  # fmt: skip
    return Audit(
        subject=f"{task} in {text}, 2 edges", kind="heads", task=task, model=text, units=("a0.h1→m1", text),
        settings=Settings.quick(), criteria=tuple(criteria), findings=tuple(findings),
    )  # fmt: skip
