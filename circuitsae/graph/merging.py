"""Fewer features without losing anything: the others' contributions become part of the error nodes."""

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from circuitsae.graph.attribution_graph import AttributionGraph
from circuitsae.graph.compact import row_blocks
from circuitsae.graph.influence import absolute_inputs
from circuitsae.graph.nodes import Node, NodeKind
from transcoders.errors import InputError


def merge_features(graph: AttributionGraph, keep: int | np.ndarray) -> AttributionGraph:
    """A full graph with some of its features; the edges of the others are added to the error node of their layer and
    position, so that every row still sums to the target's pre-activation. What is not stored stays so.

    keep: the features to keep as a mask over the features, or how many of the most influential.
    """
    feature = np.flatnonzero(graph.mask(NodeKind.FEATURE))
    if isinstance(keep, int):
        ranked = np.argsort(-graph.influence[feature], kind="stable")
        keep = np.isin(np.arange(len(feature)), ranked[:keep])
    if keep.all():
        return graph
    merge = merge_matrix(graph.nodes, feature[~keep])
    kept_rows = np.setdiff1d(np.arange(len(graph.nodes)), feature[~keep])
    weights = _merged(graph.weights, kept_rows, merge)
    bias = graph.mask(NodeKind.BIAS)
    not_stored = np.maximum(graph.inputs - absolute_inputs(graph.weights, bias), 0.0)
    return AttributionGraph.build(
        [graph.nodes[row] for row in kept_rows],
        weights,
        graph.tokens,
        graph.token_ids,
        graph.n_layers,
        graph.provenance,
        rest=graph.rest[kept_rows],
        inputs=absolute_inputs(weights, bias[kept_rows]) + not_stored[kept_rows],
        past=None if graph.past is None else _merged(graph.past, kept_rows, merge),
    )


def merge_matrix(nodes: Sequence[Node], dropped: np.ndarray) -> sparse.csr_array:
    """What turns rows of edges from `nodes` into rows without the features `dropped`: [node, node left], 1 where an
    edge counts.

    Raises `InputError` where a feature's layer and position have no error node.
    """
    errors = {(node.layer, node.pos): i for i, node in enumerate(nodes) if node.kind is NodeKind.ERROR}
    into, left = np.arange(len(nodes)), np.ones(len(nodes), dtype=bool)
    left[dropped] = False
    for i in dropped:
        error = errors.get((nodes[i].layer, nodes[i].pos))
        if error is None:
            raise InputError(f"{nodes[i].id} has no error node to be merged into; merge before pruning, not after.")
        into[i] = error
    column = (np.cumsum(left) - 1)[into]
    ones = sparse.coo_array((np.ones(len(nodes)), (np.arange(len(nodes)), column)), shape=(len(nodes), int(left.sum())))
    return sparse.csr_array(ones)


def _merged(weights: sparse.csr_array, rows: np.ndarray, merge: sparse.csr_array) -> sparse.csr_array:
    """`rows` of `weights` times `merge`: summed in float64, stored in the precision of `weights`."""
    parts = [sparse.csr_array(edges @ merge, dtype=weights.dtype) for _, edges in row_blocks(weights, rows)]
    merged = sparse.csr_array(sparse.vstack(parts, format="csr"))
    merged.sort_indices()
    return merged
