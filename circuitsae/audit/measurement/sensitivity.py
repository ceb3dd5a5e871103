"""Would the method have found it? Circuits are planted in small models, and looked for as this one's kind is.

The planted programs (`circuitsae.audit.planted`) sit in models with idle heads and layers, every weight of which is
moved by noise; found circuits are held against the edges that were planted:

    F1 = 2 · precision · recall / (precision + recall).

The audited model takes no part, so that one measurement serves every audit with the same ablation.
"""

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import RESAMPLES, Chart, Estimate, Finding, Rule, untested
from circuitsae.audit.planted import PROGRAMS, Handmade
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import Subject
from circuitsae.components import Edge, PatchingProblem, eap_ig, find_circuit, overlap
from circuitsae.components.known import projection
from circuitsae.components.problem import Ablation
from circuitsae.reproduce.result import Settings as Reproduction

LAYERS, HEADS, NOISE = 3, 4, 0.02
"""The planted hold five to eight of 302 edges, and four fifths of what the model does or more; noise holds the rest."""
DRAWS = 3
"""Draws of the noise and of the prompts, for each program."""

Find = Callable[[Sequence[PatchingProblem], int], Collection[Edge]]
"""Finds a circuit; it is told how many edges were planted, and the package's own method does not look."""


class Recovered(NamedTuple):
    """One planted circuit and what was found of it."""

    program: str
    draw: int
    planted: int
    found: int
    precision: float
    recall: float
    f1: float


def by_faithfulness(problems: Sequence[PatchingProblem], planted: int) -> Collection[Edge]:
    """As circuits are found here: the fewest best edges that reach the target, and of these no more than it needs."""
    return find_circuit(problems, target=Reproduction().target).circuit


def by_size(problems: Sequence[PatchingProblem], planted: int) -> Collection[Edge]:
    """As circuits are found anew for other criteria: the best edges by score, as many as there were."""
    return [edge for edge in eap_ig(problems).ranked()[:planted] if isinstance(edge, Edge)]


def recovered(
    ablation: Ablation, find: Find, *, prompts: int, draws: int = DRAWS, programs: Sequence[Handmade] = PROGRAMS
) -> list[Recovered]:
    """Every planted program, found anew in each draw of noise and prompts."""
    rows = []
    for number, planted in enumerate(programs):
        for draw in range(draws):
            program = planted.program(
                per_length=-(-prompts // len(planted.lengths)), seed=draws * number + draw, layers=LAYERS, heads=HEADS,
                noise=NOISE,
            )  # fmt: skip
            truth = program.truth(ablation)
            found = find(program.problems(ablation, projection), len(truth))
            agreed = overlap(list(found), truth)
            precision, recall = agreed["precision"], agreed["recall"]
            both = precision + recall
            f1 = 2 * precision * recall / both if both else 0.0
            rows.append(Recovered(planted.name, draw, len(truth), len(found), precision, recall, f1))
    return rows


@lru_cache(maxsize=8)
def _once(ablation: Ablation, prompts: int) -> tuple[tuple[Recovered, ...], tuple[Recovered, ...]]:
    return (tuple(recovered(ablation, by_faithfulness, prompts=prompts)),
            tuple(recovered(ablation, by_size, prompts=prompts)))  # fmt: skip


def mean_f1(rows: Sequence[Recovered], seed: int = 0) -> Estimate:
    """The mean F1 with its interval over planted circuits."""
    values = np.array([row.f1 for row in rows])
    drawn = np.random.default_rng(seed).choice(values, (RESAMPLES, len(values))).mean(1)
    return Estimate.of(float(values.mean()), drawn)


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """Mean F1 of planted circuits, found with the subject's ablation on as many prompts as `settings.few`."""
    usual = subject.usual.ablation
    if usual == "noise":
        return untested(
            CRITERION.key, "Which edges of a planted circuit noise disturbs depends on its draw; they are not known.",
            "Judging by resample, mean or zero ablation would let it.",
        )  # fmt: skip
    ablation: Ablation = "mean" if usual == "role mean" else usual
    tell(f"{DRAWS * len(PROGRAMS)} planted circuits, {ablation} ablation")
    rows, sized = _once(ablation, settings.few)
    found = mean_f1(rows, settings.seed)
    precision, recall = (float(np.mean([getattr(row, name) for row in rows])) for name in ("precision", "recall"))
    worst = min(rows, key=lambda row: row.f1)
    by_program = [mean_f1([row for row in rows if row.program == program.name]) for program in PROGRAMS]
    return CRITERION.finding(
        found,
        f"Of {len(rows)} circuits planted in small models, the method finds {recall:.0%} of the edges, and "
        f"{precision:.0%} of what it finds was planted (F1 {found}; worst {worst.f1:.2f}, {worst.program}); the best "
        f"by score, as many as were planted, come to F1 {mean_f1(sized, settings.seed)}.",
        f"A method that finds {'fewer edges beside' if precision < recall else 'more of'} the planted ones of "
        f"{worst.program} would raise it.",
        table=[
            {**row._asdict(), "method": method}
            for method, kind in (("fewest that reach the target", rows), ("best by score", sized)) for row in kind
        ],
        chart=Chart(
            [program.name for program in PROGRAMS], [one.value for one in by_program],
            [one.low for one in by_program], [one.high for one in by_program], y_title="F1",
            lines={"confirms": RULE.confirms, "refutes": RULE.refutes},
        ),
    )  # fmt: skip


RULE = Rule(confirms=0.9, refutes=0.5)
"""Nine edges of ten right, both ways, is what a reader takes a found circuit for; half of them wrong is no circuit."""
CRITERION = Criterion(
    key="sensitivity",
    family="measurement",
    question="Does the method find circuits that were planted, and nothing beside them?",
    figure="F1 of the edges of planted circuits",
    rule=RULE,
    measure=measure,
    runs=lambda subject, settings: 0,  # none of the audited model's
)
