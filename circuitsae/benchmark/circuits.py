"""Dictionaries by the circuits they give: the graphs, claims and circuits of a task, and how alike other seeds' are."""

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from torch import Tensor

from circuitsae.attribution import attribute
from circuitsae.benchmark.result import WHOLE, BenchmarkResult, Measured
from circuitsae.features import match_features
from circuitsae.graph import AttributionGraph, NodeKind
from circuitsae.interventions import Prompt
from circuitsae.replacement import ReplacementModel
from circuitsae.tasks import Task
from circuitsae.tasks.cases import prompt_task
from circuitsae.validation import Areas, Curve, PromptTask, areas, rank_nodes, validate
from transcoders.dictionaries import DictionarySet
from transcoders.errors import DictionaryError, InputError
from transcoders.evaluation import evaluate
from transcoders.language_model import LanguageModel
from transcoders.progress import progress_bar

WANTED = 0.9
"""The faithfulness that a circuit is to reach."""
Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class CircuitConfig:
    """On how much circuits are measured."""

    graphs: int = 8
    """So many of the prompts that nodes are ranked on get graphs, whose claims are tested."""
    edges: int = 30
    """Edges of each graph that are tested, chosen as `validate` chooses."""
    controls: int = 40
    """Features and tokens that are removed for comparison, at most so many of each."""
    loss_tokens: int = 1024
    """Tokens that losses are measured on."""
    jacobian_tokens: int = 384
    """Tokens that Jacobian agreement is measured on."""
    seed: int = 0
    """Of controls and of bootstrap resamples."""

    def __post_init__(self) -> None:
        if min(self.graphs, self.edges, self.loss_tokens) < 1 or min(self.controls, self.jacobian_tokens) < 0:
            raise InputError(
                f"graphs={self.graphs}, edges={self.edges}, controls={self.controls}, loss_tokens={self.loss_tokens}, "
                f"jacobian_tokens={self.jacobian_tokens} measure nothing; give at least 1, 1, 0, 1 and 0."
            )


class Halves(NamedTuple):
    """A task's prompts, and in the same order the corrupt ones."""

    ranked: PromptTask
    ranked_corrupt: Sequence[Prompt]
    judged: PromptTask
    judged_corrupt: Sequence[Prompt]


class Given(NamedTuple):
    """What one set of dictionaries gives."""

    figures: Mapping[str, Figures]
    """Of the tasks `core` and `circuits`."""
    graphs: Sequence[AttributionGraph]
    """Pruned, of the first prompts."""
    dictionaries: DictionarySet


def circuit_benchmark(
    model: LanguageModel,
    dictionaries: Mapping[str, Sequence[DictionarySet]],
    task: Task,
    rows: Int[Tensor, "row pos"],
    *,
    config: CircuitConfig = CircuitConfig(),
    progress: bool = False,
) -> BenchmarkResult:
    """Sets of dictionaries by the graphs, claims and circuits that they give, beside L0, FVU and loss recovered.

    `dictionaries`: of each name one set, or several that differ in their seeds alone: a line with an interval over
    them, and with stability. `task`: prompts that the model answers; nodes are ranked on the first half and circuits
    judged on the other. `rows`: tokens that nothing was trained on, for `core` and for Jacobian agreement. All
    figures are of whole sets, those of `circuits` means over prompts:

    * `replacement`, `completeness`: scores of the full graph of the likeliest tokens (`circuitsae.graph.Scores`);
    * `confirmed`, `confirmed direct`: the share of the tested edges of the graph pruned to .8 of its influence whose
      claim is confirmed; `spearman`, `spearman direct`, `spearman model`: rank correlation of what is predicted
      and what is measured;
    * `cpr`, `cmd`: `Areas` of features alone, ranked as `rank_nodes` does by default, with error nodes at their means;
      `all`: f of all of them; `size`: the fewest with f ≥ 0.9, `share`: of those active on the ranked prompts; NaN if
      not reached; `reached`: 1 where it is. Of features and error nodes in one ranking: `cpr nodes` and so on;
    * `cosine`, `norm ratio`: Jacobian agreement (`transcoders.evaluation.Agreement`); autoencoders have none;
    * `stability`: `graph_likeness` of the graphs of a seed and of the next one, on the same prompts;
    * `resampled`: `Ranking.stability` of the features of largest |effect|, a tenth of them.

    Means in the place of nodes are by position, over the judged prompts and their corrupt twins.

    Raises `InputError` for a name without dictionaries and a task of fewer than four prompts, and `DictionaryError` for
    sets under one name of another kind or size.

    Source: Mueller et al. 2025, *MIB: A Mechanistic Interpretability Benchmark* (arXiv 2504.13151): CPR, CMD; Marks et
    al. 2024, *Sparse Feature Circuits* (arXiv 2403.19647): means in the place of nodes; Ameisen et al. 2025, *Circuit
    Tracing*: the scores.
    """
    _check(dictionaries, task)
    rows, n = rows.to(model.device), len(task) // 2
    measured: list[Measured] = []
    seconds: dict[str, float] = defaultdict(float)
    with progress_bar(shown=progress) as bar:
        told = bar.add_task("circuits", total=sum(map(len, dictionaries.values())))
        for name, seeds in dictionaries.items():
            given: list[Given] = []
            for number, one in enumerate(seeds):
                bar.update(told, description=f"{name}: circuits, set {number + 1} of {len(seeds)}")
                began = time.perf_counter()
                read = ReplacementModel(model, one)
                ranked, judged = (prompt_task(read.model, task.take(slice(i, i + n))) for i in (0, n))
                given.append(circuits_of(read, Halves(*ranked, *judged), rows, config))
                seconds["circuits"] += time.perf_counter() - began
                bar.advance(told)
            measured += [
                Measured(name, "", WHOLE, number, kind, "", metric, value)
                for number, one in enumerate(given)
                for kind, figures in one.figures.items()
                for metric, value in figures.items()
            ]
            measured += [
                Measured(name, "", WHOLE, number, "circuits", "", "stability", value)
                for number, value in enumerate(stabilities(given))
            ]
    families = {name: family(seeds[0]) for name, seeds in dictionaries.items()}
    settings = asdict(config) | {"task": task.name, "prompts": 2 * n, "families": families}
    return BenchmarkResult(tuple(measured), dict(seconds), model.name, settings)


