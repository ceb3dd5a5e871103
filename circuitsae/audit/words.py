"""What an audit comes to, in words: what fails first, how far the evidence reaches, and what blocks the next tier."""

from collections import Counter
from collections.abc import Sequence
from typing import get_args

from circuitsae.audit.criterion import FAMILIES
from circuitsae.audit.finding import Finding, Status
from circuitsae.audit.result import TIERS, Audit

ASKED = {
    "claim": "what is claimed is written down",
    "measurement": "it is well measured",
    "internal": "the circuit causes the behaviour",
    "external": "it holds beyond where it was found",
}
"""What each family's criteria ask, as a statement."""
TITLES = {
    "claim": "Claim: is it written down?",
    "measurement": "Measurement: is it well measured?",
    "internal": "Internal validity: does the circuit cause the behaviour?",
    "external": "External validity: does it hold beyond where it was found?",
}


def in_all(audit: Audit) -> str:
    """How many criteria came to which status."""
    counts = Counter(finding.status for finding in audit.findings)
    parts = [f"{counts[status]} {status}" for status in get_args(Status) if counts[status]]
    return f"Of {len(audit.findings)} {'criterion' if len(audit.findings) == 1 else 'criteria'}: {', '.join(parts)}."


def failing(audit: Audit) -> list[Finding]:
    """What was disconfirmed, in order."""
    return [finding for finding in audit.findings if finding.status == "disconfirmed"]


def fails(audit: Audit) -> str:
    """Which criteria fail, as a sentence."""
    found = failing(audit)
    return f"Disconfirmed: {_listed(found)}." if found else "Nothing that was tested is disconfirmed."


def open_questions(audit: Audit) -> str:
    """Which criteria could not be decided or tested; empty where all were."""
    said = []
    for status in ("inconclusive", "untested"):
        found = [finding for finding in audit.findings if finding.status == status]
        said += [f"{status[0].upper()}{status[1:]}: {_listed(found)}."] if found else []
    return " ".join(said)


def reached(audit: Audit) -> str:
    """The tier that the evidence reaches, and what blocks the next."""
    supported = [family for family in FAMILIES if TIERS[family] == audit.tier]
    done = FAMILIES[: FAMILIES.index(supported[0]) + 1] if supported else ()
    first = f"The circuit is {audit.tier}"
    first += f": {_and([ASKED[family] for family in done])}, as far as the criteria ask." if done else "."
    if len(done) == len(FAMILIES):
        return f"{first} There is no higher tier."
    following = FAMILIES[len(done)]
    if not audit.family(following):
        return f"{first} To be {TIERS[following]}, criteria of the family {following!r} have to be put to the test."
    return f"{first} To be {TIERS[following]}, it lacks {_listed(audit.blocked, status=True)}."


def _listed(findings: Sequence[Finding], *, status: bool = False) -> str:
    return _and([f"{one.criterion} ({one.status})" if status else one.criterion for one in findings])


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
