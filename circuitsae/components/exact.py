"""Exact patching of edges and nodes, batched: the oracle of every other method.

What a patched edge changes in its reader alone: the first, cheap step of patching it.

A head's result depends on no other head of its layer, so one run of attention with input q of all heads patched by one
writer gives every edge from that writer to a q of that layer. Where the reader's output does not change, nothing after
it does: the edge's effect is zero, and no further run is needed.

Runs in which any set of edges is ablated together, many sets at a time.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitsae.components.network import ComponentGraph, Edge, Network, Projections
from circuitsae.components.problem import BATCH_TOKENS, PatchingProblem, Prepared, Problems, parts_of
from circuitsae.components.scores import Scores, join


def head_changes(
    prepared: Prepared, layer: int, kind: str, delta: Float[Tensor, "patch example pos d_model"]
) -> Float[Tensor, "patch example pos head d_head"]:
    """The change of every head's z when `delta` is added to the stream that input `kind` of the heads reads."""
    clean = prepared.clean.layers[layer]
    patches = len(delta)
    patched = (clean.before + delta).flatten(0, 1)
    at = {name: _repeat(getattr(clean.at, name), patches) for name in "qkv" if name != kind}
    at[kind] = prepared.network.project(layer, kind, patched[:, :, None])
    z = prepared.network.attend(layer, Projections(**at))
    return z.unflatten(0, (patches, -1)) - clean.z


def mlp_changes(
    prepared: Prepared, layer: int, delta: Float[Tensor, "patch example pos d_model"]
) -> Float[Tensor, "patch example pos d_model"]:
    """The change of an MLP's output when `delta` is added to the stream that it reads."""
    clean = prepared.clean.layers[layer]
    patched = (clean.mlp_reads(prepared.graph.parallel) + delta).flatten(0, 1)
    return prepared.network.mlp(layer, patched).unflatten(0, (len(delta), -1)) - (clean.after - clean.middle)


def is_changed(
    change: Float[Tensor, "patch example *rest"], reference: Float[Tensor, "example *rest"]
) -> Bool[Tensor, "patch"]:
    """Whether a change is more than rounding."""
    noise = 8 * torch.finfo(change.dtype).eps * reference.abs().amax()
    return change.abs().flatten(1).amax(1) > noise


def live_patches(
    prepared: Prepared, writers: Sequence[int], per_batch: int
) -> Iterator[tuple[list[tuple[int, int]], Float[Tensor, "patch example pos d_model"]]]:
    """The (writer, span) pairs whose ablation changes something, with the change, in batches."""
    live = [
        (writer, span)
        for writer in writers
        for span in range(len(prepared.spans))
        if bool((prepared.delta[writer].abs().amax(-1) * prepared.spans[span]).any())
    ]
    for start in range(0, len(live), per_batch):
        batch = live[start : start + per_batch]
        delta = torch.stack([prepared.delta[w] * prepared.spans[s][..., None] for w, s in batch])
        yield batch, delta


def _repeat(x: Tensor, times: int) -> Tensor:
    return x[None].expand(times, *x.shape).flatten(0, 1)


Mask = Float[Tensor, "run reader writer"] | Bool[Tensor, "run reader writer"]
"""Of each edge the share of its writer's contribution that stays; True: all of it."""


def edge_mask(graph: ComponentGraph, sets: Sequence[Collection[Edge]]) -> Bool[Tensor, "run reader writer"]:
    """One table for each set of edges, True at its edges."""
    mask = torch.zeros(len(sets), len(graph.readers), len(graph.writers), dtype=torch.bool)
    for run, edges in enumerate(sets):
        chosen = list(edges)
        if chosen:
            mask[
                run, [graph.reader_index[e.reader] for e in chosen], [graph.writer_index[e.writer] for e in chosen]
            ] = True
    return mask


def graph_of(problems: Problems) -> ComponentGraph:
    """The nodes and edges of the model that the problems are about."""
    if isinstance(problems, PatchingProblem):
        return Network.of(problems.model).graph
    return problems.graph if isinstance(problems, Prepared) else graph_of(problems[0])


