"""How well measured effects agree with predicted ones."""

from dataclasses import dataclass

import numpy as np
from scipy import stats


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


def agreement(predicted: np.ndarray, measured: np.ndarray) -> Agreement:
    """`Agreement` of two arrays of equal length."""
    n = len(predicted)
    squares, total = float(predicted @ predicted), float(measured @ measured)
    if n == 0 or squares == 0 or total == 0:
        return Agreement(n, np.nan, np.nan, np.nan, np.nan)
    slope = float(predicted @ measured) / squares
    varied = n > 2 and np.ptp(predicted) > 0 and np.ptp(measured) > 0
    return Agreement(
        n=n,
        spearman=float(np.corrcoef(stats.rankdata(predicted), stats.rankdata(measured))[0, 1]) if varied else np.nan,
        sign=float(np.mean(np.sign(predicted) == np.sign(measured))),
        slope=slope,
        r2=1 - float(((measured - slope * predicted) ** 2).sum()) / total,
    )
