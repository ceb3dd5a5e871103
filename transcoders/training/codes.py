"""The features of a batch in training: dense, or the active ones alone.

Both give the same loss and the same gradients; which one is faster depends on how many features are active, which is
measured (`Run`). Sparse codes read and change only the weights of features that are active, or near their threshold.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transcoders.dictionaries import JumpReLU, ReLU, TopK
from transcoders.kernels import (
    ActiveFeatures,
    SparseActivations,
    batch_topk_encode,
    host,
    threshold_encode,
    topk_encode,
)
from transcoders.training.activations import BatchTopK, Gated, Step
from transcoders.training.distributed import World
from transcoders.training.parameters import TrainingParameters
from transcoders.training.ranking import activate_among_ranks, kept_by_all
from transcoders.training.split import WHOLE, Split


@runtime_checkable
class Code(Protocol):
    """Pre-activations h and activations a of all layers' features on a batch."""

    a: Tensor
    """Activations: dense `[layer, batch, feature]`, or one for each feature that is listed."""
    h: Tensor
    """Pre-activations of the same."""

    def decode(self, weights: TrainingParameters, first: int, last: int) -> Float[Tensor, "layer batch d_model"]:
        """What the features `first … last − 1` of every layer write."""
        ...

    def decode_gate(self, weights: TrainingParameters) -> Float[Tensor, "layer batch d_model"]:
        """What `relu(h)` writes through decoders that get no gradient."""
        ...

    def of_feature(self, table: Float[Tensor, "layer feature"]) -> Tensor:
        """A value of every feature, beside `a`."""
        ...

    def steps(self, threshold: Float[Tensor, "layer feature"], bandwidth: float) -> Tensor:
        """`1[h > θ]` with a gradient for θ, beside `a`."""
        ...

    def mean(self, values: Tensor) -> Float[Tensor, ""]:
        """Of values beside `a`: the sum over features, averaged over layers and tokens."""
        ...

    def fired(self) -> Bool[Tensor, "layer feature"]:
        """Which features are active on any token."""
        ...

    def l0(self) -> Float[Tensor, "layer"]:
        """Active features per token of each layer."""
        ...

    def smallest(self) -> Float[Tensor, "layer"]:
        """Each layer's smallest positive activation, infinite where there is none."""
        ...

    def dead_pre_activations(self, layer: int, which: Tensor) -> Tensor | None:
        """h of some features of a layer, `[batch, which]`, or None where they are not known."""
        ...


class DenseCode:
    """All features."""

    def __init__(self, h: Float[Tensor, "layer batch feature"], a: Float[Tensor, "layer batch feature"]) -> None:
        self.h, self.a = h, a

    @classmethod
    def of(
        cls,
        weights: TrainingParameters,
        reads: Float[Tensor, "layer batch d_model"],
        split: Split = WHOLE,
        batch: int = 0,
    ) -> "DenseCode":
        """`batch`: tokens on all ranks, where `split` shares them out."""
        h = weights.pre_activations(reads)
        activation = weights.activation
        if isinstance(activation, TopK | BatchTopK) and (ranks := _competing(activation, split)).size > 1:
            return cls(h, activate_among_ranks(activation, h, _tokens(reads, split, batch), ranks))
        return cls(h, weights.activate(h))

    def decode(self, weights: TrainingParameters, first: int, last: int) -> Float[Tensor, "layer batch d_model"]:
        return weights.decode(self.a, first, last)

    def decode_gate(self, weights: TrainingParameters) -> Float[Tensor, "layer batch d_model"]:
        return weights.decode(torch.relu(self.h), frozen=True)

    def of_feature(self, table: Float[Tensor, "layer feature"]) -> Float[Tensor, "layer 1 feature"]:
        return table.unsqueeze(1)

    def steps(self, threshold: Float[Tensor, "layer feature"], bandwidth: float) -> Tensor:
        return _step(self.h, threshold.unsqueeze(1), bandwidth)

    def mean(self, values: Tensor) -> Float[Tensor, ""]:
        return values.sum(dim=-1).mean()

    def fired(self) -> Bool[Tensor, "layer feature"]:
        return (self.a > 0).any(dim=1)

    def l0(self) -> Float[Tensor, "layer"]:
        return (self.a > 0).sum(dim=-1).float().mean(dim=1)

    def smallest(self) -> Float[Tensor, "layer"]:
        return torch.where(self.a > 0, self.a, torch.inf).amin(dim=(1, 2))

    def dead_pre_activations(self, layer: int, which: Tensor) -> Tensor:
        return self.h[layer][:, which]

    @torch.no_grad()
    def density(self, weights: TrainingParameters, margin: float) -> float:
        """The share of features that a sparse code would list: those above or near their threshold."""
        return float((self.h > _lowest(weights, margin).unsqueeze(1)).float().mean())


