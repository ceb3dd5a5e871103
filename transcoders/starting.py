"""Runs that begin at a block: what was the same before it need not be computed again."""

import logging
from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.language_model import LanguageModel
from transcoders.sites import Site

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-3
"""Share of the largest value by which a run from a block on may differ from a whole one; rounding is far below."""


@torch.no_grad()
def streams_before(
    model: LanguageModel, blocks: Iterable[int], rows: Int[Tensor, "row pos"]
) -> dict[int, Float[Tensor, "row pos d_model"]]:
    """The residual stream before blocks that a run can begin at (`LanguageModel.run_to_unembedding`), by block.

    Empty where blocks hand on more than the stream, which is seen by running two of them again.
    """
    before = {block: Site(block - 1, "resid_post") for block in sorted(set(blocks)) if block > 0}
    if not all(model.has_site(site) for site in before.values()):
        return {}
    final, at = model.run_to_unembedding(rows, before.values())
    wanted = list(before)
    for start in wanted[-1:] + wanted[len(wanted) // 2 :][:1]:
        again, _ = model.run_to_unembedding(rows, start=start, stream=at[before[start]])
        if not (again - final).abs().max() <= _TOLERANCE * final.abs().max():
            logger.info("%s cannot be run from a block on; it runs as a whole each time", model.name)
            return {}
    return {block: at[site] for block, site in before.items()}
