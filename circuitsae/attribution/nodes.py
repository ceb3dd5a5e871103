"""The ends of a prompt's edges: who is read (targets), who writes (sources), as nodes and as vectors.

    A[t, s] = (what s writes) · P(place of s → place of t) · (how t reads)

This module has both vectors of every edge; what lies between them, the path map P, is the engines' business.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.attribution.linear import LinearModel, Norm
from circuitsae.graph import Node, NodeKind
from circuitsae.replacement import ReplacementModel, Trace

UNEMBED = "unembed"

CACHE_BYTES = 128 * 2**20
"""Decoder vectors of a prompt are kept from batch to batch up to this size."""

TARGET_BYTES = 256 * 2**20
"""Encoder vectors of all active features are held up to this size, beyond it those that are asked for."""

FEATURES_AT_ONCE = 2**15
"""Whose encoder vectors are looked at together."""


# who is read


class TargetVectors(NamedTuple):
    """A batch of target vectors. A target's value is `vector · read`, with the read at (layer, pos).

    `layer` l < L reads what the dictionary of layer l reads; `layer` L reads the final norm's output.
    """

    layer: Int[Tensor, "target"]
    pos: Int[Tensor, "target"]
    vector: Float[Tensor, "target d_model"]

    def take(self, which: Int[Tensor, "k"] | slice) -> "TargetVectors":
        """Some of these targets."""
        return TargetVectors(self.layer[which], self.pos[which], self.vector[which])

    @property
    def itemsize(self) -> int:
        """Bytes of a number of a vector."""
        return self.vector.element_size()

    @staticmethod
    def join(*batches: "TargetVectors") -> "TargetVectors":
        """All of some batches, in their order."""
        return TargetVectors(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


class GatheredTargets:
    """All active features and then the logits, whose vectors are gathered from the dictionaries as some are taken."""

    def __init__(self, model: ReplacementModel, trace: Trace, logits: TargetVectors) -> None:
        self._model, self._trace, self._logits = model, trace, logits
        self.layer = torch.cat([trace.features.index[:, 0], logits.layer])
        self.pos = torch.cat([trace.features.index[:, 1], logits.pos])
        self.itemsize = logits.itemsize

    def take(self, which: Int[Tensor, "k"]) -> TargetVectors:
        """Some of these targets, in any order."""
        n_features, vectors = len(self._trace.features.value), self._logits.vector
        feature, found = which < n_features, vectors.new_empty(len(which), vectors.shape[1])
        found[feature] = feature_targets(self._model, self._trace, which[feature]).vector
        found[~feature] = vectors[which[~feature] - n_features]
        return TargetVectors(self.layer[which], self.pos[which], found)


Targets = TargetVectors | GatheredTargets


def feature_targets(model: ReplacementModel, trace: Trace, row: Int[Tensor, "k"]) -> TargetVectors:
    """Encoder directions `W_enc[:, t]` of the trace's active features with these row numbers."""
    layer, pos, feature = trace.features.index[row].unbind(1)
    vector = torch.empty(len(row), model.model.d_model, dtype=model.model.dtype, device=layer.device)
    for which in layer.unique().tolist():
        vector[layer == which] = model.dictionaries.encoder_rows(which, feature[layer == which]).detach()
    return TargetVectors(layer, pos, vector)


def logit_targets(trace: Trace, token: Int[Tensor, "k"]) -> TargetVectors:
    """Centred unembedding directions `W_U[:, v] − mean_v W_U`, read at the last position after the final norm.

    A soft cap of the logits counts as one more frozen scale: `W_U[:, v] s_v − mean_v (W_U s)`.
    """
    model = trace.frozen.model
    last = torch.full_like(token, trace.n_positions - 1)
    vector = centred_columns(model.W_U.detach(), trace, token).T
    return TargetVectors(torch.full_like(token, model.n_layers), last, vector)


class Explained(NamedTuple):
    """What a graph is of: the nodes at its top, how they read, and what b_U adds to each."""

    trace: Trace
    """The prompt up to where they read, with the features that can reach them."""
    nodes: tuple[Node, ...]
    vectors: TargetVectors
    bias: Float[Tensor, "k _"]
    """One column where the model has b_U and the nodes read it, else none."""

    @property
    def bias_nodes(self) -> tuple[Node, ...]:
        layer = self.trace.frozen.model.n_layers
        return (Node(NodeKind.BIAS, layer, -1, text=f"{UNEMBED}.b"),) * self.bias.shape[1]


def centred_columns(weights: Float[Tensor, "*d d_vocab"], trace: Trace, token: Int[Tensor, "k"]) -> Tensor:
    """What `weights` (W_U or b_U) gives to each token's logit, less its mean over the vocabulary: `[*d, k]`."""
    scale = trace.frozen.logit_scale
    mean = weights @ scale / len(scale)
    return weights[..., token] * scale[token] - mean[..., None]


