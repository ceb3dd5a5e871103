"""What the nodes and edges of any file must satisfy: names that tell nodes apart, places inside of prompt and layers,
and edges that lead upwards.
"""

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from circuitsae.graph.checking import LARGEST_NUMBER, MalformedError, shown
from circuitsae.graph.nodes import Node, NodeKind


def check_place(node: Node, name: str, n_tokens: int, n_layers: int) -> None:
    """Raises `MalformedError` for a node outside of the prompt's positions or of the layers that its kind may have."""
    bias = node.kind is NodeKind.BIAS
    least = -1 if bias else 0
    if not least <= node.pos < n_tokens:
        raise MalformedError(f"node {shown(name)} is at position {node.pos}, but there are {n_tokens} tokens")
    inside = {NodeKind.TOKEN: node.layer == -1, NodeKind.LOGIT: node.layer == n_layers}
    # The bias of the unembedding stands beside the logits.
    if not inside.get(node.kind, least <= node.layer < n_layers + bias):
        raise MalformedError(f"node {shown(name)} is in layer {node.layer}, but there are {n_layers} layers")


def refuse_twice(names: Sequence[str], what: str) -> None:
    """Raises `MalformedError` where a name occurs more than once."""
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))
        raise MalformedError(f"{what} {shown(twice)} occurs twice, so its edges cannot be told apart")


def check_edges(nodes: Sequence[Node], names: Sequence[str], weights: sparse.csr_array) -> None:
    """Raises `MalformedError` for a weight that no network has, and for an edge that no network can have.

    An edge leads to a feature or a logit, from a lower layer and from no later position. What is the same whatever the
    prompt may come from the target's own layer: a bias of attention is added before the MLP reads.
    """
    if weights.nnz and not np.abs(weights.data).max() <= LARGEST_NUMBER:
        raise MalformedError(f"an edge has a weight that is not a finite number below {LARGEST_NUMBER:g}")
    target, source = np.repeat(np.arange(len(nodes)), np.diff(weights.indptr)), weights.indices
    layer, pos = (np.array([getattr(node, name) for node in nodes], dtype=np.int64) for name in ("layer", "pos"))
    bias = np.array([node.kind is NodeKind.BIAS for node in nodes], dtype=bool)
    read = np.array([node.is_target for node in nodes], dtype=bool)
    wrong = [
        (~read[target], "but only features and logits have inputs"),
        (layer[source] >= layer[target] + bias[source], "but the source is not in a lower layer"),
        (pos[source] > pos[target], "but the source is at a later position"),
    ]
    for places, what in wrong:
        if places.any():
            edge = int(np.argmax(places))
            ends = [shown(names[i]) for i in (int(source[edge]), int(target[edge]))]
            raise MalformedError(f"an edge leads from {ends[0]} to {ends[1]}, {what}")