class SparseCode:
    """The features that are active, and those so near their threshold that it gets a gradient from them."""

    def __init__(self, h: Float[Tensor, "n"], a: Float[Tensor, "n"], active: ActiveFeatures) -> None:
        self.h, self.a, self.active = h, a, active

    @classmethod
    def of(
        cls,
        weights: TrainingParameters,
        reads: Float[Tensor, "layer batch d_model"],
        margin: float,
        split: Split = WHOLE,
        batch: int = 0,
    ) -> "SparseCode":
        """`margin`: how far below its threshold a feature is listed, half the widest of JumpReLU's kernels.

        `batch`: tokens on all ranks, where `split` shares them out.
        """
        encoder = weights.encoder()
        found = _find(weights, reads, encoder.mT, weights.encoder_bias(encoder), margin, split, batch)
        code = cls(found.value, found.value, found.active)
        activation = weights.activation
        if isinstance(activation, JumpReLU):
            code.a = activation.jump(code.h, code.of_feature(activation.threshold))
        elif isinstance(activation, Gated):
            r, b_mag, b_gate = (code.of_feature(t) for t in (activation.r, activation.b_mag, weights.b_enc))
            code.a = torch.relu(r.exp() * (code.h - b_gate) + b_mag)
        else:
            code.a = torch.relu(code.h)
        return code

    def decode(self, weights: TrainingParameters, first: int, last: int) -> Float[Tensor, "layer batch d_model"]:
        if last - first == self.active.n_features:
            return weights.decode_active(self.a, self.active)
        feature = self.active.feature % self.active.n_features
        within = (feature >= first) & (feature < last)
        if host.queued(within):  # how many they are is not asked
            return weights.decode_active(self.a * within, self.active)
        chosen = within.nonzero().squeeze(1)
        return weights.decode_active(self.a[chosen], self.active.keep(chosen))

    def decode_gate(self, weights: TrainingParameters) -> Float[Tensor, "layer batch d_model"]:
        return weights.decode_active(torch.relu(self.h), self.active, frozen=True)

    def of_feature(self, table: Float[Tensor, "layer feature"]) -> Float[Tensor, "n"]:
        return table.flatten().index_select(0, self.active.feature)

    def steps(self, threshold: Float[Tensor, "layer feature"], bandwidth: float) -> Tensor:
        return _step(self.h, self.of_feature(threshold), bandwidth)

    def mean(self, values: Tensor) -> Float[Tensor, ""]:
        return values.sum() / (len(self.active.start) - 1)

    def fired(self) -> Bool[Tensor, "layer feature"]:
        return self.active.fired(self.a > 0)

    def l0(self) -> Float[Tensor, "layer"]:
        so_far = torch.nn.functional.pad((self.a > 0).cumsum(0), (1, 0))
        count = so_far[self.active.start[:: self.active.batch]].diff()
        return count.float() / self.active.batch

    def smallest(self) -> Float[Tensor, "layer"]:
        layer = self.active.feature.div(self.active.n_features, rounding_mode="floor")
        least = self.a.detach().new_full((self.active.n_layers,), torch.inf)
        return least.scatter_reduce(0, layer, self.a.detach().where(self.a > 0, torch.inf), "amin")

    def dead_pre_activations(self, layer: int, which: Tensor) -> None:
        return None


def _find(
    weights: TrainingParameters, x: Tensor, W_enc: Tensor, b_enc: Tensor, margin: float, split: Split, batch: int
) -> SparseActivations:
    activation, (n_layers, own_tokens, _) = weights.activation, x.shape
    if isinstance(activation, TopK):
        found = topk_encode(x, W_enc, b_enc, activation.k, over_layers=activation.over_layers)
        group = found.active.row % own_tokens if activation.over_layers else found.active.row
        n_groups = own_tokens if activation.over_layers else n_layers * own_tokens
        return kept_by_all(found, group, n_groups, activation.k, _competing(activation, split))
    if isinstance(activation, BatchTopK):
        kept = activation.k * _tokens(x, split, batch)
        found = batch_topk_encode(x, W_enc, b_enc, kept / own_tokens, over_layers=activation.over_layers)
        group = found.active.row // (n_layers * own_tokens if activation.over_layers else own_tokens)
        n_groups = 1 if activation.over_layers else n_layers
        return kept_by_all(found, group, n_groups, kept, _competing(activation, split))
    return threshold_encode(x, W_enc, b_enc, _lowest(weights, margin))


def _competing(activation: TopK | BatchTopK, split: Split) -> World:
    """The ranks whose features compete: for a token those that share its features, for a batch its tokens as well."""
    return split.world if isinstance(activation, BatchTopK) and split.by == "data" else split.features


def _tokens(x: Tensor, split: Split, batch: int) -> int:
    """Tokens of a batch `[layer, batch, d_model]`, of which each rank may have some."""
    return batch if split.tokens.size > 1 else x.shape[1]


def _lowest(weights: TrainingParameters, margin: float) -> Float[Tensor, "layer feature"]:
    """What a pre-activation must exceed for the feature to be active or to have a gradient."""
    if isinstance(weights.activation, JumpReLU):
        return weights.activation.threshold.detach() - margin
    assert isinstance(weights.activation, ReLU | Gated)
    return torch.zeros_like(weights.b_enc)


def _step(h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    result = Step.apply(h, threshold, bandwidth)
    assert isinstance(result, Tensor)
    return result
