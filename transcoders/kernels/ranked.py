"""TopK and BatchTopK of pre-activations that are on a device: nothing here is read by the host.

On a GPU by radix selection in Triton (`selection_gpu`), on other devices by torch's sorts. Of equal values the first
features are listed or kept, so that there are exactly k; BatchTopK's dense form keeps all that equal the last one.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@torch.no_grad()
def largest_of_rows(h: Float[Tensor, "row n"], k: int) -> tuple[Float[Tensor, "row k_or_n"], Int[Tensor, "row k_or_n"]]:
    """The k largest values of every row, all where there are no more, and their places in ascending order."""
    k = min(k, h.shape[1])
    if (kernels := _kernels(h)) is not None:
        return kernels.rows_listed(h, k)
    index = h.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    return h.gather(1, index), index


@torch.no_grad()
def largest_of_tokens(
    h: Float[Tensor, "layer batch feature"], k: int
) -> tuple[Float[Tensor, "batch k_or_n"], Int[Tensor, "batch k_or_n"]]:
    """The k largest values of every token in all layers; their places `layer · n_features + feature`, ascending."""
    if (kernels := _kernels(h)) is not None:
        return kernels.tokens_listed(h, min(k, h[:, 0].numel()))
    return largest_of_rows(h.transpose(0, 1).flatten(1), k)


@torch.no_grad()
def largest_of_groups(
    h: Float[Tensor, "layer batch feature"], count: int
) -> tuple[Float[Tensor, "layer count"], Int[Tensor, "layer count"]]:
    """The `count` largest values of every layer, and their places `token · n_features + feature`, ascending."""
    if (kernels := _kernels(h)) is not None:
        return kernels.groups_listed(h.flatten(1), min(count, h[0].numel()))
    return largest_of_rows(h.flatten(1), count)


def keep_of_rows(
    h: Float[Tensor, "layer batch feature"], k: int, *, over_layers: bool = False
) -> Float[Tensor, "layer batch feature"]:
    """TopK: `max(h, 0)` for the k largest of a token's features in a layer, or in all layers; 0 for the rest."""
    a = _Kept.apply(h, _keep_rows, k, over_layers)
    assert isinstance(a, Tensor)
    return a


def keep_of_all(
    h: Float[Tensor, "layer batch feature"], count: int, *, over_layers: bool = False
) -> Float[Tensor, "layer batch feature"]:
    """BatchTopK: `max(h, 0)` where h is at least the `count`-th largest of a layer, or of all; 0 for the rest."""
    a = _Kept.apply(h, _keep_all, count, over_layers)
    assert isinstance(a, Tensor)
    return a


class _Kept(torch.autograd.Function):
    """`a = h` where it is kept; the gradient passes where a is positive."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, keep: Any, count: int, over_layers: bool) -> Tensor:
        a = keep(h, count, over_layers)
        ctx.save_for_backward(a)
        return a

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,), (a,) = grad_outputs, ctx.saved_tensors
        return grad * (a > 0), None, None, None


def _keep_rows(h: Tensor, k: int, over_layers: bool) -> Tensor:
    if (kernels := _kernels(h)) is not None:
        return kernels.rows_kept(h, k, over_layers=over_layers)
    rows = h.transpose(0, 1).flatten(1) if over_layers else h.flatten(0, 1)
    value, index = largest_of_rows(rows, k)
    a = torch.zeros_like(rows).scatter_(1, index, torch.relu(value))
    if over_layers:
        return a.unflatten(1, (h.shape[0], -1)).transpose(0, 1).contiguous()
    return a.view_as(h)


def _keep_all(h: Tensor, count: int, over_layers: bool) -> Tensor:
    groups = h.reshape(1 if over_layers else len(h), -1)
    count = min(count, groups.shape[1])
    if (kernels := _kernels(h)) is not None:
        return kernels.groups_kept(groups, count).view_as(h)
    cut = groups.topk(count, dim=1, sorted=False).values.amin(dim=1)
    return h * (h >= cut.view(-1, 1, 1)).logical_and_(h > 0)


def _kernels(h: Tensor) -> Any:
    """Those of Triton on a GPU; None elsewhere."""
    if not h.is_cuda:
        return None
    from transcoders.kernels import selection_gpu  # here: triton comes with torch's CUDA builds only

    return selection_gpu
