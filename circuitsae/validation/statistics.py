"""How well measured effects agree with predicted ones, and how sure that is."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Of every bootstrap interval."""
FIGURES = ("spearman", "sign", "slope", "r2")


@dataclass(frozen=True)
class Agreement:
    """Agreement of n predicted and measured effects. Figures that n is too small for are NaN."""

    n: int
    spearman: float
    """Rank correlation."""
    sign: float
    """Share of pairs with the same sign."""
    slope: float
    """Slope of measured on predicted, through the origin."""
    r2: float
    """1 − Σ(measured − slope·predicted)² / Σ measured²."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """95 % bootstrap interval of each figure, where it was asked for; NaN where no resample had the figure."""


def agreement(
    predicted: np.ndarray,
    measured: np.ndarray,
    *,
    bootstrap: int = 0,
    clusters: np.ndarray | None = None,
    seed: int = 0,
) -> Agreement:
    """`Agreement` of two arrays of equal length.

    With `bootstrap` resamples, the percentile interval of every figure: edges are drawn with replacement, or whole
    `clusters` (a label per edge) are, because the edges of one prompt are not independent of each other.
    """
    figures = _figures(predicted, measured)
    intervals = {}
    if bootstrap and len(predicted):
        drawn = np.array(
            [_figures(predicted[i], measured[i]) for i in _resamples(predicted, clusters, bootstrap, seed)]
        )
        intervals = {name: interval(drawn[:, column]) for column, name in enumerate(FIGURES)}
    return Agreement(len(predicted), *figures, intervals=intervals)


def interval(drawn: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of bootstrap resamples, NaN left out; NaN where nothing is left."""
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return np.nan, np.nan
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _resamples(values: np.ndarray, clusters: np.ndarray | None, count: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    if clusters is None:
        return [rng.integers(0, len(values), len(values)) for _ in range(count)]
    _, label = np.unique(clusters, return_inverse=True)
    members = np.split(np.argsort(label, kind="stable"), np.cumsum(np.bincount(label))[:-1])
    draws = rng.integers(0, len(members), (count, len(members)))
    return [np.concatenate([members[i] for i in draw]) for draw in draws]


def _figures(predicted: np.ndarray, measured: np.ndarray) -> tuple[float, float, float, float]:
    squares, total = float(predicted @ predicted), float(measured @ measured)
    if len(predicted) == 0 or squares == 0 or total == 0:
        return np.nan, np.nan, np.nan, np.nan
    slope = float(predicted @ measured) / squares
    varied = len(predicted) > 2 and np.ptp(predicted) > 0 and np.ptp(measured) > 0
    return (
        float(np.corrcoef(stats.rankdata(predicted), stats.rankdata(measured))[0, 1]) if varied else np.nan,
        float(np.mean(np.sign(predicted) == np.sign(measured))),
        slope,
        1 - float(((measured - slope * predicted) ** 2).sum()) / total,
    )
