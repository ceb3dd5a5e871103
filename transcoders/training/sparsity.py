"""How sparse, and how fast: rates as functions of the step, one function for each penalty, and what steers its weight.

`sparsity_penalty` is the sum over the features of a layer, averaged over layers and tokens. `share = a ‖W_dec‖ / √d` is
the part of the target that a feature writes: in training a write's norm is about √d. Where decoders have norm one their
norm is left out, and its gradient with it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.dictionaries import JumpReLU
from transcoders.training.activations import Gated
from transcoders.training.codes import Code
from transcoders.training.config import TrainConfig
from transcoders.training.parameters import TrainingParameters


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, plateau, linear decay to zero."""
    up = (step + 1) / max(1, round(config.warmup * config.steps))
    down = (config.steps - step) / max(1, round(config.decay * config.steps))
    return config.lr_used * min(1.0, up, down)


def sparsity_weight(config: TrainConfig, step: int) -> float:
    """Linear warm-up of the sparsity penalty, then constant."""
    return config.sparsity * min(1.0, (step + 1) / max(1, round(config.sparsity_warmup * config.steps)))


def falling(config: TrainConfig, step: int, first: float) -> float:
    """A factor that falls from `first` to one during the sparsity warm-up, evenly in its logarithm."""
    left = max(0.0, 1 - (step + 1) / max(1.0, config.sparsity_warmup * config.steps))
    return first**left


P_SMALLEST = 1e-3
"""Shares are shifted by this much under a power below one, whose slope at zero would be infinite."""


def sparsity_penalty(
    weights: TrainingParameters, code: Code, config: TrainConfig, *, p: float = 1.0
) -> Float[Tensor, ""]:
    """The penalty that `config` names; zero for TopK and BatchTopK."""
    penalty = config.penalty_used
    if penalty is None:
        return code.a.new_zeros(())
    if penalty == "l0":
        return l0(code, weights.activation, config.penalty_bandwidth or config.bandwidth)
    share = shares(weights, code, torch.relu(code.h) if isinstance(weights.activation, Gated) else code.a)
    if penalty == "tanh":
        return code.mean(tanh(share, config.tanh_scale))
    return code.mean(p_norm(share, p) if penalty == "p_anneal" else share)


def shares(weights: TrainingParameters, code: Code, a: Tensor) -> Tensor:
    """`a ‖W_dec‖ / √d`, blind to a feature's scale; `a / √d` for unit decoders.

    Their sum is the L1 penalty; of a gated dictionary with `relu(π)` for a. Source: with unit decoders Bricken et al.
    2023, *Towards Monosemanticity*; with `a ‖W_dec‖` Conerly et al. 2024, *Update on how we train SAEs* (Anthropic,
    April 2024).
    """
    root = weights.b_dec.shape[1] ** 0.5
    return a / root if weights.unit_decoders else a * code.of_feature(weights.decoder_norms() / root)


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


_MEMORY = 0.9
"""Decay per step of the running mean of L0."""
_INTEGRAL, _PROPORTIONAL = 0.08, 3.0
"""Per step and nat of error. With less, an annealed p or the falling learning rate leaves L0 behind."""
_LARGEST_ERROR = 1.0
"""In log L0, so that a start far from the target does not run away."""
START_OVER_TARGET = 4.0
"""First L0 over the one that is steered for: sparsity comes from above, slowly."""
_EXPONENTS = 10
"""Values that an annealed exponent takes on its way down."""


