"""Decoders that read only the weights of active features."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.errors import InputError
from transcoders.kernels.active import ActiveFeatures
from transcoders.kernels.products import weighted_sum

DENSE_ABOVE = 0.3
"""Density of active features from which dense products are faster; measured by `benchmarks/sparse_kernels.py`."""


def decode(
    values: Float[Tensor, "n"], active: ActiveFeatures, W_dec: Float[Tensor, "layer feature d_out"]
) -> Float[Tensor, "layer batch d_out"]:
    """`y = a W_dec` for every layer, by whichever of `sparse_decode` and `dense_decode` suits the density."""
    return (dense_decode if active.density > DENSE_ABOVE else sparse_decode)(values, active, W_dec)


def sparse_decode(
    values: Float[Tensor, "n"], active: ActiveFeatures, W_dec: Float[Tensor, "layer feature d_out"]
) -> Float[Tensor, "layer batch d_out"]:
    """`y[l, b] = Σ_{f active} a_f W_dec[l, f]`. Cost of this and of each gradient: active features × d_out."""
    return weighted_sum(values, active, W_dec.flatten(0, 1)).unflatten(0, (active.n_layers, -1))


def dense_decode(
    values: Float[Tensor, "n"], active: ActiveFeatures, W_dec: Float[Tensor, "layer feature d_out"]
) -> Float[Tensor, "layer batch d_out"]:
    """The same by a dense matrix product: the oracle, and the faster way where many features are active."""
    return active.dense(values) @ W_dec


def cross_layer_decode(
    values: Float[Tensor, "n"], active: ActiveFeatures, W_dec: Sequence[Float[Tensor, "feature _ d_out"]]
) -> Float[Tensor, "layer batch d_out"]:
    """`y_l' = Σ_{l ≤ l'} a_l W_dec[l→l']`, W_dec[l] `[feature, span, d_out]` from layer l on.

    An active feature's decoders for all its write layers lie side by side and are read at once. Cost: active features
    × span × d_out, plus one addition per pair of layers.

    Source: Ameisen et al. 2025, *Circuit Tracing: Revealing Computational Graphs in Language Models*.
    """
    _require_spans(active, W_dec)
    layers = [active.of_layer(layer) for layer in range(active.n_layers)]
    writes: list[Tensor | float] = [0.0] * active.n_layers
    parts = values.split([part.stop - part.start for part, _ in layers])
    for layer, ((_, own), own_values) in enumerate(zip(layers, parts, strict=True)):
        if own.density > DENSE_ABOVE:
            written = own.dense(own_values)[0] @ W_dec[layer].flatten(1)
        else:
            written = weighted_sum(own_values, own, W_dec[layer].flatten(1))
        for offset, part in enumerate(written.unflatten(-1, W_dec[layer].shape[1:]).unbind(-2)):
            writes[layer + offset] = writes[layer + offset] + part
    return torch.stack(writes)  # pyright: ignore[reportArgumentType]


def _require_spans(active: ActiveFeatures, W_dec: Sequence[Tensor]) -> None:
    spans = [w.shape[1] for w in W_dec]
    if len(spans) != active.n_layers or any(span > len(spans) - layer for layer, span in enumerate(spans)):
        raise InputError(
            f"A stack of {active.n_layers} layers needs a decoder for each, that of layer l for at most "
            f"{active.n_layers} − l layers; got decoders for {spans} layers."
        )
