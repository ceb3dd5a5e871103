"""ReLU bottlenecks that learn to hold more features than dimensions: a whole grid of them, trained as one."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import relu

from transcoders.errors import InputError

_ELEMENTS_AT_ONCE = 2**22
"""Values of a sample in memory at once, of all models together."""


@dataclass(frozen=True, kw_only=True)
class ToyModels:
    """`x̂ = ReLU(WᵀW x + b)` for several models at once; `x_i ~ U[0, 1]` with probability 1 − S, and 0 otherwise.

    A row `W_i` is the direction that feature i is written along: a column of W as the paper has it.

    Source: Elhage et al. 2022, *Toy Models of Superposition*.
    """

    W: Float[Tensor, "model feature d_hidden"]
    b: Float[Tensor, "model feature"]
    density: Float[Tensor, "model"]
    """1 − S: how often each feature is there."""
    importance: Float[Tensor, "model feature"]

    def __len__(self) -> int:
        return len(self.W)

    def take(self, which: Int[Tensor, "taken"]) -> "ToyModels":
        """Some of the models."""
        return ToyModels(
            W=self.W[which], b=self.b[which], density=self.density[which], importance=self.importance[which]
        )

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "model n feature"]:
        """Independent inputs, drawn from the same numbers for every model: what is dense has all that is in sparser."""
        return draw(self.density, n, self.W.shape[1], generator)

    def hidden(self, x: Float[Tensor, "model n feature"]) -> Float[Tensor, "model n d_hidden"]:
        """`h = W x`."""
        return x @ self.W

    def reconstruct(self, x: Float[Tensor, "model n feature"]) -> Float[Tensor, "model n feature"]:
        """`x̂ = ReLU(Wᵀ h + b)`."""
        return relu(self.hidden(x) @ self.W.mT + self.b[:, None])

    @torch.no_grad()
    def losses(self, n: int, generator: torch.Generator) -> Float[Tensor, "model"]:
        """`E Σ_i I_i (x_i − x̂_i)²` of each model, over `n` inputs."""
        total, left = torch.zeros_like(self.density), n
        while left > 0:
            x = self.sample(min(left, max(1, _ELEMENTS_AT_ONCE // self.b.numel())), generator)
            total += _squares(self, x).sum(dim=1)
            left -= x.shape[1]
        return total / n

    @property
    def norms(self) -> Float[Tensor, "model feature"]:
        """`‖W_i‖`: about 1 for a feature that is represented, 0 for one that is not."""
        return self.W.norm(dim=2)

    @property
    def overlaps(self) -> Float[Tensor, "model feature"]:
        """`Σ_{j≠i} (Ŵ_i · W_j)²` with `Ŵ_i = W_i / ‖W_i‖`: how far a feature shares its direction with others."""
        return (_along(self.W).square().sum(dim=2) - self.norms.square()).clamp(min=0)

    @property
    def dimensionality(self) -> Float[Tensor, "model feature"]:
        """`D_i = ‖W_i‖² / Σ_j (Ŵ_i · W_j)²`: the share of a dimension that a feature has; 0 where `W_i` is 0.

        1 is a dimension of its own, 1/2 a digon (two features along one line), 2/3 a triangle, 3/4 a tetrahedron, 2/5 a
        pentagon, 3/8 a square antiprism. `Σ_i D_i` is at most the number of dimensions, which it is where every part
        of the geometry is a tight frame.
        """
        squares = _along(self.W).square().sum(dim=2)
        return torch.where(squares > 0, self.norms.square() / squares.clamp(min=1e-30), 0)

    @property
    def dimensions_per_feature(self) -> Float[Tensor, "model"]:
        """`D* = m / ‖W‖²_F`: dimensions for each feature that is represented."""
        return self.W.shape[2] / self.W.square().sum(dim=(1, 2)).clamp(min=1e-30)


def train_toy_models(
    density: Float[Tensor, "model"],
    importance: Float[Tensor, "model feature"],
    d_hidden: int,
    *,
    steps: int = 2000,
    batch: int = 256,
    lr: float = 0.01,
    seed: int = 0,
) -> ToyModels:
    """Minimise `E Σ_i I_i (x_i − x̂_i)²` for all models in one Adam, which treats each as if it were alone.

    Weights start from Xavier's normal draw, different for every model, so rows of equal settings are different seeds;
    biases from 0. The rate falls to 0 over the second half.

    Raises `InputError` for densities that are no probabilities, importances below 0, and sizes below 1.
    """
    _check(density, importance, d_hidden, steps, batch)
    n = importance.shape[1]
    start, data = (torch.Generator(density.device).manual_seed(2 * seed + side) for side in (0, 1))
    first = torch.randn(len(density), n, d_hidden, generator=start, device=density.device)
    W = (first * (2 / (n + d_hidden)) ** 0.5).requires_grad_()
    b = torch.zeros_like(importance, requires_grad=True)
    models = ToyModels(W=W, b=b, density=density, importance=importance)
    optimiser = torch.optim.Adam([W, b], lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, 2 * (1 - step / steps)))
    for _ in range(steps):
        loss = _squares(models, models.sample(batch, data)).mean(dim=1).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return ToyModels(W=W.detach(), b=b.detach(), density=density, importance=importance)


def draw(
    density: Float[Tensor, "model"], n: int, features: int, generator: torch.Generator
) -> Float[Tensor, "model n feature"]:
    """`x = u / p` where a uniform `u` is below the density p, and 0 elsewhere: given that, `u / p` is uniform too."""
    u = torch.rand(n, features, generator=generator, device=density.device)
    p = density[:, None, None]
    return torch.where(u < p, u / p, 0)


def _squares(models: ToyModels, x: Float[Tensor, "model n feature"]) -> Float[Tensor, "model n"]:
    return ((x - models.reconstruct(x)).square() @ models.importance[:, :, None]).squeeze(2)


def _along(W: Float[Tensor, "model feature d_hidden"]) -> Float[Tensor, "model feature feature"]:
    """`Ŵ_i · W_j`."""
    return W / W.norm(dim=2, keepdim=True).clamp(min=1e-30) @ W.mT


def _check(density: Tensor, importance: Tensor, d_hidden: int, steps: int, batch: int) -> None:
    for name, count in (("models", len(density)), ("features", importance.shape[1]), ("d_hidden", d_hidden),
                        ("steps", steps), ("batch", batch)):  # fmt: skip
        if count < 1:
            raise InputError(f"{name} must be at least 1; got {count}.")
    if not ((density > 0) & (density <= 1)).all():
        wrong = density[~((density > 0) & (density <= 1))][0]
        raise InputError(
            f"density is the probability 1 − S that a feature is there, above 0, at most 1; got {wrong:g}."
        )
    if not (importance >= 0).all():
        raise InputError(f"importance must be at least 0; got {importance.min():g}.")
