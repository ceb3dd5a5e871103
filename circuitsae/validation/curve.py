"""How a task's metric grows with the size of a circuit, be it of features or of heads and MLPs.

    f(C) = (m(C) − m(∅)) / (m(M) − m(∅)),

with m the mean metric of the task's examples while everything outside is ablated; m(M) is the model's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from circuitsae.validation.result import jsonable
from circuitsae.validation.statistics import interval

POINTS = 16
_RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Curve:
    """A task's metric against the size of a circuit whose strongest parts are kept."""

    sizes: tuple[int, ...]
    """How many parts are kept, rising."""
    metric: np.ndarray
    """m(C), [size, example]."""
    empty: np.ndarray
    """m(∅), [example]."""
    full: np.ndarray
    """m(M), [example]: the model's own."""
    parts: Mapping[str, Sequence[int]]
    """How many of which kind each size keeps: columns of `frame`."""
    realised: tuple[int, ...] | None = None
    """Parts of each size that do anything (edges on a path to the logits, nodes that have a place on some prompt): what
    areas are over; None for `sizes`."""
    circuit: Any = None
    """All parts, strongest first, where they are features and error nodes."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What was ablated how, as JSON values."""

    @cached_property
    def f(self) -> np.ndarray:
        """Of each size; NaN where ablating everything does not change the mean metric."""
        return faithful(self.metric, self.empty, self.full)

    @property
    def per_example(self) -> np.ndarray:
        """f of each example alone, [size, example]; unsteady where an example's own m(M) − m(∅) is small."""
        span = self.full - self.empty
        return (self.metric - self.empty) / np.where(span == 0, np.nan, span)

    def cpr(self) -> float:
        """Area under f over log k, as a mean over the axis (circuit performance ratio; the larger the better)."""
        return log_area(self.realised or self.sizes, self.f)

    def cmd(self) -> float:
        """Area under |1 − f| over log k (circuit-model distance; the smaller the better)."""
        return log_area(self.realised or self.sizes, np.abs(1 - self.f))

    def size_for(self, faithfulness: float) -> int | None:
        """The smallest size on the curve from which f stays within `1 ± (1 − faithfulness)`; None if none does."""
        good = np.abs(1 - self.f) <= 1 - faithfulness + 1e-12
        from_here = np.flatnonzero(np.logical_and.accumulate(good[::-1])[::-1])
        return self.sizes[from_here[0]] if len(from_here) else None

    def frame(self, seed: int = 0) -> pd.DataFrame:
        """A row per size: `parts`, `f` with a bootstrap interval over examples, `metric`, and the quartiles of the
        metric and of f over examples.
        """
        rng = np.random.default_rng(seed)
        drawn = rng.integers(0, len(self.full), (_RESAMPLES, len(self.full)))
        base = self.empty[drawn].mean(1)
        span = self.full[drawn].mean(1) - base
        records = []
        for row in range(len(self.sizes)):
            low, high = interval((self.metric[row][drawn].mean(1) - base) / np.where(span == 0, np.nan, span))
            record: dict[str, Any] = {name: counts[row] for name, counts in self.parts.items()}
            record |= {"f": self.f[row], "f_low": low, "f_high": high, "metric": self.metric[row].mean()}
            for name, values in (("metric", self.metric[row]), ("f", self.per_example[row])):
                finite = values[np.isfinite(values)]
                for q in (25, 50, 75):
                    record[f"{name}_q{q}"] = np.percentile(finite, q) if len(finite) else np.nan
            records.append(record)
        return pd.DataFrame(records)

    def examples_frame(self) -> pd.DataFrame:
        """A row per size and example: `size`, `example`, `metric`, `f`, `empty`, `full`."""
        n = len(self.full)
        table = {
            "size": np.repeat(self.sizes, n),
            "example": np.tile(np.arange(n), len(self.sizes)),
            "metric": self.metric.ravel(),
            "f": self.per_example.ravel(),
            "empty": np.tile(self.empty, len(self.sizes)),
            "full": np.tile(self.full, len(self.sizes)),
        }
        return pd.DataFrame(table)

    def to_json(self) -> dict[str, Any]:
        """The curve, its areas, and every example, as JSON values."""
        document = {
            **self.about,
            "cpr": self.cpr(),
            "cmd": self.cmd(),
            "empty": self.empty.mean(),
            "full": self.full.mean(),
            "curve": self.frame().to_dict("records"),
            "examples": self.examples_frame().to_dict("records"),
        }
        return jsonable(document)


@dataclass(frozen=True, eq=False)
class Areas:
    """A ranking of parts, be they features or edges, judged without choosing a size.

    CPR = ∫ f d(log k) / ∫ d(log k) of the k parts of largest score, signed so that what helps the behaviour is large;
    CMD = ∫ |1 − f| d(log k) / ∫ d(log k) of the k parts of largest |score|. Source: Mueller et al. 2025, "MIB".
    """

    signed: Curve
    absolute: Curve

    @classmethod
    def of(cls, curve: Callable[[bool], Curve]) -> "Areas":
        """From how a curve is drawn: by signed scores (True) or by their sizes."""
        return cls(curve(True), curve(False))

    @property
    def cpr(self) -> float:
        """Circuit performance ratio; the larger the better."""
        return self.signed.cpr()

    @property
    def cmd(self) -> float:
        """Circuit-model distance; the smaller the better."""
        return self.absolute.cmd()

    def frame(self) -> pd.DataFrame:
        """A row per ranking and size: `ranking` (signed or absolute), and the columns of `Curve.frame`."""
        curves = {"signed": self.signed, "absolute": self.absolute}
        return pd.concat([curve.frame().assign(ranking=name) for name, curve in curves.items()], ignore_index=True)

    def to_json(self) -> dict[str, Any]:
        """Both figures and both curves as JSON values."""
        figures = {"cpr": self.cpr, "cmd": self.cmd}
        return jsonable({**figures, "signed": self.signed.to_json(), "absolute": self.absolute.to_json()})


def faithful(metric: np.ndarray, empty: np.ndarray, full: np.ndarray) -> np.ndarray:
    """f from the metric [..., example]."""
    span = full.mean() - empty.mean()
    return (metric.mean(-1) - empty.mean()) / (span if span else np.nan)


def log_sizes(most: int, points: int = POINTS) -> list[int]:
    """About `points` whole numbers from 1 to `most`, evenly spaced on a log scale."""
    return sorted({round(float(x)) for x in np.geomspace(1, most, points)})


def log_area(sizes: Sequence[int], values: np.ndarray) -> float:
    """∫ values d(log k) / ∫ d(log k), by trapezoids; of one size alone, the mean value. Size 0 is left out."""
    k, y = np.array(sizes, dtype=float), np.asarray(values, dtype=float)
    k, y = k[k > 0], y[k > 0]
    if len(set(k)) < 2:
        return float(y.mean()) if len(k) else np.nan
    return float(np.trapezoid(y, np.log(k)) / (np.log(k[-1]) - np.log(k[0])))
