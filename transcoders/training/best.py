"""Which checkpoint is the best: a figure of each that can be compared with those of the others."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from transcoders.training.config import TrainConfig
from transcoders.training.sparsity import exponent

L0_TOLERANCE = 0.05
"""How far, relative to it, an L0 may be off `target_l0` and count as met."""


def score(config: TrainConfig, lines: Sequence[Mapping[str, Any]]) -> float | None:
    """How far the metrics of some steps are from perfect, or None where they cannot be compared with those of the end.

    With TopK and BatchTopK: the mean loss (FVU, over all prefixes where there are some). With `target_l0`: the same,
    of steps whose mean L0 is within 5 % of it. With a penalty of given weight: the mean loss, penalty included. The
    loss that revives dead latents never counts. Steps before k, L0, the penalty's weight or its exponent have come to
    their last values are no match for later ones.
    """
    if not lines or any(not _settled(config, line["step"]) for line in lines):
        return None
    if config.target_l0 is None:
        return fmean(line["loss"] - line["revival"] for line in lines)
    if abs(fmean(line["l0"] for line in lines) / config.target_l0 - 1) > L0_TOLERANCE:
        return None
    return fmean(line["loss"] - line["revival"] - line["sparsity_weight"] * line["sparsity"] for line in lines)


def _settled(config: TrainConfig, step: int) -> bool:
    """Whether step number `step`, from one, was taken with the settings of the last one."""
    always = config.ranks and config.k_start == 1
    if not always and step < config.sparsity_warmup * config.steps:
        return False
    return exponent(config, step - 1) == exponent(config, config.steps - 1)
