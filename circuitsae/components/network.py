"""A language model cut at the inputs and outputs of its components, runnable from any layer on.

Attention and MLPs are run by the model's own modules, so that rotary positions, soft caps, windows and the like need
no code here. To give each head its own inputs, queries, keys and values are computed here (`norm(x_h) W_Q,h + b_Q,h`)
and put in the place of the module's own. What a head writes is `z W_O,h`.

Heads, MLPs and embeddings as nodes: what writes into the residual stream, what reads it, and the edges between.

| writers | | readers | |
|---|---|---|---|
| `embed`, `pos` | token and learned positional embeddings | `a{l}.h{h}.q`, `.k`, `.v` | an attention head's inputs |
| `a{l}.h{h}` | an attention head | `m{l}` | an MLP's input |
| `m{l}` | an MLP | `logits` | the final norm and unembedding |

Where heads share keys and values (GQA), those inputs belong to the key-value head: `a{l}.kv{g}.k`, `a{l}.kv{g}.v`.
An edge runs from every writer to every reader after it. In parallel blocks an MLP does not read its own layer's heads.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.errors import InputError, ModelError
from transcoders.language_model import LanguageModel
from transcoders.model_parts import AttentionPart, Call

_READER = re.compile(r"a(?P<layer>\d+)\.(?P<owner>h|kv)(?P<head>\d+)\.(?P<kind>[qkv])")


class Edge(NamedTuple):
    """A writer's contribution to one reader's input."""

    writer: str
    reader: str

    def __str__(self) -> str:
        return f"{self.writer}→{self.reader}"


@dataclass(frozen=True)
class ComponentGraph:
    """Every node and edge of a model of this shape."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    positional: bool
    """Whether positions are embedded by a writer of their own."""
    parallel: bool = False
    """Whether an MLP reads the stream before its layer's attention."""

    @cached_property
    def writers(self) -> tuple[str, ...]:
        """In the order in which they write; `embed` first."""
        names = ["embed", *(["pos"] if self.positional else [])]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)] + [f"m{layer}"]
        return tuple(names)

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """In the order in which they read: of each layer q, k and v of all heads, then the MLP; `logits` last."""
        names: list[str] = []
        for layer in range(self.n_layers):
            names += [reader for kind in "qkv" for reader in self.head_readers(layer, kind)] + [f"m{layer}"]
        return (*names, "logits")

    def head_readers(self, layer: int, kind: str) -> list[str]:
        """The readers that are input `kind` (q, k or v) of a layer's heads."""
        if kind == "q" or self.n_kv_heads == self.n_heads:
            return [f"a{layer}.h{head}.{kind}" for head in range(self.n_heads)]
        return [f"a{layer}.kv{group}.{kind}" for group in range(self.n_kv_heads)]

    def heads_of(self, reader: str) -> tuple[int, ...]:
        """The heads that an attention input feeds: one, or those of a key-value head."""
        match = _READER.fullmatch(reader)
        if match is None:
            raise InputError(f"{reader!r} is no input of a head; those read like 'a3.h0.q'.")
        head, size = int(match["head"]), self.n_heads // self.n_kv_heads
        return (head,) if match["owner"] == "h" else tuple(range(head * size, (head + 1) * size))

    def first_after(self, stage: str) -> int:
        """How many writers come before a stage: a reader, or `a{l}` for the inputs of layer l's heads."""
        start = 1 + self.positional
        if stage == "logits":
            return len(self.writers)
        layer = int(re.match(r"[am](\d+)", stage)[1])  # pyright: ignore[reportOptionalSubscript]
        before = start + layer * (self.n_heads + 1)
        return before + self.n_heads if stage.startswith("m") and not self.parallel else before

    def writers_before(self, reader: str) -> tuple[str, ...]:
        """The writers whose output a reader's input contains."""
        return self.writers[: self.first_after(reader)]

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge, ordered by reader, then by writer."""
        return tuple(Edge(writer, reader) for reader in self.readers for writer in self.writers_before(reader))

    @cached_property
    def writer_index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.writers)}

    @cached_property
    def reader_index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.readers)}

    def writer_of(self, reader: str) -> tuple[str, ...]:
        """The writers that a reader is an input of; none for the logits."""
        if reader == "logits":
            return ()
        if reader.startswith("m"):
            return (reader,)
        layer = reader[1 : reader.index(".")]
        return tuple(f"a{layer}.h{head}" for head in self.heads_of(reader))

    def check_edges(self, edges: Iterable[Edge | tuple[str, str]]) -> tuple[Edge, ...]:
        """The edges as `Edge`s, each once; raises `InputError` for one that this model does not have."""
        given = tuple(dict.fromkeys(Edge(*edge) for edge in edges))
        known = set(self.edges)
        for edge in given:
            if edge not in known:
                raise InputError(
                    f"This model ({self.n_layers} layers, {self.n_heads} heads) has no edge {edge}; "
                    "edges run from a writer like 'a0.h1' to a later reader like 'a1.h0.q', 'm1' or 'logits'."
                )
        return given

    def check_writers(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names, each once; raises `InputError` for one that is no writer of this model."""
        given = tuple(dict.fromkeys(names))
        for name in given:
            if name not in self.writer_index:
                raise InputError(f"This model has no component {name!r}; components read like 'embed', 'a0.h1', 'm0'.")
        return given

    def connected(self, edges: Iterable[Edge]) -> frozenset[Edge]:
        """The edges that lie on a path of these edges from an embedding to the logits."""
        writers: dict[str, set[str]] = {}
        for edge in edges:
            writers.setdefault(edge.reader, set()).add(edge.writer)
        reading = [reader for reader in self.readers if reader in writers]
        reached = {"embed", "pos"}
        for reader in reading:
            if writers[reader] & reached:
                reached.update(self.writer_of(reader))
        needed: set[str] = set()
        found: list[Edge] = []
        for reader in reversed(reading):
            if reader == "logits" or needed & set(self.writer_of(reader)):
                forward = writers[reader] & reached
                needed |= forward
                found += [Edge(writer, reader) for writer in forward]
        return frozenset(found)


