"""Steering a penalty's weight, and an annealed penalty's exponent."""

import math
from dataclasses import dataclass
from typing import Any

from transcoders.training.config import TrainConfig
from transcoders.training.schedules import falling, learning_rate, sparsity_weight

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

    An annealed penalty's weight is also multiplied by `gain`: whenever p falls, by `Σ share^p / Σ share^p'` of that
    batch, so that the penalty stays as strong as it was (Karvonen et al. 2024, section 4).
    """

    config: TrainConfig
    log_weight: float = float("nan")
    """u; the first one is log `config.sparsity`."""
    l0: float = 0.0
    seen: float = 0.0
    """Weight of the running mean, which tends to one."""
    gain: float = 1.0

    def __post_init__(self) -> None:
        if math.isnan(self.log_weight):
            self.log_weight = math.log(max(self.config.sparsity, 1e-12))

    def weight(self, step: int) -> float:
        if self.config.target_l0 is None:
            return self.gain * sparsity_weight(self.config, step)
        most, error = self._most(), self._error(step)
        if self.config.penalty_used == "l0":
            largest = math.exp(most)
            return max(-largest, min(largest, math.exp(min(self.log_weight, most)) + largest * error))
        return self.gain * math.exp(min(self.log_weight + _PROPORTIONAL * error, most))

    def update(self, step: int, l0: float) -> None:
        """Take in what a step measured."""
        self.l0 = _MEMORY * self.l0 + (1 - _MEMORY) * l0
        self.seen = _MEMORY * self.seen + (1 - _MEMORY)
        if self.config.target_l0 is not None:
            moved = self.log_weight + _INTEGRAL * learning_rate(self.config, step) / self.config.lr * self._error(step)
            self.log_weight = min(moved, self._most())

    def _most(self) -> float:
        """Log of the largest useful weight: `l0` and `tanh` count features; each has 1 / L0 of the variance."""
        target = self.config.target_l0 or 1.0
        return math.log(2 / target if self.config.penalty_used in ("l0", "tanh") else 2.0)

    def asked(self, step: int) -> float:
        """The L0 that is steered for at a step."""
        assert self.config.target_l0 is not None
        return self.config.target_l0 * falling(self.config, step, START_OVER_TARGET)

    def _error(self, step: int) -> float:
        if self.config.target_l0 is None or self.seen == 0:
            return 0.0
        error = math.log(max(self.l0 / self.seen, 1e-3) / self.asked(step))
        return max(-_LARGEST_ERROR, min(_LARGEST_ERROR, error))

    def state(self) -> dict[str, Any]:
        return {"log_weight": self.log_weight, "l0": self.l0, "seen": self.seen, "gain": self.gain}


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
