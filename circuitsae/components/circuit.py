"""A set of edges as a circuit: how well it stands for the model, and whether anything is missing or idle.

With `F(C)` the mean metric when everything outside C is ablated, `f(C) = (F(C) − F(∅)) / (F(M) − F(∅))`, M all edges.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.components.exact import graph_of, run_keeping
from circuitsae.components.network import ComponentGraph, Edge
from circuitsae.components.problem import BATCH_TOKENS, Prepared, Problems, parts_of
from circuitsae.components.scores import Scores
from circuitsae.validation.curve import Areas, Curve, log_sizes
from circuitsae.validation.subsets import compare, halves, largest_changes
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


def areas(problems: Problems | Judge, scores: Scores, sizes: Iterable[int] | None = None) -> Areas:
    """CPR and CMD of a ranking of edges, with the curves that they are areas under, over the edges realised."""
    judge, chosen = problems if isinstance(problems, Judge) else Judge(problems), None if sizes is None else list(sizes)
    return Areas.of(lambda signed: faithfulness_curve(judge, scores, chosen, signed=signed))


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
    chosen = [(), *(tuple(judge.graph.check_writers(subset)) for subset in subsets)]
    chosen += halves(nodes, _draws(n_random if nodes else 0, len(nodes), seed))

    def both(removed: Sequence[tuple[str, ...]]) -> np.ndarray:
        ablated = [_without_nodes(judge.graph, whole, k) for whole in (circuit, judge.graph.edges) for k in removed]
        return judge.means(ablated).view(2, -1).T.numpy(force=True)

    scale = abs(judge.full - judge.empty)
    found = compare(both, list(dict.fromkeys(chosen)), nodes, greedy=greedy)
    return sorted((Gap(k.removed, k.circuit, k.model, k.gap / scale) for k in found), key=lambda gap: -gap.gap)


def _draws(count: int, size: int, seed: int) -> list[list[bool]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(size, generator=generator) < 0.5).tolist() for _ in range(count)]


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
    names = list(given)
    contexts = [frozenset(), *(frozenset([name]) for name in names)]
    contexts += map(frozenset, halves(names, _draws(n_random, len(names), seed)))

    def without(removed: Sequence[frozenset[str]]) -> np.ndarray:
        gone = [frozenset(edge for name in k for edge in given[name]) for k in removed]
        return judge.means([frozenset(circuit) - edges for edges in gone]).numpy(force=True)

    found = largest_changes(without, [(v, k) for v in names for k in contexts if v not in k])
    return {name: found[name][0] / abs(judge.full - judge.empty) for name in names}
