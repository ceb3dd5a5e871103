"""The k best entries of each of many groups, kept while entries stream by.

Examples of each feature: the contexts where it is strongest, and a sample of every stratum of its activations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Shaped, UInt64

from circuitsae.features.collection.statistics import exponents, part_of_range
from circuitsae.features.reading import Firing

EMPTY = np.uint64(2**64 - 1)
"""The order of a place that holds no entry."""

Payload = dict[str, np.ndarray]


class Entries(NamedTuple):
    """Candidates for places, one row each."""

    group: Int[np.ndarray, "n"]
    order: UInt64[np.ndarray, "n"]
    """The smallest are kept."""
    arrival: Int[np.ndarray, "n"]
    """Decides between equal orders: the earliest is kept."""
    key: UInt64[np.ndarray, "n"]
    """Of the entries of a group with one key, only the best is kept."""

    def take(self, which: Shaped[np.ndarray, "_"]) -> "Entries":
        """The rows `which`, by number or mask."""
        return Entries(*(column[which] for column in self))


class KeepBest:
    """For each group the `k` entries of smallest `order`, distinct by `key`.

    What is kept is a function of the set of entries seen, whatever their division into calls: the best entry of a key
    that belongs to the final k is never pushed out, for whatever pushes it out would be better than it at the end too.
    """

    def __init__(self, groups: int, k: int, payload: Mapping[str, tuple[tuple[int, ...], type]] | None = None) -> None:
        """`payload`: name, shape and type of what is stored with each entry."""
        self.k = k
        self.order = np.full((groups, k), EMPTY)
        self.arrival = np.zeros((groups, k), np.int64)
        self.key = np.zeros((groups, k), np.uint64)
        self.payload = {name: np.zeros((groups, k, *shape), kind) for name, (shape, kind) in (payload or {}).items()}

    def admits(self, group: Int[np.ndarray, "n"], order: UInt64[np.ndarray, "n"]) -> np.ndarray:
        """Which entries may find a place: those better than the worst of a full group."""
        return order < self.order[group, -1]

    def offer(self, entries: Entries, payload: Callable[[np.ndarray], Payload]) -> None:
        """Keep the best of what is held and offered; `payload(rows)` gives what belongs to rows of `entries`."""
        rows = np.flatnonzero(self.admits(entries.group, entries.order))
        if len(rows) == 0:
            return
        groups = np.unique(entries.group[rows])
        held, held_payload = self._take_out(groups)
        n_held = len(held.group)
        both = Entries(*(np.concatenate(pair) for pair in zip(held, entries.take(rows), strict=True)))
        chosen, rank = _best(both, self.k)
        place = (both.group[chosen], rank)
        self.order[place], self.arrival[place], self.key[place] = (
            both.order[chosen], both.arrival[chosen], both.key[chosen],
        )  # fmt: skip
        old = chosen < n_held
        fresh = payload(rows[chosen[~old] - n_held])
        for name, store in self.payload.items():
            store[place[0][old], rank[old]] = held_payload[name][chosen[old]]
            store[place[0][~old], rank[~old]] = fresh[name]

    def regroup(self, before: Int[np.ndarray, "n"], after: Int[np.ndarray, "n"]) -> None:
        """Empty the groups `before` (ascending) and offer their entries to the groups `after`."""
        held, payload = self._take_out(before)
        moved = held._replace(group=after[np.searchsorted(before, held.group)])
        self.offer(moved, lambda rows: {name: values[rows] for name, values in payload.items()})

    def entries(self) -> tuple[Entries, Payload]:
        """All that is held, sorted by group and order."""
        places = np.nonzero(self.order != EMPTY)
        return self._at(places[0], places), {name: store[places] for name, store in self.payload.items()}

    def _take_out(self, groups: Int[np.ndarray, "g"]) -> tuple[Entries, Payload]:
        which, rank = np.nonzero(self.order[groups] != EMPTY)
        places = (groups[which], rank)
        taken = self._at(places[0], places), {name: store[places] for name, store in self.payload.items()}
        self.order[groups] = EMPTY
        return taken

    def _at(self, group: np.ndarray, places: tuple[np.ndarray, ...]) -> Entries:
        return Entries(group.astype(np.int64), self.order[places], self.arrival[places], self.key[places])

    # what a run goes on from

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """All that is held, by names that begin with `prefix`."""
        own = {"order": self.order, "arrival": self.arrival, "key": self.key, **self.payload}
        return {f"{prefix}.{name}": array for name, array in own.items()}

    def restore(self, arrays: Mapping[str, np.ndarray], prefix: str) -> None:
        """Take over what `arrays` gave; raises `KeyError` where something is missing, `ValueError` for other sizes."""
        for name, array in self.arrays(prefix).items():
            array[...] = arrays[name]


def _best(entries: Entries, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the k best entries of each group, distinct by key, and their ranks."""
    by_key = np.lexsort((entries.arrival, entries.order, entries.key, entries.group))
    group, key = entries.group[by_key], entries.key[by_key]
    again = (group[1:] == group[:-1]) & (key[1:] == key[:-1])
    rows = by_key[np.concatenate([[True], ~again])]
    rows = rows[np.lexsort((entries.arrival[rows], entries.order[rows], entries.group[rows]))]
    rank = rank_in_runs(entries.group[rows])
    return rows[rank < k], rank[rank < k]


def rank_in_runs(sorted_values: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """How many equal values stand before each one."""
    n = len(sorted_values)
    starts = np.flatnonzero(np.concatenate([[True], sorted_values[1:] != sorted_values[:-1]])[:n])
    return np.arange(n) - np.repeat(starts, np.diff(np.append(starts, n)))


def mixed(values: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """A pseudo-random permutation of the 64-bit numbers: the finaliser of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


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
    first: int = 1
    """The first position with features."""

    @cached_property
    def windows(self) -> Int[np.ndarray, "token window"]:
        """Token ids `before` to `after` each token of the chunk; `NO_TOKEN` beyond the row, and before `first`."""
        n_rows, context = self.rows.shape
        padded = np.full((n_rows, self.before + context + self.after), NO_TOKEN, np.int32)
        padded[:, self.before + self.first : self.before + context] = self.rows[:, self.first :]
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
