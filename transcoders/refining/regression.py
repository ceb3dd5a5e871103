"""Ridge regression of vectors on vectors from sums over tokens: any ridge and any rank, after one pass over the data.

Notation: inputs x and outputs e of n tokens, `S = Σ (x − x̄)(x − x̄)ᵀ`, `C = Σ (x − x̄)(e − ē)ᵀ`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class AffineMap(NamedTuple):
    """`x ↦ x W + b`."""

    W: Float[Tensor, "d_in d_out"]
    b: Float[Tensor, "d_out"]


class Moments:
    """Sums over tokens that a regression of e on x needs, in float64; they take `d_in (d_in + d_out)` numbers.

    Everything is summed less the first batch's means, so that large means cost no digits.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        self.n = 0
        self.squares = 0.0
        self._shift_x, self._x = _zeros(d_in), _zeros(d_in)
        self._shift_e, self._e = _zeros(d_out), _zeros(d_out)
        self._xx, self._xe = _zeros(d_in, d_in), _zeros(d_in, d_out)

    def add(self, x: Float[Tensor, "token d_in"], e: Float[Tensor, "token d_out"]) -> None:
        """Products are taken in the precision and on the device of the batch."""
        if not len(x):
            return
        if self.n == 0:
            self._shift_x, self._shift_e = (side.mean(dim=0).cpu().double() for side in (x, e))
        x, e = x - self._shift_x.to(x), e - self._shift_e.to(e)
        self.n += len(x)
        self.squares += float(e.double().square().sum() if e.device.type != "mps" else e.square().sum())
        self._x += _sum(x)
        self._e += _sum(e)
        self._xx += (x.T @ x).cpu()
        self._xe += (x.T @ e).cpu()

    @property
    def means(self) -> tuple[Float[Tensor, "d_in"], Float[Tensor, "d_out"]]:
        """x̄ and ē."""
        return self._shift_x + self._x / self.n, self._shift_e + self._e / self.n

    @property
    def centred(self) -> tuple[Float[Tensor, "d_in d_in"], Float[Tensor, "d_in d_out"]]:
        """S and C."""
        mean = self._x / self.n
        return self._xx - self.n * torch.outer(mean, mean), self._xe - torch.outer(mean, self._e)

    def squared_error(self, fit: AffineMap) -> float:
        """`Σ ‖e − x W − b‖²`."""
        W, b = fit.W.double().cpu(), fit.b.double().cpu()
        b = b + self._shift_x @ W - self._shift_e
        error = self.squares - 2 * (W * self._xe).sum() + (W * (self._xx @ W)).sum()
        return float(error + self.n * b.square().sum() + 2 * b @ (self._x @ W - self._e))


class RidgeRegression:
    """The maps that minimise `Σ ‖e − x W − b‖² + λ ‖W‖²`, of which no token is held."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments
        S, self._C = moments.centred
        values, self._axes = torch.linalg.eigh(S)
        self._values = values.clamp(min=0)
        self._along = self._axes.T @ self._C

    def fit(self, ridge: float, rank: int | None = None) -> AffineMap:
        """`W = (S + λ)⁻¹ C` with λ = `ridge` · tr(S) / d, and the b that makes the mean error zero.

        With a rank r, of all W of that rank the one of the least objective: `W V Vᵀ`, where V are the r leading right
        singular vectors of `(S + λ)^½ W`, the eigenvectors of `Wᵀ C`.

        Source: Izenman 1975, *Reduced-rank regression for the multivariate linear model*; with a ridge Mukherjee & Zhu
        2011, *Reduced rank ridge regression and its kernel extensions*.
        """
        shrunk = self._values + ridge * self._values.mean()
        known = shrunk > len(shrunk) * torch.finfo(torch.float64).eps * shrunk.max()
        W = self._axes @ (self._along * torch.where(known, 1 / shrunk, 0.0)[:, None])
        if rank is not None and rank < min(W.shape):
            leading = torch.linalg.eigh(W.T @ self._C).eigenvectors[:, W.shape[1] - rank :]
            W = W @ leading @ leading.T
        x, e = self.moments.means
        return AffineMap(W, e - x @ W)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _sum(x: Float[Tensor, "token d"]) -> Float[Tensor, "d"]:
    return x.sum(dim=0).cpu().double()
