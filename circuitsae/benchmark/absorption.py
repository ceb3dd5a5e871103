"""Feature absorption: a feature that should fire on a whole class and does not, where a narrower one does its work."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from circuitsae.benchmark.layers import BenchmarkLayer, Seen
from transcoders.evaluation.probes import Probe, logistic_probe, mean_differences, strongest

MOST_SPLIT = 10
"""Features that a concept may be split into."""
F1_JUMP = 0.03
"""What the next feature must add to the F1 of a sparse probe to count as a part of the concept."""
LEAST_F1 = 0.6
"""Concepts whose dense probe does worse are left out: the model does not know them there."""
FULL_COSINE, PART_COSINE = 0.025, 0.1
"""How far an absorbing feature must point along the probe, alone and with others."""
PROPORTION = 0.4
"""Of the projection on the probe that absorbing features must make."""
MOST_ABSORBING = 3
"""Features that absorb one word together."""


def absorption(
    layer: BenchmarkLayer, train: Seen, test: Seen, y_train: Bool[np.ndarray, "n class_"],
    y_test: Bool[np.ndarray, "m class_"],
) -> dict[str, float]:  # fmt: skip
    """Share of the words of a class on which its own features are silent and others write it in their place.

    A dense probe of each class gives its direction p (of norm one). The class's own features S are the first k by mean
    difference, as long as each of them adds 0.03 to the F1 of a probe on them. Of the test words that the dense probe
    gets right, with projection x·p:

    * `full`: the share where no feature of S is active, and the feature with the largest `a_i d_i·p` has
      `cos(d_i, p) ≥ 0.025` and makes at least 0.4 of x·p.
    * `fraction`: the mean of `A / (A + M)`, M being the sum of `a_i d_i·p` over S and A that of the three largest among
      the others with `cos(d_i, p) ≥ 0.1`, at most `x·p − M`; 0 where M ≥ x·p or A < 0.4 x·p, 1 where M ≤ 0.

    Means over classes whose dense probe has an F1 of 0.6 on the test half; `classes` is how many those are, `split` the
    mean size of S, `f1` the mean F1 of the probes of all classes. NaN where there is no such class.

    Three departures from SAEBench: features are ranked by mean difference, where it trains an L1 probe on all of them;
    x is less what the dictionary writes without features; `d_i·p` takes decoders with their norm.

    Source: Chanin et al. 2024, *A is for Absorption* (arXiv 2409.14507), whose ablation effect is replaced by the
    projection as in Karvonen et al. 2025, *SAEBench* (arXiv 2503.09532), appendix.
    """
    probe = logistic_probe(train.write, y_train)
    f1 = probe.f1(test.write, y_test)
    difference = mean_differences(train.features, y_train)
    full, part, sizes = [], [], []
    for number in np.flatnonzero(f1 >= LEAST_F1).tolist():
        own = split_features(train.features, y_train[:, number], difference[:, number])
        known = y_test[:, number] & (probe.scores(test.write)[:, number] > 0)
        direction = _direction(probe, number)
        if not known.any() or not len(own):
            continue
        full.append(float(fully_absorbed(layer, test[known], direction, own).mean()))
        part.append(float(absorbed_fraction(layer, test[known], direction, own).mean()))
        sizes.append(float(len(own)))
    return {
        "full": _mean(full), "fraction": _mean(part), "split": _mean(sizes), "classes": float(len(full)),
        "f1": float(f1.mean()),
    }  # fmt: skip


def split_features(
    features: Float[np.ndarray, "n feature"], y: Bool[np.ndarray, "n"], difference: Float[np.ndarray, "feature"]
) -> Int[np.ndarray, "_"]:
    """The features that a class is split into: one, and each next by mean difference that adds 0.03 to the F1."""
    ranked, best = strongest(difference, MOST_SPLIT), 0.0
    for k in range(1, len(ranked) + 1):
        chosen = features[:, ranked[:k]]
        f1 = float(logistic_probe(chosen, y[:, None]).f1(chosen, y[:, None])[0])
        if k > 1 and f1 - best < F1_JUMP:
            return ranked[: k - 1]
        best = f1
    return ranked


def fully_absorbed(
    layer: BenchmarkLayer, seen: Seen, direction: Float[np.ndarray, "d_model"], own: Int[np.ndarray, "k"]
) -> Bool[np.ndarray, "text"]:
    """Of each text whether its class's own features are silent and a single other one writes most of the direction."""
    cosine, projected = _along(layer, seen, direction)
    largest = projected.argmax(axis=1)
    most = projected[np.arange(len(projected)), largest]
    total = seen.write @ direction
    silent = (seen.features[:, own] <= 0).all(axis=1)
    return silent & (cosine[largest] >= FULL_COSINE) & (total > 0) & (most >= PROPORTION * total)


def absorbed_fraction(
    layer: BenchmarkLayer, seen: Seen, direction: Float[np.ndarray, "d_model"], own: Int[np.ndarray, "k"]
) -> Float[np.ndarray, "text"]:
    """Of each text the part of the direction that others write in the place of its class's own features."""
    cosine, projected = _along(layer, seen, direction)
    total, mine = seen.write @ direction, projected[:, own].sum(axis=1)
    others = np.where(cosine >= PART_COSINE, projected, 0.0).clip(min=0)
    others[:, own] = 0
    absorbing = np.sort(others, axis=1)[:, -MOST_ABSORBING:].sum(axis=1)
    counted = np.minimum(absorbing, total - mine)
    part = np.where(mine <= 0, 1.0, counted / np.where(counted + mine > 0, counted + mine, 1.0))
    none = (total <= 0) | (mine >= total) | (absorbing < PROPORTION * total)
    return np.where(none, 0.0, part.clip(0, 1))


def _along(
    layer: BenchmarkLayer, seen: Seen, direction: Float[np.ndarray, "d_model"]
) -> tuple[Float[np.ndarray, "feature"], Float[np.ndarray, "text feature"]]:
    """Cosines of decoders with a direction, and what each feature writes along it."""
    product = layer.W_dec @ direction
    norms = np.linalg.norm(layer.W_dec, axis=1)
    return product / np.where(norms > 0, norms, 1.0), seen.features * product


def _direction(probe: Probe, number: int) -> Float[np.ndarray, "d_model"]:
    weight = probe.weight[:, number]
    return weight / np.linalg.norm(weight)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
