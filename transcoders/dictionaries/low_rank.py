"""Cross-layer decoders of low rank: `W_dec[l→l'] = C_l B_{l→l'}` for the layers l' after l, stored as these factors.

`factors` finds them in decoders that are of a rank, `truncated` brings decoders to one. A layer's own decoder is left.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.dictionaries.cross_layer import CrossLayerTranscoder
from transcoders.errors import DictionaryError, InputError

_EXACT = 1e-5
"""Of the norm of decoders: what rounding to float32 may have added to their rank."""
_MORE = 10
"""Random directions beyond the rank, without which rounding would be magnified."""


class Factors(NamedTuple):
    """Of what a layer's features write to later layers."""

    codes: Float[Tensor, "feature rank"]
    maps: Float[Tensor, "rank later d_model"]

    def expanded(self) -> Float[Tensor, "feature later d_model"]:
        return (self.codes @ self.maps.flatten(1)).unflatten(1, self.maps.shape[1:])


@torch.no_grad()
def factors(W_dec: Sequence[Float[Tensor, "feature _ d_model"]], rank: int) -> list[Factors] | None:
    """`C_l` with orthonormal columns and `B_l = C_lᵀ W`, of every layer but the last; None where the rank is higher.

    The singular value decomposition of W on the span of what it makes of a few more random directions than `rank`: all
    there is where W has this rank. Source: Halko, Martinsson & Tropp 2011, *Finding Structure with Randomness*.
    """
    generator, found = torch.Generator().manual_seed(0), []
    for W in W_dec[:-1]:
        later = W[:, 1:].flatten(1).double()
        drawn = torch.randn(later.shape[1], min(rank + _MORE, *later.shape), generator=generator, dtype=later.dtype)
        span = torch.linalg.qr(later @ drawn.to(later.device)).Q
        codes = span @ torch.linalg.svd(span.T @ later, full_matrices=False).U[:, :rank]
        maps = codes.T @ later
        if float((later - codes @ maps).norm()) > _EXACT * float(later.norm()):
            return None
        found.append(Factors(codes.to(W), maps.unflatten(1, W[:, 1:].shape[1:]).to(W)))
    return found


@torch.no_grad()
def truncated(
    clt: CrossLayerTranscoder, reads: Float[Tensor, "layer token d_model"], rank: int
) -> CrossLayerTranscoder:
    """The transcoder with decoders of a rank to later layers, those that change what each layer writes least.

    What features of layer l write to the layers after it is `z = a_l W`. Of all maps of rank r, `Ŵ = W V Vᵀ` with V the
    first r principal directions of z minimises `E ‖(a_l − ā_l) (W − Ŵ)‖²`: the singular value decomposition of W with
    the covariance of the activations for weights (Eckart & Young 1936), by the covariance of z, which is smaller. The
    mean of what is lost goes into `b_dec`. Each write layer counts in units of the factors of training, where the
    provenance records them, so that the error is that of FVU. What layers lose is minimised layer by layer.

    `reads`: of a sample of text, at the positions with features. Raises `InputError` for a rank below 1.
    """
    if rank < 1:
        raise InputError(f"The rank of decoders must be at least 1; got {rank}.")
    if reads.ndim != 3 or reads.shape[0] != clt.n_layers or reads.shape[2] != clt.d_model:
        raise DictionaryError(
            f"The reads of {clt.n_layers} layers of width {clt.d_model} are [layer, token, d_model]; got "
            f"{list(reads.shape)}."
        )
    made = copy.deepcopy(clt)
    factor = clt.provenance.normalisation.get("write") or [1.0] * clt.n_layers
    activations = clt.encode_dense(reads)
    for layer, W in enumerate(made.W_dec[:-1]):
        unit = torch.tensor(factor[layer + 1 :], dtype=torch.float64, device=W.device).repeat_interleave(clt.d_model)
        later = W[:, 1:].flatten(1).double() * unit
        z = activations[layer].double() @ later
        mean = z.mean(dim=0)
        directions = torch.linalg.eigh((z - mean).T @ (z - mean)).eigenvectors[:, -rank:]
        kept = later @ directions @ directions.T
        W[:, 1:] = (kept / unit).view_as(W[:, 1:]).to(W)
        lost = (mean - mean @ directions @ directions.T) / unit
        made.b_dec[layer + 1 :] += lost.view(-1, clt.d_model).to(W)
    config = {**clt.provenance.config, "decoder_rank": rank}
    made.provenance = replace(clt.provenance, config=config, agreement={})
    return made
