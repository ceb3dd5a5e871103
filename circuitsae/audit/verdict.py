"""Is this the circuit of the behaviour, no more and no less? One word from the criteria that bear on it."""

from collections.abc import Sequence
from typing import Literal

from circuitsae.audit.criteria import CRITERIA
from circuitsae.audit.criterion import Criterion
from circuitsae.audit.finding import Finding
from circuitsae.audit.result import Audit

Verdict = Literal["confirmed", "refuted", "open"]
BEARING = ("sufficiency", "necessity", "minimality", "rivals")
"""Enough; needed; nothing idle; no other as good. What else an audit asks is how that was found, how well it is known,
and how far it reaches."""


def short(audit: Audit, *, bearing: Sequence[str] = BEARING, criteria: Sequence[Criterion] = CRITERIA) -> list[str]:
    """The criteria in `bearing` whose whole interval falls short of the bar that confirms: more prompts will not do."""
    rules = {criterion.key: criterion.rule for criterion in criteria}
    found = []
    for finding in _tested(audit, bearing):
        rule, estimate = rules.get(finding.criterion), finding.estimate
        falls = rule is not None and estimate is not None and rule.short(estimate)
        if falls or finding.status == "disconfirmed":
            found.append(finding.criterion)
    return found


def verdict(audit: Audit, *, bearing: Sequence[str] = BEARING, criteria: Sequence[Criterion] = CRITERIA) -> Verdict:
    """What the criteria in `bearing` say together; one that could not be tested says nothing.

    confirmed: each of them is, and there is one. refuted: one falls `short`. open: neither.
    """
    tested = _tested(audit, bearing)
    if short(audit, bearing=bearing, criteria=criteria):
        return "refuted"
    return "confirmed" if tested and all(finding.status == "confirmed" for finding in tested) else "open"


def _tested(audit: Audit, bearing: Sequence[str]) -> list[Finding]:
    return [found for found in audit.findings if found.criterion in bearing and found.status != "untested"]
