"""The k best entries of each of many groups, kept while entries stream by."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Shaped, UInt64

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
