"""How well measured effects agree with predicted ones, how sure that is, and how likely by chance."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from scipy import stats

LEVEL = 0.95
"""Of every bootstrap interval."""
FIGURES = ("spearman", "sign", "within", "slope", "r2")
RESAMPLES = 999


@dataclass(frozen=True)
class Agreement:
    """Agreement of n predicted and measured effects. Figures that n is too small for are NaN."""

    n: int
    spearman: float
    """Rank correlation."""
    sign: float
    """Share of pairs with the same sign."""
    within: float
    """Share of pairs with measured / predicted in [½, 2]."""
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


def within_factor_two(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Whether measured / predicted lies in [½, 2]."""
    product, square = measured * predicted, predicted**2
    return (product >= square / 2) & (product <= 2 * square)


def slopes(
    x: Float[np.ndarray, "n dose"], y: Float[np.ndarray, "n dose"], *, seed: int = 0
) -> Float[np.ndarray, "n 3"]:
    """ρ = Σ xy / Σ x² of each row, the slope of y on x through the origin, with its 95 % bootstrap interval.

    Pairs (x, y) of a row are drawn with replacement (percentile interval); those that are not numbers are left out.
    NaN for rows without a pair, or whose x are all 0.
    """
    found = np.full((len(x), 3), np.nan)
    usable = np.isfinite(x) & np.isfinite(y) & (x != 0)
    for pattern in np.unique(usable, axis=0) if len(x) else ():
        rows = np.flatnonzero((usable == pattern).all(axis=1))
        if not pattern.any():
            continue
        a, b = x[np.ix_(rows, np.flatnonzero(pattern))], y[np.ix_(rows, np.flatnonzero(pattern))]
        found[rows, 0] = _slope(a, b, axis=-1)
        if pattern.sum() == 1:
            continue
        drawn = stats.bootstrap(
            (a, b), _slope, paired=True, axis=-1, n_resamples=RESAMPLES, method="percentile", rng=seed, batch=100
        )
        found[rows, 1], found[rows, 2] = drawn.confidence_interval
    return found


def _slope(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    return (x * y).sum(axis) / (x * x).sum(axis)


def chance(measured: float, controls: Float[np.ndarray, "control"]) -> float:
    """One-sided p = (1 + #{controls ≥ measured}) / (1 + K), both in the direction that was predicted."""
    return (1 + int((controls >= measured).sum())) / (1 + len(controls))


def corrected(p: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """q-values of Benjamini & Hochberg 1995 of the p-values that are numbers."""
    q, known = np.full(len(p), np.nan), np.isfinite(p)
    if known.any():
        q[known] = stats.false_discovery_control(p[known], method="bh")
    return q


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


def _figures(predicted: np.ndarray, measured: np.ndarray) -> tuple[float, ...]:
    squares, total = float(predicted @ predicted), float(measured @ measured)
    if len(predicted) == 0 or squares == 0 or total == 0:
        return (np.nan,) * len(FIGURES)
    slope = float(predicted @ measured) / squares
    varied = len(predicted) > 2 and np.ptp(predicted) > 0 and np.ptp(measured) > 0
    return (
        float(np.corrcoef(stats.rankdata(predicted), stats.rankdata(measured))[0, 1]) if varied else np.nan,
        float(np.mean(np.sign(predicted) == np.sign(measured))),
        float(np.mean(within_factor_two(predicted, measured))),
        slope,
        1 - float(((measured - slope * predicted) ** 2).sum()) / total,
    )
