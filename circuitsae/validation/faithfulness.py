"""How much of a task a circuit of features does alone: its `Curve`, a ranking's `Areas`, a null of random circuits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from circuitsae.graph import AttributionGraph
from circuitsae.interventions import PromptLike, Regime, RegimeName
from circuitsae.interventions.prompts import By
from circuitsae.replacement import ReplacementModel
from circuitsae.validation.ablation import Ablated, Ablation, Errors, Kept, kept
from circuitsae.validation.circuits import Circuit, CircuitNode, Ranking, kind_of
from circuitsae.validation.curve import Areas, Curve, faithful, log_sizes
from circuitsae.validation.measuring import reading_like
from circuitsae.validation.result import jsonable
from circuitsae.validation.tasks import Cases, Task
from transcoders.errors import InputError


class Judge:
    """f of any set of nodes, kept or left out."""

    def __init__(self, ablated: Ablated) -> None:
        self.ablated, self.full = ablated, ablated.clean()
        self.empty = ablated.metric([Kept(())])[0]

    def f(self, kept: Sequence[Kept]) -> np.ndarray:
        """f of each, all in one batch."""
        return faithful(self.ablated.metric(kept), self.empty, self.full)

    def without(self, circuit: Circuit) -> Callable[[Sequence[frozenset[CircuitNode]]], np.ndarray]:
        """f of a circuit without each of some sets of nodes."""
        return lambda sets: self.f([kept(circuit.without(gone)) for gone in sets])


def faithfulness(
    model: ReplacementModel,
    circuit: AttributionGraph | Circuit | Sequence[str],
    task: Task,
    *,
    ablation: Ablation = "mean",
    errors: Errors = "ranked",
    regime: RegimeName | Regime = "replacement",
    sizes: Sequence[int] | None = None,
    by: By = "role",
    others: Sequence[PromptLike] = (),
    seed: int = 0,
) -> Curve:
    """f against the number of nodes kept: the strongest 1, 2, … of a graph's features and error nodes, or a circuit's.

    Of a graph, nodes are ordered by influence, and positions become the roles of the task's example with the same
    tokens. `sizes` default to about 16 on a log scale up to the whole circuit. `errors` says whether error nodes follow
    the circuit, all stay, or all go; `regime` what runs around them (see `ablation`). Means are taken over the task's
    prompts and `others`, such as its corrupt ones. Raises `InputError` for an empty circuit or impossible sizes.
    """
    cases = Cases(reading_like(model, circuit) if isinstance(circuit, AttributionGraph) else model, task)
    chosen = as_circuit(circuit, cases)
    if not len(chosen):
        raise InputError("The circuit has no features or error nodes; there is nothing to keep.")
    ablated = Ablated(cases, ablation, by=by, errors=errors, regime=regime, others=others, seed=seed)
    return _curve(ablated, chosen, sizes)


def _curve(ablated: Ablated, chosen: Circuit, sizes: Sequence[int] | None) -> Curve:
    steps = log_sizes(len(chosen)) if sizes is None else sorted(set(sizes))
    if not steps or not 0 <= steps[0] <= steps[-1] <= len(chosen):
        raise InputError(f"sizes={list(steps)[:5]}…: the circuit has {len(chosen)} nodes; give sizes from 0 to that.")
    found = ablated.metric([Kept(()), *(kept(chosen.first(size)) for size in steps)])
    kinds = [[kind_of(node) for node in chosen.nodes[:size]] for size in steps]
    real = np.cumsum([0, *(ablated.reaches(node) for node in chosen.nodes)])
    return Curve(
        sizes=tuple(steps),
        metric=found[1:],
        empty=found[0],
        full=ablated.clean(),
        parts={"nodes": steps} | {f"{kind}s": [row.count(kind) for row in kinds] for kind in ("feature", "error")},
        realised=tuple(real[steps].tolist()),
        circuit=chosen,
        about={**ablated.about, "circuit": list(chosen.ids)},
    )


def areas(
    model: ReplacementModel,
    ranking: Ranking,
    task: Task,
    *,
    count: int | None = None,
    sizes: Sequence[int] | None = None,
    ablation: Ablation = "mean",
    errors: Errors = "ranked",
    regime: RegimeName | Regime = "replacement",
    by: By = "role",
    others: Sequence[PromptLike] = (),
    seed: int = 0,
) -> Areas:
    """CPR and CMD of a ranking, with the curves that they are areas under: of its `count` best nodes (None: all).

    Signed, best are the nodes that move the metric most from m(∅) towards m(M). The axis is the logarithm of the number
    of nodes kept that have a place on some prompt. Means and `others` as in `faithfulness`.
    Raises `InputError` for impossible sizes.
    """
    ablated = Ablated(Cases(model, task), ablation, by=by, errors=errors, regime=regime, others=others, seed=seed)
    rising = ablated.clean().mean() >= ablated.metric([Kept(())]).mean()
    towards = replace(ranking, scores=ranking.scores if rising else -ranking.scores)
    return Areas.of(lambda signed: _curve(ablated, towards.circuit(count, signed=signed), sizes))


def as_circuit(given: AttributionGraph | Circuit | Sequence[str], cases: Cases) -> Circuit:
    """A circuit from a graph, from ids, or as it is."""
    if isinstance(given, Circuit):
        return given
    if not isinstance(given, AttributionGraph):
        return Circuit.of(given)
    own = [r.roles for r in cases.recordings if tuple(r.trace.tokens.tolist()) == given.token_ids]
    return Circuit.from_graph(given, own[0] if own else None)


@dataclass(frozen=True, eq=False)
class RandomCircuits:
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
    regime: RegimeName | Regime = "replacement",
    by: By = "role",
    seed: int = 0,
) -> RandomCircuits:
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
    judge = Judge(Ablated(Cases(model, task), ablation, by=by, errors=errors, regime=regime, seed=seed))
    f = judge.f([kept(circuit), *map(Kept, drawn)])
    return RandomCircuits(float(f[0]), f[1:])