# who writes


def source_nodes(model: ReplacementModel, trace: Trace, features: Sequence[Node] | None = None) -> tuple[Node, ...]:
    """Everything that writes into the residual stream on one prompt: features, errors (layer by layer), tokens, biases.

    Biases: positional embeddings, what dictionaries stand for at BOS, b_dec of each layer, and `bias_keys`.
    `features`: the nodes of the trace's features, where they are known.
    """
    if features is None:
        every = torch.arange(len(trace.features.value), device=trace.errors.device)
        features = feature_nodes(model, trace, feature_targets(model, trace, every))
    positions, first = range(trace.n_positions), first_error(trace)
    stand_for = {layer: model.stands_for(layer) for layer in model.written}
    token = list(zip(positions, trace.tokens.tolist(), trace.token_strings, strict=True))
    has_position = trace.frozen.writes.position is not None
    return (
        *features,
        *(Node(NodeKind.ERROR, layer, pos) for layer in stand_for for pos in positions[first:]),
        *(Node(NodeKind.TOKEN, -1, pos, index, text) for pos, index, text in token),
        *(Node(NodeKind.BIAS, -1, pos, text="pos") for pos in positions if has_position),
        *(Node(NodeKind.BIAS, layer, pos, text=text) for layer, text in stand_for.items() for pos in positions[:first]),
        *(Node(NodeKind.BIAS, layer, -1, text="b_dec") for layer in stand_for),
        *(Node(NodeKind.BIAS, layer, -1, text=f"{label}.b") for layer, label in bias_keys(model)),
    )


def first_error(trace: Trace) -> int:
    """The first position with error nodes: what MLPs write at BOS is the same for every prompt, a bias."""
    return min(trace.first, 1) if trace.starts_with_bos else 0


def bias_keys(model: ReplacementModel) -> list[tuple[int, str]]:
    """The model's own biases, in the order of their nodes: not b_U, and none in what runs between autoencoders."""
    return [key for key in model.model.bias_groups() if key[1] != UNEMBED and not model.spliced]


def feature_nodes(model: ReplacementModel, trace: Trace, targets: Targets) -> list[Node]:
    """The active features, whose encoders are the first `targets`, with the clean h and the constant in it (b_enc)."""
    index, value = trace.features
    bias = torch.empty_like(value)
    for layer in range(model.model.n_layers):
        here = index[:, 0] == layer
        bias[here] = model.dictionaries.encoder_biases(layer, index[here, 2]).detach()
    some = map(targets.take, torch.arange(len(value), device=value.device).split(FEATURES_AT_ONCE))
    reads = trace.frozen.reads.by_layer
    h = torch.cat([torch.einsum("nd,nd->n", t.vector, reads[t.layer, t.pos]) for t in some]) + bias
    columns = zip(index.tolist(), value.tolist(), h.tolist(), bias.tolist(), strict=True)
    return [
        Node(NodeKind.FEATURE, layer, pos, number, activation=a, pre_activation=pre, bias=constant)
        for (layer, pos, number), a, pre, constant in columns
    ]


class Place(NamedTuple):
    """What is written at one position: a range of a layer's vectors, and the first of their columns."""

    pos: int
    start: int
    stop: int
    column: int


class LocalSources(NamedTuple):
    """What is written at one position each, in one layer."""

    vectors: Float[Tensor, "source d_model"]
    places: list[Place]

    def score(self, G: Float[Tensor, "row pos d_model"], A: Float[Tensor, "row column"]) -> None:
        """Add to the edges `A` of rows that read the stream as `G` says: one matrix product per position."""
        for place in self.places:
            if place.pos < G.shape[1] and len(G):
                into = A[:, place.column : place.column + place.stop - place.start]
                into.addmm_(G[:, place.pos], self.vectors[place.start : place.stop].T)


class BroadcastSources(NamedTuple):
    """What is written at many positions, in one layer."""

    columns: Int[Tensor, "source"]
    vectors: Float[Tensor, "source pos d_model"]

    def take(self, which: slice) -> "BroadcastSources":
        """Some of these sources."""
        return BroadcastSources(self.columns[which], self.vectors[which])


