"""Norms of one token's vector that some dictionaries put before their encoder and take back after their decoder."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.errors import DictionaryError

TokenNormName = Literal["rescale", "layer_norm"]
_EPS = 1e-5


class TokenNorm:
    """`x ↦ (x − shift) / (scale + ε)` of each token, and back, `y ↦ y · scale + shift`.

    `rescale`: shift 0, scale `‖x‖ / √d`, ε = 0 (SAELens' `constant_norm_rescale`).
    `layer_norm`: shift `mean(x)`, scale `std(x)`, the standard deviation with Bessel's correction, ε = 1e−5, which the
    way back leaves out (Gao et al. 2024, and SAELens).
    """

    def __init__(self, name: TokenNormName) -> None:
        if name not in get_args(TokenNormName):
            raise DictionaryError(
                f"Unknown norm of a token {name!r}; the norms are {', '.join(get_args(TokenNormName))}."
            )
        self.name = name

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        shift, scale = self._statistics(x)
        return (x - shift) / (scale + (_EPS if self.name == "layer_norm" else 0))

    def inverse(
        self, y: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        """`y` in the units of the token's own vector `x`."""
        shift, scale = self._statistics(x)
        return y * scale + shift

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.name == "rescale":
            return torch.zeros_like(x[..., :1]), x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return x.mean(-1, keepdim=True), x.std(-1, keepdim=True)

    def __repr__(self) -> str:
        return f"TokenNorm({self.name!r})"
