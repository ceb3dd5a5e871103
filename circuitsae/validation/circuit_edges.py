"""The edges of a feature circuit over a task: means over prompts of what goes from node to node to the metric."""

from collections import defaultdict
from collections.abc import Sequence

import pandas as pd

from circuitsae.attribution.effect_edges import EffectGraph, edge_effects
from circuitsae.attribution.effects import After, node_effects
from circuitsae.interventions import Library, PromptLike, Recording, target_id
from circuitsae.replacement import ReplacementModel
from circuitsae.validation.ablation import Ablated
from circuitsae.validation.circuits import Circuit, CircuitNode
from circuitsae.validation.tasks import Cases, Task
from transcoders.errors import InputError


def circuit_edges(
    model: ReplacementModel,
    circuit: Circuit,
    task: Task,
    *,
    corrupted: Sequence[PromptLike] | None = None,
    regime: After = "model",
) -> EffectGraph:
    """`edge_effects` between a circuit's nodes, as means over the task's prompts.

    An edge that a prompt has not counts as 0; `frequency` is the share of the prompts that have it. A node without a
    role or position stands for all its positions, whose edges are summed. `corrupted` and `regime` as in `rank_nodes`.
    Raises `InputError` for an empty circuit and another number of corrupted prompts.
    """
    if not len(circuit):
        raise InputError("The circuit has no nodes; there are no edges between none.")
    if corrupted is not None and len(corrupted) != len(task.examples):
        raise InputError(f"{len(corrupted)} corrupted prompts for {len(task.examples)} examples; give one for each.")
    cases, library = Cases(model, task), Library(model)
    weight: dict[tuple[str, str], float] = defaultdict(float)
    count: dict[tuple[str, str], int] = defaultdict(int)
    for number, (recording, metric) in enumerate(zip(cases.recordings, cases.metrics, strict=True)):
        other = None if corrupted is None else library[corrupted[number]].trace
        effects = node_effects(model, recording.trace, metric, corrupted=other, regime=regime)
        named = {name: target_id(node) for node in circuit.nodes for name in _ids(recording, node)}
        here = named.keys() & set(effects.frame()["id"])
        found: dict[tuple[str, str], float] = defaultdict(float)
        for source, target, effect in edge_effects(effects, here).triples() if here else []:
            found[named[source], named.get(target, target)] += effect
        for pair, effect in found.items():
            weight[pair] += effect / len(cases)
            count[pair] += 1
    rows = [(source, target, effect, count[source, target] / len(cases)) for (source, target), effect in weight.items()]
    edges = pd.DataFrame(rows, columns=["source", "target", "effect", "frequency"])
    return EffectGraph(circuit.frame(), edges.sort_values("effect", key=abs, ascending=False, ignore_index=True))


def _ids(recording: Recording, node: CircuitNode) -> list[str]:
    """Where a node is on a prompt."""
    name = target_id(node).split("@")[0]
    return [f"{name}@{pos}" for pos in Ablated.positions_of(recording, node)]
