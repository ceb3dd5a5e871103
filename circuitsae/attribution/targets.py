"""What is explained: logits and features, each as a vector that reads the residual stream at one place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.replacement import ReplacementModel, Trace
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel


class Readers(NamedTuple):
    """A batch of target vectors. A target's value is `vector · read`, with the read at (layer, pos).

    `layer` l < L reads the input of MLP l; `layer` L reads the final norm's output.
    """

    layer: Int[Tensor, "target"]
    pos: Int[Tensor, "target"]
    vector: Float[Tensor, "target d_model"]

    def take(self, which: Int[Tensor, "k"] | slice) -> "Readers":
        """Some of these targets."""
        return Readers(self.layer[which], self.pos[which], self.vector[which])


@runtime_checkable
class ChooseLogits(Protocol):
    """Chooses the tokens whose logits a graph explains."""

    def __call__(self, model: LanguageModel, logits: Float[Tensor, "d_vocab"]) -> Int[Tensor, "k"]: ...


@dataclass(frozen=True, kw_only=True)
class TopLogits:
    """The smallest set of most probable tokens that reaches a probability."""

    probability: float = 0.95
    """Stop when the chosen tokens hold this much probability together."""
    at_most: int = 10
    """Stop at this many tokens whatever their probability."""

    def __call__(self, model: LanguageModel, logits: Float[Tensor, "d_vocab"]) -> Int[Tensor, "k"]:
        if not 0 < self.probability <= 1 or self.at_most < 1:
            raise InputError(f"{self} chooses nothing; give a probability in (0, 1] and at_most ≥ 1.")
        probability, token = logits.softmax(-1).sort(descending=True, stable=True)
        enough = int((probability.cumsum(0) < self.probability).sum()) + 1
        return token[: min(enough, self.at_most)]


@dataclass(frozen=True)
class LogitTargets:
    """The logits of given tokens, as text (one token each, mind the leading space) or as ids."""

    tokens: Sequence[str | int]

    def __call__(self, model: LanguageModel, logits: Float[Tensor, "d_vocab"]) -> Int[Tensor, "k"]:
        ids = [model.token_id(token) if isinstance(token, str) else token for token in self.tokens]
        if not ids or min(ids) < 0 or max(ids) >= model.d_vocab or len(set(ids)) != len(ids):
            raise InputError(
                f"Target tokens {list(self.tokens)} are no set of tokens of {model.name}; give distinct tokens "
                f"(as text, or ids from 0 to {model.d_vocab - 1})."
            )
        return torch.tensor(ids, device=logits.device)


def logit_readers(trace: Trace, token: Int[Tensor, "k"]) -> Readers:
    """Centred unembedding directions `W_U[:, v] − mean_v W_U`, read at the last position after the final norm.

    A soft cap of the logits counts as one more frozen scale: `W_U[:, v] s_v − mean_v (W_U s)`.
    """
    model = trace.frozen.model
    last = torch.full_like(token, trace.n_positions - 1)
    vector = centred_columns(model.W_U.detach(), trace, token).T
    return Readers(torch.full_like(token, model.n_layers), last, vector)


def centred_columns(weights: Float[Tensor, "*d d_vocab"], trace: Trace, token: Int[Tensor, "k"]) -> Tensor:
    """What `weights` (W_U or b_U) gives to each token's logit, less its mean over the vocabulary: `[*d, k]`."""
    scale = trace.frozen.logit_scale
    mean = weights @ scale / len(scale)
    return weights[..., token] * scale[token] - mean[..., None]


def feature_readers(model: ReplacementModel, trace: Trace, row: Int[Tensor, "k"]) -> Readers:
    """Encoder directions of the trace's active features with these row numbers."""
    layer, pos, feature = trace.features.index[row].unbind(1)
    vector = torch.empty(len(row), model.model.d_model, dtype=model.model.dtype, device=layer.device)
    for which in layer.unique().tolist():
        vector[layer == which] = model.dictionaries.encoder_rows(which, feature[layer == which]).detach()
    return Readers(layer, pos, vector)