@dataclass
class SparsityController:
    """The weight λ of the penalty at each step.

    Without a target, `config.sparsity` after its warm-up. With `target_l0`, a proportional-integral controller in
    logarithms: `log λ = u + P · e`, `u ← u + I · (lr / peak lr) · e`, with `e = log(L0 / asked)`, where L0 is a running
    mean over layers, and what is asked falls from `START_OVER_TARGET` times the target to the target during the
    warm-up. The integral follows the learning rate because the response to λ does, and stays below the weight Λ at
    which even a feature that explains its whole share of the variance would not pay for itself.

    The `l0` penalty reaches thresholds alone, which Adam moves at a speed that is set by the gradient's sign more than
    by its size. Small weights let them go back so slowly that an L0 once too low stayed so; there `λ = exp(u) + Λ · e`,
    within ±Λ: below the target the penalty's sign turns, as in the squared distance of L0 from its target that
    Rajamanoharan et al. 2024, *Jumping Ahead*, minimise.

    What a device measures stays there: u, L0, the gain and the weight are float64 tensors then, until `state` is asked.

    An annealed penalty's weight is also multiplied by `gain`: whenever p falls, by `Σ share^p / Σ share^p'` of that
    batch, so that the penalty stays as strong as it was (Karvonen et al. 2024, section 4).
    """

    config: TrainConfig
    log_weight: float | Tensor = float("nan")
    """u; the first one is log `config.sparsity`."""
    l0: float | Tensor = 0.0
    seen: float = 0.0
    """Weight of the running mean, which tends to one."""
    gain: float | Tensor = 1.0

    def __post_init__(self) -> None:
        if math.isnan(self.log_weight):
            self.log_weight = math.log(max(self.config.sparsity, 1e-12))

    def weight(self, step: int) -> float | Tensor:
        if self.config.target_l0 is None:
            return self.gain * sparsity_weight(self.config, step)
        most, error = self._most(), self._error(step)
        if self.config.penalty_used == "l0":
            largest = math.exp(most)
            return _within(-largest, _exp(_within(None, self.log_weight, most)) + largest * error, largest)
        return self.gain * _exp(_within(None, self.log_weight + _PROPORTIONAL * error, most))

    def update(self, step: int, l0: float | Tensor) -> None:
        """Take in what a step measured: a number, or on a device a float64 tensor."""
        self.l0 = _MEMORY * self.l0 + (1 - _MEMORY) * l0
        self.seen = _MEMORY * self.seen + (1 - _MEMORY)
        if self.config.target_l0 is not None:
            moved = self.log_weight + _INTEGRAL * learning_rate(self.config, step) / self.config.lr_used * self._error(
                step
            )
            self.log_weight = _within(None, moved, self._most())

    def _most(self) -> float:
        """Log of the largest useful weight: `l0` and `tanh` count features; each has 1 / L0 of the variance."""
        target = self.config.target_l0 or 1.0
        return math.log(2 / target if self.config.penalty_used in ("l0", "tanh") else 2.0)

    def asked(self, step: int) -> float:
        """The L0 that is steered for at a step."""
        assert self.config.target_l0 is not None
        return self.config.target_l0 * falling(self.config, step, START_OVER_TARGET)

    def _error(self, step: int) -> float | Tensor:
        if self.config.target_l0 is None or self.seen == 0:
            return 0.0
        error = _log(_within(1e-3, self.l0 / self.seen, None) / self.asked(step))
        return _within(-_LARGEST_ERROR, error, _LARGEST_ERROR)

    def state(self) -> dict[str, Any]:
        numbers = {"log_weight": self.log_weight, "l0": self.l0, "seen": self.seen, "gain": self.gain}
        return {name: float(number) for name, number in numbers.items()}


def _exp(x: float | Tensor) -> float | Tensor:
    return x.exp() if isinstance(x, Tensor) else math.exp(x)


def _log(x: float | Tensor) -> float | Tensor:
    return x.log() if isinstance(x, Tensor) else math.log(x)


def _within(least: float | None, x: float | Tensor, most: float | None) -> float | Tensor:
    """x, or the bound that it is beyond."""
    if isinstance(x, Tensor):
        return x.clamp(least, most)
    x = x if most is None else min(most, x)
    return x if least is None else max(least, x)


def exponent(config: TrainConfig, step: int) -> float:
    """p of an annealed penalty: one until `p_start`, then down to `p_end` in equal steps, before `lr` falls.

    Each step down lowers L0, which a falling learning rate would leave the controller no time to mend.
    """
    if config.penalty_used != "p_anneal":
        return 1.0
    end = 1 - config.decay if config.p_start < 1 - config.decay else 1.0
    done = (step / config.steps - config.p_start) / max(1e-9, end - config.p_start)
    stage = min(_EXPONENTS, max(0, math.ceil(done * _EXPONENTS)))
    return 1 - (1 - config.p_end) * stage / _EXPONENTS
