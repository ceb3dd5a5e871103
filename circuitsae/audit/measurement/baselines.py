"""Is the circuit better than one that took no search? Random and naive circuits, and a model that has learnt nothing.

Random weights: Adebayo et al. 2018. Random circuits: Shi et al. 2024, "Hypothesis Testing the Circuit
Hypothesis in LLMs".
"""

from typing import Any

import numpy as np

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import RESAMPLES, Chart, Estimate, Finding, Rule, untested
from circuitsae.audit.measurement.figures import closeness
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import NOTHING, WHOLE, Cut, Judging, Subject
from circuitsae.validation.statistics import interval

UNTRAINED = 3
"""Models that have learnt nothing."""
SHARE = 0.975
"""Of the random circuits, what the circuit has to be above."""


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """c(C) − the largest of: the 97.5th percentile of c of random circuits, c of each naive circuit, what the circuit
    gives in an untrained model; with c = 1 − |1 − f|. Prompts and random circuits are resampled together.
    """
    judge = subject.judging(settings.few)
    random = [cut for cut in subject.random(settings.random, settings.seed) if cut != subject.units]
    if 2 * len(random) < settings.random:
        return untested(
            CRITERION.key,
            f"Of {settings.random} random circuits of this size and degree {settings.random - len(random)} are the "
            "circuit itself: so small a model leaves no room for others.",
            "A larger model, or a circuit of fewer of its edges, has random circuits to be told from.",
        )
    naive = subject.naive(settings.few)
    tell(f"{len(random)} random and {len(naive)} naive circuits")
    metric = judge.metric([subject.kept, *map(Cut, naive.values()), *map(Cut, random)])
    f, drawn = judge.of(metric), judge.drawn(metric, seed=settings.seed)
    blank, runs = _untrained(subject, settings, judge, tell)
    fixed = 1 + len(naive)
    rng = np.random.default_rng(settings.seed)
    chosen = closeness(drawn[fixed:])[rng.integers(0, len(random), (len(random), RESAMPLES)), np.arange(RESAMPLES)]
    rivals = {"random circuits": (float(_high(closeness(f[fixed:]))), _high(chosen))}
    rivals |= {name: (float(closeness(f[i])), closeness(drawn[i])) for i, name in enumerate(naive, 1)}
    most = max(blank, key=lambda row: row["f"], default=None)
    if most is not None:
        own = float(closeness(most["f"]))
        rivals["untrained model"] = (own, np.full(RESAMPLES, own))
    best = max(rivals, key=lambda name: rivals[name][0])
    value = float(closeness(f[0])) - rivals[best][0]
    highest = np.max([draws for _, draws in rivals.values()], axis=0)
    estimate = Estimate.of(value, closeness(drawn[0]) - highest)
    names = ["the circuit", *naive, *(f"random {i + 1}" for i in range(len(random)))]
    rows = [
        _row(name, len(cut), float(f[i]), interval(drawn[i]))
        for i, (name, cut) in enumerate(zip(names, [subject.units, *naive.values(), *random], strict=True))
    ] + blank
    said = f"f is {f[0]:.2f}; of {len(random)} random circuits of this size and degree 97.5 % stay below "
    said += (
        f"{_high(f[fixed:]):.2f}, naive ones reach {max([float(f[i]) for i in range(1, fixed)], default=np.nan):.2f}"
    )
    if most is not None:
        said += f"; in an untrained model the circuit gives {most['f']:.2f} of what the trained one does, all of it "
        said += f"{most['behaviour']:.2f}"
    return CRITERION.finding(
        estimate,
        f"{said}. The closest of these is {best}, {estimate} below.",
        f"{best.capitalize()} would have to do worse, or the circuit come closer to the model: units that the search "
        "adds are worth what they add over these.",
        judged=judge,
        runs=runs,
        table=rows[:200],
        chart=Chart([row["circuit"] for row in rows[:fixed]] + ["random"] * len(random) + ["untrained"] * len(blank),
                    [row["f"] for row in rows], y_title="f", lines={"the circuit": float(f[0])}),
    )  # fmt: skip


def _high(values: np.ndarray) -> Any:
    return np.quantile(values, SHARE, axis=0)


def _row(
    name: str, units: int, f: float, ends: tuple[float | None, float | None], behaviour: float = 1.0
) -> dict[str, Any]:
    return {"circuit": name, "units": units, "f": f, "low": ends[0], "high": ends[1], "behaviour": behaviour}


def _untrained(subject: Subject, settings: Settings, judge: Judging, tell: Tell) -> tuple[list[dict], int]:
    """What the circuit, and all of it, gives in models without learning, in units of what the trained model does."""
    empty, full = judge.ends.mean(1)
    rows, runs = [], 0
    for seed in range(settings.seed, settings.seed + UNTRAINED):
        other = subject.untrained(seed)
        if other is None:
            break
        tell("an untrained model")
        blank = other.judging(settings.few)
        none, whole, own = blank.metric([NOTHING, WHOLE, subject.kept]).mean(1)
        runs += blank.runs
        f, behaviour = float((own - none) / (full - empty)), float((whole - none) / (full - empty))
        rows.append(_row(f"untrained model {seed}", len(subject.units), f, (None, None), behaviour))
    return rows, runs


CRITERION = Criterion(
    key="baselines",
    family="measurement",
    question="Does the circuit do more than circuits that took no search, and than it does without learning?",
    figure="1 − |1 − f| above the best baseline",
    # Above by half of the behaviour: the search found more than luck would. Within a tenth: it need not have been made.
    rule=Rule(confirms=0.5, refutes=0.1),
    measure=measure,
    runs=lambda subject, settings: (6 + settings.random + 3 * UNTRAINED) * settings.few,
)
