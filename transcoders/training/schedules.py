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
