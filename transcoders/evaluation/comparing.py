"""The next-token distributions of a model with something replaced against the original's, at a few positions at once.

Terms are in the model's precision (float32 at least), sums over the vocabulary and over tokens in float64.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

NO_TOKEN = -1
"""The target of a position that no token follows."""


@dataclass
class Sums:
    """Over tokens."""

    loss: float = 0.0
    """Cross-entropy of the tokens that follow."""
    agreeing: int = 0
    """Positions where the likeliest next token is the original's."""
    kl: float = 0.0
    """KL(original ‖ replaced)."""

    def __iadd__(self, other: "Sums") -> "Sums":
        self.loss += other.loss
        self.agreeing += other.agreeing
        self.kl += other.kl
        return self


class Original:
    """The original's logits x at some positions, with what comparisons need of them."""

    def __init__(self, logits: Float[Tensor, "token d_vocab"], targets: Int[Tensor, "token"]) -> None:
        """`targets`: the tokens that follow, or `NO_TOKEN`."""
        self.x, self.targets = _wide(logits), targets
        self._weights, self._log_sum = _exponentials(self.x)
        self._weight_sum = self._weights.sum(-1, dtype=torch.float64)
        self._top = self.x.argmax(-1)

    @property
    def loss(self) -> float:
        """Its own cross-entropy, summed."""
        return self._loss(self.x, self._log_sum)

    def loss_of(self, logits: Float[Tensor, "token d_vocab"]) -> float:
        """The cross-entropy of other logits, summed."""
        y = _wide(logits)
        return self._loss(y, _exponentials(y)[1])

    def against(self, logits: Float[Tensor, "token d_vocab"]) -> Sums:
        """Other logits y: `KL = Σ p (x − y) + log Σ exp y − log Σ exp x` with `p ∝ exp x`."""
        y = _wide(logits)
        _, log_sum = _exponentials(y)
        loss, agreeing = self._loss(y, log_sum), int((y.argmax(-1) == self._top).sum())
        difference = (self.x - y).mul_(self._weights).sum(-1, dtype=torch.float64) / self._weight_sum
        return Sums(loss, agreeing, float((difference + log_sum - self._log_sum).sum()))

    def _loss(self, y: Float[Tensor, "token d_vocab"], log_sum: Float[Tensor, "token"]) -> float:
        followed = self.targets != NO_TOKEN
        at_target = y.gather(1, self.targets.clamp(min=0)[:, None])[:, 0].double()
        return float((log_sum - at_target)[followed].sum())


def next_tokens(rows: Int[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
    """What follows each position of each row."""
    return torch.cat([rows[:, 1:], torch.full_like(rows[:, :1], NO_TOKEN)], dim=1).long()


def _wide(logits: Float[Tensor, "token d_vocab"]) -> Float[Tensor, "token d_vocab"]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _exponentials(x: Float[Tensor, "token d_vocab"]) -> tuple[Float[Tensor, "token d_vocab"], Float[Tensor, "token"]]:
    """`exp(x − max x)`, and `log Σ exp x`."""
    top = x.amax(-1, keepdim=True)
    weights = (x - top).exp_()
    return weights, weights.sum(-1, dtype=torch.float64).log() + top[:, 0].double()
