"""Runs that begin at a block: what was the same before it need not be computed again."""

import contextlib
import logging
from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.bridge import unhooked
from transcoders.errors import ModelError
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


class _Seen(Exception):  # noqa: N818 - no error: how a forward pass is left early
    """Raised in a hook once its value has been seen."""


@torch.no_grad()
def value_from(
    model: LanguageModel,
    rows: Int[Tensor, "row pos"],
    name: str,
    start: int = 0,
    stream: Float[Tensor, "row pos d_model"] | None = None,
) -> Tensor:
    """What the hook `name` carries in a run that begins at block `start` with `stream`; nothing after it is computed.

    It may be asked for within a hook of another run, none of whose hooks this one sees. Raises `ModelError` where the
    run never comes to it.
    """
    found: list[Tensor] = []

    def see(value: Tensor) -> None:
        found.append(value)
        raise _Seen

    with unhooked(model), contextlib.suppress(_Seen):
        model.run_to_unembedding(rows, start=start, stream=stream, held={name: see})
    if not found:
        raise ModelError(f"{model.name} never calls {name} in a run from block {start} on.")
    return found[0]
