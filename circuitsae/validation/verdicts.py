"""From measurements to verdicts, one claim at a time.

| verdict     | of a claim whose ratio ρ = measured / predicted has the interval [low, high]                       |
|-------------|----------------------------------------------------------------------------------------------------|
| `attention` | direct edges: |Δ_patterns + Δ_norms| > |A|, patterns more than norms: it is carried by attention   |
| `norms`     | direct edges: the same, norms more than patterns                                                   |
| `confirmed` | [low, high] in [½, 2], and the effect is more than that of controls: q ≤ 5 %                       |
| `reversed`  | high < 0, and |measured| > δ                                                                       |
| `null`      | low and high times the prediction lie within ±δ: there is no effect to speak of                    |
| `undecided` | all else, with the `reason`                                                                        |
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from circuitsae.graph import Node, NodeKind
from circuitsae.validation.controls import Controls
from circuitsae.validation.statistics import chance

LOW, HIGH = 0.5, 2.0
Q = 0.05
NEGLIGIBLE = 0.25
"""A control's own prediction is at most this share of the tested edge's."""
FEWEST = int(1 / Q) - 1
"""Controls; with fewer no p-value can be below 5 %."""


@dataclass(frozen=True)
class Evidence:
    """What is known of each of n claims; arrays of length n."""

    predicted: Float[np.ndarray, "n"]
    measured: Float[np.ndarray, "n"]
    """The full removal."""
    ratio: Float[np.ndarray, "n"]
    low: Float[np.ndarray, "n"]
    high: Float[np.ndarray, "n"]
    finite: Bool[np.ndarray, "n"]
    """At every dose."""
    controls: np.ndarray
    """How many each was held against."""
    q: Float[np.ndarray, "n"]
    delta: Float[np.ndarray, "n"]
    """Effects smaller than this count for none."""


def decide(evidence: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """The verdict of each claim, and the reason of each that is undecided."""
    e = evidence
    agrees = (e.low >= LOW) & (e.high <= HIGH)
    effect = np.stack([e.low * e.predicted, e.high * e.predicted])
    cases = [
        (agrees & (e.q <= Q) & e.finite, "confirmed"),
        ((e.high < 0) & (np.abs(e.measured) > e.delta) & e.finite, "reversed"),
        ((np.abs(effect) < e.delta).all(axis=0) & e.finite, "null"),
    ]
    why = [
        (~e.finite, "a measurement is not a finite number"),
        (e.predicted == 0, "nothing is predicted"),
        (agrees & (e.controls < FEWEST), "too few controls"),
        (agrees, "controls do as much"),
        ((e.low >= 0) & (e.high < LOW), "less than half of what is predicted"),
        (e.low > HIGH, "more than twice what is predicted"),
        (e.high < 0, "the other way, by too little to tell"),
        ((e.low < 0) & (e.high >= 0), "the sign depends on the dose"),
        ((e.low < LOW) & (e.high <= HIGH), "at some doses less than half of what is predicted"),
        ((e.low >= LOW) & (e.high > HIGH), "at some doses more than twice what is predicted"),
    ]
    verdict = np.select([case for case, _ in cases], [name for _, name in cases], "undecided")
    reason = np.select([case for case, _ in why], [text for _, text in why], "the ratio depends on the dose")
    return verdict.astype(object), np.where(verdict == "undecided", reason, "").astype(object)


def against_controls(
    controls: Controls,
    source: Node,
    target: Node,
    predicted: float,
    measured: float,
    predictions: Float[np.ndarray, "control"],
    measurements: Float[np.ndarray, "control"],
) -> tuple[float, int]:
    """p of one claim and its number of controls: writers that could reach the target, and by their edges hardly do.

    Effects are studentised: divided by the root mean square of the controls at the same position (of all, where there
    are fewer than five or none does anything), then pooled over positions. NaN where there are too few controls.
    """
    alike = ~controls.is_token | (source.kind is NodeKind.TOKEN)
    itself = (controls.layer == source.layer) & (controls.pos == source.pos) & (controls.index == source.index)
    reaches = alike & ~itself & (controls.layer < target.layer) & (controls.pos <= target.pos)
    usable = reaches & (np.abs(predictions) <= NEGLIGIBLE * abs(predicted)) & np.isfinite(measurements)
    count = int(usable.sum())
    if count < FEWEST or not np.isfinite(measured):
        return np.nan, count
    places, effects = controls.pos[usable], measurements[usable] * np.sign(predicted)
    pooled = _size(effects) or 1.0
    scale = {
        place: _size(effects[places == place]) or pooled for place in np.unique(places) if (places == place).sum() >= 5
    }
    spread = np.array([scale.get(place, pooled) for place in places])
    return chance(measured * np.sign(predicted) / scale.get(source.pos, pooled), effects / spread), count


def _size(effects: np.ndarray) -> float:
    return float(np.sqrt(np.mean(effects**2)))
