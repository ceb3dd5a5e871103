"""Decoders that read only the weights of active features."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from transcoders.errors import InputError
from transcoders.kernels import host, products
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
    values: Float[Tensor, "n"], active: ActiveFeatures, W_dec: Sequence[Float[Tensor, "feature _ _"]]
) -> Float[Tensor, "layer batch d_out"]:
    """`y_l' = Σ_{l ≤ l'} a_l W_dec[l→l']`, W_dec[l] `[feature, span, d_out]` from layer l on.

    Where the span is one, later layers may be narrower than the first: they write the first coordinates.
    An active feature's decoders for all its write layers lie side by side and are read at once. Cost: active features
    × span × d_out, plus one addition per pair of layers. On a device the gradient cannot be differentiated again.

    Source: Ameisen et al. 2025, *Circuit Tracing: Revealing Computational Graphs in Language Models*.
    """
    _require_spans(active, W_dec)
    if host.queued(values):
        y = _SparseCrossLayer.apply(values, active, *W_dec)
        assert isinstance(y, Tensor)
        return y
    layers = [active.of_layer(layer) for layer in range(active.n_layers)]
    writes: list[Tensor | float] = [0.0] * active.n_layers
    d_out = W_dec[0].shape[2]
    parts = values.split([part.stop - part.start for part, _ in layers])
    for layer, ((_, own), own_values) in enumerate(zip(layers, parts, strict=True)):
        if own.density > DENSE_ABOVE:
            written = own.dense(own_values)[0] @ W_dec[layer].flatten(1)
        else:
            written = weighted_sum(own_values, own, W_dec[layer].flatten(1))
        if (narrower := d_out - W_dec[layer].shape[2]) and W_dec[layer].shape[1] == 1:
            written = torch.nn.functional.pad(written, (0, narrower))
        for offset, part in enumerate(written.unflatten(-1, (-1, d_out)).unbind(-2)):
            writes[layer + offset] = writes[layer + offset] + part
    return torch.stack(writes)  # pyright: ignore[reportArgumentType]


def dense_cross_layer_decode(
    a: Float[Tensor, "layer batch feature"], W_dec: Sequence[Float[Tensor, "feature _ _"]], *, bf16: bool = False
) -> Float[Tensor, "layer batch d_out"]:
    """`y_l' = Σ_{l ≤ l'} a_l W_dec[l→l']` of all features, W_dec[l] as `cross_layer_decode` has it.

    All that layer l writes is one product, `[batch, feature] × [feature, span · d_out]`, added to the outputs from l on
    at once, and so are both its gradients: a layer costs as many launches whatever its span. `bf16`: products of
    values rounded to bfloat16, whose results are rounded too before they are added; sums and gradients are float32.
    """
    y = _DenseCrossLayer.apply(a, bf16, *W_dec)
    assert isinstance(y, Tensor)
    return y


class _SparseCrossLayer(torch.autograd.Function):
    """`cross_layer_decode` without asking a device how many features of each layer are active."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, active: ActiveFeatures, *W_dec: Tensor) -> Tensor:
        y = values.new_zeros(active.n_layers, active.batch, W_dec[0].shape[2])
        feature = active.feature % active.n_features
        for layer, W in enumerate(W_dec):
            table, tokens = W.flatten(1), _of_layer(layer, active.batch)
            written = products.backend(table).gather_sum_of_some(values, feature, active.start, table, tokens)
            y[layer : layer + W.shape[1], :, : W.shape[2]] += written.unflatten(1, W.shape[1:]).transpose(0, 1)
        ctx.active, ctx.feature = active, feature
        ctx.save_for_backward(values, *W_dec)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), (values, *W_dec), active = grad_outputs, ctx.saved_tensors, ctx.active
        by_value = torch.zeros_like(values) if ctx.needs_input_grad[0] else None
        by_W: list[Tensor | None] = [None] * len(W_dec)
        lists: tuple[Tensor, ...] = ()
        if any(ctx.needs_input_grad[2:]):
            lists = values[active.order], active.by_feature.column % active.batch, active.by_feature.start
        for layer, W in enumerate(W_dec):
            of_layer = grad[layer : layer + W.shape[1], :, : W.shape[2]].transpose(0, 1).flatten(1)
            table = W.flatten(1)
            kernels = products.backend(table)
            if by_value is not None:
                tokens = _of_layer(layer, active.batch)
                by_value += kernels.gather_dot_of_some(of_layer, ctx.feature, active.start, table, tokens)
            if ctx.needs_input_grad[2 + layer]:
                features = _of_layer(layer, active.n_features)
                by_W[layer] = kernels.gather_sum_of_some(*lists, of_layer, features).view(W.shape)
        return by_value, None, *by_W


def _of_layer(layer: int, size: int) -> slice:
    return slice(layer * size, (layer + 1) * size)


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
