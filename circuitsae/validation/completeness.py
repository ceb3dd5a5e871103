"""What a circuit lacks, and what it could do without.

    completeness:  |F(C∖K) − F(M∖K)| for subsets K of C: a circuit without K should do as the model without K does;
    minimality:    for each node v of C, the largest |F(C∖K) − F(C∖(K∪{v}))| found; one that no K shows is idle.

F is the faithfulness f. Subsets: none, each class of nodes (kind, layer, place), random ones, and a greedy one that
grows by the node that widens the gap most. The algorithm is that of `subsets`, as for heads and MLPs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from circuitsae.interventions import Regime, RegimeName, target_id
from circuitsae.interventions.prompts import By
from circuitsae.replacement import ReplacementModel
from circuitsae.validation.ablation import Ablated, Ablation, Errors, Kept, kept
from circuitsae.validation.circuits import Circuit, CircuitNode, nodes_by
from circuitsae.validation.faithfulness import Judge
from circuitsae.validation.result import jsonable
from circuitsae.validation.subsets import compare, halves, largest_changes
from circuitsae.validation.tasks import Cases, Task
from transcoders.errors import InputError


@dataclass(frozen=True, eq=False)
class Completeness:
    """`subsets`, a row per K: `how` it was chosen, `name`, `size`, `circuit` F(C∖K), `model` F(M∖K), `gap`."""

    subsets: pd.DataFrame
    chosen: list[tuple[CircuitNode, ...]]
    """K of each row."""

    @property
    def worst(self) -> float:
        """The widest gap found."""
        return float(self.subsets["gap"].to_numpy().max())

    def to_json(self) -> dict[str, Any]:
        """The table and the widest gap as JSON values."""
        return jsonable({"worst": self.worst, "subsets": self.subsets.to_dict("records")})


@dataclass(frozen=True, eq=False)
class Minimality:
    """`nodes`, a row per node v: `id`, `score` (the largest change of F that removing v made), `given` (size of K)."""

    nodes: pd.DataFrame

    def to_json(self) -> dict[str, Any]:
        """The table as JSON values."""
        return jsonable({"nodes": self.nodes.to_dict("records")})


def completeness(
    model: ReplacementModel,
    circuit: Circuit,
    task: Task,
    *,
    random: int = 20,
    greedy: int = 5,
    candidates: int = 10,
    ablation: Ablation = "mean",
    errors: Errors = "ranked",
    regime: RegimeName | Regime = "replacement",
    by: By = "role",
    seed: int = 0,
) -> Completeness:
    """|F(C∖K) − F(M∖K)| for the empty K, every class of nodes, `random` subsets, and `greedy` steps of a growing one.

    A random K holds each node with probability ½. A greedy step tries `candidates` nodes.
    """
    _require_nodes(circuit)
    judge = Judge(Ablated(Cases(model, task), ablation, by=by, errors=errors, regime=regime, seed=seed))
    return completeness_of(judge, circuit, random=random, greedy=greedy, candidates=candidates, seed=seed)


def completeness_of(
    judge: Judge, circuit: Circuit, *, random: int = 20, greedy: int = 5, candidates: int = 10, seed: int = 0
) -> Completeness:
    """`completeness` as a judge measures it."""
    rng = np.random.default_rng(seed)
    named = [("none", "", ()), *_classes(circuit), *_random(circuit, random, rng)]

    def tried(rest: list[CircuitNode]) -> list[CircuitNode]:
        return [rest[i] for i in rng.permutation(len(rest))[:candidates]]

    def both(sets: Sequence[tuple[CircuitNode, ...]]) -> np.ndarray:
        pairs = [(kept(circuit.without(k)), Kept(k, all_but=True)) for k in sets]
        return judge.f([side for pair in pairs for side in pair]).reshape(-1, 2)

    found = compare(both, [k for _, _, k in named], circuit.nodes, greedy=greedy, tried=tried)
    names = [(how, name) for how, name, _ in named]
    names += [("greedy", f"step {step + 1}") for step in range(len(found) - len(named))]
    rows = [
        {"how": how, "name": name, "size": len(k.removed), "circuit": k.circuit, "model": k.model, "gap": k.gap}
        for (how, name), k in zip(names, found, strict=True)
    ]
    return Completeness(pd.DataFrame(rows), [k.removed for k in found])


def minimality(
    model: ReplacementModel,
    circuit: Circuit,
    task: Task,
    *,
    random: int = 10,
    ablation: Ablation = "mean",
    errors: Errors = "ranked",
    regime: RegimeName | Regime = "replacement",
    by: By = "role",
    seed: int = 0,
) -> Minimality:
    """For each node v the largest |F(C∖K) − F(C∖(K∪{v}))| over the empty K, every class, and `random` subsets."""
    _require_nodes(circuit)
    rng = np.random.default_rng(seed)
    judge = Judge(Ablated(Cases(model, task), ablation, by=by, errors=errors, regime=regime, seed=seed))
    chosen = [frozenset(k) for _, _, k in [("none", "", ()), *_classes(circuit), *_random(circuit, random, rng)]]
    found = largest_changes(
        judge.without(circuit), [(v, k - {v}) for v in circuit.nodes for k in dict.fromkeys(chosen)]
    )
    rows = [{"id": target_id(v), "score": change, "given": size} for v, (change, size) in found.items()]
    table = pd.DataFrame(rows).sort_values("score", ascending=False, kind="stable")
    return Minimality(table.reset_index(drop=True))


def _classes(circuit: Circuit) -> list[tuple[str, str, tuple[CircuitNode, ...]]]:
    groups = [nodes_by(circuit.nodes, attribute) for attribute in ("kind", "layer", "at")]
    return [("class", name, tuple(nodes)) for group in groups for name, nodes in group.items()]


def _random(circuit: Circuit, count: int, rng: np.random.Generator) -> list[tuple[str, str, tuple[CircuitNode, ...]]]:
    drawn = halves(circuit.nodes, (rng.random((count, len(circuit))) < 0.5).tolist())
    return [("random", str(number), k) for number, k in enumerate(drawn)]


def _require_nodes(circuit: Circuit) -> None:
    if not len(circuit):
        raise InputError("The circuit is empty; give it at least one node.")
