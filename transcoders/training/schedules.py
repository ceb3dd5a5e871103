"""Rates as functions of the step."""

from transcoders.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, plateau, linear decay to zero."""
    up = (step + 1) / max(1, round(config.warmup * config.steps))
    down = (config.steps - step) / max(1, round(config.decay * config.steps))
    return config.lr * min(1.0, up, down)


def sparsity_weight(config: TrainConfig, step: int) -> float:
    """Linear warm-up of the sparsity penalty, then constant."""
    return config.sparsity * min(1.0, (step + 1) / max(1, round(config.sparsity_warmup * config.steps)))


def falling(config: TrainConfig, step: int, first: float) -> float:
    """A factor that falls from `first` to one during the sparsity warm-up, evenly in its logarithm."""
    left = max(0.0, 1 - (step + 1) / max(1.0, config.sparsity_warmup * config.steps))
    return first**left
