"""What is changed, and what is done to it: operations on targets, nodes as both, and vectors."""

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


@dataclass(frozen=True)
class Change:
    """Vectors added to the token embeddings and to the MLP outputs."""

    embed: Float[Tensor, "pos d_model"]
    mlp_out: Float[Tensor, "layer pos d_model"]

    def __mul__(self, factor: float) -> "Change":
        return Change(self.embed * factor, self.mlp_out * factor)

    __rmul__ = __mul__


def _nothing(model: ReplacementModel, trace: Trace) -> Change:
    zero = torch.zeros_like(trace.errors)
    return Change(zero[0].clone(), zero)


def node_change(model: ReplacementModel, trace: Trace, node: Node) -> Change:
    """What a feature, error or token node writes: adding it doubles the node, subtracting it removes the node."""
    change = _nothing(model, trace)
    match node.kind:
        case NodeKind.FEATURE:
            value = trace.features.value[_active_row(trace, node)]
            _add_feature(model, change, node, float(value))
        case NodeKind.ERROR:
            change.mlp_out[node.layer, node.pos] = trace.errors[node.layer, node.pos]
        case NodeKind.TOKEN:
            change.embed[node.pos] = trace.frozen.writes.embed[node.pos]
        case _:
            raise InputError(f"Node {node.id} is a {node.kind}; only features, errors and tokens can be changed.")
    return change


def _active_row(trace: Trace, node: Node) -> int:
    wanted = torch.tensor([node.layer, node.pos, node.index], device=trace.features.index.device)
    rows = (trace.features.index == wanted).all(dim=1).nonzero()
    if len(rows) != 1:
        raise InputError(f"Feature {node.id} is not active on this prompt; take a node of this prompt's graph.")
    return int(rows[0])


def _add_feature(model: ReplacementModel, change: Change, node: Node, value: float) -> None:
    feature = torch.tensor([node.index], device=change.embed.device)
    for layer in model.dictionaries.write_layers(node.layer):
        row = model.dictionaries.decoder_rows(node.layer, feature, layer)[0].detach()
        change.mlp_out[layer, node.pos] += value * row


def random_change(model: ReplacementModel, trace: Trace, node: Node, generator: torch.Generator) -> Change:
    """A change of the same size at the same places as `node_change`, in directions that have nothing to do with it.

    A feature's stand-in is another feature of its layer, drawn from the whole dictionary; that of an error, a token or
    a layer's only feature is a Gaussian vector.
    """
    original = node_change(model, trace, node)
    stand_in = _nothing(model, trace)
    if node.kind is NodeKind.FEATURE and (others := model.dictionaries.n_features(node.layer) - 1):
        other = int(torch.randint(others, (1,), generator=generator))
        other += other >= node.index
        _add_feature(model, stand_in, Node(NodeKind.FEATURE, node.layer, node.pos, other), 1.0)
    else:
        for target, like in ((stand_in.embed, original.embed), (stand_in.mlp_out, original.mlp_out)):
            noise = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
            target.copy_(noise * (like != 0).any(dim=-1, keepdim=True))
    return Change(_rescale(stand_in.embed, original.embed), _rescale(stand_in.mlp_out, original.mlp_out))


def _rescale(vectors: Tensor, like: Tensor) -> Tensor:
    """`vectors` with the norms that `like` has, vector by vector."""
    norm = vectors.norm(dim=-1, keepdim=True)
    return vectors * torch.where(norm > 0, like.norm(dim=-1, keepdim=True) / norm.clamp(min=1e-30), 0.0)
