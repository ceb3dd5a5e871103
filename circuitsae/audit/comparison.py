"""Two audits side by side: of two circuits, or of two methods' circuits, on one task."""

from dataclasses import dataclass

import pandas as pd

from circuitsae.audit.finding import Finding
from circuitsae.audit.result import Audit
from transcoders.errors import InputError


@dataclass(frozen=True)
class Row:
    """What was found about one criterion in both; None where it was not asked."""

    family: str
    criterion: str
    rule: str
    a: Finding | None
    b: Finding | None

    @property
    def difference(self) -> float | None:
        """The second estimate minus the first."""
        if self.a is None or self.b is None or self.a.estimate is None or self.b.estimate is None:
            return None
        return self.b.estimate.value - self.a.estimate.value

    @property
    def apart(self) -> str:
        """Whether the two intervals have something in common: `apart` or `overlap`; empty where there are not two."""
        if self.a is None or self.b is None or self.a.estimate is None or self.b.estimate is None:
            return ""
        one, two = self.a.estimate, self.b.estimate
        return "apart" if one.high < two.low or two.high < one.low else "overlap"


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two audits, and what to call them."""

    a: Audit
    b: Audit
    names: tuple[str, str]
    rows: tuple[Row, ...]

    @property
    def said(self) -> str:
        """Which criteria come to another status."""
        changed = [f"{row.criterion} ({row.a.status} and {row.b.status})" for row in self.rows
                   if row.a and row.b and row.a.status != row.b.status]  # fmt: skip
        return f"They differ in {', '.join(changed)}." if changed else "No criterion comes to another status."

    def frame(self) -> pd.DataFrame:
        """A row per criterion: family, criterion, status_a, status_b, value_a, value_b, difference, apart, rule."""
        rows = []
        for row in self.rows:
            both = {"a": row.a, "b": row.b}
            status = {f"status_{side}": finding.status if finding else "" for side, finding in both.items()}
            value = {f"value_{side}": finding.estimate.value if finding and finding.estimate else None
                     for side, finding in both.items()}  # fmt: skip
            rows.append({"family": row.family, "criterion": row.criterion, **status, **value,
                         "difference": row.difference, "apart": row.apart, "rule": row.rule})  # fmt: skip
        return pd.DataFrame(rows)


def compare(a: Audit, b: Audit, names: tuple[str, str] = ("A", "B")) -> Comparison:
    """Two audits by criterion. Raises `InputError` for audits of different tasks, which no criterion compares."""
    if a.task != b.task:
        raise InputError(f"The audits are of {a.task!r} and {b.task!r}; give two of one task.")
    described = {own["key"]: own for own in (*b.criteria, *a.criteria)}
    keys = list(dict.fromkeys(own["key"] for own in (*a.criteria, *b.criteria)))
    found = [{finding.criterion: finding for finding in audit.findings} for audit in (a, b)]
    of = [(described[key], key) for key in keys]
    rows = [Row(own["family"], key, own["rule"], *(one.get(key) for one in found)) for own, key in of]
    return Comparison(a, b, names, tuple(rows))
