"""What a circuit lacks and what it could do without, whatever its parts are: features, or heads and MLPs.

    completeness:  |F(C∖K) − F(M∖K)| for subsets K of C: a circuit without K should do as the model without K does;
    minimality:    for each part v of C, the largest |F(C∖K) − F(C∖(K∪{v}))| found; one that no K shows is idle;
    shrinking:     parts leave one by one, always the one without which the circuit is the most faithful.

Who asks says what F of a set is; here are sets alone. Source: Wang et al. 2022, "Interpretability in the Wild",
section 4.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

Part = TypeVar("Part", bound=Hashable)
Without = Callable[[Sequence[frozenset[Part]]], np.ndarray]
"""F(C∖K) of each K."""
Both = Callable[[Sequence[tuple[Part, ...]]], np.ndarray]
"""F(C∖K) and F(M∖K) of each K, [K, 2]."""


@dataclass(frozen=True)
class Compared(Generic[Part]):
    """The circuit and the model once K is ablated in both."""

    removed: tuple[Part, ...]
    circuit: float
    model: float

    @property
    def gap(self) -> float:
        return abs(self.circuit - self.model)


def halves(parts: Sequence[Part], draws: Iterable[Sequence[bool]]) -> list[tuple[Part, ...]]:
    """The parts that each draw, a truth value for each part, takes."""
    return [tuple(part for part, inside in zip(parts, row, strict=True) if inside) for row in draws]


def compare(
    both: Both[Part],
    subsets: Sequence[tuple[Part, ...]],
    parts: Sequence[Part],
    *,
    greedy: int,
    tried: Callable[[list[Part]], list[Part]] = list,
) -> list[Compared[Part]]:
    """Each K of `subsets`, then up to `greedy` of a growing K, by the part that widens the gap most.

    `tried` says which of the parts left a step tries. Two measurements for each K, all of a step in one batch.
    """
    found, grown = _compared(both, subsets), ()
    for _ in range(min(greedy, len(parts))):
        rest = [part for part in parts if part not in grown]
        best = max(_compared(both, [(*grown, part) for part in tried(rest)]), key=lambda step: step.gap)
        grown = best.removed
        found.append(best)
    return found


def _compared(both: Both[Part], subsets: Sequence[tuple[Part, ...]]) -> list[Compared[Part]]:
    return [Compared(k, *pair) for k, pair in zip(subsets, both(subsets).tolist(), strict=True)]


def largest_changes(
    without: Without[Part], tests: Sequence[tuple[Part, frozenset[Part]]]
) -> dict[Part, tuple[float, int]]:
    """For each part v the largest |F(C∖K) − F(C∖(K∪{v}))| over its tests (v, K), and the size of that K.

    Each set is measured once, all of them in one batch.
    """
    sets = list(dict.fromkeys(gone for v, k in tests for gone in (k, k | {v})))
    value = dict(zip(sets, without(sets).tolist(), strict=True))
    found: dict[Part, tuple[float, int]] = {}
    for v, k in tests:
        change = abs(value[k] - value[k | {v}])
        if v not in found or change > found[v][0]:
            found[v] = change, len(k)
    return found


@dataclass(frozen=True)
class Shrunk(Generic[Part]):
    """How parts left a circuit."""

    steps: tuple[tuple[Part, float, int], ...]
    """The part that left, f without it, and how many circuits were scored to choose it."""
    needed: dict[Part, float]
    """The parts left, and f without each: beyond the limit."""


def shrink(without: Without[Part], parts: Sequence[Part], limit: float, candidates: int | None = None) -> Shrunk[Part]:
    """Take parts out one by one, always the one without which |1 − f| is least, until every one is needed.

    Stops when without any part left |1 − f| exceeds `limit`. A step scores every part left, n²/2 circuits from n parts.
    With `candidates`, a step (the first aside) scores only these many, whose |1 − f| was least when they were last
    scored, and more where none of them can go: about n · (candidates + 2) circuits. Every f is measured, and none is
    needed that was not tried last of all; which of several leaves may differ from that of scoring all.
    """
    left, gone = list(parts), frozenset[Part]()
    steps: list[tuple[Part, float, int]] = []
    f: dict[Part, float] = dict.fromkeys(left, 0.0)
    while True:
        left.sort(key=lambda part: abs(1 - f[part]))
        block = candidates if candidates is not None and steps else len(left)
        for start in range(0, len(left), max(1, block)):
            tried = left[start : start + block]
            f |= dict(zip(tried, without([gone | {part} for part in tried]).tolist(), strict=True))
            best = min(tried, key=lambda part: abs(1 - f[part]))
            if abs(1 - f[best]) <= limit:
                break
        else:
            return Shrunk(tuple(steps), {part: f[part] for part in left})
        steps.append((best, f[best], min(len(left), start + block)))
        left.remove(best)
        gone |= {best}
