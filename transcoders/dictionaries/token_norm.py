"""Norms of one token's vector that some dictionaries put before their encoder and take back after their decoder."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.errors import DictionaryError

TokenNormName = Literal["rescale", "layer_norm", "centre", "rescale_in", "layer_norm_in"]
_EPS = 1e-5


class TokenNorm:
    """`x ↦ (x − shift) / scale` of each token before the encoder, and `y ↦ y · size + shift` after the decoder.

    | name | shift | scale | size |
    |---|---|---|---|
    | `rescale` | 0 | ‖x‖ / √d | the same |
    | `layer_norm` | mean(x) | std(x) + 1e−5 | std(x) |
    | `centre` | mean(x) | 1 | 1 |

    The standard deviation is that with Bessel's correction. `rescale_in` and `layer_norm_in` are not taken back: what
    is decoded is in the model's units. Source: Gao et al. 2024, *Scaling and Evaluating Sparse Autoencoders*, and
    SAELens, whose names are `constant_norm_rescale` and `layer_norm`; `centre` is TransformerLens' centring of
    whatever is written to the residual stream.
    """

    def __init__(self, name: TokenNormName) -> None:
        if name not in get_args(TokenNormName):
            raise DictionaryError(
                f"Unknown norm of a token {name!r}; the norms are {', '.join(get_args(TokenNormName))}."
            )
        self.name = name

    @property
    def is_undone(self) -> bool:
        """Whether it is taken back after the decoder."""
        return not self.name.endswith("_in")

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        shift, scale, _ = self._statistics(x)
        return (x - shift) / scale

    def inverse(
        self, y: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        """`y` in the units of the token's own vector `x`."""
        shift, _, size = self._statistics(x)
        return y * size + shift

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.name.startswith("rescale"):
            scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
            return torch.zeros_like(scale), scale, scale
        mean = x.mean(-1, keepdim=True)
        if self.name == "centre":
            return mean, torch.ones_like(mean), torch.ones_like(mean)
        std = x.std(-1, keepdim=True)
        return mean, std + _EPS, std

    def __repr__(self) -> str:
        return f"TokenNorm({self.name!r})"
