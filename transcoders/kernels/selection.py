"""Choosing the active features: the largest of a token, of a batch, or all above a cut.

A cheap bound first: the features are folded into blocks, and since the k largest blocks contain k features at least as
large as the k-th block's maximum, nothing below that maximum is among the k largest. Only blocks that reach it are
opened; what is found there (a little more than k) is computed exactly, and the exact values decide.

What is ranked is the exact product on a GPU. On a processor with bfloat16 instructions (`pays` chooses) it is one that
is several times faster and says how wrong it can be. What it gives is used to discard features, never as a value: with
`|h̃ − h| ≤ ε` for every feature, one whose h̃ lies 2ε below the cut is not above it. The survivors are computed again in
the weights' own precision.

Source of the bounds: Higham 2002, *Accuracy and Stability of Numerical Algorithms*, sections 2.2 and 3.1.
"""

import time
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.kernels.active import ActiveFeatures, active_from_mask, active_from_pairs

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


_BLOCKS_PER_CHOICE = 8
_LARGEST_BLOCK = 32
_DENSE_CANDIDATES = 0.25
"""Where more candidates than this share of all features remain, a mask finds them faster than blocks."""

Cut = Callable[[Float[Tensor, "layer batch block"]], Float[Tensor, "layer batch"]]


def candidates(
    approximation: Approximation, cut: Cut, per_token: int | float
) -> tuple[ActiveFeatures, Float[Tensor, "n"]]:
    """A superset of the features whose exact value reaches the choice's cut, with their approximate values.

    `cut(maxima)`: of every row, a value that enough blocks reach. By the approximation's bound the exact cut is at
    least `t − ε − u|t|`, and what exceeds that has `h̃ ≥ t − 2(ε + u|t|)` up to terms in u².
    """
    h, bound, relative = approximation
    n_layers, batch, n_features = h.shape
    size = _block_size(n_features, per_token)
    folded = h.unflatten(-1, (size, n_features // size))
    maxima = folded.amax(dim=-2).to(bound.dtype)
    cuts = cut(maxima)
    # the fourth u|t| is for u², and for the cut's own distance from t
    lowest = (cuts - 2 * bound - 4 * relative * cuts.abs()).flatten().unsqueeze(1)
    blocks = maxima.flatten(0, 1) >= lowest
    row, block = blocks.nonzero().unbind(1)
    if len(row) * size > _DENSE_CANDIDATES * h.numel():
        mask = h >= lowest.unflatten(0, (n_layers, batch))
        return active_from_mask(mask), h[mask]
    opened = folded.flatten(0, 1)[row, :, block]
    near = opened >= lowest[row]
    found, place = near.nonzero().unbind(1)
    column = place * folded.shape[-1] + block[found]
    active = active_from_pairs(row[found], column, n_layers=n_layers, batch=batch, n_features=n_features)
    return active, opened[near]


def k_per_group(
    values: Float[Tensor, "n"], group: Int[Tensor, "n"], n_groups: int, k: int
) -> tuple[Int[Tensor, "m"], Int[Tensor, "m"]]:
    """The k largest values of every group, or all where it has fewer: places and groups. `group` is ascending."""
    count = torch.bincount(group, minlength=n_groups)
    start = count.cumsum(0) - count
    place = torch.arange(len(group), device=group.device) - start[group]
    padded = values.new_full((n_groups, max(k, int(count.max()))), float("-inf"))
    padded[group, place] = values
    index = padded.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values
    real = index < count.unsqueeze(1)
    owner = torch.arange(n_groups, device=group.device).unsqueeze(1).expand_as(index)
    return (index + start.unsqueeze(1))[real], owner[real]


def k_largest(values: Float[Tensor, "n"], k: int) -> Int[Tensor, "m"]:
    """The places of the k largest values, ascending."""
    return values.topk(min(k, len(values)), sorted=False).indices.sort().values


def _block_size(n_features: int, per_token: int | float) -> int:
    """The largest power of two that leaves blocks enough for the choice to be sharp."""
    size = _LARGEST_BLOCK
    while size > 1 and (n_features % size or n_features // size < _BLOCKS_PER_CHOICE * per_token):
        size //= 2
    return size


# cuts


def cut_of_token(k: int) -> Cut:
    """TopK: of every row, the k-th largest maximum."""
    return lambda maxima: maxima.topk(min(k, maxima.shape[-1]), dim=-1, sorted=False).values.amin(dim=-1)


def cut_of_batch(k: int | float) -> Cut:
    """BatchTopK: of every layer, the (k · batch)-th largest maximum."""

    def cut(maxima: Tensor) -> Tensor:
        flat = maxima.flatten(1)
        count = min(round(k * maxima.shape[1]), flat.shape[1])
        return flat.topk(count, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True).expand(maxima.shape[:2])

    return cut


def cut_of_token_over_layers(k: int) -> Cut:
    """TopK of a cross-layer transcoder: the features of all layers of a token are ranked together."""
    return lambda maxima: cut_of_token(k)(maxima.transpose(0, 1).flatten(1)).expand(maxima.shape[:2])


def cut_of_batch_over_layers(k: int | float) -> Cut:
    """BatchTopK of a cross-layer transcoder: one ranking of all layers and tokens."""

    def cut(maxima: Tensor) -> Tensor:
        count = min(round(k * maxima.shape[1]), maxima.numel())
        return maxima.flatten().topk(count, sorted=False).values.amin().expand(maxima.shape[:2])

    return cut


def cut_at_zero() -> Cut:
    """All features above zero."""
    return lambda maxima: maxima.new_zeros(maxima.shape[:2])
