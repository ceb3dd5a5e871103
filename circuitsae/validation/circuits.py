"""Circuits of features and error nodes over a task, and how nodes are ranked for them.

The score of node s on one prompt is its effect on the metric by gradients (`circuitsae.attribution.effects`), or its
total effect in the linear graph: with g_t = ∂m/∂logit_t for a logit and g_t = E_t / a_t for an active feature (whose
write scales with its activation),

    E_s = Σ_t A[t, s] · g_t,

from the top layer down. Nodes of different prompts are one where kind, layer, feature and role are the same.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch

from circuitsae.attribution import LogitTargets
from circuitsae.attribution.attribute import attribute_trace
from circuitsae.attribution.effects import STEPS, After, NodeEffects, node_effects
from circuitsae.graph import AttributionGraph, NodeKind
from circuitsae.interventions import Error, Feature, Library, Metric, PromptLike, Recording, parse_target, target_id
from circuitsae.replacement import ReplacementModel
from circuitsae.validation.tasks import Cases, Task
from transcoders.errors import InputError

LOGITS = 128
"""At most this many logits, those on which the metric depends most, are explained."""
CircuitNode = Feature | Error


@dataclass(frozen=True)
class Circuit:
    """Features and error nodes, the most important first; each at a role, a position, or everywhere (`at`)."""

    nodes: tuple[CircuitNode, ...]
    scores: tuple[float, ...] = field(default=())

    def __post_init__(self) -> None:
        if len(set(self.nodes)) < len(self.nodes):
            raise InputError("The circuit names a node twice; give each once.")

    def __len__(self) -> int:
        return len(self.nodes)

    @classmethod
    def of(cls, names: Iterable[str]) -> "Circuit":
        """From ids such as `2.713@IO`, `2.713@5` or `2.err@-1`."""
        nodes = []
        for name in names:
            node = parse_target(name)
            if not isinstance(node, CircuitNode):
                raise InputError(f"{name!r} is no node of a feature circuit; give features and error nodes.")
            nodes.append(node)
        return cls(tuple(nodes))

    @classmethod
    def from_graph(cls, graph: AttributionGraph, roles: Mapping[str, int] | None = None) -> "Circuit":
        """The features and error nodes of a (pruned) graph by influence, at roles where their positions have one."""
        role_at = {pos % len(graph.tokens): role for role, pos in (roles or {}).items()}
        rows = np.flatnonzero(graph.mask(NodeKind.FEATURE, NodeKind.ERROR))
        order = rows[np.argsort(-graph.influence[rows], kind="stable")]
        nodes = [graph.nodes[row] for row in order]
        made = [_node(n.kind, n.layer, n.index, role_at.get(n.pos) or n.pos) for n in nodes]
        return cls(tuple(made), tuple(float(graph.influence[row]) for row in order))

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(target_id(node) for node in self.nodes)

    def first(self, count: int) -> "Circuit":
        """The `count` most important nodes."""
        return Circuit(self.nodes[:count], self.scores[:count])

    def without(self, nodes: Iterable[CircuitNode]) -> "Circuit":
        """All but some nodes."""
        gone = set(nodes)
        left = [row for row, node in enumerate(self.nodes) if node not in gone]
        return Circuit(tuple(self.nodes[row] for row in left), tuple(self.scores[row] for row in left if self.scores))

    def features_only(self) -> "Circuit":
        """Without its error nodes."""
        return self.without(node for node in self.nodes if isinstance(node, Error))

    def frame(self) -> pd.DataFrame:
        """A row per node: `id`, `kind`, `layer`, `at`, `score`."""
        kinds = [kind_of(node) for node in self.nodes]
        table: dict[str, Any] = {"id": self.ids, "kind": kinds, "layer": [node.layer for node in self.nodes]}
        table |= {"at": [node.at for node in self.nodes], "score": self.scores or np.nan}
        return pd.DataFrame(table)


def kind_of(node: CircuitNode) -> str:
    return str(NodeKind.FEATURE if isinstance(node, Feature) else NodeKind.ERROR)


@dataclass(frozen=True, eq=False)
class Ranking:
    """Every node that is active on some example, and its total effect on each example's metric."""

    nodes: tuple[CircuitNode, ...]
    scores: np.ndarray
    """[example, node]; 0 where a node is not active."""

    def circuit(self, count: int | None = None, *, signed: bool = False) -> Circuit:
        """The nodes of largest mean |score|, or of largest mean score: those that raise the metric (signed)."""
        mean = _mean(self.scores, signed)
        order = np.argsort(-mean, kind="stable")[:count]
        return Circuit(tuple(self.nodes[i] for i in order), tuple(float(mean[i]) for i in order))

    def features_only(self) -> "Ranking":
        """Without its error nodes."""
        kept = [column for column, node in enumerate(self.nodes) if isinstance(node, Feature)]
        return Ranking(tuple(self.nodes[column] for column in kept), self.scores[:, kept])

    def stability(self, count: int, *, resamples: int = 20, signed: bool = False, seed: int = 0) -> "Stability":
        """How much the circuit of `count` nodes depends on the examples: bootstrap over them."""
        if not 1 <= count <= len(self.nodes):
            raise InputError(f"count={count}: the ranking has {len(self.nodes)} nodes; give 1 to that many.")
        rng = np.random.default_rng(seed)
        chosen = np.zeros((resamples, len(self.nodes)), dtype=bool)
        for row in chosen:
            drawn = self.scores[rng.integers(0, len(self.scores), len(self.scores))]
            row[np.argsort(-_mean(drawn, signed), kind="stable")[:count]] = True
        pairs = [(a & b).sum() / (a | b).sum() for a, b in combinations(chosen, 2)]
        return Stability(count, np.array(pairs), dict(zip(self.nodes, chosen.mean(0).tolist(), strict=True)))


