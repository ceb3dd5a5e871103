"""The sparse products with their gradients.

Each is the other's gradient, so they can be differentiated any number of times.

`n` active features, `R = layer · batch` rows, a table of `M = layer · feature` weight vectors:

    weighted_sum   y[i] = Σ_j v_j W[f_j]      ∂v_j = ⟨∂y[i_j], W[f_j]⟩     ∂W[f] = Σ_{j: f_j = f} v_j ∂y[i_j]
    inner_products v_j = ⟨x[i_j], W[f_j]⟩     ∂x[i] = Σ_j ∂v_j W[f_j]      ∂W[f] = Σ_{j: f_j = f} ∂v_j x[i_j]

The gradient of the table is the first product over the rows grouped by feature: no scatter, and the same sum in the
same order every time.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.kernels import cpu
from transcoders.kernels.active import ActiveFeatures, Rows, require_fit


def weighted_sum(
    values: Float[Tensor, "n"], active: ActiveFeatures, table: Float[Tensor, "m d"]
) -> Float[Tensor, "row d"]:
    """`y[i] = Σ_j v_j W[f_j]` over the active features j of row i; cost n · d."""
    require_fit(active, values, table, None)
    y = _WeightedSum.apply(values, table, active)
    assert isinstance(y, Tensor)
    return y


def inner_products(
    inputs: Float[Tensor, "row d"],
    active: ActiveFeatures,
    table: Float[Tensor, "m d"],
    known: Float[Tensor, "n"] | None = None,
) -> Float[Tensor, "n"]:
    """`v_j = ⟨x[i_j], W[f_j]⟩` for every active feature j; cost n · d. `known`: the same, computed before."""
    require_fit(active, known, table, inputs)
    v = _InnerProducts.apply(inputs, table, active, known)
    assert isinstance(v, Tensor)
    return v


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, table: Tensor, active: ActiveFeatures) -> Tensor:
        ctx.save_for_backward(values, table)
        ctx.active = active
        return _gather_sum(values, active.rows, table)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grad_outputs
        values, table = ctx.saved_tensors
        by_value = inner_products(grad, ctx.active, table) if ctx.needs_input_grad[0] else None
        by_table = _table_gradient(values, ctx.active, grad) if ctx.needs_input_grad[1] else None
        return by_value, by_table, None


class _InnerProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, table: Tensor, active: ActiveFeatures, known: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, table)
        ctx.active = active
        return _gather_dot(inputs, active.rows, table) if known is None else known.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grad_outputs
        inputs, table = ctx.saved_tensors
        by_input = weighted_sum(grad, ctx.active, table) if ctx.needs_input_grad[0] else None
        by_table = _table_gradient(grad, ctx.active, inputs) if ctx.needs_input_grad[1] else None
        return by_input, by_table, None, None


def _table_gradient(values: Tensor, active: ActiveFeatures, rows: Tensor) -> Tensor:
    gradient = _TableGradient.apply(values, rows, active)
    assert isinstance(gradient, Tensor)
    return gradient


class _TableGradient(torch.autograd.Function):
    """`G[f] = Σ_{j: f_j = f} v_j r[i_j]`: the outer products, summed by feature."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor, active: ActiveFeatures) -> Tensor:
        ctx.save_for_backward(values, rows)
        ctx.active = active
        return _gather_sum(values[active.order], active.by_feature, rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grad_outputs
        values, rows = ctx.saved_tensors
        by_value = inner_products(rows, ctx.active, grad) if ctx.needs_input_grad[0] else None
        by_row = weighted_sum(values, ctx.active, grad) if ctx.needs_input_grad[1] else None
        return by_value, by_row, None


def _gather_sum(values: Tensor, rows: Rows, table: Tensor) -> Tensor:
    return backend(table).gather_sum(values, *rows, table)


def _gather_dot(inputs: Tensor, rows: Rows, table: Tensor) -> Tensor:
    return backend(table).gather_dot(inputs, *rows, table)


def backend(table: Tensor) -> Any:
    """Triton on a GPU, torch's own kernels elsewhere: `gpu` and `cpu` hold the same functions."""
    if not table.is_cuda:
        return cpu
    from transcoders.kernels import gpu  # here: triton comes with torch's CUDA builds only

    return gpu
