"""What is changed, and what is done to it: operations on targets, nodes as both, and vectors."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.graph import Node, NodeKind
from circuitsae.interventions.prompts import Means, PromptLike
from circuitsae.interventions.targets import Error, Feature, Places, Target, Token, target_id
from circuitsae.replacement import ReplacementModel, Trace
from transcoders.errors import InputError

Value = float | Float[Tensor, "*n"]


@dataclass(frozen=True)
class Zero:
    """Remove it."""


@dataclass(frozen=True)
class Scale:
    """Multiply it."""

    factor: float


@dataclass(frozen=True, eq=False)
class Set:
    """Put a value in its place: a number for a feature, for others a vector, or one for each chosen position."""

    value: Value


@dataclass(frozen=True, eq=False)
class Add:
    """Add a value; shapes as in `Set`."""

    value: Value


@dataclass(frozen=True, eq=False)
class Mean:
    """Put its mean over other prompts in its place."""

    means: Means


@dataclass(frozen=True, eq=False)
class Patch:
    """Put its value in another prompt in its place.

    Read there at the same position, at the position of the same role where the target names roles, or `at`.
    """

    source: PromptLike
    at: Places = None


@dataclass(frozen=True, eq=False)
class Resample:
    """Put its value in a prompt drawn from `prompts` in its place; a prompt never draws itself.

    What is drawn depends on the seed and the prompt intervened on only: all that is resampled in one run from the same
    set with the same seed comes from one prompt.
    """

    prompts: Sequence[PromptLike]
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Replace:
    """Features only: this one off, and at the same positions another one set to this one's clean activation."""

    by: Feature
    value: Value | None = None
    """Set the other feature to this instead."""


@dataclass(frozen=True)
class ReplaceToken:
    """Tokens only: another token's embedding, by its text (one token, mind the leading space) or id."""

    token: str | int


Operation = Zero | Scale | Set | Add | Mean | Patch | Resample | Replace | ReplaceToken


@dataclass(frozen=True)
class Intervention:
    """One change of one target. A list of them is one alternative: all made in the same run, in their order."""

    target: Target
    operation: Operation

    def __str__(self) -> str:
        match self.operation:
            case Scale(factor):
                done = f"scale {factor:g}"
            case Set(value) | Add(value):
                shown = f"{value:g}" if isinstance(value, int | float) else f"a vector of {value.shape[-1]}"
                done = f"{type(self.operation).__name__.lower()} {shown}"
            case Replace(by):
                done = f"replace by {target_id(by)}"
            case ReplaceToken(token):
                done = f"replace by {token!r}"
            case other:
                done = type(other).__name__.lower()
        return f"{target_id(self.target)} {done}"


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


@dataclass(frozen=True, eq=False)
class Contribution:
    """Vectors added at one position to the token embeddings (layer −1) or where a layer's dictionary writes.

    Times a number it is so many times as much: −1 removes the source that writes it, −¼ a quarter of it.
    """

    pos: int
    layers: tuple[int, ...]
    vectors: Float[Tensor, "layer d_model"]

    def __mul__(self, factor: float) -> "Contribution":
        return Contribution(self.pos, self.layers, self.vectors * factor)

    __rmul__ = __mul__


def node_change(model: ReplacementModel, trace: Trace, node: Node) -> Contribution:
    """What a feature, error node or token writes on this prompt: adding it doubles the node, subtracting removes it.

    A feature: a W_dec at every layer it writes; an error node: e; a token: its embedding. Raises `InputError` for
    features that are not active on the prompt, and for nodes of other kinds.
    """
    return node_changes(model, trace, [node])[0]


def node_changes(model: ReplacementModel, trace: Trace, nodes: Sequence[Node]) -> list[Contribution]:
    """`node_change` of many nodes: a few operations for each layer, and what is active is read once for all."""
    found: dict[int, Contribution] = {}
    by_layer: dict[int, list[int]] = defaultdict(list)
    for number, node in enumerate(nodes):
        match node.kind:
            case NodeKind.FEATURE:
                by_layer[node.layer].append(number)
            case NodeKind.ERROR:
                found[number] = Contribution(node.pos, (node.layer,), trace.errors[node.layer, node.pos][None])
            case NodeKind.TOKEN:
                found[number] = Contribution(node.pos, (-1,), trace.frozen.writes.embed[node.pos][None])
            case _:
                raise InputError(f"Node {node.id} is a {node.kind}; only features, errors and tokens can be changed.")
    row_of = _active_rows(trace) if by_layer else {}
    for layer, numbers in by_layer.items():
        here = [nodes[number] for number in numbers]
        if off := [node.id for node in here if (layer, node.pos, node.index) not in row_of]:
            raise InputError(f"Feature {off[0]} is not active on this prompt; take a node of this prompt's graph.")
        rows = torch.tensor([row_of[layer, node.pos, node.index] for node in here], device=trace.errors.device)
        active = trace.features.value[rows]
        found |= dict(zip(numbers, _feature_contributions(model, layer, here, active), strict=True))
    return [found[number] for number in range(len(nodes))]


def _feature_contributions(
    model: ReplacementModel, layer: int, nodes: Sequence[Node], value: Float[Tensor, "n"]
) -> list[Contribution]:
    """What features of one layer with some activations write, whether they are active on the prompt or not."""
    feature = torch.tensor([node.index for node in nodes], device=model.model.device)
    layers = tuple(model.dictionaries.write_layers(layer))
    rows = [model.dictionaries.decoder_rows(layer, feature, at).detach() for at in layers]
    vectors = (torch.stack(rows, dim=1) * value[:, None, None]).unbind()
    return [Contribution(node.pos, layers, own) for node, own in zip(nodes, vectors, strict=True)]


def feature_contribution(model: ReplacementModel, node: Node, value: float) -> Contribution:
    """What a feature with some activation writes, whether it is active on the prompt or not."""
    activation = torch.tensor([value], dtype=model.model.dtype, device=model.model.device)
    return _feature_contributions(model, node.layer, [node], activation)[0]


def _active_rows(trace: Trace) -> dict[tuple[int, ...], int]:
    """The row of each active feature (layer, position, number)."""
    return {tuple(index): row for row, index in enumerate(trace.features.index.tolist())}
