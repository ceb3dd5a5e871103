"""Sparse probing: how well a few features, or a few coordinates, say what a text is about."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from circuitsae.benchmark.layers import Seen
from transcoders.evaluation.probes import logistic_probe, mean_differences, strongest

KS = (1, 2, 5)


def sparse_probing(
    train: Seen, test: Seen, y_train: Bool[np.ndarray, "n class_"], y_test: Bool[np.ndarray, "m class_"],
    ks: Sequence[int] = KS,
) -> dict[str, float]:  # fmt: skip
    """Balanced accuracy on the test half of logistic probes on k features, mean over classes against the rest.

    The k features are those with the largest `|mean(a | class) − mean(a | rest)|` on the training half; activations are
    means over a text's tokens. Beside them: `write k`, the same with k coordinates of the layer's own write, and
    `write`, a probe that sees all of it.

    Source: Gurnee et al. 2023, *Finding Neurons in a Haystack* (arXiv 2305.01610); Karvonen et al. 2025, *SAEBench*
    (arXiv 2503.09532), section 4.
    """
    found = {"write": float(logistic_probe(train.write, y_train).accuracy(test.write, y_test).mean())}
    sides = {"": (train.features, test.features), "write ": (train.write, test.write)}
    for name, (here, there) in sides.items():
        for k in ks:
            found[f"{name}k={k}"] = _with_best(here, there, y_train, y_test, k)
    return found


def _with_best(
    train: Float[np.ndarray, "n d"], test: Float[np.ndarray, "m d"],
    y_train: Bool[np.ndarray, "n class_"], y_test: Bool[np.ndarray, "m class_"], k: int,
) -> float:  # fmt: skip
    difference = np.abs(mean_differences(train, y_train))
    accuracies = []
    for number in range(y_train.shape[1]):
        best, one = strongest(difference[:, number], k), [number]
        probe = logistic_probe(train[:, best], y_train[:, one])
        accuracies.append(float(probe.accuracy(test[:, best], y_test[:, one])[0]))
    return float(np.mean(accuracies))
