"""What a page asks to be run, checked: a change of some nodes, or a test of an edge."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from circuitsae.graph import AttributionGraph, Node, NodeKind
from circuitsae.graph.checking import MalformedError, number, sequence, shown, text
from circuitsae.interventions import (
    Feature,
    Intervention,
    Patch,
    Recording,
    Replace,
    ReplaceToken,
    Scale,
    Zero,
    for_nodes,
    parse_target,
)
from circuitsae.interventions.prompts import Library
from circuitsae.validation.measuring import ablatable, node_row
from transcoders.errors import InputError

MOST_NODES = 2_000
LONGEST_PROMPT = 20_000
OPERATIONS = ("zero", "scale", "patch", "replace")


@dataclass(frozen=True)
class Change:
    """Nodes of the graph, and what is done to all of them in one run."""

    nodes: tuple[Node, ...]
    operation: str
    """`zero`; `scale` by a number; `patch`, the values in another prompt; `replace` features by one, a token by one."""
    value: float | str | None = None

    def interventions(self) -> list[Intervention]:
        """As `circuitsae.intervene` takes them. Raises `InputError` for nodes that nothing can be done to."""
        match self.operation:
            case "zero":
                return for_nodes(self.nodes, Zero())
            case "scale":
                return for_nodes(self.nodes, Scale(float(self.value or 0)))
            case "patch":
                return for_nodes(self.nodes, Patch(str(self.value)))
        return [it for node in self.nodes for it in for_nodes([node], self._replacement(node))]

    def _replacement(self, node: Node) -> Replace | ReplaceToken:
        return ReplaceToken(str(self.value)) if node.kind is NodeKind.TOKEN else Replace(self.other)

    @property
    def other(self) -> Feature:
        """The feature that is put in the place of others. Raises `InputError` where none is named."""
        found = parse_target(str(self.value))
        if not isinstance(found, Feature) or found.at is not None:
            raise InputError(f"{self.value!r:.80} names no feature; write it as LAYER.INDEX, such as 2.713.")
        return found

    def doses(self, graph: AttributionGraph, library: Library, prompt: Recording) -> dict[int, float] | None:
        """By how much of itself each node (by row) changes; None where the graph says nothing of what is put there."""
        rows = {graph.position[node.id]: node for node in self.nodes}
        if not {node.kind for node in self.nodes} <= set(ablatable(graph)):
            return None
        if self.operation in ("zero", "scale"):
            return dict.fromkeys(rows, -1.0 if self.operation == "zero" else float(self.value or 0) - 1)
        if any(node.kind is not NodeKind.FEATURE for node in self.nodes):
            return None
        own = _activations(prompt, self.nodes)
        if self.operation == "patch":
            there = _activations(library[str(self.value)], self.nodes)
            return {row: there[i] / own[i] - 1 for i, row in enumerate(rows)}
        return self._replaced(graph, own)

    def _replaced(self, graph: AttributionGraph, own: list[float]) -> dict[int, float] | None:
        doses = {graph.position[node.id]: -1.0 for node in self.nodes}
        for node, value in zip(self.nodes, own, strict=True):
            row = graph.position.get(Node(NodeKind.FEATURE, self.other.layer, node.pos, self.other.index).id)
            if row is None or row in doses:
                return None
            doses[row] = value / graph.nodes[row].activation - 1
        return doses


@dataclass(frozen=True)
class Test:
    """An edge whose claims are tested."""

    source: Node
    target: Node

    @property
    def edge(self) -> str:
        return f"{self.source.id} → {self.target.id}"


def parse_asked(document: Mapping[str, Any], graph: AttributionGraph) -> Change | Test:
    """`{"nodes", "operation", "value"}` or `{"edge": [source, target]}`.

    Raises `InputError` for nodes and edges that the graph has not, and for what is not understood.
    """
    try:
        if "edge" in document:
            return _test(document, graph)
        return _change(document, graph)
    except MalformedError as error:
        raise InputError(f"This cannot be run: {error}.") from error


def _test(document: Mapping[str, Any], graph: AttributionGraph) -> Test:
    ends = [graph.nodes[node_row(graph, text(end, "an end"))] for end in sequence(document["edge"], "the edge")]
    if len(ends) != 2:
        raise MalformedError(f"an edge has two ends, not {len(ends)}")
    return Test(*ends)


def _change(document: Mapping[str, Any], graph: AttributionGraph) -> Change:
    names = dict.fromkeys(text(name, "a node") for name in sequence(document.get("nodes"), "nodes"))
    if not 0 < len(names) <= MOST_NODES:
        raise MalformedError(f"{len(names):,} nodes were named; expected 1 to {MOST_NODES:,}")
    nodes = tuple(graph.nodes[node_row(graph, name)] for name in names)
    operation, value = document.get("operation"), document.get("value")
    if operation not in OPERATIONS:
        raise MalformedError(f"the operation is {shown(operation)}; expected one of {', '.join(OPERATIONS)}")
    if operation == "scale":
        value = number(value, "the factor")
        if not math.isfinite(value) or abs(value) > 1e6:
            raise MalformedError("the factor is no number up to a million")
    elif operation != "zero":
        value = text(value, "what is put there")
        if not 0 < len(value) <= LONGEST_PROMPT:
            raise MalformedError(f"what is put there has {len(value):,} characters; expected 1 to {LONGEST_PROMPT:,}")
    change = Change(nodes, operation, None if operation == "zero" else value)
    change.interventions()  # what cannot be done is refused before anything is loaded
    return change


def _activations(prompt: Recording, nodes: tuple[Node, ...]) -> list[float]:
    return prompt.activations(torch.tensor([[node.layer, node.pos, node.index] for node in nodes])).tolist()
