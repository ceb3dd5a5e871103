"""The error of each layer, regressed on what the layer reads: a skip term in closed form, and biases with it."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from transcoders.data import ActivationBatch
from transcoders.dictionaries import CrossLayerTranscoder, TranscoderSet, present_layers
from transcoders.evaluation.statistics import reconstruct
from transcoders.refining.regression import AffineMap, Moments, RidgeRegression

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Those that are tried where none is given."""

Refinable = TranscoderSet | CrossLayerTranscoder


class ErrorMoments:
    """Sums over tokens of each layer's read x and error `e = y − ŷ`, of layers that have a dictionary.

    A cross-layer transcoder's error at a layer is that of all that writes there.
    """

    def __init__(self, dictionaries: Refinable) -> None:
        self.dictionaries, d = dictionaries, dictionaries.d_model
        self.of_layer = {layer: Moments(d, d) for layer in present_layers(dictionaries)}

    @torch.no_grad()
    def add(self, batch: ActivationBatch) -> None:
        """Take a batch in, in the dictionaries' precision."""
        reads, writes = (list(side.to(self.dictionaries.decoder_bias(0)).unbind(1)) for side in batch)
        for layer, (_, y_hat) in enumerate(reconstruct(self.dictionaries, reads)):
            if layer in self.of_layer:
                self.of_layer[layer].add(reads[layer], writes[layer] - y_hat)


class Correction(NamedTuple):
    """What is added to a layer: a skip term and a bias."""

    map: AffineMap
    ridge: float
    error: float
    """`Σ ‖e − x W − b‖²` on the held-out tokens, over `Σ ‖e‖²` there."""


def corrections(
    fitted: ErrorMoments, held_out: ErrorMoments, *, rank: int | None = None, ridge: float | None = None
) -> dict[int, Correction]:
    """For each layer the ridge regression of its error, of the `RIDGES` the one of least held-out error."""
    return {
        layer: _best(RidgeRegression(moments), held_out.of_layer[layer], rank, RIDGES if ridge is None else (ridge,))
        for layer, moments in fitted.of_layer.items()
    }


def _best(regression: RidgeRegression, held_out: Moments, rank: int | None, ridges: Sequence[float]) -> Correction:
    d_in, d_out = (len(mean) for mean in regression.moments.means)
    zero = AffineMap(torch.zeros(d_in, d_out, dtype=torch.float64), torch.zeros(d_out, dtype=torch.float64))
    before = held_out.squared_error(zero)
    found = [(ridge, regression.fit(ridge, rank)) for ridge in ridges]
    tried = [Correction(fit, ridge, held_out.squared_error(fit) / max(before, 1e-300)) for ridge, fit in found]
    return min(tried, key=lambda correction: correction.error)


@torch.no_grad()
def corrected(dictionaries: Refinable, added: Mapping[int, AffineMap], *, skip: bool = True) -> Any:
    """A copy with these maps added to some layers; `skip=False`: their biases alone."""
    made = copy.deepcopy(dictionaries)
    for layer, fit in added.items():
        bias = made.decoder_bias(layer)
        bias += fit.b.to(bias)
        if skip:
            with_skip(made, layer).add_(fit.W.to(bias))
    return made


def with_skip(dictionaries: Refinable, layer: int) -> Float[Tensor, "d_model d_out"]:
    """A layer's skip term, which is made of zeros where there is none; of a cross-layer transcoder in all layers."""
    if isinstance(dictionaries, CrossLayerTranscoder):
        if dictionaries.W_skip is None:
            d = dictionaries.d_model
            dictionaries.W_skip = _parameter(torch.zeros(dictionaries.n_layers, d, d).to(dictionaries.b_dec))
        return dictionaries.W_skip[layer]
    own = dictionaries[layer]
    if own.W_skip is None:
        own.W_skip = _parameter(torch.zeros(own.W_enc.shape[0], own.W_dec.shape[1]).to(own.b_dec))
    return own.W_skip


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.contiguous(), requires_grad=False)
