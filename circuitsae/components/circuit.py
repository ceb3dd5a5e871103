"""A set of edges as a circuit: how well it stands for the model, and whether anything is missing or idle.

With `F(C)` the mean metric when everything outside C is ablated, `f(C) = (F(C) − F(∅)) / (F(M) − F(∅))`, M all edges.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.components.exact import graph_of, run_keeping
from circuitsae.components.network import ComponentGraph, Edge
from circuitsae.components.problem import BATCH_TOKENS, Prepared, Problems, parts_of
from circuitsae.components.scores import Scores
from circuitsae.validation.curve import Curve, log_sizes
from transcoders.errors import InputError

EdgeSet = Collection[Edge]


class Judge:
    """Measures circuits of one task: runs are kept, so that many circuits can be asked about.

    Raises `InputError` where ablating every edge does not change the metric: then no circuit can be judged.
    """

    def __init__(self, problems: Problems, *, batch_tokens: int = BATCH_TOKENS) -> None:
        self.parts: list[Prepared] = list(parts_of(problems, batch_tokens))
        self.graph: ComponentGraph = graph_of(problems)
        self.batch_tokens = batch_tokens
        self.runs = 0
        self.ends = self.metric([[], self.graph.edges])
        self.empty, self.full = self.ends.mean(1).tolist()
        gap, size = abs(self.full - self.empty), max(abs(self.full), abs(self.empty))
        if gap <= 1e-6 * size or gap == 0:
            raise InputError(
                f"The metric is {self.full:.4g} whether all edges are kept or all ablated, so faithfulness has no "
                "scale; use another metric or corruption."
            )

    def metric(self, circuits: Sequence[EdgeSet]) -> Float[Tensor, "circuit example"]:
        """The metric of every example for every circuit, with everything else ablated."""
        self.runs += len(circuits)
        return run_keeping(self.parts, circuits, batch_tokens=self.batch_tokens).double()

    def means(self, circuits: Sequence[EdgeSet]) -> Float[Tensor, "circuit"]:
        """F of each circuit: the mean metric over examples."""
        return self.metric(circuits).mean(1)

    def faithfulness(self, circuits: Sequence[EdgeSet]) -> Float[Tensor, "circuit"]:
        """f of each circuit."""
        return (self.means(circuits) - self.empty) / (self.full - self.empty)


def faithfulness(problems: Problems, circuit: EdgeSet) -> float:
    """f of one circuit."""
    judge = Judge(problems)
    return float(judge.faithfulness([judge.graph.check_edges(circuit)])[0])


def faithfulness_curve(
    problems: Problems | Judge, scores: Scores, sizes: Iterable[int] | None = None, *, signed: bool = False
) -> Curve:
    """f of the best edges, for each size; best by |score|, or with `signed` by how much their ablation hurts."""
    judge = problems if isinstance(problems, Judge) else Judge(problems)
    direction = -1 if judge.full > judge.empty else 1
    key = direction * scores.mean if signed else scores.mean.abs()
    ordered = [scores.items[i] for i in key.argsort(descending=True, stable=True).tolist()]
    n = len(ordered)
    chosen = sorted({min(n, max(1, s)) for s in (log_sizes(n, points=13) if sizes is None else sizes)})
    circuits = [judge.graph.connected(e for e in ordered[:size] if isinstance(e, Edge)) for size in chosen]
    realised = tuple(len(circuit) for circuit in circuits)
    empty, full = judge.ends.numpy(force=True)
    return Curve(
        sizes=tuple(chosen),
        metric=judge.metric(circuits).numpy(force=True),
        empty=empty,
        full=full,
        parts={"edges": chosen, "connected": realised},
        realised=realised,
    )


def edges_of_nodes(graph: ComponentGraph, nodes: Iterable[str]) -> frozenset[Edge]:
    """Every edge between these components; embeddings and logits always count among them."""
    kept = {"embed", "pos", *graph.check_writers(nodes)}
    return frozenset(
        edge
        for edge in graph.edges
        if edge.writer in kept and (edge.reader == "logits" or kept & set(graph.writer_of(edge.reader)))
    )


def by_node(graph: ComponentGraph, circuit: EdgeSet) -> dict[str, frozenset[Edge]]:
    """A circuit's edges by the component that they enter or leave (embeddings and logits aside)."""
    parts: dict[str, set[Edge]] = {}
    for edge in circuit:
        for node in {edge.writer, *graph.writer_of(edge.reader)} - {"embed", "pos"}:
            parts.setdefault(node, set()).add(edge)
    return {node: frozenset(parts[node]) for node in graph.writers if node in parts}


