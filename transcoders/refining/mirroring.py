"""Features that are on most of the time, turned round: they fire on the exceptions, and a skip term writes the rule.

`relu(h) = h + relu(−h)`: a feature of pre-activation `h = x w + b` that fires on most tokens writes a line, `h W_dec`,
but for the tokens on which it is off. Removing what is nearly always there takes the model far from where it was, and a
graph's paths through it say nothing of a token; the line passes by a skip term just as well.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.data import ActivationBatch
from transcoders.dictionaries import CrossLayerTranscoder, JumpReLU, ReLU, present_layers
from transcoders.errors import DictionaryError
from transcoders.refining.skip_terms import Refinable, with_skip


class Firing(NamedTuple):
    """How a layer's features fire on a text."""

    rate: Float[Tensor, "feature"]
    """The share of tokens on which each is active."""
    mean: Float[Tensor, "feature"]
    """Of the pre-activation."""


@torch.no_grad()
def firing(dictionaries: Refinable, batches: Iterable[ActivationBatch]) -> dict[int, Firing]:
    """`Firing` of every layer that has a dictionary. Raises `DictionaryError` for features that are ranked."""
    thresholds = {layer: _threshold(dictionaries, layer) for layer in present_layers(dictionaries)}
    rates = {layer: torch.zeros_like(_encoder(dictionaries, layer)[1]) for layer in thresholds}
    means, n = {layer: torch.zeros_like(sums) for layer, sums in rates.items()}, 0
    for reads, _ in batches:
        n += len(reads)
        for layer, threshold in thresholds.items():
            W_enc, b_enc = _encoder(dictionaries, layer)
            h = reads[:, layer].to(b_enc) @ W_enc + b_enc
            rates[layer] += (h > threshold).sum(0)
            means[layer] += h.sum(0)
    return {layer: Firing(rates[layer] / max(n, 1), means[layer] / max(n, 1)) for layer in thresholds}


@torch.no_grad()
def mirrored(dictionaries: Refinable, found: Mapping[int, Firing], above: float) -> tuple[Refinable, dict[int, int]]:
    """A copy whose features with a rate above this are turned round, and how many these are in each layer.

        (w, b) → (−w, −b),    W_skip += w W_dec,    b_dec += b W_dec

    The same function to rounding where a layer writes at itself alone. What a cross-layer transcoder's line `h W_dec`
    writes at later layers becomes its mean, in their biases: no skip term reaches from one layer to another. Features
    with a threshold above 0 stay, for they would not be the same.
    """
    made, turned = copy.deepcopy(dictionaries), {}
    for layer, (rate, mean) in found.items():
        chosen = ((rate > above) & (_threshold(made, layer) == 0)).nonzero()[:, 0]
        turned[layer] = len(chosen)
        if not len(chosen):
            continue
        W_enc, b_enc = _encoder(made, layer)
        own, *later = _decoders(made, layer)
        skip, w, b = with_skip(made, layer), W_enc[:, chosen], b_enc[chosen]
        skip += w @ own[chosen]
        made.decoder_bias(layer).add_(b @ own[chosen])
        for distance, W_dec in enumerate(later, start=1):
            made.decoder_bias(layer + distance).add_(mean[chosen] @ W_dec[chosen])
        W_enc[:, chosen], b_enc[chosen] = -w, -b
    return made, turned


def _threshold(d: Refinable, layer: int) -> Tensor:
    """What a pre-activation must exceed."""
    activation = d.activation if isinstance(d, CrossLayerTranscoder) else d[layer].activation
    if isinstance(activation, ReLU):
        return torch.zeros(d.n_features(layer)).to(d.decoder_bias(layer))
    if not isinstance(activation, JumpReLU):
        raise DictionaryError(
            f"Features of {activation.name!r} compete, so that none can be turned round; leave out mirror, or give "
            "dictionaries with ReLU or JumpReLU."
        )
    return activation.threshold[layer] if isinstance(d, CrossLayerTranscoder) else activation.threshold


def _encoder(d: Refinable, layer: int) -> tuple[Float[Tensor, "d_model feature"], Float[Tensor, "feature"]]:
    return (d.W_enc[layer], d.b_enc[layer]) if isinstance(d, CrossLayerTranscoder) else (d[layer].W_enc, d[layer].b_enc)


def _decoders(d: Refinable, layer: int) -> list[Float[Tensor, "feature d_model"]]:
    """To this layer, and of a cross-layer transcoder to those after it."""
    return list(d.W_dec[layer].unbind(1)) if isinstance(d, CrossLayerTranscoder) else [d[layer].W_dec]
