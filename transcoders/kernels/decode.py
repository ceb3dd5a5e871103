"""Decoders that read only the weights of active features."""

from collections.abc import Sequence
from typing import Any

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


def dense_cross_layer_decode(
    a: Float[Tensor, "layer batch feature"], W_dec: Sequence[Float[Tensor, "feature _ d_out"]], *, bf16: bool = False
) -> Float[Tensor, "layer batch d_out"]:
    """`y_l' = Σ_{l ≤ l'} a_l W_dec[l→l']` of all features, W_dec[l] `[feature, span, d_out]` from layer l on.

    All that layer l writes is one product, `[batch, feature] × [feature, span · d_out]`, added to the outputs from l on
    at once, and so are both its gradients: a layer costs as many launches whatever its span. `bf16`: products of
    values rounded to bfloat16, whose results are rounded too before they are added; sums and gradients are float32.
    """
    y = _DenseCrossLayer.apply(a, bf16, *W_dec)
    assert isinstance(y, Tensor)
    return y


class _DenseCrossLayer(torch.autograd.Function):
    """Outputs lie token by token, `[batch, layer · d_out]`: what a layer writes to is then one block of columns."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, bf16: bool, *W_dec: Tensor) -> Tensor:
        dtype = torch.bfloat16 if bf16 else a.dtype
        (n_layers, batch, _), d_out = a.shape, W_dec[0].shape[2]
        y = a.new_zeros(batch, n_layers * d_out)
        for layer, W in enumerate(W_dec):
            written = a[layer].to(dtype) @ W.to(dtype).flatten(1)
            y[:, layer * d_out : layer * d_out + written.shape[1]] += written
        ctx.dtype = dtype
        ctx.save_for_backward(a, *W_dec)
        return y.unflatten(1, (n_layers, d_out)).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (a, *W_dec) = grad_outputs, ctx.saved_tensors
        d_out, dtype = grad.shape[2], ctx.dtype
        columns = grad.transpose(0, 1).flatten(1).to(dtype)
        by_a = torch.empty_like(a) if ctx.needs_input_grad[0] else None
        by_W: list[Tensor | None] = [None] * len(W_dec)
        for layer, W in enumerate(W_dec):
            of_layer = columns[:, layer * d_out : layer * d_out + W.shape[1:].numel()]
            if by_a is not None:
                by_a[layer] = of_layer @ W.to(dtype).flatten(1).T
            if ctx.needs_input_grad[2 + layer]:
                by_W[layer] = (a[layer].to(dtype).T @ of_layer).to(W.dtype).view(W.shape)
        return by_a, None, *by_W


def _require_spans(active: ActiveFeatures, W_dec: Sequence[Tensor]) -> None:
    spans = [w.shape[1] for w in W_dec]
    if len(spans) != active.n_layers or any(span > len(spans) - layer for layer, span in enumerate(spans)):
        raise InputError(
            f"A stack of {active.n_layers} layers needs a decoder for each, that of layer l for at most "
            f"{active.n_layers} − l layers; got decoders for {spans} layers."
        )
