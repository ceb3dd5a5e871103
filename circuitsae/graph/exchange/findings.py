"""From what a reader found in a file to an `AttributionGraph`, with whatever is there."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from circuitsae.graph.attribution_graph import AttributionGraph
from circuitsae.graph.checking import (
    Limits,
    MalformedError,
    check_edges,
    check_place,
    mapping,
    present,
    refuse_twice,
    shown,
)
from circuitsae.graph.files import read_scores
from circuitsae.graph.influence import Scores
from circuitsae.graph.nodes import Node, NodeKind
from circuitsae.graph.notes import checked

NODE_FIGURES = ("rest", "inputs", "influence", "cumulative")
"""The arrays of a graph that a file may state of each node; what it does not state is computed from its edges."""


_NO_NOTES = ("source", "target", "weight", "share", "past", "past_share")
"""Columns of edges that are no notes."""


class Edge(NamedTuple):
    source: str
    """The name that the file gives the node."""
    target: str
    weight: float
    notes: dict[str, Any]
    """What else the file says of it: columns of `edge_notes`."""


@dataclass(kw_only=True)
class Findings:
    """What a reader found."""

    nodes: list[Node]
    names: list[str]
    """[node], the ids in the file."""
    edges: list[Edge]
    tokens: list[str]
    token_ids: list[int]
    n_layers: int
    figures: list[dict[str, float]]
    """[node], those of `NODE_FIGURES` that the file states."""
    scores: Any = None
    provenance: dict[str, Any] = field(default_factory=dict)


def assemble(found: Findings, limits: Limits) -> AttributionGraph:
    """The graph of `found`. Influence and scores that the file does not state are those of the edges it has.

    Raises `MalformedError` for ids that are not unique, edges between unknown nodes, given twice or leading downwards,
    nodes outside of prompt and layers, and a graph without nodes.
    """
    if not found.nodes:
        raise MalformedError("it has no nodes, so there is nothing to show; give the file of a graph that has some")
    check_counts(limits, len(found.nodes), len(found.edges), len(found.tokens), found.n_layers)
    _check_nodes(found)
    rows = {name: row for row, name in enumerate(found.names)}
    weights, notes = _edges(found, rows)
    past = _past(found, rows)
    check_edges(found.nodes, found.names, weights)
    stated = {name: np.array([f.get(name, math.nan) for f in found.figures], dtype=float) for name in NODE_FIGURES}
    plain = _build(found, weights, past, None)
    inputs = np.where(np.isnan(stated["inputs"]), plain.inputs, stated["inputs"])
    graph = plain if np.array_equal(inputs, plain.inputs) else _build(found, weights, past, inputs)
    ranked = graph.mask(NodeKind.FEATURE, NodeKind.ERROR)
    cumulative = graph.cumulative
    if not np.isnan(stated["cumulative"][ranked]).any():
        cumulative = np.where(ranked, np.clip(stated["cumulative"], 0, 1), cumulative)
    return replace(
        graph,
        rest=np.nan_to_num(stated["rest"]),
        influence=np.where(np.isnan(stated["influence"]), graph.influence, stated["influence"]),
        cumulative=cumulative,
        scores=_scores(found.scores) or graph.scores,
        edge_notes=notes,
    )


def _build(
    found: Findings, weights: sparse.csr_array, past: sparse.csr_array | None, inputs: np.ndarray | None
) -> AttributionGraph:
    return AttributionGraph.build(
        found.nodes, weights, found.tokens, found.token_ids, found.n_layers, found.provenance, inputs=inputs, past=past
    )


def check_counts(limits: Limits, nodes: int, edges: int, tokens: int = 0, layers: int = 0) -> None:
    for name, count in (("nodes", nodes), ("edges", edges), ("tokens", tokens), ("layers", layers)):
        limits.check(name, count)


def _check_nodes(found: Findings) -> None:
    refuse_twice(found.names, "the node id")
    refuse_twice([node.id for node in found.nodes], "what is our node")
    for node, name in zip(found.nodes, found.names, strict=True):
        check_place(node, name, len(found.tokens), found.n_layers)


def _edges(found: Findings, rows: dict[str, int]) -> tuple[sparse.csr_array, pd.DataFrame | None]:
    for edge in found.edges:
        for end in (edge.source, edge.target):
            if end not in rows:
                raise MalformedError(f"an edge names the node {shown(end)}, which is not among the nodes")
    source = np.array([rows[edge.source] for edge in found.edges], dtype=np.int64)
    target = np.array([rows[edge.target] for edge in found.edges], dtype=np.int64)
    n = len(found.nodes)
    order = np.sort(target * n + source)
    if (repeated := order[1:][order[1:] == order[:-1]]).size:
        t, s = divmod(int(repeated[0]), n)
        raise MalformedError(
            f"the edge from {shown(found.names[s])} to {shown(found.names[t])} is given twice; expected it once"
        )
    weight = np.array([edge.weight for edge in found.edges], dtype=np.float64)
    weights = sparse.csr_array(sparse.coo_array((weight, (target, source)), shape=(n, n)))
    weights.sort_indices()
    return weights, _notes(found, rows)


def _past(found: Findings, rows: dict[str, int]) -> sparse.csr_array | None:
    """What of the edges passed by skip terms; None where the file says it of none."""
    n = len(found.nodes)
    stated = [(edge, present(edge.notes["past"], "past of an edge")) for edge in found.edges if "past" in edge.notes]
    if not stated:
        return None
    ends = ([rows[edge.target] for edge, _ in stated], [rows[edge.source] for edge, _ in stated])
    return sparse.csr_array(sparse.coo_array(([value for _, value in stated], ends), shape=(n, n)))


def _notes(found: Findings, rows: dict[str, int]) -> pd.DataFrame | None:
    """The notes of edges as `AttributionGraph.edge_notes`."""
    names = list(dict.fromkeys(name for edge in found.edges for name in edge.notes if name not in _NO_NOTES))
    noted = [edge for edge in found.edges if any(name in edge.notes for name in names)]
    if not noted:
        return None
    ids = [[found.nodes[rows[end]].id for end in (edge.source, edge.target)] for edge in noted]
    table: dict[str, Any] = {"source": [pair[0] for pair in ids], "target": [pair[1] for pair in ids]}
    for name in names:
        table[name] = [checked(name, edge.notes.get(name), "an edge") for edge in noted]
    return pd.DataFrame(table)


def _scores(stated: Any) -> Scores | None:
    if stated is None:
        return None
    return read_scores(mapping(stated, "scores"))
