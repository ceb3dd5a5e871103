"""Several nodes ablated together: backups show as effects beyond the sum of what each does alone.

A node with a backup does little when it alone is removed, for the other takes over, and much when the other is gone
too. Wang et al. 2022, "Interpretability in the Wild" (section 3.4), found such heads in IOI.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from circuitsae.graph import AttributionGraph, NodeKind
from circuitsae.interventions import Recording, Regime, RegimeName, for_nodes
from circuitsae.replacement import ReplacementModel
from circuitsae.validation.measuring import Targets, ablatable, effects, node_row, require_active, traced
from circuitsae.validation.result import jsonable
from transcoders.errors import InputError

MARGIN = 0.1
"""A joint effect counts as super-additive if it exceeds the sum of the single ones by this share of it."""


@dataclass(frozen=True)
class Joint:
    """What groups of nodes do together.

    `groups`, a row per group and target: `predicted` (−Σ A[t, s], what the graph says), `sum` of the single effects,
    `joint` effect, `excess` (joint − sum), `super_additive` (|joint| > 1.1 |sum|, same sign).
    `members`, a row per group, target and member: `single` effect, and `conditional`: the effect of removing it once
    the others of its group are removed; `backed_up` where the conditional effect is beyond the single one by 10 %.
    """

    groups: pd.DataFrame
    members: pd.DataFrame

    def to_json(self) -> dict[str, Any]:
        """Both tables as JSON values."""
        return jsonable({name: getattr(self, name).to_dict("records") for name in ("groups", "members")})


def joint_ablation(
    model: ReplacementModel,
    graph: AttributionGraph,
    groups: Mapping[str, Sequence[str]] | Sequence[Sequence[str]],
    *,
    targets: Sequence[str] | None = None,
    regime: RegimeName | Regime = "model",
) -> Joint:
    """Remove every group of nodes (ids; a pair or a supernode) at once, each member alone, and all but each member.

    Effects are read at `targets` (ids of features or logits; default, the graph's logits). Everything runs batched, and
    a set that several groups need is run once. Raises `InputError` for groups of fewer than two nodes, for unknown ids,
    and for nodes that cannot be removed.
    """
    named = _named(groups)
    trace = traced(model, graph)
    chosen = [graph.nodes[node_row(graph, t)] for t in targets] if targets is not None else graph.top_logits()
    if unread := [node.id for node in chosen if not node.is_target]:
        raise InputError(f"Nodes {unread[:3]} have no inputs to read an effect at; name features or logits as targets.")
    members = {name: [graph.nodes[node_row(graph, i)] for i in ids] for name, ids in named.items()}
    everyone = [node for nodes in members.values() for node in nodes]
    if unremovable := [node.id for node in everyone if node.kind not in ablatable(graph)]:
        raise InputError(
            f"Nodes {unremovable[:3]} cannot be removed in this graph; name {', '.join(ablatable(graph))}s."
        )
    require_active(trace, [*chosen, *everyone])
    sets = _sets(named)
    removed = [for_nodes(graph.nodes[graph.position[i]] for i in sorted(ids)) for ids in sets]
    found = effects(model, Recording(model, trace), removed, Targets(model, trace, chosen), regime)

    def weight(source: str, target: str) -> float:
        return float(graph.weights[graph.position[target], graph.position[source]])

    return _tables(named, [node.id for node in chosen], dict(zip(sets, found, strict=True)), weight)


def strongest_pairs(
    graph: AttributionGraph,
    target: str | None = None,
    count: int = 10,
    *,
    kinds: Sequence[NodeKind] = (NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN),
) -> list[tuple[str, str]]:
    """Pairs of nodes that act on a target most, by |A[t, a] · A[t, b]|; without a target, on the likeliest logit."""
    row = node_row(graph, target if target is not None else graph.top_logits()[0].id)
    weights = np.abs(graph.weights[[row]].toarray()[0]) * graph.mask(
        *(kind for kind in ablatable(graph) if kind in kinds)
    )
    strongest = np.argsort(-weights, kind="stable")[: count + 1]
    pairs = [(a, b) for a, b in combinations(strongest, 2) if weights[a] * weights[b] > 0]
    pairs.sort(key=lambda pair: -weights[pair[0]] * weights[pair[1]])
    return [(str(graph.ids[a]), str(graph.ids[b])) for a, b in pairs[:count]]


def _named(groups: Mapping[str, Sequence[str]] | Sequence[Sequence[str]]) -> dict[str, list[str]]:
    if not isinstance(groups, Mapping):
        groups = {" + ".join(ids): ids for ids in groups}
    for name, ids in groups.items():
        if len(set(ids)) < 2 or len(set(ids)) < len(ids):
            raise InputError(f"Group {name!r} names {list(ids)}; a joint ablation needs two nodes or more, each once.")
    return {name: list(ids) for name, ids in groups.items()}


def _sets(groups: Mapping[str, Sequence[str]]) -> list[frozenset[str]]:
    """Every set of nodes to remove, once."""
    wanted: dict[frozenset[str], None] = {}
    for ids in groups.values():
        whole = frozenset(ids)
        wanted |= dict.fromkeys([whole, *(frozenset([i]) for i in ids), *(whole - {i} for i in ids)])
    return list(wanted)


def _tables(
    groups: Mapping[str, Sequence[str]],
    targets: Sequence[str],
    found: Mapping[frozenset[str], np.ndarray],
    weight: Callable[[str, str], float],
) -> Joint:
    whole_rows, member_rows = [], []
    for name, ids in groups.items():
        whole = frozenset(ids)
        for column, target in enumerate(targets):
            joint, single = found[whole][column], {i: found[frozenset([i])][column] for i in ids}
            total = sum(single.values())
            whole_rows.append(
                {
                    "group": name,
                    "target": target,
                    "predicted": -sum(weight(i, target) for i in ids),
                    "sum": total,
                    "joint": joint,
                    "excess": joint - total,
                    "super_additive": _beyond(joint, total),
                }
            )
            for i in ids:
                conditional = joint - found[whole - {i}][column]
                row = {"group": name, "target": target, "member": i, "single": single[i], "conditional": conditional}
                member_rows.append(row | {"backed_up": _beyond(conditional, single[i])})
    return Joint(pd.DataFrame(whole_rows), pd.DataFrame(member_rows))


def _beyond(effect: float, reference: float) -> bool:
    return bool(abs(effect) > (1 + MARGIN) * abs(reference) and effect * reference >= 0)
