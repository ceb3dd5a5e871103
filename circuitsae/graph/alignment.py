"""Which position of one prompt corresponds to which of another, and an order in which both can be read."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from transcoders.errors import InputError

_MOST = 2**27
"""Pairs of positions that are looked at, a byte or four each."""


class Alignment(NamedTuple):
    """The places that two prompts take side by side; positions that correspond have one place."""

    a: tuple[int, ...]
    """The place of each position of the first prompt."""
    b: tuple[int, ...]
    """The same of the second."""
    size: int

    def tokens(self, side: int, tokens: Sequence[str]) -> list[str | None]:
        """By place the token of one of the two prompts, None where it has none."""
        found: list[str | None] = [None] * self.size
        for place, token in zip((self.a, self.b)[side], tokens, strict=True):
            found[place] = token
        return found


def align(
    a: Sequence[str],
    b: Sequence[str],
    *,
    positions: Mapping[int, int] | None = None,
    roles: tuple[Mapping[str, int], Mapping[str, int]] | None = None,
) -> Alignment:
    """Places for the tokens of two prompts.

    * `positions`: from those of the first to those of the second; others have no counterpart.
    * `roles`: the positions of the same, by name: those of one name correspond.
    * otherwise prompts of equally many tokens correspond one by one; of others the longest common subsequence of
      tokens does, the last positions, which a graph explains, and what stands between where it is equally long.

    Raises `InputError` for positions that are not there or are given twice.
    """
    pairs = _given(positions, roles)
    if pairs is None:
        pairs = [(i, i) for i in range(len(a))] if len(a) == len(b) else corresponding(a, b)
    for side, (length, name) in enumerate(((len(a), "first"), (len(b), "second"))):
        own = [pair[side] for pair in pairs]
        if len(set(own)) < len(own) or any(not 0 <= pos < length for pos in own):
            raise InputError(
                f"The positions {own} do not name positions of the {name} prompt once each; it has {length} tokens, "
                "counted from 0."
            )
    return _placed(len(a), len(b), pairs)


def corresponding(a: Sequence[str], b: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of positions, rising: the last ones, a longest common subsequence of the others, and equal gaps."""
    if not a or not b:
        return []
    pairs = [*longest_common(a[:-1], b[:-1]), (len(a) - 1, len(b) - 1)]
    found, i, j = [], 0, 0
    for stop_i, stop_j in pairs:
        if stop_i - i == stop_j - j:
            found += zip(range(i, stop_i), range(j, stop_j), strict=True)
        found.append((stop_i, stop_j))
        i, j = stop_i + 1, stop_j + 1
    return found


def longest_common(a: Sequence[str], b: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of positions, rising in both, at which two texts have the same token: as many as there can be."""
    if len(a) * len(b) > _MOST:
        raise InputError(
            f"Prompts of {len(a):,} and {len(b):,} tokens are too long to find what they have in common; give "
            "positions, which of one correspond to which of the other."
        )
    number = {token: n for n, token in enumerate(dict.fromkeys([*a, *b]))}
    left, right = (np.array([number[token] for token in side], dtype=np.int64) for side in (a, b))
    length = np.zeros((len(a) + 1, len(b) + 1), dtype=np.int32)  # [i, j]: of a[i:] and b[j:]
    for i in range(len(a) - 1, -1, -1):
        best = np.maximum(length[i + 1, :-1], length[i + 1, 1:] + (right == left[i]))
        length[i, :-1] = np.maximum.accumulate(best[::-1])[::-1]
    pairs, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        if left[i] == right[j] and length[i, j] == length[i + 1, j + 1] + 1:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif length[i + 1, j] == length[i, j]:
            i += 1
        else:
            j += 1
    return pairs


def _given(
    positions: Mapping[int, int] | None, roles: tuple[Mapping[str, int], Mapping[str, int]] | None
) -> list[tuple[int, int]] | None:
    if positions is not None and roles is not None:
        raise InputError("Give positions or roles, not both.")
    if positions is not None:
        return sorted(positions.items())
    if roles is None:
        return None
    shared = [name for name in roles[0] if name in roles[1]]
    if not shared:
        raise InputError(f"The prompts share no role: {sorted(roles[0])} and {sorted(roles[1])}; give one name twice.")
    return sorted((roles[0][name], roles[1][name]) for name in shared)


def _placed(n_a: int, n_b: int, pairs: Sequence[tuple[int, int]]) -> Alignment:
    """The first prompt in its order, what only the second has after what stands before it there."""
    partner = {j: i for i, j in pairs}
    before: dict[int, list[int]] = {}
    last = -1
    for j in range(n_b):
        if j in partner:
            last = partner[j]
        else:
            before.setdefault(last, []).append(j)
    place_a, place_b, n = [0] * n_a, [0] * n_b, 0
    for i in range(-1, n_a):
        if i >= 0:
            place_a[i], n = n, n + 1
        for j in before.get(i, ()):
            place_b[j], n = n, n + 1
    for j, i in partner.items():
        place_b[j] = place_a[i]
    return Alignment(tuple(place_a), tuple(place_b), n)
