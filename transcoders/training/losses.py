"""The loss of a stack of layers on a batch of normalised activations: reconstruction, sparsity, revival."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transcoders.training.codes import Code, DenseCode, SparseCode
from transcoders.training.config import TrainConfig
from transcoders.training.parameters import Gated, TrainingParameters
from transcoders.training.revival import revival_loss
from transcoders.training.sparsity import sparsity_penalty


class Losses(NamedTuple):
    """The parts of the loss, and what they were computed from."""

    total: Float[Tensor, ""]
    fvu: Float[Tensor, "layer"]
    """Mean squared error over the variance of the target."""
    sparsity: Float[Tensor, ""]
    revival: Float[Tensor, ""]
    code: Code
    error: Float[Tensor, "layer batch d_model"]
    """Target minus reconstruction."""


def losses(
    weights: TrainingParameters,
    reads: Float[Tensor, "layer batch d_model"],
    writes: Float[Tensor, "layer batch d_model"],
    config: TrainConfig,
    *,
    sparsity_weight: float,
    dead: Bool[Tensor, "layer feature"] | None,
    p: float = 1.0,
    sparse: bool = False,
) -> Losses:
    """`mean_l ‖y_l − ŷ_l‖² / d + λ · sparsity + revival`, averaged over the batch.

    With prefixes (Matryoshka), the first term is the mean over them. `dead`: latents to be revived by an auxiliary
    loss. `p`: the exponent of an annealed penalty. `sparse`: whether only active features are touched; the loss and
    its gradients are the same.
    """
    code = SparseCode.of(weights, reads, config.margin) if sparse else DenseCode.of(weights, reads)
    target = writes - weights.base(reads)
    errors = _prefix_errors(weights, target, code, config.prefixes)
    fvu = torch.stack([error.square().mean(dim=(1, 2)) for error in errors])
    sparsity = sparsity_penalty(weights, code, config, p=p)
    total = fvu.mean() + sparsity_weight * sparsity
    if isinstance(weights.activation, Gated):
        total = total + _gate_loss(weights, code, writes, reads)
    error = errors[-1].detach()
    revival = fvu.new_zeros(())
    if dead is not None and bool(dead.any()):
        revival = config.revival * revival_loss(weights, code, reads, error, dead, config)
    return Losses(total + revival, fvu[-1].detach(), sparsity.detach(), revival.detach(), code, error)


def _prefix_errors(
    weights: TrainingParameters, target: Float[Tensor, "layer batch d_model"], code: Code, prefixes: tuple[int, ...]
) -> list[Float[Tensor, "layer batch d_model"]]:
    """What the first features leave of the target, for each of the prefixes; costs as much as the last one alone.

    Source: Bussmann et al. 2025, *Learning Multi-Level Features with Matryoshka Sparse Autoencoders*, eq. 6.
    """
    errors: list[Tensor] = []
    for first, last in zip((0, *prefixes), prefixes, strict=False):
        target = target - code.decode(weights, first, last)
        errors.append(target)
    return errors


def _gate_loss(
    weights: TrainingParameters,
    code: Code,
    writes: Float[Tensor, "layer batch d_model"],
    reads: Float[Tensor, "layer batch d_model"],
) -> Float[Tensor, ""]:
    """`‖y − relu(π) W_dec − b_dec‖² / d` with a decoder that gets no gradient from it: how the gate learns.

    Source: Rajamanoharan et al. 2024, *Improving Dictionary Learning with Gated Sparse Autoencoders*, eq. 8.
    """
    return (writes - weights.base(reads, frozen=True) - code.decode_gate(weights)).square().mean()
