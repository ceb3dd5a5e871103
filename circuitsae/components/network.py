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

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.errors import InputError, ModelError
from transcoders.language_model import LanguageModel

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
        kept = set(edges)
        reached = {"embed", "pos"}
        for reader in self.readers:
            if any(edge.reader == reader and edge.writer in reached for edge in kept):
                reached.update(self.writer_of(reader))
        forward = {edge for edge in kept if edge.writer in reached}
        needed: set[str] = set()
        for reader in reversed(self.readers):
            if reader == "logits" or needed & set(self.writer_of(reader)):
                needed.update(edge.writer for edge in forward if edge.reader == reader)
        alive = {r for r in self.readers if r == "logits" or needed & set(self.writer_of(r))}
        return frozenset(edge for edge in forward if edge.reader in alive)


_EMBED, _POSITION = "embed.hook_out", "pos_embed.hook_out"
_STATEFUL = ("past_key_values", "layer_past", "use_cache", "cache_position", "hidden_states", "output_attentions")
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
        bridge: Any = model.bridge
        self.blocks = list(bridge.blocks)
        try:
            attention = self.blocks[0].attn
            n_heads, n_kv = attention.W_O.shape[0], attention.W_V.shape[0]
            self._weights = [_weights(block.attn) for block in self.blocks]
        except (AttributeError, TypeError) as error:
            raise ModelError(
                f"{model.name} has no attention heads that can be taken apart ({error}); "
                "its architecture is not supported here."
            ) from error
        config = bridge.cfg
        mlp_norm = "ln2" in self.blocks[0].submodules
        ln1 = "ln1" in self.blocks[0].submodules
        parallel = bool(getattr(config, "parallel_attn_mlp", False)) or (ln1 and not mlp_norm)
        self.graph = ComponentGraph(model.n_layers, n_heads, n_kv, model.has_hook(_POSITION), parallel)
        cap = getattr(getattr(bridge.original_model, "config", None), "final_logit_softcapping", None)
        self._soft_cap = float(cap) if cap else None
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

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
        bridge: Any = self.model.bridge
        self._prepare(tokens)
        found = [bridge.embed(tokens)]
        if self.graph.positional:
            found.append(self._positions[tokens.shape[1]].expand_as(found[0]))
        return torch.stack(found)

    def norm(self, layer: int, name: str, x: Tensor) -> Tensor:
        """A block's norm of vectors in the last axis; the identity where the block has none of this name."""
        block = self.blocks[layer]
        if name not in block.submodules:
            return x
        return getattr(block, name)(x.reshape(x.shape[0], -1, x.shape[-1])).reshape(x.shape)

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
        pos = at.q.shape[1]
        found: list[Tensor] = []
        attention = self.blocks[layer].attn
        with contextlib.ExitStack() as hooks:
            for kind, value in (("q", at.q), ("k", at.k), ("v", at.v)):
                hooks.enter_context(_hooked(getattr(attention, kind).hook_out, value))
            hooks.enter_context(_hooked(attention.o.hook_in, None, found))
            self._attention(layer, at.q.new_zeros(at.q.shape[0], pos, self.model.d_model))
        return found[0].reshape(at.q.shape[0], pos, self.graph.n_heads, -1)

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
        block = self.blocks[layer]
        if "ln1_post" not in block.submodules:
            return results
        norm = block.ln1_post
        if not norm.uses_rms_norm:
            raise ModelError(f"{self.model.name} centres attention's output, which is not supported for single heads.")
        # normed(total) / total is the scale and weight of each dimension, but total may be zero: use the formula.
        scale = (total.pow(2).mean(-1, keepdim=True) + self.model.bridge.cfg.eps).sqrt()
        weight = norm.weight + 1 if norm.uses_weight_offset else norm.weight
        return results * (weight / scale)[:, :, None]

    def mlp(self, layer: int, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What an MLP writes, given the stream that it reads (before its norm)."""
        block = self.blocks[layer]
        normed = self.norm(layer, "ln2" if "ln2" in block.submodules else "ln1" if self.graph.parallel else "ln2", x)
        module = block.mlp
        if getattr(module, "name", "") is None:  # OPT: no module of its own, its two layers lie in the block
            hidden = block.original_component.activation_fn(getattr(module, "in")(normed))
            out = module.out(hidden).reshape(x.shape)
        else:
            out = module(normed)
            out = (out[0] if isinstance(out, tuple) else out).reshape(x.shape)
        return self.norm(layer, "ln2_post", out)

    def logits(self, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits of what the last block leaves."""
        bridge: Any = self.model.bridge
        return self.unembed(bridge.ln_final(stream) if getattr(bridge, "ln_final", None) is not None else stream)

    def unembed(self, normed: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits of what the final norm gives, through a soft cap if there is one."""
        bridge: Any = self.model.bridge
        out = bridge.unembed(normed)
        return out if self._soft_cap is None else self._soft_cap * torch.tanh(out / self._soft_cap)

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
        arguments, named = self._calls[normed.shape[1]][layer]
        mask = named.get("attention_mask")
        if isinstance(mask, Tensor):
            named = named | {"attention_mask": mask.expand(len(normed), *mask.shape[1:])}
        attention = self.blocks[layer].attn
        out = attention(hidden_states=normed, **named) if not arguments else attention(normed, *arguments[1:], **named)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def _prepare(self, tokens: Int[Tensor, "batch pos"]) -> None:
        """Record once for each length what the model calls its attention with (masks, rotary positions), and check."""
        length = tokens.shape[1]
        if length in self._calls:
            return
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            calls.append((arguments, {name: value for name, value in named.items() if name not in _STATEFUL}))

        names = [_EMBED, *([_POSITION] if self.graph.positional else [])]
        with contextlib.ExitStack() as hooks:
            for block in self.blocks:
                handle = block.attn.register_forward_pre_hook(record, with_kwargs=True)
                hooks.callback(handle.remove)
            logits, cache = self.model.run_hooked(tokens[:1], read=names)
        self._calls[length] = [(tuple(a[:1]), named) for a, named in calls]
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


def _weights(attention: Any) -> dict[str, Any]:
    names = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
    found = {name: getattr(attention, name, None) for name in names}
    return {name: None if value is None else value.detach() for name, value in found.items()}


@contextlib.contextmanager
def _hooked(point: Any, value: Tensor | None, found: list[Tensor] | None = None) -> Iterator[None]:
    """Put `value` in the place of what passes a hook point, or note what does."""

    def edit(_: Any, __: Any, output: Tensor) -> Tensor | None:
        if found is not None:
            found.append(output)
        return None if value is None else value.reshape(output.shape)

    handle = point.register_forward_hook(edit)
    try:
        yield
    finally:
        handle.remove()
