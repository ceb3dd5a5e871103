"""What a circuit lacks, and what it could do without.

    completeness:  |F(C∖K) − F(M∖K)| for subsets K of C: a circuit without K should do as the model without K does;
    minimality:    for each node v of C, the largest |F(C∖K) − F(C∖(K∪{v}))| found; one that no K shows is idle.

F is the faithfulness f. Subsets: none, each class of nodes (kind, layer, place), random ones, and a greedy one that
grows by the node that widens the gap most. Source: Wang et al. 2022, "Interpretability in the Wild", section 4.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from circuitsae.interventions import target_id
from circuitsae.interventions.prompts import By
from circuitsae.replacement import ReplacementModel
from circuitsae.validation.ablation import Ablated, Ablation, Errors, Kept
from circuitsae.validation.circuits import Circuit, CircuitNode, nodes_by
from circuitsae.validation.curve import faithful
from circuitsae.validation.result import jsonable
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


class _Faithfulness:
    """F of any set of nodes, kept or left out; each set is run once."""

    def __init__(self, ablated: Ablated) -> None:
        self.ablated, self.full = ablated, ablated.clean()
        self.empty = ablated.metric([Kept(())])[0]
        self._known: dict[tuple[frozenset[CircuitNode], bool], float] = {}

    def __call__(self, sets: list[tuple[frozenset[CircuitNode], bool]]) -> np.ndarray:
        """F of sets of nodes to keep, or (True) of all but them."""
        new = [key for key in dict.fromkeys(sets) if key not in self._known]
        if new:
            found = self.ablated.metric([Kept(tuple(nodes), all_but) for nodes, all_but in new])
            self._known |= dict(zip(new, faithful(found, self.empty, self.full).tolist(), strict=True))
        return np.array([self._known[key] for key in sets])


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
    by: By = "role",
    seed: int = 0,
) -> Completeness:
    """|F(C∖K) − F(M∖K)| for the empty K, every class of nodes, `random` subsets, and `greedy` steps of a growing one.

    A random K holds each node with probability ½. A greedy step tries `candidates` nodes.
    """
    _require_nodes(circuit)
    rng = np.random.default_rng(seed)
    measure = _Faithfulness(Ablated(Cases(model, task), ablation, by=by, errors=errors, seed=seed))
    named = [("none", "", ()), *_classes(circuit), *_random(circuit, random, rng)]
    found = [(how, name, k, *pair) for (how, name, k), pair in zip(named, _pairs(measure, circuit, named), strict=True)]
    grown: tuple[CircuitNode, ...] = ()
    for step in range(min(greedy, len(circuit))):
        rest = [node for node in circuit.nodes if node not in grown]
        tried = [rest[i] for i in rng.permutation(len(rest))[:candidates]]
        options = [("greedy", f"step {step + 1}", (*grown, node)) for node in tried]
        pairs = _pairs(measure, circuit, options)
        best = int(np.argmax(np.abs(pairs[:, 0] - pairs[:, 1])))
        grown = options[best][2]
        found.append((*options[best], *pairs[best]))
    rows = [
        {"how": how, "name": name, "size": len(k), "circuit": c, "model": m, "gap": abs(c - m)}
        for how, name, k, c, m in found
    ]
    return Completeness(pd.DataFrame(rows), [k for _, _, k, _, _ in found])


def minimality(
    model: ReplacementModel,
    circuit: Circuit,
    task: Task,
    *,
    random: int = 10,
    ablation: Ablation = "mean",
    errors: Errors = "ranked",
    by: By = "role",
    seed: int = 0,
) -> Minimality:
    """For each node v the largest |F(C∖K) − F(C∖(K∪{v}))| over the empty K, every class, and `random` subsets."""
    _require_nodes(circuit)
    rng = np.random.default_rng(seed)
    measure = _Faithfulness(Ablated(Cases(model, task), ablation, by=by, errors=errors, seed=seed))
    whole = frozenset(circuit.nodes)
    chosen = [frozenset(k) for _, _, k in [("none", "", ()), *_classes(circuit), *_random(circuit, random, rng)]]
    tests = [(v, k - {v}) for v in circuit.nodes for k in dict.fromkeys(chosen)]
    with_, without = (
        measure([(whole - k - gone, False) for v, k in tests for gone in [frozenset([v] * removed)]])
        for removed in (0, 1)
    )
    table = pd.DataFrame(
        {
            "id": [target_id(v) for v, _ in tests],
            "score": np.abs(with_ - without),
            "given": [len(k) for _, k in tests],
        }
    )
    best = table.loc[table.groupby("id", sort=False)["score"].idxmax()]
    return Minimality(best.sort_values("score", ascending=False, kind="stable").reset_index(drop=True))


def _pairs(measure: _Faithfulness, circuit: Circuit, named: list) -> np.ndarray:
    """F(C∖K) and F(M∖K) of each K."""
    whole = frozenset(circuit.nodes)
    sets = [key for _, _, k in named for key in ((whole - frozenset(k), False), (frozenset(k), True))]
    return measure(sets).reshape(-1, 2)


def _classes(circuit: Circuit) -> list[tuple[str, str, tuple[CircuitNode, ...]]]:
    groups = [nodes_by(circuit.nodes, attribute) for attribute in ("kind", "layer", "at")]
    return [("class", name, tuple(nodes)) for group in groups for name, nodes in group.items()]


def _random(circuit: Circuit, count: int, rng: np.random.Generator) -> list[tuple[str, str, tuple[CircuitNode, ...]]]:
    draws = rng.random((count, len(circuit))) < 0.5
    return [
        ("random", str(number), tuple(node for node, inside in zip(circuit.nodes, row, strict=True) if inside))
        for number, row in enumerate(draws)
    ]


def _require_nodes(circuit: Circuit) -> None:
    if not len(circuit):
        raise InputError("The circuit is empty; give it at least one node.")
