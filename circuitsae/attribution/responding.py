"""Errors that respond: what of a change passes an MLP and none of the graph's features answers.

Around the clean run an MLP answers a change of what it reads as its Jacobian says, of which features pass on a part:

    d mlp_out_l = d r_l J_l = (what features write in answer) + d e_l,
    d e_l = d r_l J_l − Σ_{l' ≤ l} (d r_l' W_enc) W_dec[l'→l]    (where errors are held: 0)

Carried down, a target that reads what is written at layer l as G reads the stream before the layer's MLP by

    normᵀ(G J_lᵀ) − normᵀ( Σ_f A[t, f] / a_f · W_enc[:, f] ),    f the layer's features, which are edges of their own,

where A[t, f] has all that f writes at later layers too, as these were scored before. What a skip term passes on is a
part of the first term.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.attribution.linear import LinearModel, Norm, exact
from circuitsae.attribution.nodes import CACHE_BYTES
from circuitsae.replacement import ReplacementModel, Trace
from transcoders.sites import Site

JACOBIAN_BYTES = 2**30
"""The Jacobians of all MLPs at all positions are held up to this size; beyond it each batch goes back through the MLPs,
which takes several times the operations."""
BACKWARD_BYTES = 256 * 2**20
"""What a backward pass through an MLP may take."""
WIDTH = 18
"""Numbers alive for each of a vector's in such a pass: hidden layers are four times as wide."""


class Reading(NamedTuple):
    """How much each feature of a layer is moved by what it reads, by position; filled up with zeros."""

    columns: Int[Tensor, "pos slot"]
    """Of the rows that are carried."""
    vectors: Float[Tensor, "pos slot d_model"]
    """`W_enc[:, f] / a_f`."""

    def transpose(self, A: Float[Tensor, "row column"], count: int) -> Float[Tensor, "row pos d_model"]:
        """How rows read by way of the features what these read, at the first `count` positions."""
        columns = self.columns[:count]
        weights = A[:, columns.flatten()].unflatten(1, columns.shape).transpose(0, 1)
        return torch.bmm(weights, self.vectors[:count]).transpose(0, 1)


@dataclass(frozen=True)
class MLPJacobians:
    """How the MLPs of a model answer small changes on one prompt: `d out(p) = d read(p) J(p)`."""

    trace: Trace

    def transpose(self, layer: int, g: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """`g Jᵀ` at the first positions, as many as g has."""
        if (held := self._held) is not None:
            return torch.bmm(g.transpose(0, 1), held[layer][: g.shape[1]]).transpose(0, 1)
        return self._backward(layer, g)

    @cached_property
    def _held(self) -> list[Float[Tensor, "pos d_out d_in"]] | None:
        """Of each layer Jᵀ."""
        model, n_positions = self.trace.frozen.model, self.trace.n_positions
        if model.n_layers * n_positions * model.d_model**2 * self._reads[0].element_size() > JACOBIAN_BYTES:
            return None
        one = torch.eye(model.d_model, dtype=self._reads[0].dtype, device=self._reads[0].device)
        each = one[:, None].expand(-1, n_positions, -1)
        return [self._backward(layer, each).transpose(0, 1).contiguous() for layer in range(model.n_layers)]

    def _backward(self, layer: int, g: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        model, count = self.trace.frozen.model, g.shape[1]
        with torch.enable_grad():
            read = self._reads[layer][None, :count].to(model.dtype).detach().requires_grad_()
            out = model.parts.blocks[layer].mlp(read)
            at_once = max(1, BACKWARD_BYTES // (WIDTH * read.numel() * read.element_size()))
            parts = [
                torch.autograd.grad(out, read, part[:, None].to(out), retain_graph=True, is_grads_batched=True)[0]
                for part in g.split(at_once)
            ]
        return torch.cat(parts)[:, 0].to(g)

    @cached_property
    def _reads(self) -> list[Float[Tensor, "pos d_model"]]:
        """What each MLP reads on the clean run."""
        model = self.trace.frozen.model
        names = [model.hook(Site(layer, "mlp_in")) for layer in range(model.n_layers)]
        with torch.no_grad():
            _, found = model.run_hooked(self.trace.tokens[None], read=names)
        return [exact(found[name][0]) for name in names]


class Responding:
    """The errors' answers on one prompt, for rows whose columns are these nodes."""

    def __init__(self, model: ReplacementModel, trace: Trace, linear: LinearModel, columns: np.ndarray) -> None:
        """`columns` [column]: the number of its node; the first nodes are the trace's features."""
        self.linear, self.jacobians = linear, MLPJacobians(trace)
        self._model, self._trace = model, trace
        n_features = len(trace.features.value)
        column, features = np.empty(n_features, dtype=np.int64), np.flatnonzero(columns < n_features)
        column[columns[features]] = features
        self._column = torch.from_numpy(column).to(trace.features.index.device)
        self._kept: dict[int, Reading] = {}
        self._kept_bytes = 0

    def transpose(
        self, layer: int, G: Float[Tensor, "row pos d_model"], A: Float[Tensor, "row column"]
    ) -> Iterator[tuple[Norm, Float[Tensor, "row pos d_model"]]]:
        """How the error of `layer` reads what the MLP and the layer's features read, each behind its norm.

        G: how rows read the stream after the block, A: their edges to what is written there and above.
        """
        block = self.linear.blocks[layer]
        written = G if block.mlp_write is None else block.mlp_write.transpose(G)
        yield block.mlp_read, self.jacobians.transpose(layer, written)
        if (reading := self._reading(layer)) is not None:
            yield block.read, reading.transpose(A, G.shape[1]).neg()

    def _reading(self, layer: int) -> Reading | None:
        if layer in self._kept:
            return self._kept[layer]
        index, value = self._trace.features
        rows = (index[:, 0] == layer).nonzero()[:, 0]
        if not len(rows):
            return None
        rows = rows[index[rows, 1].argsort(stable=True)]
        pos = index[rows, 1]
        counts = torch.bincount(pos, minlength=self._trace.n_positions)
        slot = torch.arange(len(rows), device=pos.device) - (counts.cumsum(0) - counts)[pos]
        shape = (self._trace.n_positions, int(counts.max()))
        encoders = self._model.dictionaries.encoder_rows(layer, index[rows, 2]).detach().to(self.linear.dtype)
        vectors = encoders.new_zeros(*shape, encoders.shape[1])
        columns = torch.zeros(shape, dtype=torch.long, device=pos.device)
        vectors[pos, slot] = encoders / value[rows, None].to(encoders)
        columns[pos, slot] = self._column[rows]
        found = Reading(columns, vectors)
        size = vectors.numel() * vectors.element_size()
        if self._kept_bytes + size <= CACHE_BYTES:
            self._kept[layer], self._kept_bytes = found, self._kept_bytes + size
        return found