class SourceVectors:
    """What every source of a prompt adds to the residual stream, at which layer and position.

    Columns are these sources: first the local ones, which write at one position, sorted by position and layer
    (embeddings are layer −1), so that what is written at one place is a range of columns; then the broadcast ones,
    which write at many.
    """

    def __init__(self, model: ReplacementModel, trace: Trace, nodes: Sequence[Node], linear: LinearModel) -> None:
        self.dictionaries = model.dictionaries
        self.trace = trace
        self.linear = linear
        node_layer = np.array([node.layer for node in nodes])
        node_pos = np.array([node.pos for node in nodes])
        is_local = node_pos >= 0
        order = np.lexsort((node_layer[is_local], node_pos[is_local]))
        self.columns = np.concatenate([np.flatnonzero(is_local)[order], np.flatnonzero(~is_local)])
        """Number among `nodes` of each column."""
        self.n_local = len(order)
        self.layer, self.pos = node_layer[self.columns], node_pos[self.columns]
        self._kind = np.array([nodes[i].kind for i in self.columns], dtype=object)
        self._broadcast = {
            (nodes[i].layer, nodes[i].text): column for column, i in enumerate(self.columns) if not is_local[i]
        }
        layers = range(model.model.n_layers)
        skips = [model.dictionaries.skip(layer) for layer in layers]
        self.skips = [None if skip is None else skip.detach().to(linear.dtype) for skip in skips]
        """Of each layer W_skip, by which a path passes its features."""
        self._first_writer = [0 if len(model.dictionaries.write_layers(0)) > 1 else layer for layer in layers]
        self._place = self.pos[: self.n_local] * (len(layers) + 1) + self.layer[: self.n_local] + 1
        self._kept: dict[int, LocalSources] = {}
        self._kept_bytes = 0
        self.broadcast_mlp = [self._broadcast_mlp(layer) for layer in layers]
        """Of each layer: b_dec, and what the bias of the MLP's norm adds through a skip term."""
        self.broadcast_attention = [self._broadcast_attention(layer) for layer in layers]
        """Of each layer: the biases of attention and of its norms, through the pattern."""
        self.broadcast_embed = self._broadcast_embed()
        """The bias of a norm of the embeddings."""

    def without_skips(self) -> "SourceVectors":
        """These sources where no path takes a skip term."""
        other = copy.copy(self)
        other.skips = [None] * len(self.skips)
        other.broadcast_mlp = [other._broadcast_mlp(layer) for layer in range(len(self.skips))]
        return other

    @property
    def writes_again(self) -> bool:
        """Whether features write at later layers than their own."""
        return self._first_writer[-1] < len(self._first_writer) - 1

    @property
    def n_columns(self) -> int:
        return len(self.columns)

    def local(self, layer: int) -> LocalSources:
        """What is written at one position each by the MLP of `layer`, or by the embeddings (layer −1)."""
        if layer in self._kept:
            return self._kept[layer]
        writers = range(layer if layer < 0 else self._first_writer[layer], layer + 1)
        places: list[Place] = []
        columns = [np.zeros(0, dtype=np.int64)]
        at = 0
        for pos in range(self.trace.n_positions):
            low, high = self._column_range(pos, writers)
            if high > low:
                places.append(Place(pos, at, at + high - low, low))
                columns.append(np.arange(low, high))
                at += high - low
        found = LocalSources(self.vectors(layer, np.concatenate(columns)), places)
        size = found.vectors.numel() * found.vectors.element_size()
        if self._kept_bytes + size <= CACHE_BYTES:
            self._kept[layer], self._kept_bytes = found, self._kept_bytes + size
        return found

    def local_columns(self, layer: int) -> np.ndarray:
        """The columns of what may not be 0 of `local(layer)`, in order."""
        here, local = self.layer[: self.n_local], np.arange(self.n_local)
        if layer < 0:
            return local[here < 0]
        before = (here >= self._first_writer[layer]) & (self._kind[: self.n_local] == NodeKind.FEATURE)
        return local[(here == layer) | ((here < layer) & before)]

    def vectors(self, layer: int, columns: np.ndarray) -> Float[Tensor, "source d_model"]:
        """What local sources add to the stream at `layer`: 0 where one does not write there."""
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
        norm = self.linear.blocks[layer].write
        return out if norm is None else norm.forward_at(out, pos)

    def read_bias(self, layer: int, norm: Norm | None = None) -> tuple[int, Float[Tensor, "d_model"]] | None:
        """The column and the vector of the bias in what is read at `layer` (or by the unembedding), behind its `norm`
        by default.
        """
        if layer == len(self.linear.blocks):
            component, norm = "ln_final", self.linear.final
        else:
            block = self.linear.blocks[layer]
            component, norm = block.mlp_norm, norm or block.read
        return None if norm.bias is None else (self._broadcast[layer, f"{component}.b"], norm.bias)

    def _column_range(self, pos: int, layers: range) -> tuple[int, int]:
        """The columns of the local sources at one position and in a range of layers."""
        at = pos * (len(self.linear.blocks) + 1) + 1
        low, high = np.searchsorted(self._place, [at + layers.start, at + layers.stop])
        return int(low), int(high)

    def _broadcast_mlp(self, layer: int) -> BroadcastSources:
        block = self.linear.blocks[layer]
        columns = [self._broadcast[layer, "b_dec"]]
        written = [self.dictionaries.decoder_bias(layer).detach()]
        skip, bias = self.skips[layer], block.read.bias
        if skip is not None and bias is not None:
            columns.append(self._broadcast[layer, f"{block.mlp_norm}.b"])
            written.append(bias @ skip.to(bias))
        vectors = torch.stack(written).to(self.linear.dtype)[:, None].repeat(1, self.trace.n_positions, 1)
        vectors[0, : self.trace.first] = 0  # b_dec stands in for no MLP there; a skip term does
        return self._at_columns(columns, vectors if block.write is None else block.write.forward(vectors))

    def _broadcast_attention(self, layer: int) -> BroadcastSources:
        writes = self.linear.blocks[layer].bias_writes
        columns = [self._broadcast[layer, f"{component}.b"] for component in writes]
        return self._at_columns(columns, torch.stack(list(writes.values())) if writes else self._nothing())

    def _broadcast_embed(self) -> BroadcastSources:
        norm = self.linear.after_embed
        if norm is None or norm.bias is None:
            return self._at_columns([], self._nothing())
        vectors = norm.bias.expand(1, self.trace.n_positions, -1)
        return self._at_columns([self._broadcast[-1, "embed_ln.b"]], vectors)

    def _nothing(self) -> Float[Tensor, "0 pos d_model"]:
        return self.trace.errors.new_zeros(0, *self.trace.errors.shape[1:], dtype=self.linear.dtype)

    def _at_columns(self, columns: list[int], vectors: Float[Tensor, "source pos d_model"]) -> BroadcastSources:
        return BroadcastSources(torch.tensor(columns, dtype=torch.long, device=vectors.device), vectors)


