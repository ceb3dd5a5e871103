"""What a graph explains: logits, a contrast of logits, a feature, or what is read in a direction, at any position.

All are read where the prompt ends. What stands later has no part in it, as attention looks back only, so that the graph
of a position is that of the prompt up to it.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.attribution.nodes import (
    UNEMBED,
    Explained,
    TargetVectors,
    centred_columns,
    feature_nodes,
    feature_targets,
    logit_targets,
)
from circuitsae.graph import Node, NodeKind
from circuitsae.graph.nodes import Term
from circuitsae.replacement import ReplacementModel, Trace
from circuitsae.report.text import visible
from transcoders.dictionaries import SparseFeatures
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

FINAL = "final"
"""The site after the final norm, where the unembedding reads."""
LAST = -1
TokenName = str | int


@runtime_checkable
class ChooseLogits(Protocol):
    """Chooses the tokens whose logits a graph explains, at the last position or at its `position`."""

    def __call__(self, model: LanguageModel, logits: Float[Tensor, "d_vocab"]) -> Int[Tensor, "k"]: ...


@runtime_checkable
class Explains(Protocol):
    """Something else that a graph can explain, at its `position`."""

    @property
    def position(self) -> int: ...

    def explained(self, model: ReplacementModel, trace: Trace) -> Explained:
        """What it is of a prompt that ends at its position."""
        ...


ChooseTargets = ChooseLogits | Explains


@dataclass(frozen=True, kw_only=True)
class TopLogits:
    """The smallest set of most probable tokens that reaches a probability."""

    probability: float = 0.95
    """Stop when the chosen tokens hold this much probability together."""
    at_most: int = 10
    """Stop at this many tokens whatever their probability."""
    position: int = LAST
    """After which token; a negative one counts from the prompt's end."""

    def __call__(self, model: LanguageModel, logits: Float[Tensor, "d_vocab"]) -> Int[Tensor, "k"]:
        if not 0 < self.probability <= 1 or self.at_most < 1:
            raise InputError(f"{self} chooses nothing; give a probability in (0, 1] and at_most ≥ 1.")
        probability, token = logits.softmax(-1).sort(descending=True, stable=True)
        enough = int((probability.cumsum(0) < self.probability).sum()) + 1
        return token[: min(enough, self.at_most)]


@dataclass(frozen=True)
class LogitTargets:
    """The logits of given tokens, as text (one token each, mind the leading space) or as ids."""

    tokens: Sequence[TokenName]
    position: int = field(default=LAST, kw_only=True)
    """After which token; a negative one counts from the prompt's end."""

    def __call__(self, model: LanguageModel, logits: Float[Tensor, "d_vocab"]) -> Int[Tensor, "k"]:
        ids = _ids(model, self.tokens)
        if not ids or len(set(ids)) != len(ids):
            raise InputError(_no_tokens(model, self.tokens))
        return torch.tensor(ids, device=logits.device)


@dataclass(frozen=True)
class Contrast:
    """The logit of one token less that of another; of several on a side, their mean.

    `Σ_i w_i · logit_i`, with w = 1/n for the n tokens of `plus` and −1/m for the m of `minus`. One node of the graph
    reads `Σ_i w_i · W_U[:, i]` after the final norm, a soft cap counting as one more frozen scale.
    """

    plus: TokenName | Sequence[TokenName]
    minus: TokenName | Sequence[TokenName]
    position: int = field(default=LAST, kw_only=True)
    """After which token; a negative one counts from the prompt's end."""

    def explained(self, model: ReplacementModel, trace: Trace) -> Explained:
        sides = [[side] if isinstance(side, str | int) else list(side) for side in (self.plus, self.minus)]
        plus, minus = (_ids(model.model, side) for side in sides)
        if not plus or not minus or len({*plus, *minus}) < len(plus) + len(minus):
            raise InputError(
                f"The contrast of {sides[0]} and {sides[1]} needs tokens on both sides, and each only once; give two "
                "different tokens."
            )
        token, last = torch.tensor(plus + minus, device=trace.tokens.device), trace.n_positions - 1
        weight = [1 / len(plus)] * len(plus) + [-1 / len(minus)] * len(minus)
        logits = trace.logits[-1]
        terms = map(Term, token.tolist(), weight, logits.softmax(-1)[token].tolist())
        node = Node(
            NodeKind.LOGIT,
            model.model.n_layers,
            last,
            text=f"{_mean(model.model, plus)} − {_mean(model.model, minus)}",
            pre_activation=float(logits[token] @ torch.tensor(weight, dtype=torch.float64).to(logits)),
            explained=True,
            terms=tuple(terms),
        )
        return Explained(trace, (node,), node_vectors(model, trace, node), _bias(model, trace, node))


