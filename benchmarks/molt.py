"""A mixture of linear transforms, to be measured beside transcoders: `y = Σ_t a_t (x V_t) U_t + b`.

`a = TopK(relu(x E + c))`, so that a transform of rank r answers changes in r directions where a feature answers in one.
Source: Anthropic 2025, *Sparse mixtures of linear transforms* (Transformer Circuits, updates).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from transcoders.dictionaries import TopK
from transcoders.training.config import TranscoderConfig
from transcoders.training.derivative import Directions
from transcoders.training.sparsity import learning_rate


class Mixture(nn.Module):
    """On normalised activations of one layer."""

    def __init__(self, d_model: int, transforms: int, rank: int, k: int, first: Float[Tensor, "token d_model"]) -> None:
        """`first`: reads from which the gates' biases are taken, so that they are centred."""
        super().__init__()
        generator, n = torch.Generator().manual_seed(0), transforms * rank
        self.rank, self.gate = rank, TopK(k)
        drawn = torch.randn(d_model, 2, n, generator=generator) / d_model**0.5
        self.E = nn.Parameter(torch.randn(d_model, transforms, generator=generator) / d_model**0.5)
        self.c = nn.Parameter(-(first @ self.E.detach()).mean(dim=0))
        self.V, self.U = nn.Parameter(drawn[:, 0].clone()), nn.Parameter(0.1 * drawn[:, 1].T.clone())
        self.b = nn.Parameter(torch.zeros(d_model))

    def gates(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token transform"]:
        return self.gate(x @ self.E + self.c)

    def forward(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        return self._spread(self.gates(x)) * (x @ self.V) @ self.U + self.b

    def passed_on(
        self, x: Float[Tensor, "token d_model"], v: Float[Tensor, "token d_model"]
    ) -> Float[Tensor, "token d_model"]:
        """J v with the open gates held open."""
        a = self.gates(x)
        moved = torch.where(a > 0, v @ self.E, 0.0)
        return (self._spread(a) * (v @ self.V) + self._spread(moved) * (x @ self.V)) @ self.U

    def _spread(self, gates: Float[Tensor, "token transform"]) -> Float[Tensor, "token _"]:
        return gates.repeat_interleave(self.rank, dim=-1)

    def loss(self, x: Tensor, y: Tensor, given: Directions | None, weight: float) -> Float[Tensor, ""]:
        """As a transcoder's: mean squared error, and the relative one of what is passed on."""
        total = (y - self(x)).square().mean()
        if given is None:
            return total
        size = given.responses[0].square().sum(-1)
        missed = (self.passed_on(given.reads[0], given.changes[0]) - given.responses[0]).square().sum(-1)
        reached = size > 1e-6 * size.median()
        return total + weight * (missed[reached] / size[reached]).mean()


def trainer(mixture: Mixture, config: TranscoderConfig) -> torch.optim.Adam:
    return torch.optim.Adam(mixture.parameters(), lr=config.lr_used, betas=config.betas, fused=True)


def step(
    mixture: Mixture, optimizer: torch.optim.Adam, config: TranscoderConfig, number: int, loss: Float[Tensor, ""]
) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(mixture.parameters(), config.clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, number)
    optimizer.step()
