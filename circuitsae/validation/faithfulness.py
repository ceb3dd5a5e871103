"""How much of a task a circuit does alone: faithfulness curves, their areas, and a null of random circuits.

    f(C) = (m(C) − m(∅)) / (m(M) − m(∅)),

with m the mean metric of the task's examples while everything outside is ablated; m(M) is the model's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from circuitsae.graph import AttributionGraph
from circuitsae.interventions.prompts import By
from circuitsae.replacement import ReplacementModel
from circuitsae.validation.ablation import Ablated, Ablation, Errors, Kept, kept
from circuitsae.validation.circuits import Circuit, CircuitNode, Ranking, kind_of
from circuitsae.validation.measuring import reading_like
from circuitsae.validation.result import jsonable
from circuitsae.validation.statistics import interval
from circuitsae.validation.tasks import Cases, Task
from transcoders.errors import InputError

POINTS = 16
_RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Curve:
    """The metric against the number of nodes kept, strongest first."""

    circuit: Circuit
    sizes: tuple[int, ...]
    """How many nodes of the circuit are kept, rising."""
    metric: np.ndarray
    """m(C), [size, example]."""
    empty: np.ndarray
    """m(∅), [example]."""
    full: np.ndarray
    """m(M), [example]: the model's own."""
    ablation: str
    errors: str

    @cached_property
    def f(self) -> np.ndarray:
        """Of each size; NaN where ablating everything does not change the mean metric."""
        return faithful(self.metric, self.empty, self.full)

    @property
    def per_example(self) -> np.ndarray:
        """f of each example alone, [size, example]; unsteady where an example's own m(M) − m(∅) is small."""
        span = self.full - self.empty
        return (self.metric - self.empty) / np.where(span == 0, np.nan, span)

    def cpr(self) -> float:
        """Area under f over log k, as a mean over the axis (circuit performance ratio; the larger the better)."""
        return log_area(self.sizes, self.f)

    def cmd(self) -> float:
        """Area under |1 − f| over log k (circuit-model distance; the smaller the better)."""
        return log_area(self.sizes, np.abs(1 - self.f))

    def size_for(self, faithfulness: float) -> int | None:
        """The smallest size on the curve from which f stays within `1 ± (1 − faithfulness)`; None if none does."""
        good = np.abs(1 - self.f) <= 1 - faithfulness + 1e-12
        from_here = np.flatnonzero(np.logical_and.accumulate(good[::-1])[::-1])
        return self.sizes[from_here[0]] if len(from_here) else None

    def frame(self, seed: int = 0) -> pd.DataFrame:
        """A row per size: `nodes`, `features`, `errors`, `f` with a bootstrap interval over examples, `metric`, and
        the quartiles of the metric and of f over examples.
        """
        rng = np.random.default_rng(seed)
        drawn = rng.integers(0, len(self.full), (_RESAMPLES, len(self.full)))
        base = self.empty[drawn].mean(1)
        span = self.full[drawn].mean(1) - base
        records = []
        for row, size in enumerate(self.sizes):
            kinds = [kind_of(node) for node in self.circuit.nodes[:size]]
            low, high = interval((self.metric[row][drawn].mean(1) - base) / np.where(span == 0, np.nan, span))
            record = {"nodes": size, "features": kinds.count("feature"), "errors": kinds.count("error")}
            record |= {"f": self.f[row], "f_low": low, "f_high": high, "metric": self.metric[row].mean()}
            for name, values in (("metric", self.metric[row]), ("f", self.per_example[row])):
                finite = values[np.isfinite(values)]
                for q in (25, 50, 75):
                    record[f"{name}_q{q}"] = np.percentile(finite, q) if len(finite) else np.nan
            records.append(record)
        return pd.DataFrame(records)

    def examples_frame(self) -> pd.DataFrame:
        """A row per size and example: `nodes`, `example`, `metric`, `f`, `empty`, `full`."""
        n = len(self.full)
        table = {
            "nodes": np.repeat(self.sizes, n),
            "example": np.tile(np.arange(n), len(self.sizes)),
            "metric": self.metric.ravel(),
            "f": self.per_example.ravel(),
            "empty": np.tile(self.empty, len(self.sizes)),
            "full": np.tile(self.full, len(self.sizes)),
        }
        return pd.DataFrame(table)

    def to_json(self) -> dict[str, Any]:
        """The curve, its areas, and every example, as JSON values."""
        document = {
            "ablation": self.ablation,
            "errors": self.errors,
            "cpr": self.cpr(),
            "cmd": self.cmd(),
            "empty": self.empty.mean(),
            "full": self.full.mean(),
            "circuit": list(self.circuit.ids),
            "curve": self.frame().to_dict("records"),
            "examples": self.examples_frame().to_dict("records"),
        }
        return jsonable(document)


