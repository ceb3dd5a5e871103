"""What an audit finds: an estimate with its interval, held against bars that were stated before.

| status | the 95 % interval |
|---|---|
| confirmed | lies wholly on the good side of the bar that confirms |
| partly | lies on the good side of the bar that refutes, and not wholly on that of the one that confirms |
| inconclusive | has the bar that refutes inside |
| disconfirmed | lies wholly on the bad side of the bar that refutes |
| untested | there is none; the reason is said |
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from circuitsae.validation.result import jsonable
from circuitsae.validation.statistics import interval

Status = Literal["confirmed", "partly", "inconclusive", "disconfirmed", "untested"]
RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> "Estimate":
        """A figure that nothing was drawn for: it has no width."""
        return cls(value, value, value)

    @classmethod
    def of(cls, value: float, drawn: np.ndarray) -> "Estimate":
        """A figure with the middle 95 % of its resamples."""
        return cls(value, *interval(drawn))

    @classmethod
    def mean(cls, values: np.ndarray, seed: int = 0) -> "Estimate":
        """A mean over prompts, or over whatever else was drawn, with its bootstrap interval."""
        drawn = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
        return cls.of(float(values.mean()), values[drawn].mean(1))

    def __str__(self) -> str:
        return f"{self.value:.2f}" if self.low == self.high else f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Rule:
    """What confirms and what refutes: at least `confirms` and below `refutes`, or, where it is less, the reverse."""

    confirms: float
    refutes: float

    @property
    def rising(self) -> bool:
        """Whether more is better."""
        return self.confirms >= self.refutes

    def status(self, found: Estimate) -> Status:
        """The status of an estimate; one that is no number is inconclusive."""
        low, high = (found.low, found.high) if self.rising else (-found.high, -found.low)
        confirms, refutes = (self.confirms, self.refutes) if self.rising else (-self.confirms, -self.refutes)
        if not (math.isfinite(low) and math.isfinite(high)):
            return "inconclusive"
        if low >= confirms:
            return "confirmed"
        if high < refutes:
            return "disconfirmed"
        return "partly" if low >= refutes else "inconclusive"

    def short(self, found: Estimate) -> bool:
        """Whether the whole interval lies on the wrong side of the bar that confirms."""
        return (found.high < self.confirms) if self.rising else (found.low > self.confirms)

    def __str__(self) -> str:
        first, second = ("at least", "below") if self.rising else ("at most", "above")
        return f"{first} {self.confirms:g} confirms, {second} {self.refutes:g} refutes"


@dataclass(frozen=True)
class Chart:
    """What a criterion's figure shows: points with their intervals, in a row or along an axis."""

    x: Sequence[Any]
    """Names, or numbers of an axis."""
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    series: Sequence[str] = ()
    """Which series each point belongs to; none: one."""
    x_title: str = ""
    y_title: str = ""
    lines: Mapping[str, float] = field(default_factory=dict)
    """Levels to compare with, such as the bars."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found about one criterion."""

    criterion: str
    status: Status
    said: str
    """What was found, in a sentence."""
    change: str
    """What would change the status, in a sentence."""
    estimate: Estimate | None = None
    table: Sequence[Mapping[str, Any]] = ()
    chart: Chart | None = None
    runs: int = 0
    """Prompts run, with a circuit cut or whole."""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON values; what is not finite is null."""
        return jsonable(asdict(self))

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Finding":
        """From what `to_json` gave."""
        own = dict(record)
        own["estimate"] = None if own["estimate"] is None else Estimate(**_numbers(own["estimate"]))
        own["chart"] = None if own["chart"] is None else Chart(**own["chart"])
        return cls(**own)


def untested(criterion: str, why: str, change: str) -> Finding:
    """A criterion that this audit cannot put to the test, and what would let it."""
    return Finding(criterion=criterion, status="untested", said=why, change=change)


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in record.items()}
