"""Vectors being carried through a prompt's layers: targets downwards, sources upwards.

    G_t(q): how target t reads the stream at position q        X_s(q): what source s has written there

The host decides from sizes that it knows what is done next, and never waits for a number that a device has.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.attribution.linear import Attention, LinearModel, Norm
from circuitsae.attribution.nodes import BroadcastSources, SourceVectors, TargetVectors
from circuitsae.attribution.responding import Responding


@runtime_checkable
class Local(Protocol):
    """What is written at one position each, in one layer."""

    def score(self, G: Float[Tensor, "row pos d_model"], A: Float[Tensor, "row column"]) -> None:
        """Add to the edges `A` of rows that read the stream as `G` says."""
        ...


@runtime_checkable
class Written(Protocol):
    """What the sources write, in the columns of the rows that are carried."""

    linear: LinearModel
    skips: list[Tensor | None]
    broadcast_mlp: list[BroadcastSources]
    broadcast_attention: list[BroadcastSources]
    broadcast_embed: BroadcastSources

    def local(self, layer: int) -> Local:
        """What is written at one position each by the MLP of `layer`, or by the embeddings (layer −1)."""
        ...

    def read_bias(self, layer: int, norm: Norm | None = None) -> tuple[int, Float[Tensor, "d_model"]] | None:
        """The column and the vector of the bias in what is read at `layer` (or by the unembedding)."""
        ...


@dataclass
class CarriedTargets:
    """Targets being carried down; they join, in the order of their rows, at the layer that they read."""

    sources: Written
    targets: TargetVectors
    layers: np.ndarray
    G: Float[Tensor, "row pos d_model"]
    """How each reads the stream where it has been carried to."""
    A: Float[Tensor, "row column"]
    """The edges scored so far."""
    number: Int[Tensor, "row"]
    """0, 1, …"""
    every: int = 1
    """Skip terms, and errors' answers, are taken by every so many rows, from the first on."""
    responds: Responding | None = None
    """How errors answer, where they do; the sources have no skip terms then."""
    joined: int = 0
    crossed: int = 0
    """Rows that have passed an attention; those after them are still at one position each."""

    @classmethod
    def nothing_yet(
        cls,
        sources: Written,
        targets: TargetVectors,
        layers: np.ndarray,
        count: int,
        n_columns: int,
        every: int = 1,
        responds: Responding | None = None,
    ) -> "CarriedTargets":
        """Of targets sorted from the top layer down, with their `layers`, all before position `count`."""
        vectors = targets.vector.to(sources.linear.dtype)
        G, A = vectors.new_zeros(len(layers), count, vectors.shape[1]), vectors.new_zeros(len(layers), n_columns)
        number = torch.arange(len(layers), device=vectors.device)
        return cls(sources, targets._replace(vector=vectors), layers, G, A, number, every, responds)

    def carry_down(self, stop: int) -> None:
        """To the stream before block `stop`, which none of the targets reads below; 0: to the embeddings."""
        top = len(self.sources.linear.blocks)
        self.read(top)
        self.cross(min(int(self.layers[0]), top - 1), stop)

    def cross(self, top: int, stop: int) -> None:
        """From the stream after block `top` to the one before block `stop`."""
        sources, blocks = self.sources, self.sources.linear.blocks
        for layer in range(top, stop - 1, -1):
            sources.local(layer).score(self.G[: self.joined], self.A[: self.joined])
            self.score_mlp_biases(sources.broadcast_mlp[layer])
            past = self.transpose_skip(layer) if self.responds is None else self.transpose_error(layer, self.responds)
            if not blocks[layer].parallel:
                self.read(layer, past)
            self.score_broadcast(sources.broadcast_attention[layer])
            self.attend(blocks[layer].attention)
            if blocks[layer].parallel:
                self.read(layer, past)
        if stop == 0:
            sources.local(-1).score(self.G[: self.joined], self.A[: self.joined])
            self.score_broadcast(sources.broadcast_embed)

    def read(self, layer: int, past: Tensor | None = None) -> None:
        """What is read at `layer` (or by the unembedding): for targets above past its features, for its own by W_enc.

        Those of its own join here: `G_t = normᵀ(W_enc[:, t])` at their position, where also the norm's bias is read.
        """
        if past is not None:
            self.G[: self.joined : self.every].add_(past)
        joined, linear = int(np.searchsorted(-self.layers, -layer, side="right")), self.sources.linear
        if joined > self.joined:
            here = slice(self.joined, joined)
            vectors, pos = self.targets.vector[here], self.targets.pos[here]
            norm = linear.final if layer == len(linear.blocks) else linear.blocks[layer].read
            self.G[self.number[here], pos] = norm.transpose_at(vectors, pos)
            score_read_bias(self.sources, self.A[here], vectors, layer)
        self.joined = joined

    def transpose_skip(self, layer: int) -> Float[Tensor, "row pos d_model"] | None:
        """How what the skip term of `layer` writes reads the stream, for the rows that take it."""
        skip, block = self.sources.skips[layer], self.sources.linear.blocks[layer]
        if skip is None or not self.joined:
            return None
        G = self.G[: self.joined : self.every]
        written = G if block.write is None else block.write.transpose(G)
        return block.read.transpose(written @ skip.T)

    def transpose_error(self, layer: int, responds: Responding) -> Float[Tensor, "row pos d_model"] | None:
        """How what the error of `layer` answers reads the stream, for the rows that take it."""
        if not self.joined:
            return None
        G, A = (carried[: self.joined : self.every] for carried in (self.G, self.A))
        found = []
        for norm, reads in responds.transpose(layer, G, A):
            if (at := self.sources.read_bias(layer, norm)) is not None:
                column, bias = at
                A[:, column].add_(reads.sum(1) @ bias)
            found.append(norm.transpose(reads))
        return sum(found[1:], found[0])

    def attend(self, attention: Attention) -> None:
        """`G += normᵀ( Σ_h A_hᵀ (G W_Oᵀ)_h W_V,hᵀ )`."""
        old, new = slice(self.crossed), slice(self.crossed, self.joined)
        if self.crossed:
            self.G[old].add_(attention.transpose(self.G[old]))
        if self.joined > self.crossed:
            pos = self.targets.pos[new]
            fresh = self.G[self.number[new], pos]
            self.G[new].add_(attention.transpose_from(fresh, pos, self.G.shape[1]))
        self.crossed = self.joined

    def score_mlp_biases(self, sources: BroadcastSources) -> None:
        """b_dec, and what the bias of the MLP's norm adds through a skip term."""
        if self.every == 1:
            self.score_broadcast(sources)
        else:
            self.score_broadcast(sources.take(slice(1)))
            self.score_broadcast(sources.take(slice(1, None)), self.every)

    def score_broadcast(self, sources: BroadcastSources, every: int = 1) -> None:
        """One matrix product over all positions."""
        G = self.G[: self.joined : every]
        if len(sources.columns) and len(G):
            written = sources.vectors[:, : G.shape[1]]
            self.A[: self.joined : every].index_add_(1, sources.columns, G.flatten(1) @ written.flatten(1).T)

    def meet(self, sources: "CarriedSources") -> None:
        """`A[t, s] += Σ_q G_t(q) · X_s(q)`."""
        count = self.G.shape[1] - sources.first
        if count > 0:
            reads, wrote = self.G[:, sources.first :].flatten(1), sources.X[:, :count].flatten(1)
            self.A[:, sources.column_index] += reads @ wrote.T


