"""The loss of a stack of layers on a batch of normalised activations: reconstruction, sparsity, revival."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transcoders.kernels import host
from transcoders.training.activations import Gated
from transcoders.training.codes import Code, DenseCode, SparseCode
from transcoders.training.config import MLPConfig, TrainConfig
from transcoders.training.parameters import TrainingParameters
from transcoders.training.revival import revival_loss
from transcoders.training.sparsity import sparsity_penalty
from transcoders.training.split import WHOLE, Split


class Losses(NamedTuple):
    """The parts of the loss, and what they were computed from.

    Where ranks share the tokens, all but `total` are of this rank's own; the `total` of all ranks add up to the loss.
    """

    total: Float[Tensor, ""]
    fvu: Float[Tensor, "layer"]
    """Mean squared error over the variance of the target."""
    sparsity: Float[Tensor, ""]
    revival: Float[Tensor, ""]
    code: Code
    error: Float[Tensor, "layer batch d_model"]
    """Target minus reconstruction."""
    derivative: Float[Tensor, "layer"] | None = None
    """Relative squared error of what is passed on of small changes, where these are compared."""


def losses(
    weights: TrainingParameters,
    reads: Float[Tensor, "layer batch d_model"],
    writes: Float[Tensor, "layer batch d_model"],
    config: TrainConfig,
    *,
    sparsity_weight: float | Float[Tensor, ""],
    dead: Bool[Tensor, "layer feature"] | None,
    p: float = 1.0,
    sparse: bool = False,
    split: Split = WHOLE,
) -> Losses:
    """`mean_l ‖y_l − ŷ_l‖² / d + λ · sparsity + revival (+ ‖W_skip‖² / d)`, averaged over the batch.

    With prefixes (Matryoshka), the first term is the mean over them, or their sum. `dead`: latents to be revived by a
    loss of their own. `p`: the exponent of an annealed penalty. `sparse`: whether only active features are touched; the
    loss and its gradients are the same. `split`: what of the batch, or of its features, is with this rank.
    """
    share = split.share_of(reads.shape[1], config.batch)
    if sparse:
        code = SparseCode.of(weights, reads, config.margin, split, config.batch)
    else:
        code = DenseCode.of(weights, reads, split, config.batch)
    target = writes - weights.base(reads)
    errors = _prefix_errors(weights, target, code, config, split)
    fvu = torch.stack([error.square().mean(dim=(1, 2)) for error in errors])
    sparsity = split.features.total(sparsity_penalty(weights, code, config, p=p))
    reconstruction = fvu.sum(dim=0).mean() if config.matryoshka_loss == "sum" else fvu.mean()
    total = reconstruction + sparsity_weight * sparsity
    if isinstance(config, MLPConfig) and config.skip_penalty and (past := weights.skip_map()) is not None:
        total = total + config.skip_penalty * past.square().sum(dim=2).mean()
    if isinstance(weights.activation, Gated):
        total = total + _gate_loss(weights, code, writes, reads, split)
    error = errors[-1].detach()
    revival = fvu.new_zeros(())
    masked = host.queued(error) and split.features.size == 1
    if dead is not None and (masked or bool(split.features.any(dead.any()))):
        weight = 1.0 if config.remedy_used == "ghost" else config.revival  # a ghost's loss has its own size
        revival = weight * revival_loss(weights, code, reads, error, dead, config, split)
    return Losses(share * total + revival, fvu[-1].detach(), sparsity.detach(), revival.detach(), code, error)


def _prefix_errors(
    weights: TrainingParameters,
    target: Float[Tensor, "layer batch d_model"],
    code: Code,
    config: TrainConfig,
    split: Split,
) -> list[Float[Tensor, "layer batch d_model"]]:
    """What the first features leave of the target, for each of the prefixes; costs as much as the last one alone.

    Source: Bussmann et al. 2025, *Learning Multi-Level Features with Matryoshka Sparse Autoencoders*, eq. 6.
    """
    errors: list[Tensor] = []
    own = split.features_of(config.features)
    for first, last in zip((0, *config.prefixes), config.prefixes, strict=False):
        first, last = (min(max(at, own.start), own.stop) - own.start for at in (first, last))
        target = target - split.features.total(code.decode(weights, first, last))
        errors.append(target)
    return errors


def _gate_loss(
    weights: TrainingParameters,
    code: Code,
    writes: Float[Tensor, "layer batch d_model"],
    reads: Float[Tensor, "layer batch d_model"],
    split: Split,
) -> Float[Tensor, ""]:
    """`‖y − relu(π) W_dec − b_dec‖² / d` with a decoder that gets no gradient from it: how the gate learns.

    Source: Rajamanoharan et al. 2024, *Improving Dictionary Learning with Gated Sparse Autoencoders*, eq. 8.
    """
    written = split.features.total(code.decode_gate(weights))
    return (writes - weights.base(reads, frozen=True) - written).square().mean()