@torch.no_grad()
def run_keeping(
    problems: Problems,
    sets: Sequence[Collection[Edge]],
    *,
    outside: str | None = None,
    left: Sequence[float] | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Float[Tensor, "run example"]:
    """The metric with only these edges kept, for each set: every other edge carries its writer's ablated output.

    A kept edge carries what its writer writes in this same run, ablations before it included. With `left`, a share λ
    for each set, every other edge carries λ times that and 1 − λ times the ablated output. At the positions of the
    problems' span named `outside`, every head and MLP is ablated for all its readers too. Raises `InputError` for a
    span that there is not.
    """
    found = []
    for part in parts_of(problems, batch_tokens):
        masks: Mask = edge_mask(part.graph, sets).to(part.problem.clean.device)
        if left is not None and any(left):
            shares = torch.tensor(left).to(part.clean.writes)[:, None, None]
            masks = torch.where(masks, torch.ones_like(shares), shares)
        away = None if outside is None else part.span(outside)
        found.append(torch.cat([_masked(part, mask, away) for mask in masks.split(part.runs_at_once(batch_tokens))]))
    return torch.cat(found, 1)


def run_without(
    problems: Problems, sets: Sequence[Collection[Edge]], *, batch_tokens: int = BATCH_TOKENS
) -> Float[Tensor, "run example"]:
    """The metric with each of these sets of edges ablated."""
    every = set(graph_of(problems).edges)
    return run_keeping(problems, [every - set(edges) for edges in sets], batch_tokens=batch_tokens)


def exact_inputs(problems: Problems, readers: Iterable[str] | None = None) -> Scores:
    """The effect of ablating everything that a reader reads (`a1.h0.q`, `m1`, `logits`); by default of all heads."""
    graph = graph_of(problems)
    chosen = tuple(r for r in graph.readers if r.startswith("a")) if readers is None else tuple(readers)
    sets = [graph.check_edges(Edge(writer, reader) for writer in graph.writers_before(reader)) for reader in chosen]
    clean, *values = run_without(problems, [[], *sets])
    return Scores(chosen, (torch.stack(values) - clean).mT[..., None], "exact", patches=len(chosen))


class _State:
    """The contributions of the writers so far, in every run, and how far they are from their ablated values."""

    def __init__(self, prepared: Prepared, keep: Mask, away: Bool[Tensor, "example pos"] | None) -> None:
        self.graph = prepared.graph
        self.away = None if away is None else away[..., None].to(prepared.clean.writes)
        self.cut = 1 - keep.to(prepared.clean.writes)
        self.target = prepared.replacement
        self.runs = len(keep)
        writers, *shape = self.target.shape
        self.gap = self.target.new_zeros(self.runs, writers, *shape)
        self.stream = self.target.new_zeros(self.runs, *shape)
        self.written = 0

    def write(self, contribution: Float[Tensor, "run example pos d_model"]) -> Tensor | float:
        """The next writer's contribution; the stream is updated apart, and by what is returned: the ablation `away`."""
        gap = self.target[self.written] - contribution
        embedding = self.written <= self.graph.positional
        moved = 0.0 if self.away is None or embedding else self.away * gap
        self.gap[:, self.written] = gap - moved
        self.written += 1
        return moved

    def read(self, readers: Sequence[str], stream: Tensor) -> Float[Tensor, "row pos reader d_model"]:
        """What each of these readers reads, where the uncut stream is `stream`."""
        n = self.graph.first_after(readers[0])
        cut = self.cut[:, [self.graph.reader_index[reader] for reader in readers], :n]
        if not cut.any():
            return stream.flatten(0, 1)[:, :, None]
        shape = self.gap.shape[2:]
        patched = (cut @ self.gap[:, :n].flatten(2)).unflatten(-1, shape) + stream[:, None]
        return patched.movedim(1, 3).flatten(0, 1)


def _masked(
    prepared: Prepared, keep: Mask, away: Bool[Tensor, "example pos"] | None = None
) -> Float[Tensor, "run example"]:
    network, graph, clean = prepared.network, prepared.graph, prepared.clean
    state = _State(prepared, keep, away)
    first = 1 + graph.positional
    for contribution in clean.writes[:first]:
        state.write(contribution.expand_as(state.stream))
    stream = clean.layers[0].before.expand_as(state.stream)
    for layer in range(graph.n_layers):
        before = stream
        reads = (state.read(graph.head_readers(layer, kind), before) for kind in "qkv")
        at = Projections(*(network.project(layer, kind, x) for kind, x in zip("qkv", reads, strict=True)))
        results = network.results(layer, network.attend(layer, at))
        total = results.sum(2) + network.attention_bias(layer)
        stream = before + network.after_attention(layer, total).unflatten(0, (state.runs, -1))
        for contribution in network.share(layer, results, total).unbind(2):
            stream = stream + state.write(contribution.unflatten(0, (state.runs, -1)))
        read = state.read([f"m{layer}"], before if graph.parallel else stream)[:, :, 0]
        mlp = network.mlp(layer, read).unflatten(0, (state.runs, -1))
        stream = stream + mlp + state.write(mlp)
    final = state.read(["logits"], stream)[:, :, 0].unflatten(0, (state.runs, -1))
    return prepared.values(final)


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
