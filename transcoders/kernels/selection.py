"""Choosing the active features: the largest of a token, of a batch, or all above a cut.

A cheap bound first: the features are folded into blocks, and since the k largest blocks contain k features at least as
large as the k-th block's maximum, nothing below that maximum is among the k largest. Only blocks that reach it are
opened; what is found there (a little more than k) is computed exactly, and the exact values decide.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.kernels.active import ActiveFeatures, active_from_mask, active_from_pairs
from transcoders.kernels.approximate import Approximation

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