def faithfulness(
    model: ReplacementModel,
    circuit: AttributionGraph | Circuit | Sequence[str],
    task: Task,
    *,
    ablation: Ablation = "mean",
    errors: Errors = "ranked",
    sizes: Sequence[int] | None = None,
    by: By = "role",
    seed: int = 0,
) -> Curve:
    """f against the number of nodes kept: the strongest 1, 2, … of a graph's features and error nodes, or a circuit's.

    Of a graph, nodes are ordered by influence, and positions become the roles of the task's example with the same
    tokens. `sizes` default to about 16 on a log scale up to the whole circuit. `errors` says whether error nodes follow
    the circuit, all stay, or all go. Raises `InputError` for an empty circuit or impossible sizes.
    """
    cases = Cases(reading_like(model, circuit) if isinstance(circuit, AttributionGraph) else model, task)
    chosen = as_circuit(circuit, cases)
    if not len(chosen):
        raise InputError("The circuit has no features or error nodes; there is nothing to keep.")
    steps = log_sizes(len(chosen)) if sizes is None else sorted(set(sizes))
    if not steps or not 0 <= steps[0] <= steps[-1] <= len(chosen):
        raise InputError(f"sizes={list(steps)[:5]}…: the circuit has {len(chosen)} nodes; give sizes from 0 to that.")
    ablated = Ablated(cases, ablation, by=by, errors=errors, seed=seed)
    found = ablated.metric([Kept(()), *(kept(chosen.first(size)) for size in steps)])
    return Curve(chosen, tuple(steps), found[1:], found[0], ablated.clean(), ablation, errors)


def as_circuit(given: AttributionGraph | Circuit | Sequence[str], cases: Cases) -> Circuit:
    """A circuit from a graph, from ids, or as it is."""
    if isinstance(given, Circuit):
        return given
    if not isinstance(given, AttributionGraph):
        return Circuit.of(given)
    own = [r.roles for r in cases.recordings if tuple(r.trace.tokens.tolist()) == given.token_ids]
    return Circuit.from_graph(given, own[0] if own else None)


def faithful(metric: np.ndarray, empty: np.ndarray, full: np.ndarray) -> np.ndarray:
    """f from the metric [..., example]."""
    span = full.mean() - empty.mean()
    return (metric.mean(-1) - empty.mean()) / (span if span else np.nan)


def log_sizes(most: int, points: int = POINTS) -> list[int]:
    """About `points` whole numbers from 1 to `most`, evenly spaced on a log scale."""
    return sorted({round(float(x)) for x in np.geomspace(1, most, points)})


def log_area(sizes: Sequence[int], values: np.ndarray) -> float:
    """∫ values d(log k) / ∫ d(log k), by trapezoids; of one size, its value. Size 0 is left out."""
    k, y = np.array(sizes, dtype=float), np.asarray(values, dtype=float)
    k, y = k[k > 0], y[k > 0]
    if len(k) < 2:
        return float(y[0]) if len(k) else np.nan
    return float(np.trapezoid(y, np.log(k)) / (np.log(k[-1]) - np.log(k[0])))


@dataclass(frozen=True, eq=False)
class Null:
    """A circuit beside random ones with as many nodes of each kind and layer."""

    f: float
    random: np.ndarray

    @property
    def above(self) -> float:
        """Share of the random circuits whose f is below the circuit's."""
        return float(np.mean(self.random < self.f))

    def to_json(self) -> dict[str, Any]:
        return jsonable({"f": self.f, "random": self.random, "above": self.above})


def random_circuits(
    model: ReplacementModel,
    circuit: Circuit,
    ranking: Ranking,
    task: Task,
    *,
    count: int = 20,
    ablation: Ablation = "mean",
    errors: Errors = "ranked",
    by: By = "role",
    seed: int = 0,
) -> Null:
    """f of `count` random circuits, drawn from all nodes that are active on the task (`rank_nodes`)."""
    rng = np.random.default_rng(seed)
    pool: dict[tuple[str, int], list[CircuitNode]] = {}
    for node in ranking.nodes:
        pool.setdefault((kind_of(node), node.layer), []).append(node)
    wanted: dict[tuple[str, int], int] = {}
    for node in circuit.nodes:
        key = kind_of(node), node.layer
        wanted[key] = wanted.get(key, 0) + 1
    if short := [key for key, n in wanted.items() if n > len(pool.get(key, []))]:
        raise InputError(f"The ranking has too few nodes of {short[0]} to draw from; rank the nodes of the same task.")
    drawn = [
        tuple(pool[key][i] for key, n in wanted.items() for i in rng.choice(len(pool[key]), n, replace=False))
        for _ in range(count)
    ]
    ablated = Ablated(Cases(model, task), ablation, by=by, errors=errors, seed=seed)
    found = ablated.metric([Kept(()), kept(circuit), *map(Kept, drawn)])
    f = faithful(found, found[0], ablated.clean())
    return Null(float(f[1]), f[2:])
