"""What writes the query or the key of a head: the two ways to split the stream at one position into sources."""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.attribution.carried import CarriedTargets
from circuitsae.attribution.linear import LinearModel, Norm, attention_norm, linear_model
from circuitsae.attribution.nodes import SourceVectors, TargetVectors, source_nodes
from circuitsae.graph import NodeKind
from circuitsae.replacement import ReplacementModel, Trace

SourceKind = Literal["nodes", "writers"]
Namer = Callable[[int, int], str]
"""The name of a feature, by layer and number; "" where it has none."""


class Source(NamedTuple):
    """What writes a part of a query or a key."""

    id: str
    """As of the graph's nodes: `0.153@8`, `tok@4`, `1.err@3`, `0.b_dec`. No nodes: `1.head3@8`, `0.skip@8`, `2.b_Q`."""
    pos: int
    """Where it is written; -1 for a bias."""
    kind: str
    """Of the node, or `head` or `skip`."""
    text: str = ""
    """The token; the name of a feature."""


class Sources(Protocol):
    """A way to split the stream before one block."""

    def at(self, pos: int, W: Float[Tensor, "d_model d_head"]) -> tuple[list[Source], Float[Tensor, "source d_head"]]:
        """The sources of the stream at a position, and what each gives to `norm(stream) W`, the norm's bias aside."""
        ...


class Prompt:
    """What both ways share: the frozen model of a prompt as matrices, and the stream before block `layer`."""

    def __init__(self, model: ReplacementModel, trace: Trace, layer: int, name: Namer | None) -> None:
        self.trace, self.layer, self._name = trace, layer, name
        self.linear: LinearModel = linear_model(trace.frozen)
        self.norm: Norm = attention_norm(trace.frozen, layer)
        """From the stream to what attention reads."""
        self._nodes = source_nodes(model, trace)
        self.sources = SourceVectors(model, trace, self._nodes, self.linear)
        self.heads: list[Float[Tensor, "pos head d_model"]] = []
        """Of each layer below, what each head writes, biases aside."""
        self.skipped: list[Float[Tensor, "pos d_model"] | None] = []
        """Of each layer below, what the skip term writes, the bias of the MLP's norm aside."""
        self.stream: Float[Tensor, "pos d_model"] = self._carry()

    def _carry(self) -> Float[Tensor, "pos d_model"]:
        sources, linear = self.sources, self.linear
        stream = linear.embed if linear.after_embed is None else linear.after_embed.forward(linear.embed[None])[0]
        stream = stream + sources.broadcast_embed.vectors.sum(0)
        for layer, block in enumerate(linear.blocks[: self.layer]):
            self.heads.append(block.attention.by_head(stream))
            middle = stream + self.heads[-1].sum(1) + sources.broadcast_attention[layer].vectors.sum(0)
            self.skipped.append(self._skip(layer, block.read.forward((stream if block.parallel else middle)[None])))
            written = self.trace.frozen.writes.mlp_out[layer].to(stream)[None]
            stream = middle + (written if block.write is None else block.write.forward(written))[0]
        return stream

    def _skip(self, layer: int, read: Float[Tensor, "1 pos d_model"]) -> Float[Tensor, "pos d_model"] | None:
        skip, write = self.sources.skips[layer], self.linear.blocks[layer].write
        if skip is None:
            return None
        return (read @ skip if write is None else write.forward(read @ skip))[0]

    def source(self, column: int) -> Source:
        """The node of a column of `sources`."""
        node = self._nodes[self.sources.columns[column]]
        if node.kind is NodeKind.FEATURE and self._name is not None:
            return Source(node.id, node.pos, node.kind, self._name(node.layer, node.index))
        return Source(node.id, node.pos, node.kind, node.text if node.kind is NodeKind.TOKEN else "")


class Nodes:
    """The nodes of the graph, wherever they write: carried through earlier heads and skip terms, patterns held.

    Each dimension of the query (or key) is a target, `G(p) = normᵀ(W[:, i])`, and is carried down as those of a graph.
    """

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt

    def at(self, pos: int, W: Float[Tensor, "d_model d_head"]) -> tuple[list[Source], Float[Tensor, "source d_head"]]:
        prompt, sources, top = self._prompt, self._prompt.sources, len(self._prompt.linear.blocks)
        rows, d_model = W.shape[1], W.shape[0]
        here = torch.full((rows,), pos, device=W.device)
        G = torch.zeros(rows, pos + 1, d_model, dtype=prompt.linear.dtype, device=W.device)
        G[:, pos] = prompt.norm.transpose_at(W.T.to(G), here)
        targets = TargetVectors(torch.full_like(here, top), here, W.T.to(G))
        number = torch.arange(rows, device=W.device)
        A = G.new_zeros(rows, sources.n_columns)
        carried = CarriedTargets(sources, targets, np.full(rows, top), G, A, number, joined=rows)
        carried.cross(prompt.layer - 1, 0)
        columns = A.any(0).nonzero().squeeze(1)
        return [prompt.source(column) for column in columns.tolist()], A[:, columns].T


class Writers:
    """What writes at the position itself, heads and skip terms (`1.head3@8`, `0.skip@8`) among the nodes."""

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt

    def at(self, pos: int, W: Float[Tensor, "d_model d_head"]) -> tuple[list[Source], Float[Tensor, "source d_head"]]:
        found: dict[Source, Tensor] = {}
        for layer in range(-1, self._prompt.layer):
            for source, vector in self._written(layer, pos):
                found[source] = found[source] + vector if source in found else vector
        written = torch.stack(list(found.values()))
        normed = self._prompt.norm.forward_at(written, torch.full((len(written),), pos, device=written.device))
        return list(found), normed @ W.to(normed)

    def _written(self, layer: int, pos: int) -> list[tuple[Source, Float[Tensor, "d_model"]]]:
        """By the embeddings (layer −1), or by a block."""
        prompt, sources = self._prompt, self._prompt.sources
        columns = sources.local_columns(layer)
        columns = columns[sources.pos[columns] == pos]
        pairs = list(zip(columns.tolist(), sources.vectors(layer, columns), strict=True))
        groups = [sources.broadcast_embed]
        if layer >= 0:
            groups = [sources.broadcast_attention[layer], sources.broadcast_mlp[layer]]
        for group in groups:
            pairs += zip(group.columns.tolist(), group.vectors[:, pos], strict=True)
        found = [(prompt.source(column), vector) for column, vector in pairs]
        if layer >= 0:
            heads = prompt.heads[layer][pos]
            found += [(Source(f"{layer}.head{head}@{pos}", pos, "head"), vector) for head, vector in enumerate(heads)]
            if (skipped := prompt.skipped[layer]) is not None:
                found.append((Source(f"{layer}.skip@{pos}", pos, "skip"), skipped[pos]))
        return found
