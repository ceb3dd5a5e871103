"""What several criteria of measurement count with."""

from typing import Any

import numpy as np

from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import Subject, Unit


def closeness(f: Any) -> Any:
    """1 − |1 − f|, of a number or each of an array: f itself up to 1, and as bad above as below."""
    return 1 - np.abs(1 - np.asarray(f))


def jaccard(first: frozenset[Unit], second: frozenset[Unit]) -> float:
    """|A ∩ B| / |A ∪ B|; of two empty sets 1."""
    return len(first & second) / len(first | second) if first or second else 1.0


def by_chance(size: int, candidates: int) -> float:
    """The Jaccard index, about, of two sets of `size` drawn from so many candidates: k / (2 N − k)."""
    return size / (2 * candidates - size)


def scored(subject: Subject, settings: Settings) -> int:
    """Prompts on which units are scored anew; an attribution graph each, where they are features."""
    return 3 * settings.few if subject.kind == "heads" else settings.few
