"""The two sparse products on a processor, from kernels that torch ships.

Both read one row of a table for every active feature: `embedding_bag` adds rows up, `sampled_addmm` multiplies them
with the inputs. Neither forms anything of the size batch × features, and neither needs MKL.
"""

import warnings
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag, pad


def gather_sum(
    values: Float[Tensor, "n"], column: Int[Tensor, "n"], start: Int[Tensor, "_"], table: Float[Tensor, "m d"]
) -> Float[Tensor, "row d"]:
    """`out[i] = Σ_j values[j] · table[column[j]]`, j over row i."""
    if not len(column):
        return table.new_zeros(len(start) - 1, table.shape[1])
    return embedding_bag(
        column,
        table.detach().contiguous(),  # attached, torch would also keep what its own backward pass needs
        start,
        mode="sum",
        per_sample_weights=values.detach().contiguous(),
        include_last_offset=True,
    )


def gather_dot(
    inputs: Float[Tensor, "row d"], column: Int[Tensor, "n"], start: Int[Tensor, "_"], table: Float[Tensor, "m d"]
) -> Float[Tensor, "n"]:
    """`out[j] = ⟨inputs[i], table[column[j]]⟩`, j over row i."""
    if not len(column):
        return inputs.new_zeros(0)
    _hush_beta_warning()
    pattern = torch.sparse_csr_tensor(
        start, column, inputs.new_zeros(len(column)), (len(inputs), len(table)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, inputs.detach(), table.detach().mT, beta=0.0).values()


def gather_sum_of_some(
    values: Float[Tensor, "n"],
    column: Int[Tensor, "n"],
    start: Int[Tensor, "_"],
    table: Float[Tensor, "m d"],
    rows: slice,
) -> Float[Tensor, "row d"]:
    """`gather_sum` of some of the rows."""
    return gather_sum(values, column, start, table)[rows]


def gather_dot_of_some(
    inputs: Float[Tensor, "row d"],
    column: Int[Tensor, "n"],
    start: Int[Tensor, "_"],
    table: Float[Tensor, "m d"],
    rows: slice,
) -> Float[Tensor, "n"]:
    """`gather_dot` of some of the rows, whose inputs are given; 0 for what the others list."""
    return gather_dot(pad(inputs, (0, 0, rows.start, len(start) - 1 - rows.stop)), column, start, table)


@cache
def _hush_beta_warning() -> None:
    """Torch says once per process that its compressed tensors are new; a user of a trainer cannot act on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1), check_invariants=False)
