"""The sources of a prompt as vectors: what each adds to the residual stream, at which layer and position.

Columns are these sources: first the narrow ones, which write at one position, sorted by position and layer (embeddings
are layer −1), so that what is written at one place is a range of columns; then the wide ones, which write at many.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.attribution.linear import LinearModel
from circuitsae.attribution.sources import Sources
from circuitsae.graph import NodeKind
from circuitsae.replacement import FIRST, ReplacementModel, Trace

CACHE_BYTES = 128 * 2**20
"""Decoder vectors of a prompt are kept from batch to batch up to this size."""


class Place(NamedTuple):
    """What is written at one position: a range of a layer's vectors, and the first of their columns."""

    pos: int
    start: int
    stop: int
    column: int


class Narrow(NamedTuple):
    """What is written at one position each, in one layer."""

    vectors: Float[Tensor, "source d_model"]
    places: list[Place]


class Wide(NamedTuple):
    """What is written at many positions, in one layer."""

    columns: Int[Tensor, "source"]
    vectors: Float[Tensor, "source pos d_model"]


class Writers:
    """What every source of a prompt writes into the residual stream."""

    def __init__(self, model: ReplacementModel, trace: Trace, sources: Sources, linear: LinearModel) -> None:
        self.dictionaries = model.dictionaries
        self.trace = trace
        self.linear = linear
        nodes = sources.nodes
        node_layer = np.array([node.layer for node in nodes])
        node_pos = np.array([node.pos for node in nodes])
        is_narrow = node_pos >= 0
        order = np.lexsort((node_layer[is_narrow], node_pos[is_narrow]))
        self.columns = np.concatenate([np.flatnonzero(is_narrow)[order], np.flatnonzero(~is_narrow)])
        """Number among `sources.nodes` of each column."""
        self.n_narrow = len(order)
        self.layer, self.pos = node_layer[self.columns], node_pos[self.columns]
        self._kind = np.array([nodes[i].kind for i in self.columns], dtype=object)
        self._wide = {
            (nodes[i].layer, nodes[i].text): column for column, i in enumerate(self.columns) if not is_narrow[i]
        }
        self._first_writer = [
            0 if len(model.dictionaries.write_layers(0)) > 1 else i for i in range(model.model.n_layers)
        ]
        self._place = self.pos[: self.n_narrow] * (model.model.n_layers + 1) + self.layer[: self.n_narrow] + 1
        self._kept: dict[int, Narrow] = {}
        self._kept_bytes = 0
        layers = range(model.model.n_layers)
        self.wide_mlp = [self._wide_mlp(layer) for layer in layers]
        """Of each layer: b_dec, and what the bias of the MLP's norm adds through a skip term."""
        self.wide_attention = [self._wide_attention(layer) for layer in layers]
        """Of each layer: the biases of attention and of its norms, through the pattern."""
        self.wide_embed = self._wide_embed()
        """The bias of a norm of the embeddings."""

    @property
    def writes_again(self) -> bool:
        """Whether features write at later layers than their own."""
        return self._first_writer[-1] < len(self._first_writer) - 1

    @property
    def n_columns(self) -> int:
        return len(self.columns)

    def column_range(self, pos: int, layers: range) -> tuple[int, int]:
        """The columns of the narrow sources at one position and in a range of layers."""
        at = pos * (len(self.linear.blocks) + 1) + 1
        low, high = np.searchsorted(self._place, [at + layers.start, at + layers.stop])
        return int(low), int(high)

    def narrow(self, layer: int) -> Narrow:
        """What is written at one position each by the MLP of `layer`, or by the embeddings (layer −1)."""
        if layer in self._kept:
            return self._kept[layer]
        writers = range(layer if layer < 0 else self._first_writer[layer], layer + 1)
        places: list[Place] = []
        columns = [np.zeros(0, dtype=np.int64)]
        at = 0
        for pos in range(self.trace.n_positions):
            low, high = self.column_range(pos, writers)
            if high > low:
                places.append(Place(pos, at, at + high - low, low))
                columns.append(np.arange(low, high))
                at += high - low
        found = Narrow(self.vectors(layer, np.concatenate(columns)), places)
        size = found.vectors.numel() * found.vectors.element_size()
        if self._kept_bytes + size <= CACHE_BYTES:
            self._kept[layer], self._kept_bytes = found, self._kept_bytes + size
        return found

    def vectors(self, layer: int, columns: np.ndarray) -> Float[Tensor, "source d_model"]:
        """What narrow sources add to the stream at `layer`: 0 where one does not write there."""
        trace, kind, device = self.trace, self._kind[columns], self.trace.errors.device
        out = torch.zeros(len(columns), trace.errors.shape[-1], dtype=self.linear.dtype, device=device)
        pos = torch.from_numpy(self.pos[columns]).to(device)

        def where(mask: np.ndarray) -> Tensor:
            return torch.from_numpy(np.flatnonzero(mask)).to(device)

        if layer < 0:
            writes, token = trace.frozen.writes, where(kind == NodeKind.TOKEN)
            out[token] = writes.embed[pos[token]].to(out)
            if writes.position is not None:
                position = where(kind != NodeKind.TOKEN)
                out[position] = writes.position[pos[position]].to(out)
            norm = self.linear.after_embed
            return out if norm is None else norm.forward_at(out, pos)
        features = kind == NodeKind.FEATURE
        rest = where(~features & (self.layer[columns] == layer))
        out[rest] = trace.errors[layer, pos[rest]].to(out)
        for written_by in range(self._first_writer[layer], layer + 1):
            mask = features & (self.layer[columns] == written_by)
            # Columns of features are node numbers, which are rows of the trace's features.
            rows = torch.from_numpy(self.columns[columns[mask]]).to(device)
            decoders = self.dictionaries.decoder_rows(written_by, trace.features.index[rows, 2], layer).detach()
            out[where(mask)] = decoders.to(out) * trace.features.value[rows, None].to(out)
        norm = self.linear.blocks[layer].after_mlp
        return out if norm is None else norm.forward_at(out, pos)

    def _wide_mlp(self, layer: int) -> Wide:
        block = self.linear.blocks[layer]
        columns = [self._wide[layer, "b_dec"]]
        written = [self.dictionaries.decoder_bias(layer).detach()]
        skip, bias = self.dictionaries.skip(layer), block.before_mlp.bias
        if skip is not None and bias is not None:
            columns.append(self._wide[layer, f"{block.mlp_norm}.b"])
            written.append(bias @ skip.detach().to(bias))
        vectors = torch.stack(written).to(self.linear.dtype)[:, None].repeat(1, self.trace.n_positions, 1)
        vectors[0, :FIRST] = 0  # b_dec stands in for no MLP there; a skip term does
        return self._wide_of(columns, vectors if block.after_mlp is None else block.after_mlp.forward(vectors))

    def _wide_attention(self, layer: int) -> Wide:
        writes = self.linear.blocks[layer].attention.bias_writes
        columns = [self._wide[layer, f"{component}.b"] for component in writes]
        return self._wide_of(columns, torch.stack(list(writes.values())) if writes else self._nothing())

    def _wide_embed(self) -> Wide:
        norm = self.linear.after_embed
        if norm is None or norm.bias is None:
            return self._wide_of([], self._nothing())
        return self._wide_of([self._wide[-1, "embed_ln.b"]], norm.bias.expand(1, self.trace.n_positions, -1))

    def _nothing(self) -> Float[Tensor, "0 pos d_model"]:
        return self.trace.errors.new_zeros(0, *self.trace.errors.shape[1:], dtype=self.linear.dtype)

    def _wide_of(self, columns: list[int], vectors: Float[Tensor, "source pos d_model"]) -> Wide:
        return Wide(torch.tensor(columns, dtype=torch.long, device=vectors.device), vectors)

    def read_bias(self, layer: int) -> tuple[int, Float[Tensor, "d_model"]] | None:
        """The column and the vector of the bias in what the MLP of `layer` (or the unembedding) reads."""
        if layer == len(self.linear.blocks):
            component, norm = "ln_final", self.linear.final
        else:
            block = self.linear.blocks[layer]
            component, norm = block.mlp_norm, block.before_mlp
        return None if norm.bias is None else (self._wide[layer, f"{component}.b"], norm.bias)
