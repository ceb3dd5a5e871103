"""The page of `aligned.py`: two tables of figures, their differences seed by seed, and what becomes of each claim."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
import torch
from machine import machine
from scipy.stats import gaussian_kde
from torch import Tensor

from circuitsae.benchmark.result import Estimate, interval
from transcoders.dictionaries import DictionarySet
from transcoders.evaluation import bimodality, compare_seeds

EDGES = (-1.0, 0.2, 0.4, 0.6, 0.8, 1.0)
NONE_DEAD = 0.01
"""A share of dead features below which there are none to speak of."""
SAME_L0 = 0.02
"""L0 that differs by a smaller share is the same."""


class Case(NamedTuple):
    """What is trained aligned and not."""

    data: str
    kind: str
    start: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """One dictionary on held-out vectors."""

    dictionary: DictionarySet
    fvu: float
    l0: float
    dead: float
    shrinkage: float
    recovered: float | None
    """None where there is no model."""
    alive: Tensor
    product: Tensor
    cosine: Tensor


Runs = Sequence[Run]
Both = Mapping[bool, Runs]
"""By whether training was aligned."""


def page(claim: str, said: str, runs: Mapping[Case, Both]) -> str:
    """Everything, as Markdown."""
    rows = [(case, aligned, both[aligned]) for case, both in runs.items() for aligned in (False, True)]
    sections = {
        "": [claim, "", said, "", f"Machine: {machine()}, shared with other work.", "", INTERVALS],
        "How good": table((*CASE, "aligned", *DIFFERENCES), [how_good(*row) for row in rows]),
        "Encoder against decoder": [DIRECTIONS, "", *table(DIRECTION_COLUMNS, [directions(*row) for row in rows])],
        "Aligned less not, seed by seed": table(
            (*CASE, *DIFFERENCES),
            [[*case, *(str(difference(both, of)) for of in DIFFERENCES.values())] for case, both in runs.items()],
        ),
        "The abstract's claims": [
            VERDICTS, "",
            *table((*CASE, *CLAIMS), [[*case, *(judge(both) for judge in CLAIMS.values())]
                                      for case, both in runs.items()]),
            "", *counted(runs),
        ],
    }  # fmt: skip
    parts = ["\n".join([f"## {name}", "", *lines] if name else ["# aligned", "", *lines])
             for name, lines in sections.items()]  # fmt: skip
    return "\n\n".join(parts) + "\n"


INTERVALS = (
    "Mean ± half of the 95 % interval by Student's t over seeds; of MMCS over pairs of seeds. Pairs share seeds, so "
    "its intervals are narrower than those of independent pairs."
)
DIRECTIONS = (
    "Score: ⟨encoder, decoder⟩ in the coordinates of training, its standard deviation over features, and its mean over "
    "those that are dead. Modes: fewest and most over the seeds, of the maxima of a Gaussian kernel density of the "
    "scores (Scott's bandwidth) that are at least a tenth of the highest. Bimodality: Sarle's coefficient, 5/9 for a "
    "uniform distribution. Cosine: mean, and share of the features in five bins."
)
VERDICTS = (
    "Holds or does not: all of the interval of the difference lies on that side. Reconstructs better: FVU falls, and "
    f"L0 does not clearly rise by more than {SAME_L0:.0%}; does not: FVU rises, and L0 does not clearly fall by more. "
    f"None dead: less than {NONE_DEAD:.0%} with aligned training. Two modes: the densities of all seeds have them, or "
    "of none."
)
CASE = ("data", "kind", "start")
DIRECTION_COLUMNS = (
    *CASE, "aligned", "score", "sd", "score of dead", "modes", "bimodality", "cosine",
    *(f"{a:g}–{b:g}" if a >= 0 else f"< {b:g}" for a, b in pairwise(EDGES)), "its bimodality",
)  # fmt: skip


def how_good(case: Case, aligned: bool, runs: Runs) -> list[str]:
    figures = [str(interval(known(of(runs)))) for of in DIFFERENCES.values()]
    return [*case, "yes" if aligned else "no", *figures]


def directions(case: Case, aligned: bool, runs: Runs) -> list[str]:
    cosines = torch.cat([run.cosine for run in runs])
    shares = [float(((cosines > a) & (cosines <= b)).double().mean()) for a, b in pairwise(EDGES)]
    counts = sorted({modes(run.product) for run in runs})
    dead = [float(run.product[~run.alive].mean()) for run in runs if not bool(run.alive.all())]
    return [
        *case, "yes" if aligned else "no", str(interval([float(run.product.mean()) for run in runs])),
        str(interval([float(run.product.std()) for run in runs])), str(interval(dead)), "–".join(map(str, counts)),
        str(interval(known([bimodality(run.product) for run in runs]))),
        str(interval([float(run.cosine.mean()) for run in runs])), *(f"{share:.1%}" for share in shares),
        str(interval([bimodality(run.cosine) for run in runs])),
    ]  # fmt: skip


def modes(values: Tensor) -> int:
    """Maxima of a kernel density that are at least a tenth of the highest; one where all values are the same."""
    x = values.double().numpy()
    if float(x.std()) < 1e-3:
        return 1
    grid = np.linspace(x.min() - x.std(), x.max() + x.std(), 1000)
    density = gaussian_kde(x)(grid)
    inner = density[1:-1]
    tops = (inner > density[:-2]) & (inner >= density[2:]) & (inner > density.max() / 10)
    return int(tops.sum())


def mmcs(runs: Runs, *, living: bool) -> list[float]:
    """Of every pair of seeds."""
    return [
        compare_seeds(a.dictionary, b.dictionary, alive=([a.alive], [b.alive]) if living else None)[0].mmcs
        for a, b in combinations(runs, 2)
    ]


def known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and not math.isnan(value)]


DIFFERENCES: dict[str, Callable[[Runs], Sequence[float | None]]] = {
    "FVU": lambda runs: [run.fvu for run in runs],
    "L0": lambda runs: [run.l0 for run in runs],
    "recovered": lambda runs: [run.recovered for run in runs],
    "size": lambda runs: [run.shrinkage for run in runs],
    "dead": lambda runs: [run.dead for run in runs],
    "MMCS, all": lambda runs: mmcs(runs, living=False),
    "MMCS, alive": lambda runs: mmcs(runs, living=True),
}


def difference(both: Both, of: Callable[[Runs], Sequence[float | None]]) -> Estimate:
    pairs = zip(of(both[True]), of(both[False]), strict=True)
    return interval([one - other for one, other in pairs if one is not None and other is not None])


def side(found: Estimate, *, than: float = 0.0) -> int:
    """−1, 1: all of the interval lies below or above; 0: neither."""
    return int(found.mean - found.half > than) - int(found.mean + found.half < than)


WORDS = {1: "holds", 0: "undecided", -1: "does not", None: "–"}


def two_modes(both: Both) -> str:
    found = [modes(run.product) >= 2 for run in both[False]]
    return WORDS[1 if all(found) else 0 if any(found) else -1]


def better(both: Both) -> str:
    """Less error at no more features."""
    fvu, l0 = (difference(both, DIFFERENCES[name]) for name in ("FVU", "L0"))
    within = SAME_L0 * interval([run.l0 for run in both[False]]).mean
    sparser, denser = l0.mean + l0.half < -within, l0.mean - l0.half > within
    verdict = -side(fvu)
    return WORDS[0 if (verdict == 1 and denser) or (verdict == -1 and sparser) else verdict]


def rises(name: str) -> Callable[[Both], str]:
    def judge(both: Both) -> str:
        found = difference(both, DIFFERENCES[name])
        return WORDS[None if math.isnan(found.mean) else side(found)]

    return judge


def fewer_dead(both: Both) -> str:
    return WORDS[-side(difference(both, DIFFERENCES["dead"]))]


def none_dead(both: Both) -> str:
    return WORDS[-side(interval([run.dead for run in both[True]]), than=NONE_DEAD)]


CLAIMS: dict[str, Callable[[Both], str]] = {
    "two modes without": two_modes,
    "reconstructs better": better,
    "recovers more loss": rises("recovered"),
    "fewer dead": fewer_dead,
    "none dead": none_dead,
    "seeds agree more, all": rises("MMCS, all"),
    "seeds agree more, alive": rises("MMCS, alive"),
}


def counted(runs: Mapping[Case, Both]) -> list[str]:
    """How often each verdict was given: of autoencoders by their start, of transcoders."""
    groups: dict[str, dict[Case, Both]] = {}
    for case, both in runs.items():
        name = "transcoders" if "transcoder" in case.data else f"autoencoders that start {case.start}"
        groups.setdefault(name, {})[case] = both
    lines = []
    for name, of in groups.items():
        said = []
        for claim, judge in CLAIMS.items():
            found = Counter(judge(both) for both in of.values())
            parts = [f"{word} in {found[word]}" for word in ("holds", "does not", "undecided") if found[word]]
            said += [f"{claim}: {', '.join(parts)}"] if parts else []
        lines += [f"Of {len(of)} pairs of {name}: " + "; ".join(said) + ".", ""]
    return lines[:-1]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
