"""TopK and BatchTopK of pre-activations that are on a device: nothing here is read by the host.

On a GPU by radix selection in Triton (`selection_gpu`), which reads each pre-activation from memory once for a row that
stays in the cache and once per digit of the ranking of a whole batch; on other devices by torch's sorts. Equal values
are taken in the order of features, then of tokens, so that exactly k are.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@torch.no_grad()
def largest_of_rows(h: Float[Tensor, "row n"], k: int) -> tuple[Float[Tensor, "row k_or_n"], Int[Tensor, "row k_or_n"]]:
    """The k largest values of every row, all where there are no more, and their places in ascending order."""
    order = h.sort(dim=1, descending=True, stable=True).indices[:, :k]
    index = order.sort(dim=1).values
    return h.gather(1, index), index


@torch.no_grad()
def largest_of_groups(
    h: Float[Tensor, "layer batch feature"], count: int
) -> tuple[Float[Tensor, "layer count"], Int[Tensor, "layer count"]]:
    """The `count` largest values of every layer, and their places `token · feature + feature`, ascending."""
    return largest_of_rows(h.flatten(1), count)


@torch.no_grad()
def kth_of_groups(h: Float[Tensor, "group n"], count: int) -> Float[Tensor, "group"]:
    """The `count`-th largest value of every group, the smallest where it has fewer."""
    return h.topk(min(count, h.shape[1]), dim=1, sorted=False).values.amin(dim=1)


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
    rows = h.transpose(0, 1).flatten(1) if over_layers else h.flatten(0, 1)
    value, index = largest_of_rows(rows, k)
    a = torch.zeros_like(rows).scatter_(1, index, torch.relu(value))
    if over_layers:
        return a.unflatten(1, (h.shape[0], -1)).transpose(0, 1).contiguous()
    return a.view_as(h)


def _keep_all(h: Tensor, count: int, over_layers: bool) -> Tensor:
    cut = kth_of_groups(h.reshape(1 if over_layers else len(h), -1), count)
    return h * (h >= cut.view(-1, 1, 1)).logical_and_(h > 0)
