"""Activation functions that exist in training only: BatchTopK, the gate of Gated, and JumpReLU's step.

They take `[batch, layer, feature]`, all layers of a token side by side: `export` turns them into those of
`transcoders.dictionaries`.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from transcoders.dictionaries import Activation
from transcoders.errors import DictionaryError

_THRESHOLD_DECAY = 0.95
"""Per step, of the running mean of BatchTopK's smallest activation."""


class BatchTopK(Activation):
    """a = h for the k·batch largest positive h of a batch, 0 for the rest.

    A layer's features compete among themselves; with `over_layers` those of all layers do (cross-layer transcoders),
    and k counts a token's features in all of them. So tokens, and there layers, need not get the same number.
    `threshold` is a running mean of the smallest activation that was kept; at inference `a = h · 1[h > threshold]`.

    Source: Bussmann et al. 2024, *BatchTopK Sparse Autoencoders*, section 3.
    """

    name = "batchtopk"
    pointwise = False
    threshold_sum: Float[Tensor, "layer"]
    threshold_weight: Float[Tensor, "layer"]

    def __init__(self, k: int, n_layers: int, *, over_layers: bool = False) -> None:
        super().__init__()
        if k < 1:
            raise DictionaryError(f"BatchTopK keeps at least one feature; got k = {k}.")
        self.k, self.over_layers = int(k), over_layers
        self.register_buffer("threshold_sum", torch.zeros(n_layers))
        self.register_buffer("threshold_weight", torch.zeros(n_layers))

    @property
    def threshold(self) -> Float[Tensor, "layer"]:
        """The value to replace the ranking by; zero before the first batch."""
        return self.threshold_sum / self.threshold_weight.clamp(min=1e-12)

    def forward(self, h: Float[Tensor, "batch layer feature"]) -> Float[Tensor, "batch layer feature"]:
        return h * (h >= self.cut(h)).logical_and_(h > 0)

    @torch.no_grad()
    def cut(self, h: Float[Tensor, "batch layer feature"]) -> Float[Tensor, "layer 1"]:
        """The k·batch-th largest value, of each layer or of all."""
        count = self.k * h.shape[0]
        if self.over_layers:
            return kth_largest(h, count, float(self.threshold[0])).expand(h.shape[1], 1)
        lower = self.threshold.tolist()
        return torch.stack([kth_largest(h[:, i], count, lower[i]) for i in range(h.shape[1])]).unsqueeze(1)

    @torch.no_grad()
    def observe(self, smallest: Float[Tensor, "layer"]) -> None:
        """Take each layer's smallest positive activation of a batch into the running mean; infinite ones are none."""
        if self.over_layers:
            smallest = smallest.min().expand_as(smallest)
        smallest = smallest.where(smallest.isfinite(), 0.0)
        self.threshold_sum.lerp_(smallest.to(self.threshold_sum), 1 - _THRESHOLD_DECAY)
        self.threshold_weight.lerp_(torch.ones_like(self.threshold_weight), 1 - _THRESHOLD_DECAY)


@torch.no_grad()
def kth_largest(h: Tensor, count: int, guess: float = 0.0) -> Float[Tensor, ""]:
    """The `count`-th largest value, the smallest of all where there are not that many.

    `guess`: about where it lies. Values far below are not sorted; a bad guess costs time, never the result.
    """
    if guess > 0:
        candidates = h[h > 0.9 * guess]
        if len(candidates) >= count:
            return candidates.kthvalue(len(candidates) - count + 1).values
    flat = h.flatten()
    return flat.kthvalue(max(1, len(flat) - count + 1)).values


class Gated(Activation):
    """a = 1[π > 0] · relu(m), with π = x W_gate + b_gate and m = exp(r) · x W_gate + b_mag.

    The gate decides which features are active, so the penalty on it does not shrink the magnitudes. Since both share
    their directions, m = exp(r) · (π − b_gate) + b_mag.

    Source: Rajamanoharan et al. 2024, *Improving Dictionary Learning with Gated Sparse Autoencoders*, section 3.2.
    """

    name = "gated"

    def __init__(self, b_gate: Float[Tensor, "layer feature"]) -> None:
        super().__init__()
        self.r = nn.Parameter(torch.zeros_like(b_gate))
        self.b_mag = nn.Parameter(b_gate.detach().clone())

    def forward(self, h: Float[Tensor, "batch layer feature"]) -> Float[Tensor, "batch layer feature"]:
        raise DictionaryError("A gated activation needs its gate's bias; call `magnitudes(h, b_gate)`.")

    def magnitudes(
        self, pi: Float[Tensor, "batch layer feature"], b_gate: Float[Tensor, "layer feature"]
    ) -> Float[Tensor, "batch layer feature"]:
        """a, of the gate's pre-activations."""
        return torch.relu(self.r.exp() * (pi - b_gate) + self.b_mag) * (pi > 0)


class Step(torch.autograd.Function):
    """1[h > θ], and for θ the gradient −1[|h − θ| < ε/2] / ε; none for h.

    Source: Rajamanoharan et al. 2024, *Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU SAEs*, eq. 12.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth = bandwidth
        return (h > threshold).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor, None]:
        (grad,) = grad_outputs
        h, threshold = ctx.saved_tensors
        kernel = (h - threshold).abs() < ctx.bandwidth / 2
        return None, (grad * kernel).sum_to_size(threshold.shape) / -ctx.bandwidth, None
