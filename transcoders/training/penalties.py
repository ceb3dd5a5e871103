"""What makes features sparse: one function for each penalty.

`sparsity_penalty` is the sum over the features of a layer, averaged over layers and tokens. `share = a ‖W_dec‖ / √d` is
the part of the target that a feature writes: in training a write's norm is about √d. Where decoders have norm one their
norm is left out, and its gradient with it.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.dictionaries import JumpReLU
from transcoders.training.activations import Gated
from transcoders.training.codes import Code
from transcoders.training.config import TrainConfig
from transcoders.training.trainee import Trainee

P_SMALLEST = 1e-3
"""Shares are shifted by this much under a power below one, whose slope at zero would be infinite."""


def sparsity_penalty(trainee: Trainee, code: Code, config: TrainConfig, *, p: float = 1.0) -> Float[Tensor, ""]:
    """The penalty that `config` names; zero for TopK and BatchTopK."""
    penalty = config.penalty_used
    if penalty is None:
        return code.a.new_zeros(())
    if penalty == "l0":
        return l0(code, trainee.activation, config.penalty_bandwidth or config.bandwidth)
    share = shares(trainee, code, torch.relu(code.h) if isinstance(trainee.activation, Gated) else code.a)
    if penalty == "tanh":
        return code.mean(tanh(share, config.tanh_scale))
    return code.mean(p_norm(share, p) if penalty == "p_anneal" else share)


def shares(trainee: Trainee, code: Code, a: Tensor) -> Tensor:
    """`a ‖W_dec‖ / √d`, blind to a feature's scale; `a / √d` for unit decoders.

    Their sum is the L1 penalty; of a gated dictionary with `relu(π)` for a. Source: with unit decoders Bricken et al.
    2023, *Towards Monosemanticity*; with `a ‖W_dec‖` Conerly et al. 2024, *Update on how we train SAEs* (Anthropic,
    April 2024).
    """
    root = trainee.b_dec.shape[1] ** 0.5
    return a / root if trainee.unit_decoders else a * code.of_feature(trainee.decoder_norms() / root)


def tanh(share: Tensor, scale: float) -> Tensor:
    """c · share through tanh: about one where a feature is active, and with a gradient for its activation.

    Source: Ameisen et al. 2025, *Circuit Tracing*, appendix on the CLT's loss; Anthropic's January 2025 update.
    """
    return torch.tanh(scale * share)


def l0(code: Code, activation: torch.nn.Module, bandwidth: float) -> Float[Tensor, ""]:
    """Σ 1[h > θ], through which only thresholds get a gradient, in a rectangle of width `bandwidth`.

    Source: Rajamanoharan et al. 2024, *Jumping Ahead*, eq. 9 and 12.
    """
    assert isinstance(activation, JumpReLU)
    return code.mean(code.steps(activation.threshold, bandwidth))


def p_norm(share: Tensor, p: float) -> Tensor:
    """(share + ε)^p − ε^p, with p falling from one towards zero, from L1 to L0. At p = 1 it is `share`.

    Source: Karvonen et al. 2024, *Measuring Progress in Dictionary Learning for Language Model Interpretability with
    Board Game Models*, section 4 (p-annealing). The shift by ε is a departure.
    """
    return (share + P_SMALLEST) ** p - P_SMALLEST**p