def score_read_bias(sources: Written, A: Tensor, vector: Float[Tensor, "row d_model"], layer: int) -> None:
    """Add what targets that read at `layer` read of its norm's bias."""
    if (found := sources.read_bias(layer)) is not None:
        column, bias = found
        A[:, column].add_(vector @ bias)


@dataclass
class CarriedSources:
    """Sources that write at positions from `first` on, being carried up; they join at the layer that they write at."""

    first: int
    columns: np.ndarray
    """Of each row; rows join in this order."""
    layer: np.ndarray
    at: Int[Tensor, "row"]
    """Of each row its position, from `first` on."""
    column_index: Int[Tensor, "row"]
    """`columns` where the tensors are: nothing is copied there inside the loops."""
    X: Float[Tensor, "row pos d_model"]
    """What each has written into the stream where it has been carried to."""
    joined: int = 0
    crossed: int = 0
    """Rows that have passed an attention; those after them are still at one position each."""

    @classmethod
    def nothing_yet(cls, sources: SourceVectors, columns: np.ndarray, first: int) -> "CarriedSources":
        """Of some columns, at the positions from `first` on."""
        errors = sources.trace.errors
        X = torch.zeros(
            len(columns), errors.shape[1] - first, errors.shape[2], dtype=sources.linear.dtype, device=errors.device
        )
        at = torch.from_numpy((sources.pos[columns] - first).clip(0)).to(errors.device)
        return cls(first, columns, sources.layer[columns], at, torch.from_numpy(columns).to(errors.device), X)

    def attend(self, attention: Attention) -> None:
        """`X += Σ_h A_h norm(X) W_V,h W_O,h`."""
        old, new = slice(self.crossed), slice(self.crossed, self.joined)
        if self.crossed:
            self.X[old] += attention.forward(self.X[old], self.first)
        if self.joined > self.crossed:
            at = self.at[new]
            fresh = self.X[torch.arange(self.crossed, self.joined, device=at.device), at]
            self.X[new] += attention.forward_from(fresh, at + self.first, self.first)
        self.crossed = self.joined

    def write_everywhere(self, written: BroadcastSources) -> None:
        """Add what broadcast sources, which are rows of these, write."""
        for column, vectors in zip(written.columns.tolist(), written.vectors, strict=True):
            self.X[int(np.flatnonzero(self.columns == column)[0])] += vectors
