"""Does the circuit hang on where it was cut? Prunings at several sizes on resamples of the prompts, as an ensemble.

    s(u) = (1 / B) Σ_b [u ∈ pruning b]

is a unit's inclusion frequency; what is in every pruning (s = 1) is the strict consensus. Parekh 2026, "CIRCUS"
(arXiv 2603.00523); for one prompt's graph, `circuitsae.graph.consensus`.
"""

from collections import Counter

import numpy as np

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import Chart, Estimate, Finding, Rule
from circuitsae.audit.measurement.figures import closeness, jaccard, scored
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import FOUND, Cut, Subject, Unit, unit_name

SIZES = (0.5, 0.7, 1.0, 1.4, 2.0)
"""Prunings keep so many times as many units as the circuit has."""


def inclusion(subject: Subject, settings: Settings) -> dict[Unit, float]:
    """Of every unit that is in some pruning, or in the circuit, in which share of the prunings it is."""
    scores = subject.scores(scored(subject, settings), FOUND)
    count, rng = len(next(iter(scores.values()))), np.random.default_rng(settings.seed)
    held: Counter[Unit] = Counter()
    for _ in range(settings.resamples):
        among = rng.integers(0, count, count).tolist()
        for size in SIZES:
            held.update(subject.selected(scores, among, count=max(1, round(size * len(subject.units)))))
    prunings = settings.resamples * len(SIZES)
    return {unit: held[unit] / prunings for unit in [*held, *(subject.units - held.keys())]}


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """1 − |1 − f| of the part of the circuit that is in every pruning, with its interval over held-out prompts."""
    n = scored(subject, settings)
    tell(f"pruning {settings.resamples} resamples of {n} prompts at {len(SIZES)} sizes")
    shares = inclusion(subject, settings)
    strict = frozenset(unit for unit, share in shares.items() if share == 1)
    core, most = subject.connected(list(strict & subject.units)), [u for u, share in shares.items() if share >= 0.5]
    judge = subject.judging(settings.few)
    cuts = {"the circuit": subject.units, "its part in every pruning": core,
            "strict consensus": subject.connected(list(strict)),
            "in half of the prunings": subject.connected(most)}  # fmt: skip
    tell("judging the consensus")
    metric = judge.metric([Cut(units) for units in cuts.values()])
    f, drawn = judge.of(metric), judge.drawn(metric, seed=settings.seed)
    found = Estimate.of(float(closeness(f[1])), closeness(drawn[1]))
    own = float(np.mean([shares[unit] for unit in subject.units]))
    rows: list[dict] = [
        {"of": name, "units": len(units), "f": float(value), "jaccard": jaccard(units, subject.units),
         "frequency": None, "in_circuit": None}
        for (name, units), value in zip(cuts.items(), f, strict=True)
    ]  # fmt: skip
    ranked = sorted(shares, key=lambda unit: (-shares[unit], unit not in subject.units, unit_name(unit)))
    rows += [{"of": unit_name(unit), "units": 1, "f": None, "jaccard": None, "frequency": shares[unit],
              "in_circuit": unit in subject.units} for unit in ranked]  # fmt: skip
    shown = [unit for unit in ranked if unit in subject.units][:60]
    return CRITERION.finding(
        found,
        f"{len(core)} of the circuit's {len(subject.units)} units are in all of {settings.resamples * len(SIZES)} "
        f"prunings of half to twice its size (a unit of it in {100 * own:.0f} % of them, on average); alone they give "
        f"f {f[1]:.2f}, the circuit {f[0]:.2f}.",
        "A circuit whose work lies in units that every pruning keeps, or prunings on more prompts, which differ less.",
        judged=judge,
        runs=subject.scoring * n,
        table=rows[:200],
        chart=Chart([unit_name(unit) for unit in shown], [shares[unit] for unit in shown],
                    y_title="share of the prunings that keep it"),
    )  # fmt: skip


CRITERION = Criterion(
    key="consensus",
    family="measurement",
    question="Does what the circuit does lie in units that every pruning keeps?",
    figure="1 − |1 − f| of the circuit's part in every pruning",
    # The narrowest prunings have half of the units: of f they should keep more than that; less than .3 is not the work.
    rule=Rule(confirms=0.7, refutes=0.3),
    measure=measure,
    runs=lambda subject, settings: 6 * settings.few + subject.scoring * scored(subject, settings),
)
