"""Decoders of low rank: what a layer's features write to later layers goes through `r` directions that they share.

    W_dec[l→l] = W_l,    W_dec[l→l'] = C_l B_{l→l'} for l' > l,    W_l [feature, d], C_l [feature, r], B_{l→l'} [r, d]

A layer's own decoder is full, so that nothing is taken from what a per-layer transcoder has; with r = (L − 1 − l) d
nothing is taken from a cross-layer one either. In training `[W_l | C_l]` is one table `[feature, 1, d + r]`, a
feature a row: sparse kernels read it at once, and processes share it out by features. B is common to all features.

The shared directions are ours. One decoder for all write layers (r = d, B diagonal) is crosslayer-coding's
`decoder_tying="per_source"` (github.com/curt-tigges/crosslayer-coding, pull request 38).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from transcoders.kernels import dense_cross_layer_decode
from transcoders.training.distributed import World

_SMALLEST_SQUARE = 1e-24
"""So that the norm of nothing has a gradient."""


def spread(
    written: Float[Tensor, "layer batch _"], W_later: Sequence[Float[Tensor, "rank _ d_model"]], *, bf16: bool = False
) -> Float[Tensor, "layer batch d_model"]:
    """From `a_l [W_l | C_l]` to what is written at every layer: a cross-layer decoder with the codes for features."""
    d_model = W_later[0].shape[2]
    own, codes = written[..., :d_model], written[:-1, :, d_model:]
    return torch.cat([own[:1], own[1:] + dense_cross_layer_decode(codes, W_later, bf16=bf16)])


def expanded(
    table: Float[Tensor, "feature 1 _"], W_later: Float[Tensor, "rank later d_model"]
) -> Float[Tensor, "feature span d_model"]:
    """The decoders of a layer's features for all layers they write to."""
    own, codes = table.split([W_later.shape[2], W_later.shape[0]], dim=2)
    return torch.cat([own, torch.einsum("fr,rld->fld", codes[:, 0], W_later)], dim=1)


def summed(
    table: Float[Tensor, "feature 1 _"], W_later: Float[Tensor, "rank later d_model"]
) -> Float[Tensor, "feature d_model"]:
    """The sum of each feature's decoders, without expanding them."""
    own, codes = table[:, 0].split([W_later.shape[2], W_later.shape[0]], dim=1)
    return own + codes @ W_later.sum(dim=1)


def stacked_norms(
    table: Float[Tensor, "feature 1 _"], W_later: Float[Tensor, "rank later d_model"]
) -> Float[Tensor, "feature"]:
    """The norm of all decoders of each feature stacked: `√(‖w‖² + c B Bᵀ cᵀ)`, at a cost of features × r²."""
    squares = (_normals(table, W_later) * table[:, 0]).sum(dim=1)
    return squares.clamp(min=_SMALLEST_SQUARE).sqrt()


@torch.no_grad()
def project_gradients(table: nn.Parameter, W_later: nn.Parameter, ranks: World) -> None:
    """The gradient of a loss of unit decoders, from that of the decoders as they are.

    With `x = [w | c]` of norm `n(x, B) = 1` the loss of `x / n` has the gradients `g − ⟨g, x⟩ [w | c B Bᵀ]` for x and
    `G − Cᵀ diag(⟨g, x⟩) C B` for B: what only scales a decoder is taken away. `ranks`: those that have other features.
    """
    assert table.grad is not None
    assert W_later.grad is not None
    along = (table.grad[:, 0] * table[:, 0]).sum(dim=1, keepdim=True)
    codes = table[:, 0, W_later.shape[2] :]
    of_maps = ranks.sum(codes.T @ (along * codes))
    table.grad[:, 0] -= along * _normals(table, W_later)
    W_later.grad -= torch.einsum("rq,qld->rld", of_maps, W_later)


def first_maps(rank: int, later: int, d_model: int, generator: torch.Generator) -> Float[Tensor, "rank later d_model"]:
    """Random orthogonal directions, so that at first a feature writes as much to later layers as its code is long."""
    drawn = torch.empty(rank, later * d_model)
    return nn.init.orthogonal_(drawn, generator=generator).unflatten(1, (later, d_model))


def _normals(
    table: Float[Tensor, "feature 1 _"], W_later: Float[Tensor, "rank later d_model"]
) -> Float[Tensor, "feature _"]:
    """`[w | c B Bᵀ]`: half the gradient of each feature's squared norm."""
    own, codes = table[:, 0].split([W_later.shape[2], W_later.shape[0]], dim=1)
    return torch.cat([own, codes @ torch.einsum("rld,qld->rq", W_later, W_later)], dim=1)
