"""Nodes of an attribution graph."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import numpy as np


class NodeKind(StrEnum):
    FEATURE = "feature"
    """A dictionary feature active at one position."""
    ERROR = "error"
    """What the dictionary misses of one MLP's output, or an autoencoder of its site, at one position."""
    TOKEN = "token"
    """The embedding of one prompt token."""
    BIAS = "bias"
    """What is the same whatever the prompt: a positional embedding, a bias, what a dictionary stands for at BOS."""
    LOGIT = "logit"
    """What is explained: the centred logit of one token at the last position, a contrast of such logits, or what a
    direction reads."""


class Term(NamedTuple):
    """A token's part of a contrast."""

    token: int
    weight: float
    """By which its logit is multiplied."""
    probability: float


@dataclass(frozen=True, slots=True)
class Node:
    """One node. Layers count from 0; tokens and positional embeddings have layer -1, logits the number of layers, what
    a direction reads that of the MLP where it is read.

    `pos` is -1 for a bias that acts at every position. `index` is the feature's number, the token's id, a checksum of
    the direction, or -1. Nodes are equal that stand at one place, whatever was measured there.
    """

    kind: NodeKind
    layer: int
    pos: int
    index: int = -1
    text: str = ""
    """The token's text; the component of a bias; the name of a contrast or a direction."""
    activation: float = field(default=math.nan, compare=False)
    """Of a feature: a = σ(pre_activation)."""
    pre_activation: float = field(default=math.nan, compare=False)
    """Of a feature: h = r W_enc + b_enc. Of a logit: the centred logit. Of a contrast or direction: its value."""
    bias: float = field(default=0.0, compare=False)
    """The part of `pre_activation` that comes from b_enc, and so from no edge."""
    probability: float = field(default=math.nan, compare=False)
    """Of a token's logit: its probability under the model."""
    explained: bool = field(default=False, compare=False)
    """Whether it is what the graph explains, and no token's logit: a contrast, a direction or a feature."""
    terms: tuple[Term, ...] = field(default=(), compare=False)
    """Of a contrast: its tokens."""
    vector: tuple[float, ...] = field(default=(), compare=False)
    """Of a direction: what is read with."""

    @property
    def id(self) -> str:
        """Stable text id: `2.713@5`, `2.err@5`, `tok@5`, `pos@5`, `2.b_dec`, `logit.17@5`; a contrast's
        `logit.17-23@5`, a direction's `2.direction.1234@5`.
        """
        match self.kind:
            case NodeKind.FEATURE:
                return f"{self.layer}.{self.index}@{self.pos}"
            case NodeKind.ERROR:
                return f"{self.layer}.err@{self.pos}"
            case NodeKind.TOKEN:
                return f"tok@{self.pos}"
            case NodeKind.LOGIT if self.terms:
                named = "".join(f"{'-' if term.weight < 0 else '+'}{term.token}" for term in self.terms)
                return f"logit.{named.removeprefix('+')}@{self.pos}"
            case NodeKind.LOGIT if self.vector:
                return f"{self.layer}.direction.{self.index}@{self.pos}"
            case NodeKind.LOGIT:
                return f"logit.{self.index}@{self.pos}"
        name = self.text if self.layer < 0 else f"{self.layer}.{self.text}"
        return name if self.pos < 0 else f"{name}@{self.pos}"

    @property
    def is_target(self) -> bool:
        return self.kind in (NodeKind.FEATURE, NodeKind.LOGIT)

    @property
    def start(self) -> float:
        """The weight with which influence starts here: of a logit its probability, 1 of what else is explained."""
        if self.explained:
            return 1.0
        return self.probability if self.kind is NodeKind.LOGIT else 0.0


def node_columns(nodes: Sequence[Node]) -> dict[str, np.ndarray]:
    """What passes over a graph need of its nodes, as read-only arrays [node].

    `kind`: the names of the kinds, that of a feature that is explained being `logit`: it is kept, and passes nothing
    on. `layer`. `pos`. `start`: `Node.start`. `wanted`: the part of a target's pre-activation that its edges add up to,
    0 elsewhere.
    """
    columns = {
        "kind": np.array(
            [NodeKind.LOGIT if n.explained else n.kind for n in nodes], dtype=f"U{max(map(len, NodeKind))}"
        ),
        "layer": np.array([n.layer for n in nodes], dtype=np.int64),
        "pos": np.array([n.pos for n in nodes], dtype=np.int64),
        "start": np.array([n.start for n in nodes], dtype=np.float64),
        "wanted": np.array([n.pre_activation - n.bias if n.is_target else 0.0 for n in nodes], dtype=np.float64),
    }
    for column in columns.values():
        column.setflags(write=False)
    return columns
