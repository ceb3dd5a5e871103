"""Fewer features without losing anything: the others' contributions become part of the error nodes."""

import numpy as np
from scipy import sparse

from circuitsae.graph.attribution_graph import AttributionGraph
from circuitsae.graph.nodes import NodeKind
from transcoders.errors import InputError


def merge_features(graph: AttributionGraph, keep: int) -> AttributionGraph:
    """A full graph with its `keep` most influential features; the edges of the others are added to the error node of
    their layer and position, so that every row still sums to the target's pre-activation.
    """
    feature = np.flatnonzero(graph.mask(NodeKind.FEATURE))
    if keep >= len(feature):
        return graph
    ranked = feature[np.argsort(-graph.influence[feature], kind="stable")]
    into = np.arange(len(graph.nodes))
    for row in ranked[keep:]:
        node = graph.nodes[row]
        error = graph.position.get(f"{node.layer}.err@{node.pos}")
        if error is None:
            raise InputError(f"{graph!r} has no error node for {node.id}; merge features before pruning, not after.")
        into[row] = error
    kept = into == np.arange(len(graph.nodes))
    kept_rows = np.flatnonzero(kept)
    new_index = np.cumsum(kept) - 1
    ones = np.ones(len(into))
    merge = sparse.csr_array(sparse.coo_array((ones, (np.arange(len(into)), new_index[into]))))
    return AttributionGraph.build(
        [graph.nodes[row] for row in kept_rows],
        sparse.csr_array(graph.weights[kept_rows] @ merge),
        graph.tokens,
        graph.token_ids,
        graph.n_layers,
        graph.provenance,
    )
