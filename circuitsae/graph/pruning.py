"""Which nodes and edges carry most of the influence: masks and weights from arrays [node] and [node, node].

`columns` are those of `node_columns`. How shares of a sum are met: `selection.threshold`.
"""

from collections.abc import Mapping

import numpy as np
from scipy import sparse

from circuitsae.graph.compact import select_edges
from circuitsae.graph.influence import EdgeScores, absolute_inputs, node_influence
from circuitsae.graph.nodes import NodeKind
from circuitsae.graph.selection import threshold
from transcoders.errors import InputError


def check_shares(**shares: float) -> None:
    for name, value in shares.items():
        if not 0 < value <= 1:
            raise InputError(f"prune: {name}={value} is not a share; give a number above 0 and at most 1.")


def strongest_nodes(influence: np.ndarray, kind: np.ndarray, share: float) -> np.ndarray:
    """[node], those that hold the `share` of the influence; tokens, logits and biases always stay."""
    score, bias = np.nan_to_num(influence), kind == NodeKind.BIAS
    always = np.isin(kind, [NodeKind.TOKEN, NodeKind.LOGIT, NodeKind.BIAS])
    return (score >= threshold([score[~bias]], share)) | always


def strongest_edges(
    weights: sparse.csr_array, columns: Mapping[str, np.ndarray], share: float
) -> tuple[np.ndarray, sparse.csr_array]:
    """A mask of the nodes that stay connected, and the edges that hold the `share`.

    Edge score Â[t, s]·(I+w)[t], with Â and I of these nodes and edges. Then features without an input or output and
    errors and biases without an output are dropped, repeatedly.
    """
    return _drop_dangling(columns["kind"], _highest_scores(weights, columns, share))


def _highest_scores(weights: sparse.csr_array, columns: Mapping[str, np.ndarray], share: float) -> sparse.csr_array:
    kind, start = columns["kind"], columns["start"]
    bias, targets = kind == NodeKind.BIAS, np.isin(kind, [NodeKind.FEATURE, NodeKind.LOGIT])
    inputs = absolute_inputs(weights, bias)
    influence = node_influence(weights, inputs, columns["layer"], targets, start, bias)
    output = np.nan_to_num(influence) + start
    least = threshold(EdgeScores(weights, inputs, output, ~bias), share)
    of_all = EdgeScores(weights, inputs, output, np.ones_like(bias))
    strong = [(score >= least) & (score > 0) for score in of_all]
    return select_edges(weights, np.concatenate(strong or [np.zeros(0, dtype=bool)]))


def _drop_dangling(kind: np.ndarray, edges: sparse.csr_array) -> tuple[np.ndarray, sparse.csr_array]:
    needs_input = kind == NodeKind.FEATURE
    needs_output = np.isin(kind, [NodeKind.FEATURE, NodeKind.ERROR, NodeKind.BIAS])
    carrying = kind != NodeKind.BIAS
    numbers = np.arange(len(kind), dtype=edges.indices.dtype)
    kept = np.ones(len(kind), dtype=bool)
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
