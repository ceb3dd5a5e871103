"""A graph with supernodes in place of their members, every edge summed and none lost."""

from collections.abc import Sequence

import networkx as nx
import numpy as np
from scipy import sparse

from circuitsae.graph.attribution_graph import AttributionGraph
from circuitsae.graph.compact import row_blocks
from circuitsae.graph.influence import reciprocal
from circuitsae.graph.supernodes import Supernode
from transcoders.errors import InputError


def group(graph: AttributionGraph, supernodes: Sequence[Supernode]) -> nx.DiGraph:
    """The graph with each supernode in place of its members, edges summed in float64.

        weight(S → T) = Σ_{s∈S, t∈T} A[t, s]        share(S → T) = Σ_{t∈T} I_t Σ_{s∈S} Â[t, s] / Σ_{t∈T} I_t

    Edges between members of one supernode are left out of the edges and kept in its `internal`, so that for every node
    Σ weight of its inputs + `internal` + `rest` = its `pre_activation` − `bias`, as in the graph. Other nodes stay as
    they are, under their ids. A supernode's node is its name, with `kind` "supernode", `members`, `reason`, `score`,
    and sums over its members of `influence`, `pre_activation`, `bias` and `rest`; `layer` and `pos` are those of its
    most influential member. Supernodes may form circles where they span layers.
    Raises `InputError` for a name given twice or that is a node's, members that are not in the graph, and nodes in two
    supernodes.
    """
    into, names = _places(graph, supernodes)
    n, k = len(graph.nodes), len(names)
    merge = sparse.csr_array((np.ones(n), (np.arange(n), into)), shape=(n, k))
    importance = np.nan_to_num(graph.influence) + graph.start
    total = merge.T @ importance
    importance = np.where(total[into] > 0, importance, 1.0)
    share_of = importance / (merge.T @ importance)[into]
    weights, shares = sparse.csr_array((k, k)), sparse.csr_array((k, k))
    for rows, edges in row_blocks(graph.weights):
        left, sources = merge[rows], edges @ merge
        relative = abs(edges) * (reciprocal(graph.inputs[rows]) * share_of[rows])[:, None]
        weights = weights + left.T @ sources
        shares = shares + left.T @ (relative @ merge)
    return _drawn(graph, supernodes, into, names, weights.tocoo(), shares.tocsr())


def _places(graph: AttributionGraph, supernodes: Sequence[Supernode]) -> tuple[np.ndarray, list[str]]:
    """Of each node its row in the grouped graph, and the names of its rows, supernodes first."""
    into = np.full(len(graph.nodes), -1)
    names = [one.name for one in supernodes]
    for number, one in enumerate(supernodes):
        if names.count(one.name) > 1 or one.name in graph.position:
            raise InputError(
                f"The name {one.name!r} is taken; give each supernode a name of its own that is no node's."
            )
        if not one.members:
            raise InputError(f"The supernode {one.name!r} has no members; give it at least one node.")
        for member in one.members:
            row = graph.position.get(member)
            if row is None:
                raise InputError(f"The supernode {one.name!r} names {member!r}, which is not in {graph!r}.")
            if into[row] >= 0:
                raise InputError(
                    f"{member!r} is in {names[into[row]]!r} and in {one.name!r}; a node has one supernode."
                )
            into[row] = number
    others = np.flatnonzero(into < 0)
    into[others] = len(names) + np.arange(len(others))
    return into, [*names, *(str(graph.ids[row]) for row in others)]


def _drawn(
    graph: AttributionGraph,
    supernodes: Sequence[Supernode],
    into: np.ndarray,
    names: list[str],
    weights: sparse.coo_array,
    shares: sparse.csr_array,
) -> nx.DiGraph:
    drawn = nx.DiGraph(tokens=list(graph.tokens), scores=graph.scores.as_dict(), provenance=dict(graph.provenance))
    frame = graph.nodes_frame().assign(rest=graph.rest)
    for one in supernodes:
        members = frame.iloc[[graph.position[member] for member in one.members]]
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
