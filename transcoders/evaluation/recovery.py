"""How many of the features that data was made of a dictionary has found."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.evaluation.matching import best_cosines, match

RECOVERED_ABOVE = 0.9
"""Cosine with a dictionary's decoder above which a known direction counts as found."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Known directions against the decoders of a dictionary."""

    mmcs: float
    """Mean over known directions of the highest cosine with a decoder."""
    recovered: float
    """Share of known directions with a decoder above a cosine of 0.9."""
    matched: float
    """The same where each decoder may stand for one direction only."""
    spurious: float
    """Share of decoders that have no known direction above a cosine of 0.9."""


@torch.no_grad()
def recovery(
    decoders: Float[Tensor, "feature d_model"],
    directions: Float[Tensor, "known d_model"],
    *,
    above: float = RECOVERED_ABOVE,
) -> Recovery:
    """`recovered = 1/n Σ_i 1[max_j cos(W_i, d_j) > above]` over the known directions W and the decoders d.

    The sign counts: activations are positive, so a decoder along −W_i stands for nothing. Revived latents that match
    nothing show in `spurious`, not in a count of dead latents.

    Source: Sharkey et al. 2022, *Taking features out of superposition with sparse autoencoders* (mean maximum cosine
    similarity against known features); the share above 0.9 is theirs too.
    """
    found, _ = best_cosines(directions, decoders)
    known, _ = best_cosines(decoders, directions)
    pairs = match(directions, decoders)
    return Recovery(
        mmcs=float(found.mean()),
        recovered=float((found > above).double().mean()),
        matched=int((pairs.cosine > above).sum()) / len(directions),
        spurious=float((known <= above).double().mean()),
    )