# both


@dataclass(frozen=True)
class Endpoints:
    """The ends of a prompt's edges: its sources, and its targets: active features, and what is explained."""

    model: ReplacementModel
    trace: Trace
    sources: tuple[Node, ...]
    other_nodes: tuple[Node, ...]
    """b_U, where the model has one, and what is explained."""
    targets: Targets
    target_nodes: np.ndarray
    """[target], which node it is."""
    unembedding_bias: np.ndarray
    """[target, extra], what b_U adds to it."""

    @classmethod
    def of(cls, model: ReplacementModel, explained: Explained) -> "Endpoints":
        """Of all active features that can reach what is explained, and of that."""
        trace, n_features = explained.trace, len(explained.trace.features.value)
        targets = _all_targets(model, explained)
        sources = source_nodes(model, trace, feature_nodes(model, trace, targets))
        first = len(sources) + len(explained.bias_nodes)
        return cls(
            model=model,
            trace=trace,
            sources=sources,
            other_nodes=(*explained.bias_nodes, *explained.nodes),
            targets=targets,
            target_nodes=np.concatenate([np.arange(n_features), first + np.arange(len(explained.nodes))]),
            unembedding_bias=np.pad(to_numpy(explained.bias), ((n_features, 0), (0, 0))),
        )

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (*self.sources, *self.other_nodes)

    @property
    def n_features(self) -> int:
        return len(self.trace.features.value)

    def keep(self, features: np.ndarray) -> "Endpoints":
        """The features with these numbers, in order, and what is explained; what the other features write is error."""
        trace = self.model.keep(self.trace, torch.from_numpy(features).to(self.targets.layer.device))
        sources = source_nodes(self.model, trace, [self.sources[row] for row in features.tolist()])
        dropped = np.setdiff1d(np.arange(self.n_features), features)
        left = self.without_targets(dropped)
        nodes = left.target_nodes - np.searchsorted(dropped, left.target_nodes)
        return replace(left, trace=trace, sources=sources, target_nodes=nodes)

    def without_targets(self, nodes: np.ndarray) -> "Endpoints":
        """Without the targets that are these nodes; the nodes stay."""
        wanted = np.flatnonzero(~np.isin(self.target_nodes, nodes))
        return replace(
            self,
            targets=self.targets.take(torch.from_numpy(wanted).to(self.targets.layer.device)),
            target_nodes=self.target_nodes[wanted],
            unembedding_bias=self.unembedding_bias[wanted],
        )


def _all_targets(model: ReplacementModel, explained: Explained) -> Targets:
    trace, vectors = explained.trace, explained.vectors
    n_features = len(trace.features.value)
    if n_features * model.model.d_model * vectors.itemsize > TARGET_BYTES:
        return GatheredTargets(model, trace, vectors)
    every = torch.arange(n_features, device=vectors.pos.device)
    return TargetVectors.join(feature_targets(model, trace, every), vectors)


def to_numpy(block: Tensor) -> np.ndarray:
    """In float32 where numpy has no such precision."""
    return (block.float() if block.dtype in (torch.bfloat16, torch.float16) else block).cpu().numpy()
