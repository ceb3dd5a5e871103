"""Examples of each feature: the contexts where it is strongest, and a sample of every stratum of its activations."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int, UInt64

from circuitsae.features.collection.keeping import Entries, KeepBest, Payload, mixed
from circuitsae.features.collection.statistics import Firing, exponents, part_of_range

FIRST = 1
"""The first position that has features; the one before is an outlier in most models."""
NO_TOKEN = -1
"""In the place of a token beyond either end of a row."""


@dataclass(frozen=True)
class Chunk:
    """Rows of tokens, what fires on them, and the window of text around every token."""

    rows: Int[np.ndarray, "row pos"]
    first_row: int
    """Number of the first row in the corpus."""
    firing: Firing
    before: int
    after: int

    @cached_property
    def windows(self) -> Int[np.ndarray, "token window"]:
        """Token ids `before` to `after` each token of the chunk; `NO_TOKEN` beyond the row, and for position 0."""
        n_rows, context = self.rows.shape
        padded = np.full((n_rows, self.before + context + self.after), NO_TOKEN, np.int32)
        padded[:, self.before + FIRST : self.before + context] = self.rows[:, FIRST:]
        width = self.before + 1 + self.after
        return np.lib.stride_tricks.sliding_window_view(padded, width, axis=1).reshape(-1, width)

    @cached_property
    def keys(self) -> UInt64[np.ndarray, "token"]:
        """A hash of each window: equal texts have equal keys."""
        key = np.zeros(len(self.windows), np.uint64)
        for column in self.windows.T:
            key = mixed(key ^ (column + 2).astype(np.uint64))
        return key

    @property
    def arrival(self) -> Int[np.ndarray, "n"]:
        """Place in the corpus of each active feature."""
        return self.first_row * self.rows.shape[1] + self.firing.token

    @cached_property
    def _by_feature(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted `feature · tokens + token` of all that is active, and where each stands in `firing`."""
        place = self.firing.feature * self.rows.size + self.firing.token
        order = np.argsort(place, kind="stable")
        return place[order], order

    def contents(self, which: Int[np.ndarray, "m"]) -> Payload:
        """What examples keep of rows of `firing`: the window's tokens and the feature's activation on each."""
        feature, token = self.firing.feature[which], self.firing.token[which]
        tokens = self.windows[token]
        beside = token[:, None] + np.arange(-self.before, self.after + 1)
        wanted = feature[:, None] * self.rows.size + beside
        places, order = self._by_feature
        found = np.searchsorted(places, wanted).clip(max=len(places) - 1)
        active = (places[found] == wanted) & (tokens != NO_TOKEN)
        activations = np.where(active, self.firing.value[order[found]], np.float32(0))
        return {"tokens": tokens, "activations": activations, "value": self.firing.value[which]}


def _store(groups: int, k: int, width: int) -> KeepBest:
    return KeepBest(
        groups, k, {"tokens": ((width,), np.int32), "activations": ((width,), np.float32), "value": ((), np.float32)}
    )


class TopExamples:
    """The `k` strongest contexts of each feature: at most one token of a row, no text twice, the earliest of equals."""

    def __init__(self, n: int, k: int, width: int) -> None:
        self.kept = _store(n, k, width)

    def update(self, chunk: Chunk) -> None:
        """Count a chunk; its activations are above 0."""
        order = np.uint64(2**32 - 1) - chunk.firing.value.view(np.uint32)  # positive floats sort as their bits
        which = np.flatnonzero(self.kept.admits(chunk.firing.feature, order))
        feature, token = chunk.firing.feature[which], chunk.firing.token[which]
        row = token // chunk.rows.shape[1]
        sorted_ = np.lexsort((token, order[which], row, feature))
        feature, row = feature[sorted_], row[sorted_]
        again = (feature[1:] == feature[:-1]) & (row[1:] == row[:-1])
        which = which[sorted_][np.concatenate([[True], ~again])[: len(sorted_)]]
        firing = chunk.firing.take(which)
        entries = Entries(firing.feature, order[which], chunk.arrival[which], chunk.keys[firing.token])
        self.kept.offer(entries, lambda rows: chunk.contents(which[rows]))


class StratifiedExamples:
    """A uniform sample, without repetition, of the distinct contexts in each stratum of each feature's activations.

    Strata are equal parts of `[0, 2^e)` as in `Statistics`. Every context has a pseudo-random number, a function of
    its text, the feature and the seed; a stratum keeps the contexts with the smallest. So strata that merge when the
    range grows keep a sample of their union, and the sample does not depend on the order of the corpus.
    """

    def __init__(self, n: int, strata: int, k: int, width: int, seed: int) -> None:
        self.strata, self.seed = strata, seed
        self.kept = _store(n * strata, k, width)

    def update(self, chunk: Chunk, largest: np.ndarray, growth: np.ndarray) -> None:
        """`largest`: maxima with this chunk counted; `growth`: what `Statistics.update` returned for it."""
        self._widen(growth)
        feature, token, value = chunk.firing
        group = feature * self.strata + part_of_range(value, exponents(largest)[feature], self.strata)
        key = chunk.keys[token]
        salt = mixed(np.arange(len(largest), dtype=np.uint64) + (np.uint64(self.seed) << np.uint64(40)))
        entries = Entries(group, mixed(key ^ salt[feature]), chunk.arrival, key)
        self.kept.offer(entries, chunk.contents)

    def _widen(self, growth: np.ndarray) -> None:
        """Ranges doubled: the lower strata take in what the upper ones were."""
        features = np.flatnonzero(growth > 0)
        if len(features) == 0:
            return
        part = np.arange(self.strata)
        shift = np.minimum(growth[features], self.strata.bit_length() - 1)
        before = features[:, None] * self.strata + part
        after = features[:, None] * self.strata + (part >> shift[:, None])
        self.kept.regroup(before.ravel(), after.ravel())


def examples_arrays(top: TopExamples, strata: StratifiedExamples) -> dict[str, np.ndarray]:
    """What `restore_examples` goes on from, by name."""
    return top.kept.arrays("top") | strata.kept.arrays("strata")


def restore_examples(top: TopExamples, strata: StratifiedExamples, arrays: Mapping[str, np.ndarray]) -> None:
    """Take over what `examples_arrays` gave; raises `KeyError` or `ValueError` for arrays of other examples."""
    top.kept.restore(arrays, "top")
    strata.kept.restore(arrays, "strata")
