"""What an audit found: every criterion with its status, and how far up the evidence reaches."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from circuitsae.audit.criterion import FAMILIES, Criterion, Family
from circuitsae.audit.finding import Finding
from circuitsae.audit.settings import Settings
from transcoders.errors import FileFormatError
from transcoders.files import write_json

SUPPORTED = ("confirmed", "partly")
TIERS: dict[Family, str] = {
    "claim": "stated", "measurement": "measured", "internal": "causal", "external": "general",
}  # fmt: skip
"""What a circuit may be called once a family, and those before it, are supported throughout."""
PROPOSED = "proposed"


@dataclass(frozen=True, eq=False)
class Audit:
    """An audit of one circuit."""

    subject: str
    kind: str
    task: str
    model: str
    units: tuple[str, ...]
    """The circuit's edges or nodes, by name."""
    settings: Settings
    criteria: tuple[Mapping[str, Any], ...]
    """Of each criterion `key`, `family`, `question`, `figure`, `rule`, `bars`, as they stood when it was measured."""
    findings: tuple[Finding, ...]

    def of(self, key: str) -> Finding:
        """The finding about one criterion."""
        return next(finding for finding in self.findings if finding.criterion == key)

    def family(self, name: str) -> list[Finding]:
        """The findings of one family, in order."""
        keys = [criterion["key"] for criterion in self.criteria if criterion["family"] == name]
        return [finding for finding in self.findings if finding.criterion in keys]

    @property
    def blocked(self) -> list[Finding]:
        """What stands between the circuit and the next tier; empty at the last."""
        for family in FAMILIES:
            short = [finding for finding in self.family(family) if finding.status not in SUPPORTED]
            if short or not self.family(family):
                return short
        return []

    @property
    def tier(self) -> str:
        """The last family that is supported throughout, with all before it, as a word."""
        reached = PROPOSED
        for family in FAMILIES:
            found = self.family(family)
            if not found or any(finding.status not in SUPPORTED for finding in found):
                break
            reached = TIERS[family]
        return reached

    def frame(self) -> pd.DataFrame:
        """A row per criterion: family, criterion, status, figure, value, low, high, rule, said, change."""
        about = {criterion["key"]: criterion for criterion in self.criteria}
        rows = []
        for finding in self.findings:
            own, estimate = about[finding.criterion], finding.estimate
            numbers = {"value": None, "low": None, "high": None} if estimate is None else asdict(estimate)
            rows.append(
                {"family": own["family"], "criterion": finding.criterion, "status": finding.status,
                 "figure": own["figure"], **numbers, "rule": own["rule"], "said": finding.said,
                 "change": finding.change}
            )  # fmt: skip
        return pd.DataFrame(rows)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values, with the tier and what blocks the next."""
        own = {name: getattr(self, name) for name in ("subject", "kind", "task", "model")}
        return {
            **own, "units": list(self.units), "settings": asdict(self.settings), "tier": self.tier,
            "blocked": [finding.criterion for finding in self.blocked],
            "criteria": [dict(criterion) for criterion in self.criteria],
            "findings": [finding.to_json() for finding in self.findings],
        }  # fmt: skip

    def save(self, path: str | Path) -> Path:
        """Write it as a JSON file."""
        write_json(Path(path), self.to_json())
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "Audit":
        """Read what `save` wrote. Raises `FileFormatError` for another file."""
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(
                **{name: record[name] for name in ("subject", "kind", "task", "model")},
                units=tuple(record["units"]),
                settings=Settings(**record["settings"]),
                criteria=tuple(record["criteria"]),
                findings=tuple(Finding.from_json(finding) for finding in record["findings"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileFormatError(
                f"{path} is no audit ({type(error).__name__}: {error}); give an audit.json that `audit` wrote."
            ) from error


def described(criteria: Sequence[Criterion]) -> tuple[Mapping[str, Any], ...]:
    """What an audit says of its criteria."""
    return tuple(
        {"key": c.key, "family": c.family, "question": c.question, "figure": c.figure,
         "rule": "" if c.rule is None else str(c.rule),
         "bars": None if c.rule is None else [c.rule.confirms, c.rule.refutes]}
        for c in criteria
    )  # fmt: skip
