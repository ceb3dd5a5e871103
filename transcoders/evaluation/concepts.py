"""Which labelled concepts are found in one unit, in a few, or in all: neurons, features and directions side by side.

A unit is whatever gives a number for a row: a neuron, a feature, a direction. Labels say what a row is an instance of.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from transcoders.errors import InputError
from transcoders.evaluation.probes import logistic_probe

_HELD_OUT = 0.3
"""Share of the rows of each concept that is held out, where nobody says which."""
_PENALTY = 0.1
"""Inverse strength of the probes' L2 penalty, on units of variance 1."""

Labels = Sequence[str] | np.ndarray


def concept_table(
    units: Mapping[str, Float[np.ndarray, "row _"]],
    labels: Labels,
    *,
    k: Sequence[int] = (1, 5),
    held_out: Bool[np.ndarray, "row"] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """For each basis and each concept: how well one unit, the best `k` of them, and all tell it from the others.

    `units` are activations on the same rows by the basis' name, [row, unit]. Every concept is asked for against all
    other rows: units are ranked by `|AUROC − ½|` on the rows that are not held out, a logistic regression
    `σ(w · z + b)` of the best ones, standardised, is fitted there (classes weighted alike, L2 penalty), and judged on
    the rows held out. A unit may be found by its sign reversed. `held_out`: 30 % of the rows of each concept unless
    given; hold out whole words or subjects to ask for the concept instead of them.

    Columns: basis, concept, probe (the number of units, or `all`), units, best (the unit ranked first), rows (of the
    concept, held out), auroc, accuracy (½(TPR + TNR)).

    Raises `InputError` for tables of other lengths, fewer than two concepts, a concept without rows on either side,
    and where scikit-learn (the extra `probes`) is missing.

    Source: Gurnee et al. 2023, *Finding Neurons in a Haystack: Case Studies with Sparse Probing* (k-sparse probes);
    they rank by mean difference, which depends on a unit's scale.
    """
    labels, held = _checked(units, labels, held_out, seed)
    rows = []
    for basis, values in units.items():
        strength = np.abs(unit_auroc(values[~held], labels[~held]) - 0.5)
        sizes = {str(n): n for n in k if n < values.shape[1]} | {"all": values.shape[1]}
        for concept, of_units in zip(np.unique(labels), strength, strict=True):
            order = np.argsort(-of_units, kind="stable")
            for probe, size in sizes.items():
                score, accuracy = _probe(values[:, order[:size]], labels == concept, held)
                there = int((labels[held] == concept).sum())
                rows.append((basis, concept, probe, size, int(order[0]), there, score, accuracy))
    return pd.DataFrame(
        rows, columns=["basis", "concept", "probe", "units", "best", "rows", "auroc", "accuracy"]
    )  # fmt: skip


def purity_table(
    activations: Float[np.ndarray, "row unit"],
    labels: Labels,
    *,
    held_out: Bool[np.ndarray, "row"] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Of each unit: how much of it goes to one concept, and to how many it goes.

    With `m_c = E[max(a, 0) | c]` and `p_c = m_c / Σ_c' m_c'`, so that frequent concepts count no more than rare ones:
    *purity* is `p_c` of the concept c that is strongest on the rows not held out, measured on those held out, and
    *concepts* `exp(−Σ_c p_c log p_c)` there, their effective number: 1 for a unit of one concept, and all of them for a
    unit that does not care, whose purity is one through their number.

    Columns: unit, concept, purity, concepts, rows (held out, on which it is above 0). Units that are silent on
    either side have NaN. Centre what has two signs, and give both.

    Raises `InputError` as `concept_table` does, but needs no scikit-learn.
    """
    labels, held = _checked({"activations": activations}, labels, held_out, seed)
    concepts = np.unique(labels)
    positive = np.maximum(activations, 0)
    first, second = (_shares(positive[side], labels[side], concepts) for side in (~held, held))
    silent = np.isnan(first).any(axis=0) | np.isnan(second).any(axis=0)
    strongest = np.nan_to_num(first).argmax(axis=0)
    entropy = -np.where(second > 0, second * np.log(np.where(second > 0, second, 1)), 0).sum(axis=0)
    return pd.DataFrame(
        {
            "unit": np.arange(activations.shape[1]),
            "concept": np.where(silent, "", concepts[strongest]),
            "purity": np.where(silent, np.nan, second[strongest, np.arange(len(strongest))]),
            "concepts": np.where(silent, np.nan, np.exp(entropy)),
            "rows": (positive[held] > 0).sum(axis=0),
        }
    )


def unit_auroc(values: Float[np.ndarray, "row unit"], labels: Labels) -> Float[np.ndarray, "concept unit"]:
    """Chance that a row of a concept has more of a unit than another row has, ties half: Mann and Whitney's U.

    `(r̄_c − (n_c + 1) / 2) / (n − n_c)` with `r̄_c` the mean rank of the concept's n_c rows; concepts are sorted.
    """
    concepts, number = np.unique(np.asarray(labels), return_inverse=True)
    ranks = rankdata(values, axis=0)
    count = np.bincount(number)[:, None]
    mean = (np.arange(len(concepts))[:, None] == number) @ ranks / count
    return (mean - (count + 1) / 2) / np.maximum(len(ranks) - count, 1)


def direction_baselines(
    x: Float[np.ndarray, "row d_model"], held_out: Bool[np.ndarray, "row"], n: int, seed: int
) -> dict[str, Float[np.ndarray, "row _"]]:
    """Principal components of the rows not held out, and as many random directions, n at most; both signs of each."""
    centred = x - x[~held_out].mean(axis=0)
    components = np.linalg.svd(centred[~held_out], full_matrices=False)[2][:n]
    drawn = np.random.default_rng(seed).standard_normal((n, x.shape[1]))
    random = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return {
        name: np.hstack([centred @ rows.T, -centred @ rows.T])
        for name, rows in (("PCA", components), ("random directions", random))
    }


def _probe(values: np.ndarray, there: np.ndarray, held: np.ndarray) -> tuple[float, float]:
    """AUROC and balanced accuracy of a logistic regression, on the rows held out."""
    probe = logistic_probe(values[~held], there[~held, None], l2=1 / (_PENALTY * (~held).sum()))
    score = unit_auroc(probe.scores(values[held]), there[held])[1, 0]
    return float(score), float(probe.accuracy(values[held], there[held, None])[0])


def _shares(positive: np.ndarray, labels: np.ndarray, concepts: np.ndarray) -> Float[np.ndarray, "concept unit"]:
    """`p_c`, NaN for a unit that is silent."""
    means = np.stack([positive[labels == concept].mean(axis=0) for concept in concepts])
    total = means.sum(axis=0)
    return np.divide(means, total, out=np.full_like(means, np.nan), where=total > 0)


def _checked(
    units: Mapping[str, np.ndarray], labels: Labels, held_out: np.ndarray | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    labels = np.asarray(labels)
    for name, values in units.items():
        if values.ndim != 2 or len(values) != len(labels) or not values.shape[1]:
            raise InputError(
                f"Activations are [row, unit] with a row for each of the {len(labels)} labels; those of {name!r} have "
                f"the shape {list(values.shape)}."
            )
    concepts = np.unique(labels)
    if len(concepts) < 2:
        raise InputError(f"Concepts are told from each other; the labels name {len(concepts)}, give at least two.")
    held = _draw(labels, seed) if held_out is None else held_out
    for concept in concepts:
        n = int((labels[held] == concept).sum())
        if n == 0 or n == (labels == concept).sum():
            raise InputError(
                f"Of {str(concept)!r} {n} of {(labels == concept).sum()} rows are held out; each needs some on both "
                "sides."
            )
    return labels, held


def _draw(labels: np.ndarray, seed: int) -> Bool[np.ndarray, "row"]:
    """The same share of every concept's rows, at least one."""
    rng, held = np.random.default_rng(seed), np.zeros(len(labels), dtype=bool)
    for concept in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == concept))
        held[rows[: max(1, round(_HELD_OUT * len(rows)))]] = True
    return held
