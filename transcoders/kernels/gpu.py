# pyright: reportMissingImports=false, reportIndexIssue=false
"""The two sparse products on a GPU, in Triton.

One program for each row, and of sums for each block of columns: no atomics, so results are repeatable. Sums run in
float32, those of float64 tables in float64. A row is found in the lists by where it starts, so that rows of a layer are
taken out of those of all without asking how many features they have.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_LARGEST_BLOCK = 1024


@triton.jit
def _sum_kernel(values, column, start, table, out, d, block: tl.constexpr, double: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * block + tl.arange(0, block)
    inside = offsets < d
    total = tl.zeros([block], dtype=tl.float64 if double else tl.float32)
    for j in range(tl.load(start + row), tl.load(start + row + 1)):
        weights = tl.load(table + tl.load(column + j).to(tl.int64) * d + offsets, mask=inside, other=0.0)
        total += tl.load(values + j).to(total.dtype) * weights.to(total.dtype)
    tl.store(out + row * d + offsets, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dot_kernel(inputs, column, start, table, out, d, block: tl.constexpr, double: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = inputs + row * d
    for j in range(tl.load(start + row), tl.load(start + row + 1)):
        second = table + tl.load(column + j).to(tl.int64) * d
        total = tl.zeros([block], dtype=tl.float64 if double else tl.float32)
        for begin in range(0, d, block):
            offsets = begin + tl.arange(0, block)
            inside = offsets < d
            x = tl.load(first + offsets, mask=inside, other=0.0).to(total.dtype)
            total += x * tl.load(second + offsets, mask=inside, other=0.0).to(total.dtype)
        tl.store(out + j, tl.sum(total, axis=0).to(out.dtype.element_ty))


def gather_sum(
    values: Float[Tensor, "n"], column: Int[Tensor, "n"], start: Int[Tensor, "_"], table: Float[Tensor, "m d"]
) -> Float[Tensor, "row d"]:
    """`out[i] = Σ_j values[j] · table[column[j]]`, j over row i."""
    d = table.shape[1]
    out = table.new_empty(len(start) - 1, d)
    if out.numel():
        block = _block(d)
        arguments: tuple[Any, ...] = (values.contiguous(), column.contiguous(), start.contiguous(), table.contiguous())
        launch: Any = _sum_kernel[(len(out), triton.cdiv(d, block))]
        launch(*arguments, out, d, block=block, double=table.dtype == torch.float64)
    return out


def gather_dot(
    inputs: Float[Tensor, "row d"], column: Int[Tensor, "n"], start: Int[Tensor, "_"], table: Float[Tensor, "m d"]
) -> Float[Tensor, "n"]:
    """`out[j] = ⟨inputs[i], table[column[j]]⟩`, j over row i; 0 for what no row lists."""
    d = table.shape[1]
    out = inputs.new_zeros(len(column))
    if len(column):
        arguments: tuple[Any, ...] = (inputs.contiguous(), column.contiguous(), start.contiguous(), table.contiguous())
        launch: Any = _dot_kernel[(len(inputs),)]
        launch(*arguments, out, d, block=_block(d), double=table.dtype == torch.float64)
    return out


def gather_sum_of_some(
    values: Float[Tensor, "n"],
    column: Int[Tensor, "n"],
    start: Int[Tensor, "_"],
    table: Float[Tensor, "m d"],
    rows: slice,
) -> Float[Tensor, "row d"]:
    """`gather_sum` of some of the rows."""
    return gather_sum(values, column, start[rows.start : rows.stop + 1], table)


def gather_dot_of_some(
    inputs: Float[Tensor, "row d"],
    column: Int[Tensor, "n"],
    start: Int[Tensor, "_"],
    table: Float[Tensor, "m d"],
    rows: slice,
) -> Float[Tensor, "n"]:
    """`gather_dot` of some of the rows, whose inputs are given; 0 for what the others list."""
    return gather_dot(inputs, column, start[rows.start : rows.stop + 1], table)


def _block(d: int) -> int:
    return min(_LARGEST_BLOCK, 1 << (d - 1).bit_length())
