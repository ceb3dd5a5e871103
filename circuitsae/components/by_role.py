"""A circuit of heads by roles: what the edges from the heads of one role to those of another are worth, together.

    worth(A → B) = (F(M) − F(M ∖ edges(A, B))) / |F(M)|

with F the mean metric, M all edges, and `edges(A, B)` all direct edges from A's components to inputs of B's, ablated at
once (Wang et al. 2022, figure 2, drawn from patched paths). Every figure is a run of the model.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations

import pandas as pd

from circuitsae.components.circuit import Judge, edges_of_nodes
from circuitsae.components.network import ComponentGraph, Edge
from circuitsae.components.problem import Problems
from circuitsae.report.circuit_diagram import Columns
from circuitsae.report.circuit_drawing import CircuitPicture
from circuitsae.report.circuit_of_heads import ANSWER, Look, heads_picture
from transcoders.errors import InputError

LEAST = 0.02
"""Arrows of less worth than this share of the metric are not drawn."""


@dataclass(frozen=True, eq=False)
class RoleCircuit:
    """Roles and what is between them."""

    classes: Mapping[str, tuple[str, ...]]
    """Components by role, each in one."""
    effects: pd.DataFrame
    """A row per pair that has edges: `source`, `target` (a role, or `answer`), `worth`, `edges` (how many), and of
    those drawn whose target has heads `by`, the input (q, k or v) whose edges are worth most."""
    metric: float
    """F(M)."""
    faithfulness: float
    """f of the boxes and the arrows drawn, with embeddings and MLPs and all edges of theirs among these."""
    prompts: int
    least: float = LEAST
    positions: Mapping[str, str] = field(default_factory=dict)
    """Where a role acts."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Names of positions in their order, with a token that stands there."""
    looks: Sequence[Look] = ()
    """Where roles look."""
    measure: str = "metric"
    """What the metric is called."""

    @property
    def drawn(self) -> pd.DataFrame:
        """The rows of `effects` that are worth drawing."""
        return pd.DataFrame(self.effects[self.effects["worth"].abs() >= self.least]).reset_index(drop=True)

    def picture(self, columns: Columns = 2) -> CircuitPicture:
        """The circuit to look at and to print."""
        found = self.drawn
        rows = [(str(r["source"]), str(r["target"]), float(r["worth"]), str(r["by"])) for r in found.to_dict("records")]
        told = (
            f"Each arrow is all direct edges between two boxes, resampled at once in the model, on {self.prompts} "
            f"prompts; {len(self.effects) - len(found)} of {len(self.effects)} pairs are worth less than "
            f"{100 * self.least:g} % and not drawn. With these boxes and arrows and the MLPs alone, faithfulness is "
            f"{self.faithfulness:.2f}."
        )
        return CircuitPicture(
            heads_picture(self.classes, rows, positions=self.positions, places=self.places, looks=self.looks,
                          metric=(self.measure, self.metric), last=told),
            columns,
        )  # fmt: skip


def role_circuit(
    problems: Problems | Judge,
    classes: Mapping[str, Sequence[str]],
    *,
    positions: Mapping[str, str] | None = None,
    places: Mapping[str, str] | None = None,
    looks: Sequence[Look] = (),
    measure: str = "metric",
    least: float = LEAST,
) -> RoleCircuit:
    """Measure what is between roles: for each ordered pair of them, and each with the answer, one run of the prompts.

    Of pairs worth at least `least`, three more: by queries, keys and values alone. `positions`, `places`, `looks` and
    `measure` are for the picture. Raises `InputError` for a component that the model lacks, or that has two roles.
    """
    judge = problems if isinstance(problems, Judge) else Judge(problems)
    graph = judge.graph
    members = {role: graph.check_writers(names) for role, names in classes.items() if names}
    named = [name for names in members.values() for name in names]
    if ANSWER in members or not named:
        raise InputError(f"The roles {sorted(members)} cannot be drawn; give at least one, and none called {ANSWER!r}.")
    if len(set(named)) < len(named):
        raise InputError(f"{max(named, key=named.count)!r} has two roles; give each component one.")
    pairs = {pair: edges for pair in permutations(members, 2) if (edges := _between(graph, members, *pair))}
    pairs |= {(role, ANSWER): edges for role in members if (edges := _between(graph, members, role, ANSWER))}
    worth = _worth(judge, list(pairs.values()))
    rows = [
        {"source": s, "target": t, "worth": w, "edges": len(edges), "by": ""}
        for ((s, t), edges), w in zip(pairs.items(), worth, strict=True)
    ]
    for row in rows:
        if abs(row["worth"]) >= least:
            row["by"] = _strongest_input(judge, pairs[row["source"], row["target"]])
    faint = [pairs[row["source"], row["target"]] for row in rows if abs(row["worth"]) < least]
    left = edges_of_nodes(graph, [*named, *_mlps(graph)]) - frozenset().union(*faint)
    return RoleCircuit(
        classes=members,
        effects=pd.DataFrame(rows, columns=["source", "target", "worth", "edges", "by"]),
        metric=judge.full,
        faithfulness=float(judge.faithfulness([left])[0]),
        prompts=judge.ends.shape[1],
        least=least,
        positions=dict(positions or {}),
        places=dict(places or {}),
        looks=tuple(looks),
        measure=measure,
    )


def _mlps(graph: ComponentGraph) -> list[str]:
    return [name for name in graph.writers if name.startswith("m")]


def _between(graph: ComponentGraph, members: Mapping[str, Sequence[str]], source: str, target: str) -> frozenset[Edge]:
    """Every direct edge from one role to another, or to the logits."""
    writers = set(members[source])
    reached = set(members.get(target, ()))
    readers = ["logits"] if target == ANSWER else [r for r in graph.readers if reached & set(graph.writer_of(r))]
    return frozenset(Edge(w, r) for r in readers for w in graph.writers_before(r) if w in writers)


def _worth(judge: Judge, sets: Sequence[Collection[Edge]]) -> list[float]:
    if not sets:
        return []
    every = frozenset(judge.graph.edges)
    means = judge.means([every - frozenset(edges) for edges in sets])
    return ((judge.full - means) / abs(judge.full)).tolist()


def _strongest_input(judge: Judge, edges: Collection[Edge]) -> str:
    """The input by which most enters: q, k or v; nothing where the readers are no heads."""
    kinds = {kind: [e for e in edges if e.reader.startswith("a") and e.reader.endswith(f".{kind}")] for kind in "qkv"}
    given = {kind: chosen for kind, chosen in kinds.items() if chosen}
    worth = dict(zip(given, _worth(judge, list(given.values())), strict=True))
    return max(worth, key=lambda kind: abs(worth[kind]), default="")