def circuits_of(
    model: ReplacementModel, halves: Halves, rows: Int[Tensor, "row pos"], config: CircuitConfig
) -> Given:  # fmt: skip
    """All figures of one set but its stability, and the graphs that this needs."""
    core, jacobian = _core(model, rows, config)
    graphs, claims = _graphs(model, halves.ranked, config)
    figures = {**claims, **jacobian, **_circuits(model, halves, config)}
    return Given({"core": core, "circuits": figures}, graphs, model.dictionaries)


def by_seeds(dictionaries: Mapping[str, DictionarySet]) -> dict[str, list[DictionarySet]]:
    """Sets that were trained alike but for the seed together, under the name of the first; others alone."""
    groups: dict[str, list[DictionarySet]] = {}
    name_of: dict[str, str] = {}
    for name, one in dictionaries.items():
        known = one.provenance
        alike = {key: value for key, value in known.config.items() if key != "seed"}
        stated = [one.kind, known.model, known.fingerprint, known.corpus, known.tokens, alike]
        key = json.dumps(stated, sort_keys=True, default=str) if alike and known.seed is not None else name
        first = name_of.setdefault(key, name)
        seeds = [other.provenance.seed for other in groups.get(first, [])]
        if known.seed in seeds:
            first = name
        groups.setdefault(first, []).append(one)
    return groups


def family(dictionaries: DictionarySet) -> str:
    """`autoencoders` or `transcoders`, with cross-layer ones: what has graphs of one kind, whose figures compare."""
    return "autoencoders" if dictionaries.kind == "sae" else "transcoders"


def _core(model: ReplacementModel, rows: Int[Tensor, "row pos"], config: CircuitConfig) -> tuple[Figures, Figures]:
    found = evaluate(
        model.model, model.dictionaries, rows, loss_tokens=config.loss_tokens, jacobian_tokens=config.jacobian_tokens
    )
    agreement = found.agreement
    cosine, ratio = (np.nan, np.nan) if agreement is None else (agreement.cosine, agreement.norm_ratio)
    core = {"l0": found.l0, "fvu": found.fvu, "recovered": found.replaced.recovered_zero, "dead": found.dead}
    return core, {"cosine": cosine, "norm ratio": ratio}


def _graphs(model: ReplacementModel, task: PromptTask, config: CircuitConfig) -> tuple[list[AttributionGraph], Figures]:
    """Pruned graphs of the first prompts; their scores, and how their claims hold."""
    graphs, found = [], defaultdict(list)
    for number, example in enumerate(task.examples[: config.graphs]):
        full = attribute(model, example.prompt)
        graph = full.prune()
        seed = config.seed + number
        check = validate(model, graph, edges=config.edges, controls=config.controls, seed=seed, heads=0)
        found["replacement"].append(full.scores.replacement)
        found["completeness"].append(full.scores.completeness)
        for claim in check.claims:
            name = "" if claim == "graph" else f" {claim}"
            if claim != "model":
                verdicts = check.verdicts(claim)
                found[f"confirmed{name}"].append(verdicts.get("confirmed", 0) / max(1, sum(verdicts.values())))
            found[f"spearman{name}"].append(check.agreement(claim)["all"].spearman)
        found["edges"].append(float(len(check.edges)))
        graphs.append(graph)
    return graphs, {name: _mean(values) for name, values in found.items()}


