"""Sparsifying functions σ: pre-activations h in, activations a = σ(h) out.

Every function takes `[*batch, feature]`; those of a cross-layer transcoder take `[*batch, layer, feature]`.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from transcoders.errors import DictionaryError


class Activation(nn.Module):
    """σ of one dictionary.

    `pointwise`: a feature's activation depends on its own pre-activation only. `over_layers`: it depends on those of
    all layers of a cross-layer transcoder, which then cannot be evaluated one layer at a time.
    """

    name: str
    pointwise: bool = True
    over_layers: bool = False

    def forward(self, h: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch feature"]:
        raise NotImplementedError

    def require(self, n_features: int) -> None:
        """Raises `DictionaryError` where a layer of so many features cannot have it."""

    def at_layer(self, layer: int) -> "Activation":
        """The function that one layer of a cross-layer transcoder applies to its own pre-activations."""
        raise NotImplementedError


class ReLU(Activation):
    """a = max(h, 0). Source: Bricken et al. 2023, *Towards Monosemanticity*."""

    name = "relu"

    def forward(self, h: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch feature"]:
        return torch.relu(h)

    def at_layer(self, layer: int) -> Activation:
        return self


class JumpReLU(Activation):
    """a = h · 1[h > θ], one threshold θ for each feature.

    The step has no gradient; a straight-through estimate with a rectangle kernel of width ε replaces it:
    ∂a/∂θ = −(θ/ε) · 1[|h − θ| < ε/2]. The gradient of h is exact: 1[h > θ].

    θ itself is the parameter. A log-parametrised threshold barely moves under Adam.

    Source: Rajamanoharan et al. 2024, *Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU SAEs*, eq. 11.
    """

    name = "jumprelu"
    threshold: Tensor

    def __init__(self, threshold: Float[Tensor, "*layer feature"], bandwidth: float = 1e-3) -> None:
        super().__init__()
        if not 0 < bandwidth < math.inf:
            raise DictionaryError(f"JumpReLU's bandwidth must be positive; got {bandwidth}.")
        self.threshold = nn.Parameter(threshold)
        self.bandwidth = float(bandwidth)

    def forward(self, h: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch feature"]:
        return self.jump(h, self.threshold)

    def jump(self, h: Tensor, threshold: Tensor) -> Tensor:
        """The function with thresholds given beside h: for features picked one by one."""
        activation = _Jump.apply(h, threshold, self.bandwidth)
        assert isinstance(activation, Tensor)
        return activation

    def at_layer(self, layer: int) -> Activation:
        single = JumpReLU(self.threshold.detach()[layer], self.bandwidth)
        single.threshold.requires_grad_(False)
        return single

    def extra_repr(self) -> str:
        return f"threshold={tuple(self.threshold.shape)}, bandwidth={self.bandwidth}"


class _Jump(torch.autograd.Function):
    """`JumpReLU` with its straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth = bandwidth
        return h * (h > threshold)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grad_outputs
        h, threshold = ctx.saved_tensors
        kernel = (h - threshold).abs() < ctx.bandwidth / 2
        grad_threshold = (grad * kernel).sum_to_size(threshold.shape) * (-threshold / ctx.bandwidth)
        return grad * (h > threshold), grad_threshold, None


class TopK(Activation):
    """a = max(h, 0) for the k largest h of a token, 0 for the rest.

    `over_layers`: the features of all layers of a token are ranked together (cross-layer transcoders), so that k bounds
    the token's total. Such a function cannot be evaluated one layer at a time.

    Source: Gao et al. 2024, *Scaling and Evaluating Sparse Autoencoders*, section 2.3.
    """

    name = "topk"
    pointwise = False

    def __init__(self, k: int, *, over_layers: bool = False) -> None:
        super().__init__()
        if k < 1:
            raise DictionaryError(f"TopK keeps at least one feature; got k = {k}.")
        self.k = int(k)
        self.over_layers = over_layers

    def forward(self, h: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch feature"]:
        flat = h.flatten(-2) if self.over_layers else h
        value, index = flat.topk(min(self.k, flat.shape[-1]), dim=-1, sorted=False)
        return torch.zeros_like(flat).scatter(-1, index, torch.relu(value)).reshape(h.shape)

    def at_layer(self, layer: int) -> Activation:
        if not self.over_layers:
            return self
        raise DictionaryError(
            f"TopK ranks the features of all layers together (k = {self.k}), so layer {layer} alone has none; "
            "encode all layers at once, or replace TopK by a JumpReLU with `transcoders.training.fold_topk`."
        )

    def extra_repr(self) -> str:
        return f"k={self.k}, over_layers={self.over_layers}"


class GroupMax(Activation):
    """a = max(h, 0) for the largest h of each of k groups of consecutive features, 0 for the rest.

    Source: EleutherAI's sparsify, which trains with it in the place of TopK.
    """

    name = "groupmax"
    pointwise = False

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise DictionaryError(f"GroupMax has at least one group; got k = {k}.")
        self.k = int(k)

    def require(self, n_features: int) -> None:
        if n_features % self.k or not n_features:
            raise DictionaryError(
                f"GroupMax takes the largest of each of k groups of one size; {n_features} features are no k = "
                f"{self.k} such groups."
            )

    def forward(self, h: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch feature"]:
        self.require(h.shape[-1])
        grouped = h.unflatten(-1, (self.k, -1))
        value, index = grouped.max(dim=-1, keepdim=True)
        return torch.zeros_like(grouped).scatter(-1, index, torch.relu(value)).reshape(h.shape)

    def at_layer(self, layer: int) -> Activation:
        return self

    def extra_repr(self) -> str:
        return f"k={self.k}"


class JumpTopK(Activation):
    """a = h · 1[h > θ] for the k features of a layer with the largest h − θ, 0 for the rest.

    What TopK keeps, each raised by its threshold: EleutherAI's clt-training writes it as an encoder of h − θ and a
    `post_enc` of θ.
    """

    name = "jumptopk"
    pointwise = False
    threshold: Tensor

    def __init__(self, k: int, threshold: Float[Tensor, "*layer feature"]) -> None:
        super().__init__()
        if k < 1:
            raise DictionaryError(f"JumpTopK keeps at least one feature; got k = {k}.")
        self.k = int(k)
        self.threshold = nn.Parameter(threshold)

    def forward(self, h: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch feature"]:
        above, index = (h - self.threshold).topk(min(self.k, h.shape[-1]), dim=-1, sorted=False)
        return h * torch.zeros_like(h, dtype=torch.bool).scatter(-1, index, above > 0)

    def at_layer(self, layer: int) -> Activation:
        return JumpTopK(self.k, self.threshold.detach()[layer]).requires_grad_(False)

    def extra_repr(self) -> str:
        return f"k={self.k}, threshold={tuple(self.threshold.shape)}"
