"""A circuit made minimal: nodes leave it one by one for as long as it stays as faithful.

Each step takes out the node without which |1 − f| is least, by running the circuit without it. The circuit is done when
without any of its nodes |1 − f| would exceed what the given circuit had by more than a tolerance.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from circuitsae.interventions import Regime, RegimeName, target_id
from circuitsae.interventions.prompts import By
from circuitsae.replacement import ReplacementModel
from circuitsae.validation.ablation import Ablated, Ablation, Errors
from circuitsae.validation.circuits import Circuit
from circuitsae.validation.completeness import Completeness, completeness_of
from circuitsae.validation.faithfulness import Judge
from circuitsae.validation.result import jsonable
from circuitsae.validation.subsets import shrink
from circuitsae.validation.tasks import Cases, Task
from transcoders.errors import InputError


@dataclass(frozen=True, eq=False)
class Minimal:
    """A circuit of which every node is needed, and how it came about."""

    circuit: Circuit
    steps: pd.DataFrame
    """A row per circuit, the given one first: `removed` (id of the node that left it last), `nodes` left, `f`, and how
    many circuits were `scored` to choose."""
    nodes: pd.DataFrame
    """A row per node of the result: `id`, `without` (f without it), the least needed first."""
    completeness: Completeness
    """Of the result; what a smaller circuit lacks shows here."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What was ablated how, as JSON values."""

    @property
    def f(self) -> float:
        """Faithfulness of the result."""
        return float(self.steps["f"].iloc[-1])

    def to_json(self) -> dict[str, Any]:
        """The result, every step, every node and the completeness as JSON values."""
        document = {
            **self.about,
            "f": self.f,
            "circuit": list(self.circuit.ids),
            "steps": self.steps.to_dict("records"),
            "nodes": self.nodes.to_dict("records"),
            "completeness": self.completeness.to_json(),
        }
        return jsonable(document)


def minimal(
    model: ReplacementModel,
    circuit: Circuit,
    task: Task,
    *,
    tolerance: float = 0.02,
    candidates: int | None = None,
    ablation: Ablation = "mean",
    errors: Errors = "ranked",
    regime: RegimeName | Regime = "replacement",
    by: By = "role",
    seed: int = 0,
) -> Minimal:
    """The circuit that is left once every node is needed: without any, |1 − f| > |1 − f(C)| + `tolerance`.

    C is the circuit given, so that the result is as faithful as C but for the tolerance, however many nodes leave it;
    one that did harm leaves early. `regime` is the claim under which nodes are scored: `graph`, `model`, `replacement`.

    From n nodes this runs n²/2 circuits, batched, each on every example; with `candidates`, a step scores only these
    many that cost least when last scored (more where none of them can go), about n · (candidates + 2) circuits, and
    each recorded f is still measured. `completeness` of the result adds about 150. Raises `InputError` for an empty
    circuit, a tolerance below 0 or that would let the empty circuit pass, or fewer candidates than 1.
    """
    if not len(circuit):
        raise InputError("The circuit is empty; give it at least one node.")
    if candidates is not None and candidates < 1:
        raise InputError(f"candidates={candidates} leaves nothing to score; give at least 1, or None for all.")
    judge = Judge(Ablated(Cases(model, task), ablation, by=by, errors=errors, regime=regime, seed=seed))
    without = judge.without(circuit)
    f = float(without([frozenset()])[0])
    limit = abs(1 - f) + tolerance
    if not (tolerance >= 0 and limit < 1):
        raise InputError(
            f"tolerance={tolerance}: the circuit's f is {f:.3g}, and |1 − f| is 1 without any node; give a tolerance "
            "of 0 or more with which |1 − f| stays below that, or a more faithful circuit."
        )
    found = shrink(without, circuit.nodes[::-1], limit, candidates)  # of equals the weakest leaves
    rows = [("", f, 1), *((target_id(node), *measured) for node, *measured in found.steps)]
    steps = pd.DataFrame(rows, columns=["removed", "f", "scored"])
    steps.insert(1, "nodes", len(circuit) - steps.index)
    needed = sorted(found.needed.items(), key=lambda item: abs(1 - item[1]))
    left = circuit.without(node for node, *_ in found.steps)
    return Minimal(
        circuit=left,
        steps=steps,
        nodes=pd.DataFrame([(target_id(node), value) for node, value in needed], columns=["id", "without"]),
        completeness=completeness_of(judge, left, seed=seed),
        about={**judge.ablated.about, "tolerance": tolerance, "candidates": candidates},
    )
