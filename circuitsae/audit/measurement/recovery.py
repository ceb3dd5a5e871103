"""What methods find of circuits that were planted in small models (`planted`, `planted_features`)."""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from circuitsae.audit.finding import RESAMPLES, Estimate
from circuitsae.audit.planted import PROGRAMS, Handmade
from circuitsae.audit.planted_features import planted_features
from circuitsae.components import Edge, PatchingProblem, eap_ig, find_circuit, overlap
from circuitsae.components.known import projection
from circuitsae.components.problem import Ablation
from circuitsae.components.scores import Item
from circuitsae.reproduce.features import ABLATION, FAITHFUL
from circuitsae.reproduce.result import Settings as Reproduction
from circuitsae.validation import faithfulness
from circuitsae.validation.circuits import Ranking, rank_nodes

LAYERS, HEADS, NOISE = 3, 4, 0.02
"""The planted hold two to eight of 302 edges, and four fifths of what the model does or more; noise holds the rest."""
DRAWS = 3
"""Draws of the noise and of the prompts, for each program."""
MOST = 60
"""Features and error nodes that a circuit may have, of 212."""

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

    @classmethod
    def of(cls, program: str, draw: int, found: Collection[Item], planted: Collection[Item]) -> "Recovered":
        agreed = overlap(found, planted)
        return cls(program, draw, len(planted), len(found), agreed["precision"], agreed["recall"])

    @property
    def f1(self) -> float:
        """2 · precision · recall / (precision + recall); 0 where nothing planted was found."""
        return 2 * self.precision * self.recall / (self.precision + self.recall) if self.recall else 0.0


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
            rows.append(Recovered.of(planted.name, draw, found, truth))
    return rows


def recovered_features(
    *, prompts: int, draws: int = DRAWS * len(PROGRAMS), rank: Callable[..., Ranking] = rank_nodes
) -> tuple[list[Recovered], list[Recovered]]:
    """Planted features in each draw: the fewest best nodes that reach the bar, and as many as were planted."""
    fewest, sized = [], []
    for draw in range(draws):
        planted = planted_features(prompts=prompts, seed=draw, noise=NOISE)
        with _without_notices():
            ranking = rank(planted.model, planted.task)
        ranked = ranking.circuit(MOST)
        curve = faithfulness(planted.model, ranked, planted.task, ablation=ABLATION, sizes=range(1, len(ranked) + 1))
        for rows, size in ((fewest, curve.size_for(FAITHFUL) or MOST), (sized, len(planted.nodes))):
            rows.append(Recovered.of("features", draw, ranked.first(size).ids, planted.ids))
    return fewest, sized


def mean_f1(rows: Sequence[Recovered], seed: int = 0) -> Estimate:
    """The mean F1 with its interval over planted circuits."""
    values = np.array([row.f1 for row in rows])
    drawn = np.random.default_rng(seed).choice(values, (RESAMPLES, len(values))).mean(1)
    return Estimate.of(float(values.mean()), drawn)


@contextmanager
def _without_notices() -> Iterator[None]:
    """That a planted model has no norms, and its graphs take the slower engine, is no news of the audited one."""
    logger = logging.getLogger("circuitsae.attribution")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
