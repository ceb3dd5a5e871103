"""How often and how strongly each feature fires: counts, sums, maxima, and histograms that grow exactly."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32, Int

from circuitsae.features.reading import Firing

BINS = 32
"""Bins of a histogram; a power of two."""


class Statistics:
    """Running numbers of `n` features.

    A histogram has 32 equal bins over `[0, 2^e)`, with `2^e` the smallest power of two above the largest activation.
    When that grows by one power, bins merge in pairs: at the end it is what one pass that knew the range would count.
    """

    def __init__(self, n: int) -> None:
        self.count = np.zeros(n, np.int64)
        self.sum = np.zeros(n, np.float64)
        self.max = np.zeros(n, np.float32)
        self.histogram = np.zeros((n, BINS), np.int64)

    def update(self, firing: Firing) -> Int[np.ndarray, "n"]:
        """Count a chunk; by how many powers of two each feature's range grew (0 for those that fire first)."""
        feature, n = firing.feature, len(self.count)
        before, fired = exponents(self.max), self.count > 0
        np.maximum.at(self.max, feature, firing.value)
        after = exponents(self.max)
        growth = np.where(fired, after - before, 0)
        for steps in np.unique(growth[growth > 0]).tolist():
            self._widen(np.flatnonzero(growth == steps), min(steps, BINS.bit_length() - 1))
        self.count += np.bincount(feature, minlength=n)
        self.sum += np.bincount(feature, weights=firing.value, minlength=n)
        np.add.at(self.histogram.reshape(-1), feature * BINS + part_of_range(firing.value, after[feature], BINS), 1)
        return growth

    def _widen(self, features: Int[np.ndarray, "m"], steps: int) -> None:
        merged = self.histogram[features].reshape(len(features), BINS >> steps, 1 << steps).sum(-1)
        self.histogram[features] = 0
        self.histogram[features, : BINS >> steps] = merged

    def arrays(self) -> dict[str, np.ndarray]:
        """What `restore` goes on from, by name."""
        own = {"count": self.count, "sum": self.sum, "max": self.max, "histogram": self.histogram}
        return {f"statistics.{name}": array for name, array in own.items()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `arrays` gave; raises `KeyError` where something is missing, `ValueError` for other sizes."""
        for name, array in self.arrays().items():
            array[...] = arrays[name]


def exponents(largest: Float32[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """e of the smallest power of two above each value."""
    return np.frexp(largest)[1].astype(np.int64)


def part_of_range(value: Float32[np.ndarray, "n"], exponent: Int[np.ndarray, "n"], parts: int) -> Int[np.ndarray, "n"]:
    """In which of the `parts` (a power of two) equal parts of `[0, 2^e)` each value, above 0, lies; exact."""
    return np.ldexp(value, (parts.bit_length() - 1) - exponent).astype(np.int64)
