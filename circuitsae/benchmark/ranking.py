"""Whether one figure of dictionaries ranks them as another does: rank correlation over kinds, with an interval."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from circuitsae.benchmark.result import HEADLINES, BenchmarkResult, Headline
from circuitsae.validation.statistics import interval
from transcoders.errors import InputError

RESAMPLES = 2000
FEWEST = 4
"""Kinds; with fewer a rank correlation says nothing."""
FVU, L0 = (next(each for each in HEADLINES if each.title == title) for title in ("FVU", "L0"))


class Alike(NamedTuple):
    """How one figure ranks lines beside how another does."""

    figure: str
    kinds: int
    """Lines that have it."""
    spearman: float
    low: float
    high: float
    partial: float
    partial_low: float
    partial_high: float
    answer: Literal["agrees", "disagrees", "undecided", "too few"]


def ranks_alike(
    result: BenchmarkResult,
    family: str | None = None,
    *,
    by: Headline = FVU,
    figures: Sequence[Headline] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Alike]:
    """Whether dictionaries that are better `by` one figure are better by others, figure by figure.

    `family`: the lines of one family, for figures of different ones do not compare (`circuit_benchmark`); default, all.
    Lines without a figure are left out of its row, and figures of a single line.

    * `spearman`: ρ of the lines' means over seeds, both figures turned so that more is better: 1 is the same ranking.
    * `partial`: the same given L0, `(ρ_xy − ρ_xz ρ_yz) / √((1 − ρ_xz²)(1 − ρ_yz²))`; ranks of L0 are those of log L0.
    * intervals, 95 %: percentiles over `resamples`, of lines drawn with replacement, and of each its seeds.
    * `answer`: `agrees` where the interval of ρ lies above 0, `disagrees` where it lies below, else `undecided`; `too
      few` with fewer than four lines, which get no interval.

    Raises `InputError` for a result without `by`, without L0, or of one line.

    Source: Spearman 1904; Efron & Tibshirani 1993, *An Introduction to the Bootstrap*, chapter 13 (percentiles).
    """
    families = result.settings.get("families", {})
    lines = [line for line in result.lines if family is None or families.get(line[0]) == family]
    measured = result.headlines
    if len(lines) < 2 or by not in measured or L0 not in measured:
        of = "" if family is None else f" of {family}"
        raise InputError(
            f"{len(lines)} lines{of} with the figures {', '.join(each.title for each in measured)} cannot be ranked by "
            f"{by.title}; give two or more, measured with it and with L0."
        )
    wanted = figures or [each for each in measured if each.task == "circuits" and each.more_is_better is not None]
    rng = np.random.default_rng(seed)
    x, z = (_table(result, lines, each) for each in (by, L0))
    found = []
    for figure in wanted:
        tables = np.stack([x, _table(result, lines, figure), z])
        known = np.all(np.isfinite(tables), axis=0)
        there = [line for line in range(len(lines)) if known[line].any()]
        if len(there) > 1:
            found.append(_alike(figure.title, tables[:, there], resamples, rng))
    return found


def spearman(x: Float[np.ndarray, "*n line"], y: Float[np.ndarray, "*n line"]) -> Float[np.ndarray, "*n"]:
    """Rank correlation along the last axis; NaN where either is constant."""
    a, b = (stats.rankdata(each, axis=-1) for each in (x, y))
    a, b = (each - each.mean(axis=-1, keepdims=True) for each in (a, b))
    size = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    return np.divide((a * b).sum(axis=-1), size, out=np.full_like(size, np.nan), where=size > 0)


def partial_spearman(
    x: Float[np.ndarray, "*n line"], y: Float[np.ndarray, "*n line"], z: Float[np.ndarray, "*n line"]
) -> Float[np.ndarray, "*n"]:
    """Rank correlation of x and y given z; NaN where z tells either of them whole."""
    xy, xz, yz = spearman(x, y), spearman(x, z), spearman(y, z)
    left = (1 - xz**2) * (1 - yz**2)
    return np.divide(xy - xz * yz, np.sqrt(left), out=np.full_like(xy, np.nan), where=left > 1e-9)


def _table(result: BenchmarkResult, lines: Sequence[tuple[str, str]], of: Headline) -> Float[np.ndarray, "line seed"]:
    """A figure of each line and seed, turned so that more is better; NaN where it was not measured."""
    found = [result.by_seed(line, of.task, of.metric) for line in lines]
    seeds = sorted({row.seed for row in result.rows})
    sign = -1.0 if of.more_is_better is False else 1.0
    return np.array([[sign * each.get(seed, np.nan) for seed in seeds] for each in found])


def _alike(figure: str, tables: Float[np.ndarray, "3 line seed"], resamples: int, rng: np.random.Generator) -> Alike:
    """Of three figures of lines: by which, of what, given what."""
    n = tables.shape[1]
    x, y, z = np.nanmean(tables, axis=-1)
    whole = float(spearman(x, y))
    if n < FEWEST:
        return Alike(figure, n, whole, math.nan, math.nan, math.nan, math.nan, math.nan, "too few")
    x_drawn, y_drawn, z_drawn = np.stack([_drawn(tables, rng) for _ in range(resamples)], axis=1)
    low, high = interval(spearman(x_drawn, y_drawn))
    given = interval(partial_spearman(x_drawn, y_drawn, z_drawn))
    answer = "agrees" if low > 0 else "disagrees" if high < 0 else "undecided"
    return Alike(figure, n, whole, low, high, float(partial_spearman(x, y, z)), *given, answer)


def _drawn(tables: Float[np.ndarray, "3 line seed"], rng: np.random.Generator) -> Float[np.ndarray, "3 line"]:
    """Means of lines that are drawn, each over seeds that are drawn among those that have every figure."""
    known, means = np.all(np.isfinite(tables), axis=0), []
    for line in rng.integers(0, len(known), len(known)):
        seeds = np.flatnonzero(known[line])
        means.append(tables[:, line, rng.choice(seeds, len(seeds))].mean(axis=-1))
    return np.stack(means, axis=-1)
