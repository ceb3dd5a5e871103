"""Keep what carries most of the influence."""

import numpy as np
from scipy import sparse

from circuitsae.graph import influence as _influence
from circuitsae.graph.attribution_graph import AttributionGraph
from circuitsae.graph.nodes import NodeKind
from transcoders.errors import InputError


def prune(graph: AttributionGraph, *, nodes: float = 0.8, edges: float = 0.98) -> AttributionGraph:
    """The nodes that hold the share `nodes` of the influence, and the edges between them that hold the share `edges`.

    Tokens and logits always stay. Edge score Â[t, s]·(I+w)[t], with Â and I of the graph of kept nodes; then features
    without an input or output and errors without an output are dropped, repeatedly. Bias nodes take no part in the
    sums; they stay where an edge of theirs scores as high as the weakest edge kept.
    Source: Ameisen et al. 2025, "Circuit Tracing", Appendix: Graph pruning.
    """
    for name, value in (("nodes", nodes), ("edges", edges)):
        if not 0 < value <= 1:
            raise InputError(f"prune: {name}={value} is not a share; give a number above 0 and at most 1.")
    bias, fixed = graph.mask(NodeKind.BIAS), graph.mask(NodeKind.TOKEN, NodeKind.LOGIT)
    score = np.nan_to_num(graph.influence)
    kept = (score >= _influence.threshold(score[~bias], nodes)) | fixed | bias

    inside = sparse.diags_array(kept.astype(float))
    weights = sparse.csr_array(inside @ graph.weights @ inside)
    scored = _edge_scores(graph, weights, bias)
    carrying = scored @ sparse.diags_array((~bias).astype(float))
    least = _influence.threshold(np.asarray(carrying.data), edges)
    edge_kept = sparse.csr_array((scored.data >= least, scored.indices, scored.indptr), shape=scored.shape)
    edge_kept.eliminate_zeros()

    kept, edge_kept = _drop_dangling(graph, kept, edge_kept)
    return graph.keep(kept, sparse.csr_array(graph.weights * edge_kept))


def _edge_scores(graph: AttributionGraph, weights: sparse.csr_array, bias: np.ndarray) -> sparse.csr_array:
    share = _influence.shares(weights, bias)
    layers = np.array([node.layer for node in graph.nodes])
    targets = graph.mask(NodeKind.FEATURE, NodeKind.LOGIT)
    influence = _influence.node_influence(share, layers, targets, graph.start, bias)
    return sparse.csr_array(sparse.diags_array(np.nan_to_num(influence) + graph.start) @ share)


def _drop_dangling(
    graph: AttributionGraph, kept: np.ndarray, edges: sparse.csr_array
) -> tuple[np.ndarray, sparse.csr_array]:
    """Drop, until nothing changes, features without input and features, errors and biases without output."""
    needs_input = graph.mask(NodeKind.FEATURE)
    needs_output = graph.mask(NodeKind.FEATURE, NodeKind.ERROR, NodeKind.BIAS)
    carrying = (~graph.mask(NodeKind.BIAS)).astype(float)
    while True:
        has_output = np.asarray(edges.sum(axis=0)).ravel() > 0
        has_input = edges.astype(float) @ carrying > 0
        still = kept & (has_output | ~needs_output) & (has_input | ~needs_input)
        if np.array_equal(still, kept):
            return kept, edges
        kept = still
        inside = sparse.diags_array(kept.astype(float))
        edges = sparse.csr_array((inside @ edges.astype(float) @ inside) > 0)
