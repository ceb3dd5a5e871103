"""What is minimised. All tensors are normalised: a layer's writes have variance one per coordinate."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transcoders.dictionaries import JumpReLU, ReLU, TopK
from transcoders.training.config import TrainConfig
from transcoders.training.trainee import Trainee


class Losses(NamedTuple):
    """The parts of the loss, and what they were computed from."""

    total: Float[Tensor, ""]
    fvu: Float[Tensor, "layer"]
    """Mean squared error over the variance of the target."""
    sparsity: Float[Tensor, ""]
    revival: Float[Tensor, ""]
    active: Bool[Tensor, "layer batch feature"]


def losses(
    trainee: Trainee,
    reads: Float[Tensor, "layer batch d_model"],
    writes: Float[Tensor, "layer batch d_model"],
    config: TrainConfig,
    *,
    sparsity_weight: float,
    dead: Bool[Tensor, "layer feature"],
) -> Losses:
    """`mean_l ‖y_l − ŷ_l‖² / d + λ · sparsity + revival`, averaged over the batch."""
    h = trainee.pre_activations(reads)
    a = trainee.activate(h)
    error = writes - trainee.reconstruct(a, reads)
    fvu = error.square().mean(dim=(1, 2))
    sparsity = sparsity_penalty(trainee, a, config)
    revival = config.revival * revival_loss(trainee, h, error.detach(), dead, config) if dead.any() else h.new_zeros(())
    return Losses(
        fvu.mean() + sparsity_weight * sparsity + revival, fvu.detach(), sparsity.detach(), revival.detach(), a > 0
    )


def sparsity_penalty(
    trainee: Trainee, a: Float[Tensor, "layer batch feature"], config: TrainConfig
) -> Float[Tensor, ""]:
    """Sum over the features of a layer, mean over layers and tokens; the decoder norm makes it blind to rescaling.

    ReLU: `Σ a ‖W_dec‖ / √d`. JumpReLU: `Σ tanh(c · a ‖W_dec‖ / √d)`. TopK: none. A write's norm is about √d here, so
    the argument is the share of the target that a feature writes.
    """
    if isinstance(trainee.activation, TopK):
        return a.new_zeros(())
    share = a * (trainee.decoder_norms() / a.new_tensor(trainee.b_dec.shape[1]).sqrt()).unsqueeze(1)
    penalty = torch.tanh(config.tanh_scale * share) if isinstance(trainee.activation, JumpReLU) else share
    return penalty.sum(dim=-1).mean()


def revival_loss(
    trainee: Trainee,
    h: Float[Tensor, "layer batch feature"],
    error: Float[Tensor, "layer batch d_model"],
    dead: Bool[Tensor, "layer feature"],
    config: TrainConfig,
) -> Float[Tensor, ""]:
    """A gradient for latents that never fire.

    TopK: AuxK (Gao et al. 2024, appendix A.2). Of the dead latents the `k_aux` with the largest pre-activation predict
    the residual; a departure: no ReLU after the choice, since a dead latent's pre-activation is often negative and
    would have no gradient. ReLU, JumpReLU: `Σ_dead relu(θ − h) ‖W_dec‖ / √d`, as in Anthropic's January 2025 update.
    """
    if isinstance(trainee.activation, TopK):
        masked = h.masked_fill(~dead.unsqueeze(1), float("-inf"))
        value, index = masked.topk(min(config.k_aux, h.shape[-1]), dim=-1, sorted=False)
        aux = torch.zeros_like(h).scatter(-1, index, value.masked_fill(value == float("-inf"), 0.0))
        return (error - trainee.decode(aux)).square().sum() / error.square().sum()
    threshold = trainee.activation.threshold.detach() if isinstance(trainee.activation, JumpReLU) else h.new_zeros(())
    assert isinstance(trainee.activation, JumpReLU | ReLU)
    gap = torch.relu(threshold.unsqueeze(1) - h if threshold.ndim else threshold - h)
    pull = gap * (dead * trainee.decoder_norms().detach()).unsqueeze(1)
    return pull.sum(dim=-1).mean() / trainee.b_dec.shape[1] ** 0.5
