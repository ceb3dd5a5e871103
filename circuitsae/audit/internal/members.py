"""A circuit's members: which there are, which are the strongest, and which of their effects stand out from noise."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

from circuitsae.audit.subject import Judging, Subject, Unit, unit_name
from circuitsae.validation.statistics import corrected

MOST = 60
"""Members that are tried one by one."""
FLOOR = 1e-3
"""A change below this share of what the model does is none, whatever its p: single precision's noise is as large."""
SURE = 0.05


def units_or_parts(subject: Subject) -> Mapping[str, frozenset[Unit]]:
    """Each unit as a member, or, where there are more than `MOST`, each part."""
    if len(subject.units) > MOST:
        return subject.parts
    return {unit_name(unit): frozenset([unit]) for unit in sorted(subject.units, key=unit_name)}


def drawn(members: Mapping[str, frozenset[Unit]], seed: int, most: int = MOST) -> dict[str, frozenset[Unit]]:
    """All members, or `most` of them drawn at random, in their order."""
    names = list(members)
    if len(names) > most:
        chosen = np.random.default_rng(seed).choice(len(names), most, replace=False)
        names = [names[i] for i in sorted(chosen)]
    return {name: members[name] for name in names}


def strengths(subject: Subject, n: int) -> dict[Unit, float]:
    """|mean score| of every unit that has one, on the prompts that circuits are found on."""
    return {unit: abs(float(np.mean(values))) for unit, values in subject.scores(n).items()}


def strongest(subject: Subject, n: int) -> list[str]:
    """The circuit's parts by the sum of their units' |mean score|, the largest first."""
    strength, parts = strengths(subject, n), subject.parts
    return sorted(parts, key=lambda name: -sum(strength.get(unit, 0.0) for unit in parts[name]))


def p_values(judge: Judging, change: Float[np.ndarray, "cut example"]) -> Float[np.ndarray, "cut"]:
    """Two-sided p of Student's t over prompts that a change of the metric is none; 1 for those below `FLOOR`."""
    if change.shape[1] < 2:
        return np.ones(len(change))
    mean, error = change.mean(1), change.std(1, ddof=1) / np.sqrt(change.shape[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stats.t.sf(np.abs(mean / error), change.shape[1] - 1)
    empty, full = judge.ends.mean(1)
    return np.where(np.abs(mean) <= FLOOR * abs(full - empty), 1.0, p)


def beyond_noise(p: Float[np.ndarray, "cut"]) -> np.ndarray:
    """Which of several tests are significant at `SURE` once corrected for their number (Benjamini & Hochberg 1995)."""
    return corrected(p) <= SURE


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names in a sentence, the first few and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
