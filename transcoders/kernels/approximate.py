"""A fast product that says how wrong it can be.

On processors with bfloat16 instructions the encoder's product is several times faster in bfloat16. What it gives is
used to discard features, never as a value: with `|h̃ − h| ≤ ε` for every feature, one whose h̃ lies 2ε below the
cut is not above it. The survivors are computed again in the weights' own precision.

Source of the bounds: Higham 2002, *Accuracy and Stability of Numerical Algorithms*, sections 2.2 and 3.1.
"""

import time
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_CHUNK_BYTES = 2**19
"""Weights are rounded in pieces that stay in the cache."""

_STORED, _SUMS = torch.finfo(torch.bfloat16).eps / 2, torch.finfo(torch.float32).eps / 2
"""Unit roundoff of what is stored, and of the sums before."""

_SMALLEST_PRODUCT = 2**18
"""Inputs times features from which a cheaper product repays a second look at its best; measured."""

_CLEARLY = 0.7
"""Of the time that float32 takes."""


class Approximation(NamedTuple):
    """Pre-activations, each within `bound[row] + relative · |h̃|` of the exact ones."""

    h: Float[Tensor, "layer batch feature"]
    bound: Float[Tensor, "layer batch"]
    relative: float


def product(
    x: Float[Tensor, "layer batch d_in"],
    rows: Float[Tensor, "layer feature d_in"],
    bias: Float[Tensor, "layer feature"],
) -> Float[Tensor, "layer batch feature"]:
    """`x rowsᵀ + bias`."""
    if len(x) > 1:
        return torch.baddbmm(bias.unsqueeze(1), x, rows.mT)
    return torch.addmm(bias[0], x[0], rows[0].mT).unsqueeze(0)  # faster than a batch of one


def approximate_product(
    x: Float[Tensor, "layer batch d_in"],
    rows: Float[Tensor, "layer feature d_in"],
    bias: Float[Tensor, "layer feature"],
) -> Approximation:
    """`x rowsᵀ + bias` in bfloat16.

    `h − h̃ = ⟨δx, w⟩ + ⟨x̃, δw⟩ + δb + rounding`, so with norms over the inputs and the largest norms over the features
    `ε = ‖δx‖ max‖w‖ + ‖x̃‖ max‖δw‖ + max|δb| + γ_d (‖x̃‖ max‖w̃‖ + max|b|)`, the last for the sums in float32, and,
    because h̃ is stored in bfloat16, `u |h̃|`.
    """
    low_x, low_bias = x.bfloat16(), bias.bfloat16()
    low_rows, norm, rounding = _rounded(rows)
    h = product(low_x, low_rows, low_bias)
    x_norm, x_rounding = (torch.linalg.vector_norm(part, dim=-1) for part in (x, x - low_x))
    bias_size, bias_rounding = (part.abs().amax(dim=-1, keepdim=True) for part in (bias, bias - low_bias))
    norm, rounding = norm.unsqueeze(1), rounding.unsqueeze(1)
    low_norm = x_norm + x_rounding
    sums = (x.shape[-1] + 2) * _SUMS
    bound = x_rounding * norm + low_norm * rounding + bias_rounding + sums * (low_norm * (norm + rounding) + bias_size)
    return Approximation(h, bound, _STORED)


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights in bfloat16, and of every layer the largest norm of a row and of a row's rounding error."""
    low = torch.empty_like(rows, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    norm, rounding = [], []
    step = max(1, _CHUNK_BYTES // (rows.shape[-1] * rows.element_size()))
    for layer, low_layer in zip(rows, low, strict=True):
        norms = []
        for piece, low_piece in zip(layer.split(step), low_layer.split(step), strict=True):
            low_piece.copy_(piece)
            error = low_piece.to(rows.dtype).sub_(piece)
            norms.append([torch.linalg.vector_norm(part, dim=-1).amax() for part in (piece, error)])
        norm.append(torch.stack([n for n, _ in norms]).amax())
        rounding.append(torch.stack([r for _, r in norms]).amax())
    return low, torch.stack(norm), torch.stack(rounding)


def pays(x: Float[Tensor, "layer batch d_in"], n_features: int) -> bool:
    """Whether the approximation saves more time than the second look costs; results do not depend on the answer."""
    large = x.shape[-1] * n_features >= _SMALLEST_PRODUCT
    return large and x.device.type == "cpu" and x.dtype == torch.float32 and bfloat16_is_faster(x.shape[-1])


@lru_cache
def bfloat16_is_faster(d_in: int) -> bool:
    """A trial of a few milliseconds, once for each width."""
    x, rows = torch.ones(256, d_in), torch.ones(1024, d_in)
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = x.to(dtype), rows.to(dtype)
        times[dtype] = min(_seconds(a, b) for _ in range(5))
    return times[torch.bfloat16] < _CLEARLY * times[torch.float32]


def _seconds(a: Tensor, b: Tensor) -> float:
    start = time.perf_counter()
    torch.matmul(a, b.mT)
    return time.perf_counter() - start
