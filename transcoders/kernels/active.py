"""Which features are active where: compressed rows, and the same grouped by feature."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from transcoders.errors import InputError
from transcoders.kernels import host


class Rows(NamedTuple):
    """Compressed rows: row i holds the columns `column[start[i]:start[i + 1]]`."""

    column: Int[Tensor, "n"]
    start: Int[Tensor, "row_plus_one"]


@dataclass(frozen=True, eq=False)
class ActiveFeatures:
    """The active features of a stack of dictionaries on one batch, without their values.

    A token of a layer is a row, `row = layer · batch + token`; a feature has its number in the stack,
    `feature = layer · n_features + feature in its layer`, so that a stack `[layer, feature, d]` of weights is a table
    `[layer · feature, d]`. The features of row i are `feature[start[i]:start[i + 1]]`, in any order.
    """

    feature: Int[Tensor, "n"]
    start: Int[Tensor, "row_plus_one"]
    n_layers: int
    n_features: int

    @property
    def batch(self) -> int:
        return (len(self.start) - 1) // self.n_layers

    @property
    def density(self) -> float:
        """The share of all features of all rows that is active."""
        return len(self.feature) / max(1, (len(self.start) - 1) * self.n_features)

    @cached_property
    def row(self) -> Int[Tensor, "n"]:
        """The row of each active feature."""
        rows = torch.arange(len(self.start) - 1, device=self.start.device)
        return rows.repeat_interleave(self.start.diff(), output_size=len(self.feature))

    @property
    def rows(self) -> Rows:
        return Rows(self.feature, self.start)

    @property
    def order(self) -> Int[Tensor, "n"]:
        """What sorts the active features by their number; rows of one feature stay in order."""
        return self._transposed[0]

    @property
    def by_feature(self) -> Rows:
        """For each feature of the stack, the rows where it is active, in the order of `order`."""
        return self._transposed[1]

    @cached_property
    def _transposed(self) -> tuple[Int[Tensor, "n"], Rows]:
        n_features = self.n_layers * self.n_features
        if host.queued(self.feature):
            feature, order = self.feature.sort(stable=True)
            numbers = torch.arange(n_features + 1, device=feature.device)
            return order, Rows(self.row[order], torch.searchsorted(feature, numbers))
        # On a processor SciPy's counting sort is several times faster than torch's sort.
        places = np.arange(len(self.feature))
        rows = csr_array((places, self.feature.numpy(), self.start.numpy()), shape=(len(self.start) - 1, n_features))
        columns = rows.tocsc()
        order, row, start = (torch.from_numpy(a).long() for a in (columns.data, columns.indices, columns.indptr))
        return order, Rows(row, start)

    def of_layer(self, layer: int) -> tuple[slice, "ActiveFeatures"]:
        """One layer alone: where its values lie, which the host reads, and its features numbered from zero."""
        if self.n_layers == 1 and layer == 0:
            return slice(0, len(self.feature)), self
        first_row, first_feature = layer * self.batch, layer * self.n_features
        starts = self.start[first_row : first_row + self.batch + 1]
        first = int(starts[0])
        part = slice(first, int(starts[-1]))
        own = ActiveFeatures(self.feature[part] - first_feature, starts - first, 1, self.n_features)
        # A layer's features are those of its rows, so its part of every list is the same.
        by_feature = Rows(
            self.by_feature.column[part] - first_row,
            self.by_feature.start[first_feature : first_feature + self.n_features + 1] - first,
        )
        own.__dict__.update(row=self.row[part] - first_row, _transposed=(self.order[part] - first, by_feature))
        return part, own

    def counts(self) -> Int[Tensor, "layer batch"]:
        """Active features per layer and token: L0 before averaging, where no value is zero."""
        return self.start.diff().unflatten(0, (self.n_layers, -1))

    def fired(self, where: Bool[Tensor, "n"] | None = None) -> Bool[Tensor, "layer feature"]:
        """Whether each feature is active anywhere in the batch; `where` leaves out those that are listed with zero."""
        n_features = self.n_layers * self.n_features
        fired = torch.zeros(n_features + 1, dtype=torch.bool, device=self.feature.device)  # the last for those left out
        fired.index_fill_(0, self.feature if where is None else self.feature.where(where, n_features), True)
        return fired[:-1].unflatten(0, (self.n_layers, self.n_features))

    def dense(self, values: Float[Tensor, "n"]) -> Float[Tensor, "layer batch feature"]:
        """The values as a dense tensor; differentiable."""
        flat = values.new_zeros(len(self.start) - 1, self.n_features)
        column = self.feature % self.n_features
        return flat.index_put((self.row, column), values).unflatten(0, (self.n_layers, -1))

    def keep(self, chosen: Int[Tensor, "m"]) -> "ActiveFeatures":
        """Some of them, given by their places in ascending order of rows."""
        n_rows = len(self.start) - 1
        counts = torch.bincount(self.row[chosen], minlength=n_rows)
        return ActiveFeatures(self.feature[chosen], starts(counts), self.n_layers, self.n_features)


class SparseActivations(NamedTuple):
    """Values of active features (activations or pre-activations) and where they are."""

    value: Float[Tensor, "n"]
    active: ActiveFeatures

    def dense(self) -> Float[Tensor, "layer batch feature"]:
        return self.active.dense(self.value)


def active_from_mask(mask: Bool[Tensor, "layer batch feature"]) -> ActiveFeatures:
    """The features where `mask` is true."""
    row, column = mask.flatten(0, 1).nonzero().unbind(1)
    return active_from_pairs(row, column, n_layers=mask.shape[0], batch=mask.shape[1], n_features=mask.shape[2])


def active_of_rows(index: Int[Tensor, "row k"], *, n_layers: int, batch: int, n_features: int) -> ActiveFeatures:
    """From k features of every row, numbered in their layer; the host asks nothing."""
    n_rows, k = index.shape
    row = torch.arange(n_rows, device=index.device)
    feature = index + row.div(batch, rounding_mode="floor").unsqueeze(1) * n_features
    start = torch.arange(n_rows + 1, device=index.device) * k
    active = ActiveFeatures(feature.flatten(), start, n_layers, n_features)
    active.__dict__["row"] = row.unsqueeze(1).expand(-1, k).flatten()  # known already
    return active


def active_from_pairs(
    row: Int[Tensor, "n"], column: Int[Tensor, "n"], *, n_layers: int, batch: int, n_features: int
) -> ActiveFeatures:
    """From pairs of a row (`layer · batch + token`, ascending) and a feature of that row's layer."""
    if host.queued(row):
        start = torch.searchsorted(row, torch.arange(n_layers * batch + 1, device=row.device))
    else:
        start = starts(torch.bincount(row, minlength=n_layers * batch))
    feature = column if n_layers == 1 else column + row.div(batch, rounding_mode="floor") * n_features
    active = ActiveFeatures(feature, start, n_layers, n_features)
    active.__dict__["row"] = row  # known already
    return active


def require_fit(active: ActiveFeatures, values: Tensor | None, table: Tensor, inputs: Tensor | None) -> None:
    """`InputError` where values, weights or inputs do not belong to these features."""
    n_rows, n_table = len(active.start) - 1, active.n_layers * active.n_features
    if values is not None and values.shape != active.feature.shape:
        raise InputError(f"There are {len(active.feature)} active features; got values of shape {list(values.shape)}.")
    if table.shape[0] != n_table:
        raise InputError(
            f"The active features count {active.n_layers} layers of {active.n_features}, so the weights need {n_table} "
            f"rows; got {list(table.shape)}. Give all layers, one row per feature."
        )
    if inputs is not None and inputs.shape != (n_rows, table.shape[1]):
        raise InputError(f"The inputs must be {[n_rows, table.shape[1]]}; got {list(inputs.shape)}.")


def starts(counts: Int[Tensor, "row"]) -> Int[Tensor, "row_plus_one"]:
    """Where rows of these lengths begin and end."""
    start = counts.new_zeros(len(counts) + 1)
    torch.cumsum(counts, 0, out=start[1:])
    return start
