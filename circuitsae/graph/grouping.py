"""Supernodes in place of their members, every edge summed and none lost."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
from scipy import sparse

from circuitsae.graph.compact import row_blocks
from circuitsae.graph.influence import reciprocal
from circuitsae.graph.past import past_share
from transcoders.errors import InputError


@dataclass(frozen=True, slots=True)
class Supernode:
    """Nodes under one name."""

    name: str
    members: tuple[str, ...]
    """Ids of nodes."""
    reason: str = ""
    """What they have in common, in words."""
    score: float = field(default=math.nan, compare=False)
    """Mean similarity of its pairs."""

    def as_dict(self) -> dict[str, Any]:
        """As the page of a graph reads it."""
        return asdict(self) | {"members": list(self.members), "score": None if np.isnan(self.score) else self.score}


def group_nodes(
    nodes: pd.DataFrame,
    weights: sparse.csr_array,
    supernodes: Sequence[Supernode],
    past: sparse.csr_array | None = None,
) -> nx.DiGraph:
    """Nodes and edges with each supernode in place of its members, edges summed in float64.

    `nodes`: the `nodes_frame` of a graph with columns `start`, `inputs` and `rest`; `weights` [node, node]; `past`: the
    part of these that passed by skip terms, which is summed as they are.

        weight(S → T) = Σ_{s∈S, t∈T} A[t, s]        share(S → T) = Σ_{t∈T} I_t Σ_{s∈S} Â[t, s] / Σ_{t∈T} I_t

    Raises `InputError` for a name given twice or that is a node's, members that are not among the nodes, and nodes in
    two supernodes.
    """
    into, names = places(nodes["id"].tolist(), supernodes)
    n, k = len(nodes), len(names)
    merge = sparse.csr_array((np.ones(n), (np.arange(n), into)), shape=(n, k))
    importance = np.nan_to_num(nodes["influence"].to_numpy(float)) + nodes["start"].to_numpy(float)
    total = merge.T @ importance
    importance = np.where(total[into] > 0, importance, 1.0)
    share_of = importance / (merge.T @ importance)[into]
    inputs = nodes["inputs"].to_numpy(float)
    summed, shares = sparse.csr_array((k, k)), sparse.csr_array((k, k))
    for rows, edges in row_blocks(weights):
        left, sources = merge[rows], edges @ merge
        relative = abs(edges) * (reciprocal(inputs[rows]) * share_of[rows])[:, None]
        summed = summed + left.T @ sources
        shares = shares + left.T @ (relative @ merge)
    drawn = _drawn(nodes.drop(columns=["start", "inputs"]), supernodes, into, names, summed.tocoo(), shares.tocsr())
    if past is not None:
        bypassed = sparse.csr_array(merge.T @ past.astype(np.float64) @ merge)
        row = {name: number for number, name in enumerate(names)}
        for source, target, edge in drawn.edges(data=True):
            edge["past"] = float(bypassed[row[target], row[source]])
            edge["past_share"] = float(past_share(np.array(edge["past"]), np.array(edge["weight"])))
    return drawn


def places(ids: Sequence[str], supernodes: Sequence[Supernode]) -> tuple[np.ndarray, list[str]]:
    """Of each node its row in the grouped graph, and the names of its rows, supernodes first."""
    position = {name: row for row, name in enumerate(ids)}
    into = np.full(len(ids), -1)
    names = [one.name for one in supernodes]
    for number, one in enumerate(supernodes):
        if names.count(one.name) > 1 or one.name in position:
            raise InputError(
                f"The name {one.name!r} is taken; give each supernode a name of its own that is no node's."
            )
        if not one.members:
            raise InputError(f"The supernode {one.name!r} has no members; give it at least one node.")
        for member in one.members:
            row = position.get(member)
            if row is None:
                raise InputError(f"The supernode {one.name!r} names {member!r}, which is not in the graph.")
            if into[row] >= 0:
                raise InputError(
                    f"{member!r} is in {names[into[row]]!r} and in {one.name!r}; a node has one supernode."
                )
            into[row] = number
    others = np.flatnonzero(into < 0)
    into[others] = len(names) + np.arange(len(others))
    return into, [*names, *(ids[row] for row in others.tolist())]


def by_parent(nodes: pd.DataFrame, parents: pd.DataFrame, name: str = "parent") -> list[Supernode]:
    """A supernode for the features of a layer and position that have one parent, where these are several.

    `nodes`: the `nodes_frame` of a graph; `parents`: a table with `layer`, `index` (of a feature) and `parent` (a
    number): meta-latents that features are made of, or features of a narrower dictionary that they have split from
    (`transcoders.evaluation.meta_parents`, `narrow_parents`). `name`: what parents are called. Raises `InputError`
    where the table lacks a column, or gives a feature two parents.
    """
    if missing := [column for column in ("layer", "index", "parent") if column not in parents]:
        raise InputError(f"The table of parents lacks {', '.join(missing)}; expected layer, index and parent.")
    if parents.duplicated(["layer", "index"]).any():
        raise InputError("The table of parents gives a feature two; give each feature one parent at most.")
    features = nodes.iloc[np.flatnonzero(nodes["kind"] == "feature")]
    found = features.merge(parents[["layer", "index", "parent"]], on=["layer", "index"])
    groups = found.groupby(["layer", "pos", "parent"], sort=True)
    return [
        Supernode(f"{name} {layer}.{parent}@{pos}", tuple(own["id"]), f"{len(own)} features of one {name}")
        for (layer, pos, parent), own in groups
        if len(own) > 1
    ]


def _drawn(
    frame: pd.DataFrame,
    supernodes: Sequence[Supernode],
    into: np.ndarray,
    names: list[str],
    weights: sparse.coo_array,
    shares: sparse.csr_array,
) -> nx.DiGraph:
    drawn = nx.DiGraph()
    position = {name: row for row, name in enumerate(frame["id"].tolist())}
    for one in supernodes:
        members: Any = frame.iloc[[position[member] for member in one.members]]
        leader = members.iloc[int(np.nan_to_num(members["influence"].to_numpy(float)).argmax())]
        sums = {name: float(members[name].sum()) for name in ("influence", "pre_activation", "bias", "rest")}
        about = {"layer": int(leader["layer"]), "pos": int(leader["pos"]), "reason": one.reason}
        score = {} if np.isnan(one.score) else {"score": one.score}
        drawn.add_node(one.name, kind="supernode", members=list(one.members), internal=0.0, **about, **score, **sums)
    alone = frame.iloc[np.flatnonzero(into >= len(supernodes))]
    for record in alone.to_dict("records"):
        values = {str(k): v for k, v in record.items() if k != "id" and v == v}
        drawn.add_node(record["id"], **values, internal=0.0)
    for t, s, w in zip(weights.row.tolist(), weights.col.tolist(), weights.data.tolist(), strict=True):
        if t == s:
            drawn.nodes[names[t]]["internal"] = w
        else:
            drawn.add_edge(names[s], names[t], weight=w, share=float(shares[t, s]))
    return drawn