@dataclass(frozen=True)
class FeatureTarget:
    """A feature: the graph of what made it fire. Raises `InputError` where it is not active at the position."""

    layer: int
    index: int
    position: int = LAST
    """A negative one counts from the prompt's end."""

    def explained(self, model: ReplacementModel, trace: Trace) -> Explained:
        index, value = trace.features
        place = torch.tensor([self.layer, trace.n_positions - 1, self.index], device=index.device)
        row = (index == place).all(1).nonzero().squeeze(1)
        if not len(row):
            raise InputError(self._not_active(model, trace))
        alone = replace(trace, features=SparseFeatures(index[row], value[row]))
        vectors = feature_targets(model, trace, row)
        (node,) = feature_nodes(model, alone, vectors)
        below = features_below(model, trace, self.layer)
        return Explained(below, (replace(node, explained=True),), vectors, vectors.vector.new_zeros(1, 0))

    def _not_active(self, model: ReplacementModel, trace: Trace) -> str:
        """Why there is nothing to explain."""
        index, value = trace.features
        last, layers = trace.n_positions - 1, model.model.n_layers
        if not 0 <= self.layer < layers:
            return f"Feature {self.layer}.{self.index}: there are layers 0 to {layers - 1}; give a feature of one."
        here = ((index[:, 0] == self.layer) & (index[:, 1] == last)).nonzero().squeeze(1)
        strongest = index[here[value[here].argsort(descending=True)[:3]], 2].tolist()
        others = ", ".join(f"{self.layer}.{number}" for number in strongest) or "none"
        return (
            f"Feature {self.layer}.{self.index} is not active at position {last} "
            f"({visible(trace.token_strings[last])}), so nothing made it fire; most active there in layer "
            f"{self.layer}: {others}."
        )


@dataclass(frozen=True, eq=False)
class DirectionTarget:
    """What a vector reads, such as that of a probe: `vector · read` at a layer's read site or after the final norm."""

    vector: Float[Tensor, "d_model"] | Float[np.ndarray, "d_model"] | Sequence[float]
    site: str = FINAL
    """Where the dictionary of a layer reads, such as `3.mlp_in`, or `final`."""
    position: int = LAST
    """A negative one counts from the prompt's end."""
    name: str = "direction"

    def __repr__(self) -> str:
        return f"DirectionTarget(site={self.site!r}, position={self.position}, name={self.name!r})"

    def explained(self, model: ReplacementModel, trace: Trace) -> Explained:
        layer = self._layer(model)
        given = self.vector.detach().cpu().double().numpy() if isinstance(self.vector, Tensor) else self.vector
        vector = np.array(given, dtype=np.float64).reshape(-1)
        if len(vector) != model.model.d_model or not np.isfinite(vector).all() or not vector.any():
            raise InputError(
                f"The direction {self.name!r} has {len(vector)} numbers, of which {np.count_nonzero(vector)} are not 0 "
                f"and {np.count_nonzero(~np.isfinite(vector))} not finite; give {model.model.d_model} finite ones."
            )
        node = Node(
            NodeKind.LOGIT,
            layer,
            trace.n_positions - 1,
            zlib.crc32(vector.tobytes()),
            self.name,
            explained=True,
            vector=tuple(vector.tolist()),
        )
        reads = trace.frozen.reads
        read = reads.final[-1] if layer == model.model.n_layers else reads.by_layer[layer, -1]
        vectors = node_vectors(model, trace, node)
        node = replace(node, pre_activation=float(read @ vectors.vector[0].to(read)))
        return Explained(features_below(model, trace, layer), (node,), vectors, vectors.vector.new_zeros(1, 0))

    def _layer(self, model: ReplacementModel) -> int:
        if self.site == FINAL:
            return model.model.n_layers
        sites = [str(site) for site in model.dictionaries.reads[: model.model.n_layers]]
        if self.site not in sites:
            raise InputError(
                f"A direction is read where the dictionary of a layer reads ({sites[0]} to {sites[-1]}) or after the "
                f"final norm ({FINAL}); {self.site!r} is neither."
            )
        return sites.index(self.site)


