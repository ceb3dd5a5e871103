"""Is there another circuit that does it? The best ones of as many units that share none with this one."""

from collections.abc import Sequence

import numpy as np

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import Chart, Estimate, Finding, Rule, untested
from circuitsae.audit.internal.members import strengths
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import CHOSEN, Cut, Judging, Subject, Unit

STARTS = 2
"""Random circuits from which to climb, beside the one of the best scores."""
STEPS, PROPOSALS, SWAPPED = 6, 4, 0.1
"""Steps of a climb, exchanges tried at each, and the share of the units that one exchanges."""
WIDTH = 4
"""Times the circuit's size: how many of the best other units a rival is made of."""
RULE = Rule(confirms=0.37, refutes=0.1)
"""A rival that falls to where sufficiency refutes (.5) beside a circuit where it confirms (.87) is none; one within a
tenth of the circuit is as faithful."""


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """|1 − f(R)| − |1 − f(C)| of the best rival R, with its interval over held-out prompts.

    Rivals are found and chosen on prompts of another draw: the best units by score, and from these and from random
    starts (units drawn by score) exchanges that lessen |1 − f|.
    """
    tell("scores of the units outside")
    strength = strengths(subject, settings.few)
    ranked = sorted((unit for unit in strength if unit not in subject.units), key=lambda unit: -strength[unit])
    best = ranked[: WIDTH * len(subject.units)]
    if not best:
        return untested(
            "rivals",
            "The circuit holds every unit that has a score, so no rival is left.",
            "A circuit that leaves something out would let it be tested.",
        )
    train = subject.judging(_few(settings), draw=CHOSEN)
    climb = _Climb(subject, train, best, np.array([strength[unit] for unit in best]), settings.seed)
    starts = [_filled(subject, best), *(_filled(subject, climb.drawn()) for _ in range(STARTS))]
    names = ["best scores", *(f"random start {i + 1}" for i in range(STARTS))]
    ends = []
    for name, start in zip(names, starts, strict=True):
        tell(f"climbing from {name} on {len(train.prompts)} prompts")
        ends.append(climb.run(start))
    found = min(ends, key=lambda end: end[1])[0]
    return _found(subject, settings, found, train, names, starts, ends)


def _few(settings: Settings) -> int:
    return max(4, settings.few // 2)


class _Climb:
    """Exchanges of units that lessen |1 − f| on some prompts."""

    def __init__(
        self, subject: Subject, judge: Judging, units: Sequence[Unit], strength: np.ndarray, seed: int
    ) -> None:
        self.subject, self.judge, self.units, self.rng = subject, judge, units, np.random.default_rng(seed)
        self.log = np.log(strength + 1e-9 * max(float(strength.max()), 1e-30))

    def drawn(self) -> list[Unit]:
        """The units in a random order, drawn one by one in proportion to their scores."""
        order = np.argsort(-(self.log + self.rng.gumbel(size=len(self.units))))
        return [self.units[i] for i in order]

    def off(self, circuits: Sequence[frozenset[Unit]]) -> np.ndarray:
        return np.abs(1 - self.judge.f([Cut(units) for units in circuits]))

    def run(self, start: frozenset[Unit]) -> tuple[frozenset[Unit], float]:
        """The circuit at the end of a climb, and its |1 − f|."""
        best, off = start, float(self.off([start])[0])
        for _ in range(STEPS):
            tried = [self.exchanged(best) for _ in range(PROPOSALS)]
            values = self.off(tried)
            if values.min() < off:
                best, off = tried[int(values.argmin())], float(values.min())
        return best, off

    def exchanged(self, circuit: frozenset[Unit]) -> frozenset[Unit]:
        order = [unit for unit in self.units if unit in circuit]
        gone = {order[i] for i in self.rng.permutation(len(order))[: max(1, round(SWAPPED * len(order)))]}
        kept = [unit for unit in order if unit not in gone]
        return _filled(self.subject, [*kept, *(unit for unit in self.drawn() if unit not in circuit)])


def _filled(subject: Subject, ranked: Sequence[Unit]) -> frozenset[Unit]:
    """The connected part of as many of the first units as leave it no larger than the circuit."""
    low, high = min(len(subject.units), len(ranked)), len(ranked)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high) if len(subject.connected(ranked[:middle])) <= len(subject.units) else (low, middle - 1)
        )
    return subject.connected(ranked[:low])


def _found(
    subject: Subject,
    settings: Settings,
    rival: frozenset[Unit],
    train: Judging,
    names: list[str],
    starts: list[frozenset[Unit]],
    ends: list[tuple[frozenset[Unit], float]],
) -> Finding:
    judge = subject.judging(settings.held_out)
    metric = judge.metric([subject.kept, Cut(rival), Cut(subject.units, all_but=True)])
    f, resampled = judge.of(metric), judge.drawn(metric, seed=settings.seed)
    own, other, every = (Estimate.of(float(value), row) for value, row in zip(f, resampled, strict=True))
    margin = Estimate.of(abs(1 - f[1]) - abs(1 - f[0]), np.abs(1 - resampled[1]) - np.abs(1 - resampled[0]))
    begun = train.f([Cut(start) for start in starts])
    rows = [
        {"rival": name, "units": len(units), "f at the start": float(value), "|1 - f| at the end": off}
        for name, value, (units, off) in zip(names, begun, ends, strict=True)
    ]
    return CRITERION.finding(
        margin,
        f"The best of {len(ends)} rivals without any of the circuit's {len(subject.units)} units has {len(rival)} and "
        f"f {other} on {len(judge.prompts)} held-out prompts; the circuit has {own}, and all that "
        f"it leaves out {every}.",
        "A longer search, or units that the scores miss, could find a rival; that none was found proves none.",
        judged=judge,
        runs=train.runs,
        table=rows,
        chart=Chart(
            ["circuit", "best rival", "all outside"], [own.value, other.value, every.value],
            [own.low, other.low, every.low], [own.high, other.high, every.high], y_title="f", lines={"the model": 1.0},
        ),
    )  # fmt: skip


CRITERION = Criterion(
    key="rivals",
    family="internal",
    question="Is there no other circuit of this size that does as well?",
    figure="how much further from 1 the f of the best rival is",
    rule=RULE,
    measure=measure,
    runs=lambda subject, settings: (
        5 * settings.held_out + _few(settings) * (2 + (1 + STARTS) * (2 + STEPS * PROPOSALS))
    ),
)