@dataclass(frozen=True, eq=False)
class Stability:
    """Circuits of bootstrap resamples of the examples, compared pair by pair."""

    count: int
    jaccard: np.ndarray
    """|A ∩ B| / |A ∪ B| of every pair of resamples' circuits."""
    frequency: Mapping[CircuitNode, float]
    """In which share of the resamples a node is in the circuit."""

    @property
    def mean(self) -> float:
        return float(self.jaccard.mean()) if len(self.jaccard) else np.nan

    def frame(self) -> pd.DataFrame:
        """A row per node that was ever chosen: `id`, `frequency`."""
        rows = [(target_id(node), share) for node, share in self.frequency.items() if share > 0]
        return pd.DataFrame(rows, columns=["id", "frequency"]).sort_values("frequency", ascending=False, kind="stable")

    def to_json(self) -> dict[str, Any]:
        """Mean and 5th percentile of the Jaccard indices, and the nodes' frequencies."""
        low = float(np.quantile(self.jaccard, 0.05)) if len(self.jaccard) else None
        return {"count": self.count, "jaccard": self.mean, "low": low, "nodes": self.frame().to_dict("records")}


Method = Literal["graph", "gradient", "integrated"]
"""How nodes are scored: in the linear graph, or by gradients at the clean run or on the way to it."""


def rank_nodes(
    model: ReplacementModel,
    task: Task,
    *,
    method: Method | None = None,
    corrupted: Sequence[PromptLike] | None = None,
    steps: int = STEPS,
    regime: After = "model",
) -> Ranking:
    """The effect of every feature and error node on every example's metric.

    `method`: `graph`, one attribution graph each, the default with transcoders; or that of `node_effects`, `integrated`
    being the default with autoencoders, with its `steps` and `regime`. Then a node's effect is against its value on the
    `corrupted` prompt of the example, as long as the clean one, where they are given, or against 0.
    Positions are told apart by role; those without one by number where all prompts have one length, else by their
    distance from the end.
    """
    how = method or ("integrated" if model.spliced else "graph")
    if how not in get_args(Method):
        raise InputError(f"method={how!r} is not known; give {' or '.join(map(repr, get_args(Method)))}.")
    if corrupted is not None and (how == "graph" or len(corrupted) != len(task.examples)):
        raise InputError(
            f"{len(corrupted)} corrupted prompts for {len(task.examples)} examples with method={how!r}; give one for "
            "each, with 'gradient' or 'integrated'."
        )
    cases, library = Cases(model, task), Library(model)
    one_length = len(cases.by_length()) == 1
    found: dict[CircuitNode, dict[int, float]] = defaultdict(dict)
    for number, (recording, metric) in enumerate(zip(cases.recordings, cases.metrics, strict=True)):
        if how == "graph":
            scored = _in_graph(model, recording, metric)
        else:
            other = None if corrupted is None else library[corrupted[number]].trace
            effects = node_effects(
                model, recording.trace, metric, corrupted=other, method=how, steps=steps, regime=regime
            )
            scored = _of_effects(effects)
        role_at = {pos % len(recording): role for role, pos in recording.roles.items()}
        shift = 0 if one_length else len(recording)
        for (kind, layer, pos, index), effect in scored:
            found[_node(kind, layer, index, role_at.get(pos, pos - shift))][number] = effect
    scores = np.zeros((len(cases), len(found)))
    for column, by_example in enumerate(found.values()):
        scores[list(by_example), column] = list(by_example.values())
    return Ranking(tuple(found), scores)