def until(tokens: Int[Tensor, "pos"], targets: ChooseTargets) -> Int[Tensor, "kept"]:
    """The prompt up to the position that `targets` are read at. Raises `InputError` where it has none such."""
    position, count = getattr(targets, "position", LAST), len(tokens)
    if not -count <= position < count:
        raise InputError(
            f"Position {position} is not in the prompt, which has {count} tokens; give one from {-count} to "
            f"{count - 1}."
        )
    return tokens[: position % count + 1]


def explained(model: ReplacementModel, trace: Trace, targets: ChooseTargets) -> Explained:
    """What `targets` are of a prompt that ends at their position."""
    if isinstance(targets, Explains):
        return targets.explained(model, trace)
    return explained_logits(model, trace, targets(model.model, trace.logits[-1]))


def explained_logits(model: ReplacementModel, trace: Trace, token: Int[Tensor, "k"]) -> Explained:
    """The centred logits of some tokens at the last position."""
    logits, last = trace.logits[-1], trace.n_positions - 1
    probability, centred = logits.softmax(-1)[token], (logits - logits.mean())[token]
    layer, text = model.model.n_layers, model.model.token_string
    nodes = [
        Node(NodeKind.LOGIT, layer, last, index, text(index), pre_activation=value, probability=p)
        for index, value, p in zip(token.tolist(), centred.tolist(), probability.tolist(), strict=True)
    ]
    b_U = model.model.bias_groups().get((layer, UNEMBED))
    bias = logits.new_zeros(len(token), 0) if b_U is None else centred_columns(b_U[0].detach(), trace, token)[:, None]
    return Explained(trace, tuple(nodes), logit_targets(trace, token), bias)


def node_vectors(model: ReplacementModel, trace: Trace, node: Node) -> TargetVectors:
    """How a node that is no feature reads: a token's logit, a contrast, a direction."""
    device = trace.tokens.device
    if not node.vector:
        token = torch.tensor([term.token for term in node.terms] or [node.index], device=device)
        if int(token.min()) < 0 or int(token.max()) >= model.model.d_vocab:
            raise InputError(
                f"{node.id} is no logit of {model.model.name}, which has tokens 0 to {model.model.d_vocab - 1}."
            )
        read = logit_targets(trace, token)
        if not node.terms:
            return read
        weight = _weights(node).to(read.vector)
        return TargetVectors(read.layer[:1], read.pos[:1], weight @ read.vector)
    if len(node.vector) != model.model.d_model:
        raise InputError(f"{node.id} has {len(node.vector)} numbers, but {model.model.name} has {model.model.d_model}.")
    layer, pos = (torch.tensor([value], device=device) for value in (node.layer, trace.n_positions - 1))
    return TargetVectors(layer, pos, torch.tensor([node.vector], dtype=torch.float64).to(trace.errors))


def features_below(model: ReplacementModel, trace: Trace, layer: int) -> Trace:
    """The trace with the features that a target of this layer can have read, those of earlier layers."""
    below = trace.features.index[:, 0] < layer
    return trace if bool(below.all()) else model.keep(trace, below.nonzero().squeeze(1))


def _bias(model: ReplacementModel, trace: Trace, node: Node) -> Float[Tensor, "1 _"]:
    """What b_U adds to a contrast."""
    token = torch.tensor([term.token for term in node.terms], device=trace.tokens.device)
    of_each = explained_logits(model, trace, token).bias
    return _weights(node).to(of_each) @ of_each


def _mean(model: LanguageModel, tokens: Sequence[int]) -> str:
    """One side of a contrast in words: `·Mary`, `(·Mary + ·Anna)/2`."""
    words = " + ".join(visible(model.token_string(token)) for token in tokens)
    return words if len(tokens) == 1 else f"({words})/{len(tokens)}"


def _weights(node: Node) -> Float[Tensor, "1 term"]:
    return torch.tensor([[term.weight for term in node.terms]], dtype=torch.float64)


def _ids(model: LanguageModel, tokens: Sequence[TokenName]) -> list[int]:
    """Ids of tokens given as text or as ids. Raises `InputError` for an id that the model has not."""
    ids = [model.token_id(token) if isinstance(token, str) else token for token in tokens]
    if ids and (min(ids) < 0 or max(ids) >= model.d_vocab):
        raise InputError(_no_tokens(model, tokens))
    return ids


def _no_tokens(model: LanguageModel, tokens: Sequence[TokenName]) -> str:
    return (
        f"Target tokens {list(tokens)} are no set of tokens of {model.name}; give distinct tokens "
        f"(as text, or ids from 0 to {model.d_vocab - 1})."
    )
