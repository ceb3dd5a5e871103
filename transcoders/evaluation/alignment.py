"""How well each feature's encoder points along what it writes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.dictionaries import DictionarySet
from transcoders.evaluation.result import AlignmentSummary

_TINY = 1e-12


class Alignment(NamedTuple):
    """Of the features of one layer."""

    cosine: Float[Tensor, "feature"]
    """`⟨w_enc, v⟩ / (‖w_enc‖ ‖v‖)`, zero where one of them is zero."""
    product: Float[Tensor, "feature"]
    """`⟨w_enc, v⟩`, in the coordinates of training where the dictionaries record them."""

    def summary(self) -> AlignmentSummary:
        return AlignmentSummary(
            mean=float(self.cosine.mean()),
            below_half=float((self.cosine < 0.5).double().mean()),
            product=float(self.product.mean()),
            bimodality=bimodality(self.cosine),
        )


def alignment(dictionaries: DictionarySet, layer: int) -> Alignment:
    """Encoder against decoder, for every feature of a layer.

    `v` is the decoder of an SAE or a transcoder. Of a cross-layer transcoder it is `Σ_l' W_dec[l→l']`, what the feature
    has added to the residual stream after the last layer, a generalisation of ours. Aligned training keeps the product
    at one in the coordinates of training, so recorded factors are divided out: `w_enc / s_l` and `t_l' W_dec[l→l']`.

    A score near zero is one sign of a feature whose direction of reading has nothing to do with what it writes; scores
    of dictionaries trained without the constraint often have two modes.

    Source: Brzozowski & Chung 2026, *Aligned Training* (arXiv 2605.18629).
    """
    features = torch.arange(dictionaries.n_features(layer), device=dictionaries.decoder_bias(layer).device)
    factors = getattr(dictionaries.provenance, "normalisation", {})
    ones = [1.0] * dictionaries.n_layers
    read, write = factors.get("read", ones), factors.get("write", ones)
    encoder = dictionaries.encoder_rows(layer, features).double() / read[layer]
    written = torch.zeros_like(encoder)
    for target in dictionaries.write_layers(layer):
        written += write[target] * dictionaries.decoder_rows(layer, features, target).double()
    product = (encoder * written).sum(dim=1)
    norms = encoder.norm(dim=1) * written.norm(dim=1)
    return Alignment(cosine=torch.where(norms > _TINY, product / norms.clamp(min=_TINY), 0.0), product=product)


def bimodality(values: Float[Tensor, "n"] | Sequence[float]) -> float:
    """Sarle's coefficient `(g₁² + 1) / g₂`, with skewness g₁ and kurtosis g₂ (a normal distribution's is 3).

    1 for two equal values, 5/9 for a uniform distribution, 1/3 for a normal one. Skewed distributions with a single
    mode reach above 5/9 too, so it is a hint to look at the histogram. NaN where all values are equal.

    Source: Pfister et al. 2013, *Good things peak in pairs: a note on the bimodality coefficient*.
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    centred = x - x.mean()
    variance = float(centred.square().mean())
    if variance < _TINY:
        return float("nan")
    skewness = float(centred.pow(3).mean()) / variance**1.5
    return (skewness**2 + 1) / (float(centred.pow(4).mean()) / variance**2)