Scored = list[tuple[tuple[NodeKind, int, int, int], float]]
"""Kind, layer, position and number of each node, and its score."""


def _of_effects(effects: NodeEffects) -> Scored:
    index, where = effects.nodes.index, effects.nodes.errors.any(-1).nonzero()
    features = [(NodeKind.FEATURE, layer, pos, feature) for layer, pos, feature in index.tolist()]
    errors = [(NodeKind.ERROR, layer, pos, -1) for layer, pos in where.tolist()]
    values = effects.features.tolist() + effects.errors[where[:, 0], where[:, 1]].tolist()
    return list(zip([*features, *errors], values, strict=True))


def _in_graph(model: ReplacementModel, recording: Recording, metric: Metric) -> Scored:
    gradient = _gradient(metric, recording.trace.logits[-1])
    tokens = gradient.abs().topk(min(LOGITS, int((gradient != 0).sum()))).indices
    if not len(tokens):
        raise InputError("The metric does not depend on the logits of a prompt's last position; nothing can be ranked.")
    graph = attribute_trace(model, recording.trace, targets=LogitTargets(tokens.tolist()))
    total = graph_effects(graph, {int(token): float(gradient[token]) for token in tokens})
    rows = np.flatnonzero(graph.mask(NodeKind.FEATURE, NodeKind.ERROR))
    nodes = [graph.nodes[row] for row in rows]
    return list(zip([(n.kind, n.layer, n.pos, n.index) for n in nodes], total[rows].tolist(), strict=True))


def _gradient(metric: Metric, logits: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        leaf = logits.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(metric(leaf[None])[0], leaf, allow_unused=True)
    return torch.zeros_like(logits) if gradient is None else gradient


def graph_effects(graph: AttributionGraph, weight: Mapping[int, float]) -> np.ndarray:
    """E_s of every node of a full graph, for a metric whose derivatives by the logits of tokens are `weight`."""
    total, slope = np.zeros(len(graph.nodes)), np.zeros(len(graph.nodes))
    layers, features = graph.layers, graph.mask(NodeKind.FEATURE)
    activation = np.array([node.activation for node in graph.nodes])
    for row in np.flatnonzero(graph.mask(NodeKind.LOGIT)):
        slope[row] = weight.get(graph.nodes[row].index, 0.0)
    for layer in range(graph.n_layers, -1, -1):
        here = np.flatnonzero((layers == layer) & graph.mask(NodeKind.FEATURE, NodeKind.LOGIT))
        on = here[features[here]]
        slope[on] = total[on] / activation[on]
        total += slope[here] @ graph.weights[here]
    return total


def _node(kind: NodeKind, layer: int, index: int, at: int | str) -> CircuitNode:
    return Feature(layer, index, at) if kind is NodeKind.FEATURE else Error(layer, at)


def _mean(scores: np.ndarray, signed: bool) -> np.ndarray:
    return scores.mean(0) if signed else np.abs(scores).mean(0)


def nodes_by(nodes: Sequence[CircuitNode], attribute: str) -> dict[str, list[CircuitNode]]:
    """Nodes of one `kind`, `layer` or place (`at`) together."""
    groups: dict[str, list[CircuitNode]] = defaultdict(list)
    for node in nodes:
        value = kind_of(node) if attribute == "kind" else getattr(node, attribute)
        groups[f"{attribute} {value}"].append(node)
    return dict(groups)
