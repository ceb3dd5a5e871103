"""Linear probes: logistic regression of each class, and the features that it is given."""

from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from transcoders.errors import InputError

L2 = 1e-3
"""Weight of half the squared norm of a probe, in coordinates of variance one, beside a mean loss."""
_TINY, _SURE = 1e-12, 1e-5


class Probe(NamedTuple):
    """`score = x · weight + bias` of each class, against the rest; positive where it says yes."""

    weight: Float[np.ndarray, "d class_"]
    bias: Float[np.ndarray, "class_"]

    def scores(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n class_"]:
        return x @ self.weight + self.bias

    def accuracy(self, x: Float[np.ndarray, "n d"], y: Bool[np.ndarray, "n class_"]) -> Float[np.ndarray, "class_"]:
        """Share of right answers of each class, yes and no counted with half the weight each (balanced accuracy)."""
        said = self.scores(x) > 0
        with np.errstate(invalid="ignore"):
            right = (said & y).sum(0) / y.sum(0), (~said & ~y).sum(0) / (~y).sum(0)
        return (right[0] + right[1]) / 2

    def f1(self, x: Float[np.ndarray, "n d"], y: Bool[np.ndarray, "n class_"]) -> Float[np.ndarray, "class_"]:
        """`2 TP / (2 TP + FP + FN)` of each class; 0 where it has no case and none was said."""
        said = self.scores(x) > 0
        wrong = (said != y).sum(0)
        hits = 2 * (said & y).sum(0)
        return hits / np.maximum(hits + wrong, 1)


def logistic_probe(x: Float[np.ndarray, "n d"], y: Bool[np.ndarray, "n class_"], *, l2: float = L2) -> Probe:
    """Balanced logistic regression of each class against the rest, by scikit-learn.

    It minimises `mean_i c_i log(1 + exp(−s_i (x_i · w + b))) + l2/2 ‖w‖²` with s = ±1, over x with mean zero and
    variance one in each coordinate; weights come back in the coordinates of x. c gives yes and no the same weight
    altogether. Coordinates that are constant get no weight.

    Raises `InputError` for a class of which all examples say the same, and where scikit-learn (the extra `probes`) is
    missing.
    """
    if find_spec("sklearn") is None:
        raise InputError("Probes need scikit-learn, which is not installed; run: pip install 'circuitsae[probes]'.")
    from sklearn.linear_model import LogisticRegression

    count, yes = len(x), y.sum(axis=0)
    if count == 0 or not ((yes > 0) & (yes < count)).all():
        raise InputError("A probe needs examples of its class and of others; give more texts of each label.")
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    scale = np.where(deviation > _TINY, 1 / np.maximum(deviation, _TINY), 0.0)
    strength = 1 / (l2 * count) if l2 else np.inf
    fitted = [
        LogisticRegression(C=strength, class_weight="balanced", max_iter=1000, tol=_SURE).fit((x - mean) * scale, there)
        for there in y.T
    ]
    weight = np.stack([one.coef_[0] for one in fitted], axis=1) * scale[:, None]
    return Probe(weight, np.array([one.intercept_[0] for one in fitted]) - mean @ weight)


def mean_differences(x: Float[np.ndarray, "n d"], y: Bool[np.ndarray, "n class_"]) -> Float[np.ndarray, "d class_"]:
    """`mean(x | class) − mean(x | rest)` of each coordinate.

    Source: Gurnee et al. 2023, *Finding Neurons in a Haystack* (arXiv 2305.01610), "maximum mean difference".
    """
    here, there = y.sum(axis=0), (~y).sum(axis=0)
    return x.T @ y / np.maximum(here, 1) - x.T @ ~y / np.maximum(there, 1)


def strongest(score: Float[np.ndarray, "d"], k: int) -> Int[np.ndarray, "_"]:
    """The k largest scores' places, the largest first; fewer where fewer are above zero."""
    order = np.argsort(-score, kind="stable")[:k]
    return order[score[order] > 0]
