"""Nodes of a graph as interventions."""

from collections.abc import Iterable

from circuitsae.graph import Node, NodeKind
from circuitsae.interventions.operations import Intervention, Operation, Zero
from circuitsae.interventions.targets import Error, Feature, Token
from transcoders.errors import InputError


def for_node(node: Node, operation: Operation = Zero()) -> Intervention:
    """The intervention that does `operation` to one node of a graph, at its position.

    Raises `InputError` for biases and logits, which nothing writes on this prompt alone.
    """
    match node.kind:
        case NodeKind.FEATURE:
            return Intervention(Feature(node.layer, node.index, node.pos), operation)
        case NodeKind.ERROR:
            return Intervention(Error(node.layer, node.pos), operation)
        case NodeKind.TOKEN:
            return Intervention(Token(node.pos), operation)
    raise InputError(f"Node {node.id} is a {node.kind}; only features, errors and tokens can be changed.")


def for_nodes(nodes: Iterable[Node], operation: Operation = Zero()) -> list[Intervention]:
    """`for_node` of every member of a supernode: one alternative that changes them together."""
    return [for_node(node, operation) for node in nodes]
