"""Which checkpoint is the best, by a figure that can be compared with those of the others; whether L0 is as asked."""

import logging
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.dictionaries import DictionarySet
from transcoders.training.config import TrainConfig
from transcoders.training.sparsity import exponent

logger = logging.getLogger(__name__)

_TOLERANCE = 0.05
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
    if abs(fmean(line["l0"] for line in lines) / config.target_l0 - 1) > _TOLERANCE:
        return None
    return fmean(line["loss"] - line["revival"] - line["sparsity_weight"] * line["sparsity"] for line in lines)


def _settled(config: TrainConfig, step: int) -> bool:
    """Whether step number `step`, from one, was taken with the settings of the last one."""
    always = config.ranks and config.k_start == 1
    if not always and step < config.sparsity_warmup * config.steps:
        return False
    return exponent(config, step - 1) == exponent(config, config.steps - 1)


def compare_l0(
    config: TrainConfig, name: str, dictionaries: DictionarySet, reads: Float[Tensor, "layer token d_model"]
) -> None:
    """Warn where the L0 of what is handed out is not the one that was asked."""
    if config.target_l0 is None:
        return
    assert isinstance(dictionaries, torch.nn.Module)
    device = next(dictionaries.parameters()).device
    l0 = len(dictionaries.encode(reads.to(device)).value) / (reads.shape[0] * reads.shape[1])
    if abs(l0 / config.target_l0 - 1) > _TOLERANCE:
        logger.warning(
            "%s ended with L0 %.1f, %+.0f%% off its target_l0 of %g: train on more tokens, or set `sparsity`.",
            name, l0, 100 * (l0 / config.target_l0 - 1), config.target_l0,
        )  # fmt: skip
