"""Keep what carries most of the influence."""

import numpy as np
from scipy import sparse

from circuitsae.graph.attribution_graph import AttributionGraph
from circuitsae.graph.compact import select_edges
from circuitsae.graph.influence import EdgeScores, absolute_inputs, node_influence
from circuitsae.graph.nodes import NodeKind
from circuitsae.graph.selection import threshold
from transcoders.errors import InputError


def prune(graph: AttributionGraph, *, nodes: float = 0.8, edges: float = 0.98) -> AttributionGraph:
    """The nodes that hold the share `nodes` of the influence, and the edges between them that hold the share `edges`.

    Tokens and logits always stay. Edge score Â[t, s]·(I+w)[t], with Â and I of the graph of kept nodes; then features
    without an input or output and errors without an output are dropped, repeatedly. Bias nodes take no part in the
    sums; they stay where an edge of theirs scores as high as the weakest edge kept. Edges that are not stored (`rest`)
    count as edges from nodes that are not kept. How shares of a sum are met: `circuitsae.graph.selection.threshold`.
    Source: Ameisen et al. 2025, "Circuit Tracing", Appendix: Graph pruning.
    """
    check_shares(nodes=nodes, edges=edges)
    bias, fixed = graph.mask(NodeKind.BIAS), graph.mask(NodeKind.TOKEN, NodeKind.LOGIT)
    return prune_edges(graph.keep(strongest_nodes(graph.influence, bias, fixed, nodes), graph.weights), edges)


def check_shares(**shares: float) -> None:
    for name, value in shares.items():
        if not 0 < value <= 1:
            raise InputError(f"prune: {name}={value} is not a share; give a number above 0 and at most 1.")


def strongest_nodes(influence: np.ndarray, bias: np.ndarray, fixed: np.ndarray, share: float) -> np.ndarray:
    """[node], those that hold the `share` of the influence, and those that always stay."""
    score = np.nan_to_num(influence)
    return (score >= threshold([score[~bias]], share)) | fixed | bias


def prune_edges(inside: AttributionGraph, share: float) -> AttributionGraph:
    """The second half of `prune`: of a graph that has only the nodes to keep, and all edges between them."""
    connected, strong = _drop_dangling(inside, _strongest_edges(inside, share))
    return inside.keep(connected, strong)


def _strongest_edges(graph: AttributionGraph, share: float) -> sparse.csr_array:
    bias, targets = graph.mask(NodeKind.BIAS), graph.mask(NodeKind.FEATURE, NodeKind.LOGIT)
    inputs = absolute_inputs(graph.weights, bias)
    influence = node_influence(graph.weights, inputs, graph.layers, targets, graph.start, bias)
    output = np.nan_to_num(influence) + graph.start
    least = threshold(EdgeScores(graph.weights, inputs, output, ~bias), share)
    of_all = EdgeScores(graph.weights, inputs, output, np.ones_like(bias))
    strong = [(score >= least) & (score > 0) for score in of_all]
    return select_edges(graph.weights, np.concatenate(strong or [np.zeros(0, dtype=bool)]))


def _drop_dangling(graph: AttributionGraph, edges: sparse.csr_array) -> tuple[np.ndarray, sparse.csr_array]:
    """Drop, until nothing changes, features without input and features, errors and biases without output."""
    needs_input = graph.mask(NodeKind.FEATURE)
    needs_output = graph.mask(NodeKind.FEATURE, NodeKind.ERROR, NodeKind.BIAS)
    carrying = ~graph.mask(NodeKind.BIAS)
    numbers = np.arange(len(graph.nodes), dtype=edges.indices.dtype)
    kept = np.ones(len(graph.nodes), dtype=bool)
    while True:
        target = np.repeat(numbers, np.diff(edges.indptr))
        has_output, has_input = np.zeros_like(kept), np.zeros_like(kept)
        has_output[edges.indices] = True
        has_input[target[carrying[edges.indices]]] = True
        still = kept & (has_output | ~needs_output) & (has_input | ~needs_input)
        if np.array_equal(still, kept):
            return kept, edges
        kept = still
        edges = select_edges(edges, kept[target] & kept[edges.indices])
