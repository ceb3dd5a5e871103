"""Nodes of a feature circuit put together by what they do in each template, and what removing them together does."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from circuitsae.graph.likeness import clusters, cosines
from circuitsae.interventions import Intervention, Patch, Prompt, Zero, run_alternatives, target_id
from circuitsae.interventions.prompts import Library
from circuitsae.replacement import ReplacementModel
from circuitsae.validation import Circuit, PromptTask, Ranking
from circuitsae.validation.circuits import CircuitNode

ALIKE = 0.2
"""Nodes of one place are put together up to this mean cosine distance."""
INVARIANT = 0.5
"""A supernode is invariant if its weakest template has at least this share of its mean effect, with the same sign."""


@dataclass(frozen=True, eq=False)
class Supernode:
    """Nodes of one place whose effects on the metric go together over templates."""

    name: str
    nodes: tuple[CircuitNode, ...]
    effect: float
    """Its nodes' effects in the linear graph, summed; mean over examples."""
    invariance: float
    """Effect in the template where it is weakest over its mean effect; 1: the same in all, below 0: of another sign."""

    @property
    def invariant(self) -> bool:
        return self.invariance >= INVARIANT


def supernodes(ranking: Ranking, circuit: Circuit, templates: Sequence[str]) -> list[Supernode]:
    """Clusters of a circuit's nodes, the strongest first.

    A node's profile is its mean effect on the metric in each template. Nodes of one place are clustered by the cosine
    distance of their profiles, each with its size (average linkage, cut at `ALIKE`): nodes that push the metric the
    same way in the same templates are one supernode.
    """
    column = {node: i for i, node in enumerate(ranking.nodes)}
    kinds = list(dict.fromkeys(templates))
    member = np.array([[t == kind for t in templates] for kind in kinds], dtype=float)
    profile = (member / member.sum(1, keepdims=True)) @ ranking.scores[:, [column[node] for node in circuit.nodes]]
    found = []
    for place in dict.fromkeys(str(node.at) for node in circuit.nodes):
        rows = [i for i, node in enumerate(circuit.nodes) if str(node.at) == place]
        for number, members in enumerate(_clusters(profile[:, rows].T)):
            chosen = [rows[i] for i in members]
            total = profile[:, chosen].sum(1)
            mean = float(total.mean())
            weakest = float((total / mean).min()) if mean else 0.0
            found.append(Supernode(f"{place} {number + 1}", tuple(circuit.nodes[i] for i in chosen), mean, weakest))
    return sorted(found, key=lambda one: -abs(one.effect))


def _clusters(profiles: np.ndarray) -> list[list[int]]:
    norms = np.linalg.norm(profiles, axis=1)
    live = np.flatnonzero(norms > 0)
    if len(live) < 2:
        return [list(range(len(profiles)))]
    groups = [live[members].tolist() for members in clusters(1 - cosines(profiles[live]), ALIKE)]
    return [*groups, *([i] for i in np.flatnonzero(norms == 0).tolist())]


@torch.no_grad()
def ablate_supernodes(
    model: ReplacementModel,
    task: PromptTask,
    corrupt: Sequence[Prompt],
    groups: Sequence[Supernode],
    ranking: Ranking,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """What the real model (regime `model`) does once a supernode is removed, or set as on the corrupt prompt.

    A row per supernode and one for all together: `supernode`, `features`, `errors`, `linear` (effect in the graphs),
    `invariance`, and changes of the metric, means over the task's prompts: `zeroed`, `patched`, `control` (as many
    other nodes of the same kinds and layers, zeroed).
    """
    every = Supernode("all of these", tuple(n for g in groups for n in g.nodes), sum(g.effect for g in groups), np.nan)
    chosen = [*groups, every] if len(groups) > 1 else list(groups)
    rng = np.random.default_rng(seed)
    others = [_others(group, every, ranking, rng) for group in chosen]
    library, by_length, metrics, before = Library(model), defaultdict(list), [], []
    for example, source in zip(task.examples, corrupt, strict=True):
        prompt = Prompt(example.prompt, example.roles, example.template)
        recording = library[prompt]
        for group, control in zip(chosen, others, strict=True):
            for nodes, operation in ((group.nodes, Zero()), (group.nodes, Patch(source)), (control, Zero())):
                here = [node for node in nodes if _is_on(node, example.roles, len(recording))]
                row = (recording, [Intervention(node, operation) for node in here])
                by_length[len(recording)].append((len(metrics), row))
                metrics.append(example.measure)
                before.append(float(example.measure(recording.trace.logits[-1:])[0]))
    after = np.zeros(len(metrics))
    for numbered in by_length.values():
        chunks = run_alternatives(model, [row for _, row in numbered], "model", library=library)
        logits = (row for chunk in chunks for row in chunk.logits[:, -1])
        for (number, _), row in zip(numbered, logits, strict=True):
            after[number] = float(metrics[number](row[None])[0])
    change = (after - np.array(before)).reshape(len(task.examples), len(chosen), 3).mean(0)
    return pd.DataFrame(
        [
            {
                "supernode": group.name,
                "nodes": ", ".join(target_id(node) for node in group.nodes[:4])
                + (" …" if len(group.nodes) > 4 else ""),
                "features": sum(not target_id(node).split("@")[0].endswith("err") for node in group.nodes),
                "errors": sum(target_id(node).split("@")[0].endswith("err") for node in group.nodes),
                "linear": -group.effect,
                "invariance": group.invariance,
                "zeroed": row[0],
                "patched": row[1],
                "control": row[2],
            }
            for group, row in zip(chosen, change.tolist(), strict=True)
        ]
    )


def _others(group: Supernode, every: Supernode, ranking: Ranking, rng: np.random.Generator) -> list[CircuitNode]:
    """As many nodes that are active on the task, of the same kinds and layers, outside every supernode."""
    taken, drawn = set(every.nodes), []
    for node in group.nodes:
        pool = [n for n in ranking.nodes if n not in taken and type(n) is type(node) and n.layer == node.layer]
        if pool:
            drawn.append(pool[rng.integers(len(pool))])
            taken.add(drawn[-1])
    return drawn


def _is_on(node: CircuitNode, roles: Mapping[str, int], length: int) -> bool:
    """Whether a prompt has the place of a node."""
    if isinstance(node.at, str):
        return node.at in roles
    return not isinstance(node.at, int) or -length < node.at < length