@dataclass(frozen=True)
class Gap:
    """`|F(C∖K) − F(M∖K)|` for one set K, in units of `|F(M) − F(∅)|`."""

    removed: tuple[str, ...]
    circuit: float
    model: float
    gap: float


def completeness(
    problems: Problems | Judge,
    circuit: EdgeSet,
    *,
    subsets: Iterable[Collection[str]] = (),
    n_random: int = 20,
    greedy: int = 5,
    seed: int = 0,
) -> list[Gap]:
    """How the circuit and the model differ once components K are ablated in both; a missing part shows as a gap.

    `subsets` are K of your choice (classes of heads); beside them none, `n_random` random K and a greedy K of up to
    `greedy` components, each chosen to widen the gap (Wang et al. 2022, section 4). Largest gap first.
    """
    judge = problems if isinstance(problems, Judge) else Judge(problems)
    nodes = list(by_node(judge.graph, circuit))
    generator = torch.Generator().manual_seed(seed)
    removed = [(), *(tuple(judge.graph.check_writers(subset)) for subset in subsets)]
    for _ in range(n_random if nodes else 0):
        drawn = torch.rand(len(nodes), generator=generator) < 0.5
        removed.append(tuple(node for node, out in zip(nodes, drawn.tolist(), strict=True) if out))
    gaps = _gaps(judge, circuit, list(dict.fromkeys(removed)))
    taken: tuple[str, ...] = ()
    for _ in range(min(greedy, len(nodes))):
        best = max(_gaps(judge, circuit, [(*taken, node) for node in nodes if node not in taken]), key=lambda g: g.gap)
        gaps.append(best)
        taken = best.removed
    return sorted(gaps, key=lambda g: -g.gap)


def _gaps(judge: Judge, circuit: EdgeSet, removed: Sequence[tuple[str, ...]]) -> list[Gap]:
    cut = [_without_nodes(judge.graph, circuit, nodes) for nodes in removed]
    whole = [_without_nodes(judge.graph, judge.graph.edges, nodes) for nodes in removed]
    if not removed:
        return []
    values = judge.means([*cut, *whole]).view(2, -1)
    scale = abs(judge.full - judge.empty)
    return [
        Gap(nodes, mine, theirs, abs(mine - theirs) / scale)
        for nodes, mine, theirs in zip(removed, *values.tolist(), strict=True)
    ]


def _without_nodes(graph: ComponentGraph, edges: EdgeSet, nodes: Collection[str]) -> frozenset[Edge]:
    """A component is ablated by ablating what it writes."""
    return frozenset(edge for edge in edges if edge.writer not in nodes)


def minimality(
    problems: Problems | Judge,
    circuit: EdgeSet,
    *,
    parts: Mapping[str, EdgeSet] | None = None,
    n_random: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    """For each part v the largest `|F(C∖K) − F(C∖(K∪{v}))|` found over sets K of other parts, over `|F(M) − F(∅)|`.

    K runs over the empty set, single parts and `n_random` random sets. Parts are the components, unless given
    (`{str(edge): [edge] for edge in circuit}` for single edges). A part near zero is idle (Wang et al. 2022, 4).
    """
    judge = problems if isinstance(problems, Judge) else Judge(problems)
    given = by_node(judge.graph, circuit) if parts is None else parts
    names, generator = list(given), torch.Generator().manual_seed(seed)
    contexts: list[set[str]] = [set(), *({name} for name in names)]
    for _ in range(n_random):
        drawn = torch.rand(len(names), generator=generator) < 0.5
        contexts.append({name for name, out in zip(names, drawn.tolist(), strict=True) if out})

    def without(removed: Collection[str]) -> frozenset[Edge]:
        return frozenset(circuit) - {edge for name in removed for edge in given[name]}

    pairs = [(name, index) for name in names for index, context in enumerate(contexts) if name not in context]
    circuits = [without(context) for context in contexts] + [without({name, *contexts[i]}) for name, i in pairs]
    values = judge.means(circuits)
    changes = values[[i for _, i in pairs]] - values[len(contexts) :]
    found = dict.fromkeys(names, 0.0)
    for (name, _), change in zip(pairs, changes.abs().tolist(), strict=True):
        found[name] = max(found[name], change / abs(judge.full - judge.empty))
    return found