def _circuits(model: ReplacementModel, halves: Halves, config: CircuitConfig) -> Figures:
    """The areas of features alone, and of features and error nodes."""
    corrupted = halves.ranked_corrupt if model.spliced else None
    ranking = rank_nodes(model, halves.ranked, corrupted=corrupted)
    how: dict[str, Any] = {"by": "position", "others": halves.judged_corrupt, "seed": config.seed}
    features = ranking.features_only()
    if not features.nodes:
        raise InputError("No feature is active on the task's prompts, so there is no circuit; give other dictionaries.")
    alone = areas(model, features, halves.judged, errors="ablate", **how)
    both = areas(model, ranking, halves.judged, **how)
    resampled = features.stability(max(1, len(features.nodes) // 10), seed=config.seed).mean
    of_nodes = {f"{name} nodes": value for name, value in area_figures(both).items()}
    return {**area_figures(alone), **of_nodes, "resampled": resampled, "active": float(len(features.nodes))}


def area_figures(found: Areas) -> Figures:
    """CPR, CMD, f of all parts, and the fewest parts with f ≥ 0.9, as a number and as a share."""
    size = first_size(found.signed, WANTED)
    return {
        "cpr": found.cpr, "cmd": found.cmd, "all": float(found.signed.f[-1]), "size": size,
        "share": size / found.signed.sizes[-1], "reached": float(np.isfinite(size)),
    }  # fmt: skip


def first_size(curve: Curve, f: float) -> float:
    """The smallest size on a curve with at least this f; NaN where there is none."""
    good = np.flatnonzero(curve.f >= f)
    return float(curve.sizes[good[0]]) if len(good) else float("nan")


def stabilities(given: Sequence[Given]) -> list[float]:
    """How alike each seed's graphs are to those of the next, over prompts; of two seeds one figure, of one none."""
    n = len(given)
    pairs = list(combinations(range(n), 2)) if n < 3 else [(i, (i + 1) % n) for i in range(n)]
    return [
        _mean(
            [
                graph_likeness(a, b, (given[one].dictionaries, given[other].dictionaries))
                for a, b in zip(given[one].graphs, given[other].graphs, strict=True)
            ]
        )
        for one, other in pairs
    ]


def graph_likeness(
    a: AttributionGraph, b: AttributionGraph, dictionaries: tuple[DictionarySet, DictionarySet], **how: Any
) -> float:
    """Weighted Jaccard index of two graphs' features of one prompt: Σ min(p_a, p_b) / Σ max(p_a, p_b), in [0, 1].

    p is a feature's share of the influence of all features of its graph. Features of A and B are one where
    `circuitsae.features.match_features` pairs them, by what they write and at one position, with its settings `how`;
    others have p = 0 in the other graph. As p sums to 1 in each graph, it is m / (2 − m) with m = Σ min over the pairs.
    NaN where a graph has no feature.

    Source: Ioffe 2010, *Improved Consistent Sampling, Weighted Minhash and L1 Sketching* (the index).
    """
    shares = [_shares(graph) for graph in (a, b)]
    if not all(shares):
        return float("nan")
    pairs = match_features(a.nodes_frame(), b.nodes_frame(), dictionaries, **how)
    both = zip(pairs["id_a"], pairs["id_b"], strict=True)
    common = sum(min(shares[0][one], shares[1][other]) for one, other in both)
    return common / (2 - common)


def _shares(graph: AttributionGraph) -> dict[str, float]:
    rows = np.flatnonzero(graph.mask(NodeKind.FEATURE))
    total = float(graph.influence[rows].sum())
    return {graph.ids[row]: float(graph.influence[row]) / total for row in rows} if total > 0 else {}


def _check(dictionaries: Mapping[str, Sequence[DictionarySet]], task: Task) -> None:
    empty = [name for name, seeds in dictionaries.items() if not seeds]
    if not dictionaries or empty:
        under = f" under {empty[0]!r}" if empty else ""
        raise InputError(f"There are no dictionaries{under}; give at least one set under each name.")
    if len(task) < 4:
        raise InputError(
            f"The task {task.name!r} has {len(task)} prompts that the model answers; give at least 4, half to rank "
            "nodes on and half to judge circuits on."
        )
    for name, seeds in dictionaries.items():
        for other in seeds[1:]:
            alike = [(one.kind, one.reads, one.writes, _widths(one)) for one in (seeds[0], other)]
            if alike[0] != alike[1]:
                raise DictionaryError(
                    f"The sets under {name!r} are of different kinds or sizes; give those that differ in seed alone."
                )


def _widths(dictionaries: DictionarySet) -> list[int]:
    return [dictionaries.n_features(layer) for layer in range(dictionaries.n_layers)]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
