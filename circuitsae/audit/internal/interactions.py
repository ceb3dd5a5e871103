"""Do parts stand in for each other? Effects of pairs against those of their parts, inside the circuit and out of it.

A pair whose joint effect exceeds the sum of its own is a backup: inside the circuit that is part of what it explains.
What speaks against a circuit is a backup outside: once a part a is out, all that the circuit leaves out does more than
it did before,

    b(a) = [f(M∖a) − f(C∖a)] − [f(M) − f(C)]        (its completeness for K = {a}, Wang et al. 2022, section 4.1).
"""

from itertools import combinations

import numpy as np

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import Chart, Estimate, Finding, Rule
from circuitsae.audit.internal.members import beyond_noise, listed, p_values, strongest
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import Cut, Judging, Subject, Unit

PARTS = 8
"""The strongest ones, of which every pair is taken out."""
RULE = Rule(confirms=0.13, refutes=0.5)
"""Those of sufficiency: what the circuit alone may lack is what others may take over."""


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """The largest b(a) over the strongest parts, with its interval over prompts; the pairs inside are in the table.

    The interaction of a pair is e(a∪b) − e(a) − e(b) + e(a∩b), with e what is lost of f when units are out: parts of
    edges share those between them, which are no interaction.
    """
    tell("the strongest parts")
    names, judge = strongest(subject, settings.few)[:PARTS], subject.judging(settings.few)
    parts = {name: subject.parts[name] for name in names}
    tell(f"{len(parts)} parts out, alone and in pairs, on {len(judge.prompts)} prompts")
    pairs, inside = _inside(judge, parts)
    outside = _outside(subject, judge, parts)
    scale = judge.ends[0]
    backups, resampled = judge.of(outside + scale), judge.drawn(outside + scale, seed=settings.seed)
    largest = Estimate.of(float(backups.max()), resampled.max(0))
    each = [Estimate.of(float(value), row) for value, row in zip(backups, resampled, strict=True)]
    rows: list[dict] = [
        {"part": name, "and": "all outside", "interaction": one.value, "low": one.low, "high": one.high}
        for name, one in zip(names, each, strict=True)
    ]
    said = f"Once {names[int(backups.argmax())]} is out, what the circuit leaves out does {largest} more of it."
    if pairs:
        rows += _pair_rows(judge, pairs, inside, settings.seed)
        said += _of_pairs(rows[len(names) :])
    return CRITERION.finding(
        largest,
        said,
        "The parts outside that then do more belong to the account; the circuit with them would lower this."
        if largest.value > RULE.confirms
        else "A part outside that stands in for one of these would raise this.",
        judged=judge,
        table=rows,
        chart=Chart(
            names, backups.tolist(), [one.low for one in each], [one.high for one in each],
            y_title="f that all outside takes over", lines={"none": 0.0, "confirms": RULE.confirms},
        ),
    )  # fmt: skip


def _inside(judge: Judging, parts: dict[str, frozenset[Unit]]) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Every pair, and of the metric on each prompt its interaction [pair, example]."""
    pairs = list(combinations(parts, 2))
    wanted = [units for a, b in pairs for units in (parts[a] | parts[b], parts[a], parts[b], parts[a] & parts[b])]
    sets = list(dict.fromkeys(wanted))
    if not sets:
        return [], np.zeros((0, len(judge.prompts)))
    lost = judge.ends[1] - judge.metric([Cut(units, all_but=True) for units in sets])
    effect = dict(zip(sets, lost, strict=True))
    found = [
        effect[parts[a] | parts[b]] - effect[parts[a]] - effect[parts[b]] + effect[parts[a] & parts[b]]
        for a, b in pairs
    ]
    return pairs, np.array(found)


def _outside(subject: Subject, judge: Judging, parts: dict[str, frozenset[Unit]]) -> np.ndarray:
    """b(a) of each part, of the metric on each prompt [part, example]."""
    left = [subject.units - units for units in parts.values()]
    metric = judge.metric([subject.kept, *map(Cut, left), *(Cut(units, all_but=True) for units in parts.values())])
    circuit, without, model = metric[0], metric[1 : 1 + len(left)], metric[1 + len(left) :]
    return (model - without) - (judge.ends[1] - circuit)


def _pair_rows(judge: Judging, pairs: list[tuple[str, str]], change: np.ndarray, seed: int) -> list[dict]:
    value = judge.of(change + judge.ends[0])
    resampled = judge.drawn(change + judge.ends[0], seed=seed)
    sure = beyond_noise(p_values(judge, change))
    rows = []
    for (a, b), one, row, significant in zip(pairs, value, resampled, sure, strict=True):
        kind = "none" if not significant else "backup" if one > 0 else "in one path"
        found = Estimate.of(float(one), row)
        rows.append({"part": a, "and": b, "interaction": found.value, "low": found.low, "high": found.high,
                     "kind": kind})  # fmt: skip
    return rows


def _of_pairs(rows: list[dict]) -> str:
    backups = sorted((row for row in rows if row["kind"] == "backup"), key=lambda row: -row["interaction"])
    none = sum(row["kind"] == "none" for row in rows)
    named = listed([f"{row['part']} with {row['and']} ({row['interaction']:.2f})" for row in backups], 3)
    found = f"backups are {named}" if backups else "none is a backup"
    return f" Inside, {none} of {len(rows)} pairs have no interaction beyond noise; {found}."


def _runs(subject: Subject, settings: Settings) -> int:
    n = min(PARTS, len(subject.parts))
    shared = n * (n - 1) // 4 if subject.kind == "heads" else 1
    return settings.few * (3 + 3 * n + n * (n - 1) // 2 + shared)


CRITERION = Criterion(
    key="interactions",
    family="internal",
    question="Does anything outside stand in for the circuit's parts?",
    figure="largest f that all outside takes over when a part is out",
    rule=RULE,
    measure=measure,
    runs=_runs,
)
