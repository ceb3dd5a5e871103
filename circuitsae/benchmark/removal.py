"""Concept removal: what a probe can no longer tell once the features that it goes by are taken out."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from circuitsae.benchmark.layers import BenchmarkLayer, Seen
from transcoders.evaluation.probes import logistic_probe, mean_differences, strongest

NS = (2, 5, 10, 20, 50)
"""Features that are taken out."""
_NOTHING = 1e-3
"""An oracle that is not better than this leaves nothing to recover."""


def probe_attribution(
    layer: BenchmarkLayer, weight: Float[np.ndarray, "d_model class_"], train: Seen,
    y: Bool[np.ndarray, "n class_"],
) -> Float[np.ndarray, "feature class_"]:  # fmt: skip
    """`(w · d_i)(mean(a_i | class) − mean(a_i | rest))`: what feature i adds to the difference of a probe's scores.

    Source: Karvonen et al. 2025, *SAEBench*, as an approximation of the indirect effect on the probe's logit.
    """
    return (layer.W_dec @ weight) * mean_differences(train.features, y)


def spurious_correlation_removal(
    layer: BenchmarkLayer, train: Seen, test: Seen, cells_train: Bool[np.ndarray, "n 2"],
    cells_test: Bool[np.ndarray, "m 2"], ns: Sequence[int] = NS,
) -> dict[str, float]:  # fmt: skip
    """`S_SHIFT = (A_ablated − A_base) / (A_oracle − A_base)`, of the direction in which the biased probe does worse.

    `cells`: whether a text has the concept and whether it has the spurious one; all four combinations alike. The probe
    C_b is trained on texts with both or neither, where it cannot tell the two apart, A_base is its accuracy for the
    concept on balanced texts, and A_oracle that of a probe trained on balanced ones. Ablated are the n features with
    the largest `|probe_attribution|` to a probe for the spurious concept. NaN where the oracle is no better.

    Beside the score, `base` and `oracle` are the two accuracies.

    Source: Marks et al. 2024, *Sparse Feature Circuits* (SHIFT); Karvonen et al. 2024, *Evaluating Sparse Autoencoders
    on Targeted Concept Removal Tasks* (arXiv 2411.18895); Karvonen et al. 2025, *SAEBench* (arXiv 2503.09532).
    """
    biased = cells_train[:, 0] == cells_train[:, 1]
    probe = logistic_probe(train.write[biased], cells_train[biased][:, [0]])
    base = [float(probe.accuracy(test.write, cells_test[:, [side]])[0]) for side in (0, 1)]
    concept = int(np.argmin(base))
    spurious = [1 - concept]
    balanced = logistic_probe(train.write, cells_train)
    oracle = float(balanced.accuracy(test.write, cells_test)[concept])
    score = np.abs(probe_attribution(layer, balanced.weight[:, spurious], train, cells_train[:, spurious]))[:, 0]
    found = {"base": base[concept], "oracle": oracle}
    for n in ns:
        ablated = test.without(layer, strongest(score, n))
        accuracy = float(probe.accuracy(ablated, cells_test[:, [concept]])[0])
        room = oracle - base[concept]
        found[f"n={n}"] = (accuracy - base[concept]) / room if room > _NOTHING else float("nan")
    return found


def targeted_probe_perturbation(
    layer: BenchmarkLayer, train: Seen, test: Seen, y_train: Bool[np.ndarray, "n class_"],
    y_test: Bool[np.ndarray, "m class_"], ns: Sequence[int] = NS,
) -> dict[str, float]:  # fmt: skip
    """`S_TPP = mean_i (A_i − A_i,i) − mean_{i≠j} (A_j − A_i,j)`.

    A_j is the balanced accuracy of the probe of class j on the test half, and A_i,j the same once the n features with
    the largest positive `probe_attribution` to class i are taken out; only features that are more active on class i
    count. `intended n=…` and `unintended n=…` are the two means.

    Source: Karvonen et al. 2024 (arXiv 2411.18895); Karvonen et al. 2025, *SAEBench* (arXiv 2503.09532).
    """
    probe = logistic_probe(train.write, y_train)
    clean = probe.accuracy(test.write, y_test)
    more = mean_differences(train.features, y_train) > 0
    score = np.where(more, probe_attribution(layer, probe.weight, train, y_train), 0.0)
    found = {"clean": float(clean.mean())}
    own = np.eye(y_train.shape[1], dtype=bool)
    for n in ns:
        dropped = np.stack(
            [clean - probe.accuracy(test.without(layer, strongest(each, n)), y_test) for each in score.T]
        )
        intended, unintended = float(dropped[own].mean()), float(dropped[~own].mean())
        found |= {f"n={n}": intended - unintended, f"intended n={n}": intended, f"unintended n={n}": unintended}
    return found
