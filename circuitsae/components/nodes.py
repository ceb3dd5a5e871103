"""Heads, MLPs and embeddings as nodes: what writes into the residual stream, what reads it, and the edges between.

| writers | | readers | |
|---|---|---|---|
| `embed`, `pos` | token and learned positional embeddings | `a{l}.h{h}.q`, `.k`, `.v` | an attention head's inputs |
| `a{l}.h{h}` | an attention head | `m{l}` | an MLP's input |
| `m{l}` | an MLP | `logits` | the final norm and unembedding |

Where heads share keys and values (GQA), those inputs belong to the key-value head: `a{l}.kv{g}.k`, `a{l}.kv{g}.v`.
An edge runs from every writer to every reader after it. In parallel blocks an MLP does not read its own layer's heads.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from transcoders.errors import InputError

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