_EMBED, _POSITION = "embed.hook_out", "pos_embed.hook_out"
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}

HeadInputs = Float[Tensor, "batch pos reader d_model"]


@dataclass(frozen=True)
class Projections:
    """Queries, keys and values, before rotary positions and norms of their own."""

    q: Float[Tensor, "batch pos head d_head"]
    k: Float[Tensor, "batch pos kv d_head"]
    v: Float[Tensor, "batch pos kv d_head"]


class Network:
    """A language model as components. One for each model; `Network.of(model)` keeps it.

    Raises `ModelError` where the parts, put together again, do not give the model's own logits.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.parts, self.blocks = model.parts, model.parts.blocks
        try:
            self._weights = [_weights(block.attention) for block in self.blocks]
            n_heads, n_kv = self._weights[0]["W_O"].shape[0], self._weights[0]["W_V"].shape[0]
        except (AttributeError, TypeError) as error:
            raise ModelError(
                f"{model.name} has no attention heads that can be taken apart ({error}); "
                "its architecture is not supported here."
            ) from error
        self.graph = ComponentGraph(model.n_layers, n_heads, n_kv, model.has_hook(_POSITION), self.blocks[0].parallel)
        self._calls: dict[int, list[Call]] = {}

    @classmethod
    def of(cls, model: LanguageModel) -> "Network":
        """The network of a model, made once."""
        made = model.__dict__.get("_components")
        if made is None or made.model is not model or made.dtype != model.dtype:
            made = cls(model)
            model.__dict__["_components"] = made
        return made

    @property
    def dtype(self) -> torch.dtype:
        return self._weights[0]["W_O"].dtype

    # parts

    def embeddings(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "writer batch pos d_model"]:
        """What `embed` (and `pos`) write."""
        self._prepare(tokens)
        found = [self.parts.embed(tokens)]
        if self.graph.positional:
            found.append(self._positions[tokens.shape[1]].expand_as(found[0]))
        return torch.stack(found)

    def norm(self, layer: int, name: str, x: Tensor) -> Tensor:
        """A block's norm of vectors in the last axis; the identity where the block has none of this name."""
        norm = self.blocks[layer].norm(name)
        return x if norm is None else norm(x.reshape(x.shape[0], -1, x.shape[-1])).reshape(x.shape)

    def project(
        self, layer: int, kind: str, x: Float[Tensor, "batch pos _ d_model"]
    ) -> Float[Tensor, "batch pos n d_head"]:
        """Queries, keys or values of inputs: one for each reader, or a single one that all of them share."""
        weights = self._weights[layer]
        normed = self.norm(layer, "ln1", x)
        W, b = weights[f"W_{kind.upper()}"], weights[f"b_{kind.upper()}"]
        if normed.shape[2] == 1:
            out = einsum(normed[:, :, 0], W, "batch pos d_model, n d_model d_head -> batch pos n d_head")
        else:
            out = einsum(normed, W, "batch pos n d_model, n d_model d_head -> batch pos n d_head")
        return out if b is None else out + b

    def attend(self, layer: int, at: Projections) -> Float[Tensor, "batch pos head d_head"]:
        """What the heads of a layer read: patterns times values."""
        batch, pos = at.q.shape[:2]
        like = at.q.new_zeros(batch, pos, self.model.d_model)
        mixed = self.blocks[layer].attention.mixed(self._calls[pos][layer], like, q=at.q, k=at.k, v=at.v)
        return mixed.reshape(batch, pos, self.graph.n_heads, -1)

    def results(self, layer: int, z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head d_model"]:
        """What each head writes before any norm after attention: `z W_O`."""
        W_O = self._weights[layer]["W_O"]
        return einsum(z, W_O, "batch pos head d_head, head d_head d_model -> batch pos head d_model")

    def head_result(
        self, layer: int, z: Float[Tensor, "batch pos head d_head"], heads: tuple[int, ...]
    ) -> Float[Tensor, "batch pos d_model"]:
        """What some heads write together."""
        W_O = self._weights[layer]["W_O"][list(heads)]
        return einsum(z, W_O, "batch pos head d_head, head d_head d_model -> batch pos d_model")

    def attention_bias(self, layer: int) -> Tensor | float:
        """b_O: what attention adds whatever its input; it belongs to no head."""
        bias = self._weights[layer]["b_O"]
        return 0.0 if bias is None else bias

    def share(self, layer: int, results: Float[Tensor, "batch pos head d_model"], total: Tensor) -> Tensor:
        """The heads' shares of what attention adds to the stream, where a norm follows it: its scale is the total's."""
        norm = self.blocks[layer].norm("ln1_post")
        if norm is None:
            return results
        if norm.centres:
            raise ModelError(f"{self.model.name} centres attention's output, which is not supported for single heads.")
        # normed(total) / total is the scale and weight of each dimension, but total may be zero: use the formula.
        scale = (total.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        return results * (norm.weight() / scale)[:, :, None]

    def mlp(self, layer: int, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What an MLP writes, given the stream that it reads (before its norm)."""
        block = self.blocks[layer]
        return self.norm(layer, "ln2_post", block.mlp(self.norm(layer, block.mlp_norm, x)))

    def logits(self, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits of what the last block leaves."""
        norm = self.parts.final_norm
        return self.unembed(stream if norm is None else norm(stream))

    def unembed(self, normed: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits of what the final norm gives, through a soft cap if there is one."""
        return self.parts.unembed(normed)

    def after_attention(self, layer: int, out: Float[Tensor, "batch pos d_model"]) -> Tensor:
        """What attention's output (b_O included) adds to the stream."""
        return self.norm(layer, "ln1_post", out)

    def finish_layer(self, layer: int, before: Tensor, middle: Tensor) -> Tensor:
        """The stream after a block, from the one before it and the one after its attention."""
        return middle + self.mlp(layer, before if self.graph.parallel else middle)

    def run(
        self,
        stream: Float[Tensor, "batch pos d_model"],
        start: int = 0,
        needed: Callable[[int, Tensor], Tensor] = lambda layer, x: x,
    ) -> Float[Tensor, "batch read d_model"]:
        """The stream after the last block, from the one before block `start`; nothing is cut.

        `needed(layer, x)` keeps the positions that are read after the attention of a layer.
        """
        for layer in range(start, self.graph.n_layers):
            out = self._attention(layer, self.norm(layer, "ln1", stream))
            middle = stream + self.after_attention(layer, out)
            stream = self.finish_layer(layer, needed(layer, stream), needed(layer, middle))
        return stream

    # what the modules are called with

    def _attention(self, layer: int, normed: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self.blocks[layer].attention.run(normed, self._calls[normed.shape[1]][layer])

    @torch.no_grad()
    def _prepare(self, tokens: Int[Tensor, "batch pos"]) -> None:
        """Record once for each length what the model calls its attention with (masks, rotary positions), and check."""
        length = tokens.shape[1]
        if length in self._calls:
            return
        names = [_EMBED, *([_POSITION] if self.graph.positional else [])]
        with self.parts.recorded_calls() as calls:
            logits, cache = self.model.run_hooked(tokens[:1], read=names)
        self._calls[length] = calls
        self._positions = getattr(self, "_positions", {})
        stream = cache[_EMBED]
        if self.graph.positional:
            self._positions[length] = cache[_POSITION].expand(1, length, -1)
            stream = stream + self._positions[length]
        ours = self.logits(self._run_apart(stream))
        error = float((ours - logits).abs().max() / logits.abs().max().clamp(min=1e-30))
        if not error <= _TOLERANCE.get(self.dtype, 5e-2):
            del self._calls[length]
            raise ModelError(
                f"The components of {self.model.name}, put together again, give logits that differ from its own by "
                f"{error:.1e} (relative); its architecture is not supported here."
            )

    def _run_apart(self, stream: Tensor) -> Tensor:
        """`run` through the heads one by one."""
        for layer in range(self.graph.n_layers):
            x = stream[:, :, None]
            z = self.attend(layer, Projections(*(self.project(layer, kind, x) for kind in "qkv")))
            total = self.results(layer, z).sum(2) + self.attention_bias(layer)
            stream = self.finish_layer(layer, stream, stream + self.after_attention(layer, total))
        return stream


def _weights(attention: AttentionPart) -> dict[str, Any]:
    weights, biases = ({kind: get(kind) for kind in "QKVO"} for get in (attention.weight, attention.bias))
    return {f"W_{kind}": w for kind, w in weights.items()} | {f"b_{kind}": b for kind, b in biases.items()}
