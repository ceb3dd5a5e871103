"""Exact patching of edges and nodes, batched: the oracle of every other method."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.components.local import head_changes, is_changed, live_patches, mlp_changes
from circuitsae.components.nodes import Edge
from circuitsae.components.recording import BATCH_TOKENS, Prepared, Problems, parts_of
from circuitsae.components.scores import Scores, join


@torch.no_grad()
def exact_edges(
    problems: Problems,
    edges: Iterable[Edge | tuple[str, str]] | None = None,
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> Scores:
    """The effect of ablating each edge alone: `m(clean, in[v] += Δ_u) − m(clean)`.

    The input of v alone sees u ablated; every other reader of u sees it clean; all that follows v is recomputed.
    Edges that change nothing in their reader need no run of what follows; `patches` counts the others.
    """
    chosen = None if edges is None else tuple(edges)
    return join([_edges(part, chosen, batch_tokens) for part in parts_of(problems, batch_tokens)])


@torch.no_grad()
def exact_nodes(
    problems: Problems,
    nodes: Iterable[str] | None = None,
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> Scores:
    """Activation patching: the effect of ablating each component's whole output, that is all edges from it at once.

    Nodes are writers (`a0.h1`, `m0`, `embed`), by default all; `masked.exact_inputs` ablates what a reader reads.
    """
    chosen = None if nodes is None else tuple(nodes)
    return join([_nodes(part, chosen, batch_tokens) for part in parts_of(problems, batch_tokens)])


class _Sink:
    """Collects changed streams until a batch is full, runs the rest of the model on it, and notes the effects."""

    def __init__(self, prepared: Prepared, n_items: int, batch_tokens: int) -> None:
        self.prepared = prepared
        self.per_batch = prepared.runs_at_once(batch_tokens)
        shape = (len(prepared.problem), n_items, len(prepared.spans))
        self.values = prepared.clean_value.new_zeros(shape)
        self.patches = 0
        self._waiting: list[tuple[int, int, Tensor]] = []
        self._stage: tuple[int, bool] = (0, False)

    def at(self, layer: int, *, middle: bool = False) -> None:
        """From here on, changes are of the stream before block `layer`, or of attention's output in it."""
        if self._stage != (layer, middle):
            self.flush()
            self._stage = (layer, middle)

    def add(self, item: int, span: int, change: Float[Tensor, "example pos d_model"]) -> None:
        self._waiting.append((item, span, change))
        if len(self._waiting) >= self.per_batch:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        items, spans, changes = zip(*self._waiting, strict=True)
        effects = self.prepared.effects(self._finish(torch.stack(changes)))
        self.values[:, list(items), list(spans)] = effects.mT
        self.patches += len(items)
        self._waiting = []

    def _finish(self, change: Float[Tensor, "patch example pos d_model"]) -> Tensor:
        network, clean = self.prepared.network, self.prepared.clean
        layer, middle = self._stage
        if not middle:
            before = clean.final if layer == network.graph.n_layers else clean.layers[layer].before
            stream = network.run((before + change).flatten(0, 1), layer, self.prepared.needed)
            return stream.unflatten(0, (len(change), -1))
        at = clean.layers[layer]
        before = at.before.expand_as(change).flatten(0, 1)
        stream = before + network.after_attention(layer, (at.attention + change).flatten(0, 1))
        needed = self.prepared.needed
        stream = network.finish_layer(layer, needed(layer, before), needed(layer, stream))
        return network.run(stream, layer + 1, needed).unflatten(0, (len(change), -1))


def _edges(prepared: Prepared, edges: Iterable[Edge | tuple[str, str]] | None, batch_tokens: int) -> Scores:
    graph = prepared.graph
    chosen = graph.edges if edges is None else graph.check_edges(edges)
    place = {edge: index for index, edge in enumerate(chosen)}
    sink = _Sink(prepared, len(chosen), batch_tokens)
    for layer in range(graph.n_layers):
        for kind in "qkv":
            _patch_heads(prepared, layer, kind, place, sink)
        _patch_mlp(prepared, layer, place, sink)
    sink.at(graph.n_layers)
    for writer, span, delta in _deltas(prepared, "logits", place, sink):
        sink.add(place[Edge(graph.writers[writer], "logits")], span, delta)
    sink.flush()
    return Scores(chosen, sink.values, "exact", prepared.span_names, sink.patches)


