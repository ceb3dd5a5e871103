"""What the nodes of any file must satisfy: names that tell them apart, places inside of prompt and layers."""

from collections.abc import Sequence

from circuitsae.graph.checking import MalformedError, shown
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