def _deltas(prepared: Prepared, reader: str, place: dict[Edge, int], sink: _Sink) -> Iterable[tuple[int, int, Tensor]]:
    writers = _wanted(prepared, [reader], place)
    for batch, delta in live_patches(prepared, writers, sink.per_batch):
        for (writer, span), change in zip(batch, delta, strict=True):
            yield writer, span, change


def _wanted(prepared: Prepared, readers: Sequence[str], place: dict[Edge, int]) -> list[int]:
    """Writers with an edge of interest to one of the readers."""
    graph = prepared.graph
    before = enumerate(graph.writers_before(readers[0]))
    return [index for index, name in before if any(Edge(name, reader) in place for reader in readers)]


def _patch_heads(prepared: Prepared, layer: int, kind: str, place: dict[Edge, int], sink: _Sink) -> None:
    graph, clean = prepared.graph, prepared.clean.layers[layer]
    readers = graph.head_readers(layer, kind)
    sink.at(layer, middle=True)
    for batch, delta in live_patches(prepared, _wanted(prepared, readers, place), sink.per_batch):
        change = head_changes(prepared, layer, kind, delta)
        for reader in readers:
            heads = graph.heads_of(reader)
            mine = change[..., list(heads), :]
            changed = is_changed(mine, clean.z[..., list(heads), :])
            for patch in changed.nonzero()[:, 0].tolist():
                writer, span = batch[patch]
                item = place.get(Edge(graph.writers[writer], reader))
                if item is not None:
                    sink.add(item, span, prepared.network.head_result(layer, mine[patch], heads))


def _patch_mlp(prepared: Prepared, layer: int, place: dict[Edge, int], sink: _Sink) -> None:
    graph, clean = prepared.graph, prepared.clean.layers[layer]
    reader = f"m{layer}"
    sink.at(layer + 1)
    for batch, delta in live_patches(prepared, _wanted(prepared, [reader], place), sink.per_batch):
        change = mlp_changes(prepared, layer, delta)
        for patch in is_changed(change, clean.after - clean.middle).nonzero()[:, 0].tolist():
            writer, span = batch[patch]
            sink.add(place[Edge(graph.writers[writer], reader)], span, change[patch])


def _nodes(prepared: Prepared, nodes: Iterable[str] | None, batch_tokens: int) -> Scores:
    graph = prepared.graph
    chosen = graph.writers if nodes is None else tuple(dict.fromkeys(nodes))
    graph.check_writers(chosen)
    sink = _Sink(prepared, len(chosen), batch_tokens)
    for batch, delta in live_patches(prepared, [graph.writer_index[name] for name in chosen], sink.per_batch):
        for (writer, span), change in zip(batch, delta, strict=True):
            name = graph.writers[writer]
            _patch_output(prepared, name, chosen.index(name), span, change, sink)
    sink.flush()
    return Scores(chosen, sink.values, "exact", prepared.span_names, sink.patches)


def _patch_output(prepared: Prepared, name: str, item: int, span: int, change: Tensor, sink: _Sink) -> None:
    """A head's change enters after its block's attention, an MLP's after its block, an embedding's before the first."""
    network = prepared.network
    if not name.startswith("a"):
        sink.at(0 if name in ("embed", "pos") else int(name[1:]) + 1)
        sink.add(item, span, change)
        return
    layer = int(name[1 : name.index(".")])
    clean = prepared.clean.layers[layer]
    after = network.finish_layer(layer, clean.before, clean.middle + change)
    sink.at(layer + 1)
    sink.add(item, span, after - clean.after)
