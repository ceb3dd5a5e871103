"""Patching along paths: an effect that passes through named edges, and nothing else.

Direct logit attribution: what each component adds to the metric through the final norm and unembedding alone.
"""

from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from circuitsae.components.exact import graph_of, head_changes, mlp_changes
from circuitsae.components.network import Edge, Projections
from circuitsae.components.problem import BATCH_TOKENS, Prepared, Problems, Recording, parts_of
from circuitsae.components.scores import Scores, join
from transcoders.errors import InputError, ModelError
from transcoders.model_parts import NormPart


@torch.no_grad()
def patch_path(problems: Problems, path: Sequence[Edge | tuple[str, str]]) -> Float[Tensor, "example"]:
    """The effect of ablating one path, `u → v₁ → v₂ → … → logits` (Goldowsky-Dill et al. 2023).

    The first writer's change reaches the first edge's reader; what that changes in the reader's own output goes along
    the next edge alone, and so on; the last edge's reader acts on everything after it. A one-edge path is an edge.
    Raises `InputError` where an edge does not start at the component that the one before it reaches.
    """
    graph = graph_of(problems)
    edges = graph.check_edges(path)
    for before, after in pairwise(edges):
        if after.writer not in graph.writer_of(before.reader):
            raise InputError(
                f"The path breaks between {before} and {after}: the second must start where the first ends."
            )
    return torch.cat([_along(part, edges) for part in parts_of(problems)])


def _along(prepared: Prepared, edges: Sequence[Edge]) -> Float[Tensor, "example"]:
    graph, clean = prepared.graph, prepared.clean
    change = prepared.delta[graph.writer_index[edges[0].writer]]
    for edge, after in pairwise(edges):
        change = _output_change(prepared, edge.reader, change, (after.writer,))
    reader = edges[-1].reader
    if reader == "logits":
        return prepared.effects((clean.final + change)[None])[0]
    layer = _layer(reader)
    if reader.startswith("m"):
        stream = clean.layers[layer].after + _output_change(prepared, reader, change, ())
    else:
        at = clean.layers[layer]
        middle = at.middle + _output_change(prepared, reader, change, graph.writer_of(reader))
        stream = prepared.network.finish_layer(layer, at.before, middle)
    return prepared.effects(prepared.network.run(stream, layer + 1)[None])[0]


def _output_change(prepared: Prepared, reader: str, change: Tensor, writers: Sequence[str]) -> Tensor:
    """What a change of a reader's input changes in the output of its component (of these heads)."""
    layer = _layer(reader)
    if reader.startswith("m"):
        return mlp_changes(prepared, layer, change[None])[0]
    heads = tuple(int(name.split(".h")[1]) for name in writers)
    z = head_changes(prepared, layer, reader[-1], change[None])[0][..., list(heads), :]
    at, network = prepared.clean.layers[layer], prepared.network
    patched = network.after_attention(layer, at.attention + network.head_result(layer, z, heads))
    return patched - network.after_attention(layer, at.attention)


def _layer(reader: str) -> int:
    return int(reader[1:].split(".")[0])


@torch.no_grad()
def path_patching(
    problems: Problems,
    receivers: Iterable[str],
    senders: Iterable[str] | None = None,
    *,
    through_mlps: bool = True,
    batch_tokens: int = BATCH_TOKENS,
) -> Scores:
    """The effect of each sender by way of the receivers' inputs (Wang et al. 2022, section 3.1).

    1. The sender's output is ablated; every other head keeps its clean output, MLPs are recomputed (or, without
       `through_mlps`, kept too). What the receivers (`a9.h9.q`, `m3`, `logits`) then read is noted.
    2. A clean run in which the receivers read that; everything after them is recomputed.
    """
    graph = graph_of(problems)
    chosen = tuple(dict.fromkeys(receivers))
    for reader in chosen:
        if reader not in graph.reader_index:
            raise InputError(f"This model has no reader {reader!r}; readers are like 'a1.h0.q', 'm1' and 'logits'.")
    last = max((graph.first_after(reader) for reader in chosen), default=0)
    given = graph.writers[:last] if senders is None else graph.check_writers(senders)
    if not chosen or not given:
        raise InputError(f"Path patching needs senders and receivers; got {len(given)} and {len(chosen)}.")
    found = []
    for part in parts_of(problems, batch_tokens):
        size = part.runs_at_once(batch_tokens)
        batches = [given[i : i + size] for i in range(0, len(given), size)]
        effects = torch.cat([_receive(part, chosen, _send(part, batch, through_mlps)) for batch in batches])
        found.append(Scores(given, effects.mT[..., None], "path patching", patches=len(given)))
    return join(found)


def _send(prepared: Prepared, senders: Sequence[str], through_mlps: bool) -> dict[str, Tensor]:
    """How far every stage's input is from clean, [sender example pos d_model]: `a{l}`, `m{l}`, `logits`."""
    graph, delta = prepared.graph, prepared.delta
    index = [graph.writer_index[name] for name in senders]
    gap = delta.new_zeros(len(index), *delta.shape[1:])

    def enter(names: Iterable[str]) -> None:
        for row, name in enumerate(senders):
            if name in names:
                gap[row] += delta[index[row]]

    stages: dict[str, Tensor] = {}
    enter(("embed", "pos"))
    for layer in range(graph.n_layers):
        stages[f"a{layer}"] = gap.clone()
        heads = {f"a{layer}.h{head}" for head in range(graph.n_heads)}
        enter(heads)
        stages[f"m{layer}"] = stages[f"a{layer}"] if graph.parallel else gap.clone()
        through = mlp_changes(prepared, layer, stages[f"m{layer}"]) if through_mlps else torch.zeros_like(gap)
        sent = [row for row, name in enumerate(senders) if name == f"m{layer}"]
        through[sent] = 0  # an ablated MLP writes its ablated output, whatever it reads
        gap = gap + through
        enter({f"m{layer}"})
    stages["logits"] = gap
    return stages


def _receive(
    prepared: Prepared, receivers: Sequence[str], stages: dict[str, Tensor]
) -> Float[Tensor, "sender example"]:
    network, graph, clean = prepared.network, prepared.graph, prepared.clean
    rows = len(stages["logits"])

    def patched(stage: str, uncut: Tensor) -> Tensor:
        return (uncut + stages[stage]).flatten(0, 1)

    stream = clean.layers[0].before.expand(rows, -1, -1, -1).flatten(0, 1)
    for layer, at in enumerate(clean.layers):
        before, inputs = stream, []
        for kind in "qkv":
            names = graph.head_readers(layer, kind)
            x = before[:, :, None].expand(-1, -1, len(names), -1).clone()
            for place, name in enumerate(names):
                if name in receivers:
                    x[:, :, place] = patched(f"a{layer}", at.before)
            inputs.append(network.project(layer, kind, x))
        z = network.attend(layer, Projections(*inputs))
        out = network.head_result(layer, z, tuple(range(graph.n_heads))) + network.attention_bias(layer)
        stream = before + network.after_attention(layer, out)
        read = before if graph.parallel else stream
        if f"m{layer}" in receivers:
            read = patched(f"m{layer}", at.mlp_reads(graph.parallel))
        stream = stream + network.mlp(layer, read)
    if "logits" in receivers:
        stream = patched("logits", clean.final)
    return prepared.effects(stream.unflatten(0, (rows, -1)))


@torch.no_grad()
def attention_moved(
    problems: Problems,
    senders: Sequence[str],
    heads: Sequence[str],
    *,
    through_mlps: bool = True,
    batch_tokens: int = BATCH_TOKENS,
) -> Float[Tensor, "sender head example span"]:
    """How far a sender moves where heads look: patched − clean attention, from the last position to each span.

    The heads' queries, and nothing else, receive the sender ablated, as in `path_patching` (Wang et al. 2022,
    section 3.2). Zero where a head does not come after the sender.
    """
    graph = graph_of(problems)
    given, chosen = graph.check_writers(senders), graph.check_writers(heads)
    found = []
    for part in parts_of(problems, batch_tokens):
        size = part.runs_at_once(batch_tokens)
        batches = [given[i : i + size] for i in range(0, len(given), size)]
        found.append(torch.cat([_moved(part, chosen, _send(part, batch, through_mlps)) for batch in batches]))
    return torch.cat(found, 2)


def _moved(
    prepared: Prepared, heads: Sequence[str], stages: dict[str, Tensor]
) -> Float[Tensor, "sender head example span"]:
    moved = []
    for name in heads:
        layer, head = (int(number) for number in name[1:].split(".h"))
        gap = stages[f"a{layer}"]
        both = _attention(prepared, layer, torch.cat([torch.zeros_like(gap[:1]), gap]))[:, :, head]
        moved.append(both[1:] - both[:1])
    return torch.stack(moved, 1)


def _attention(
    prepared: Prepared, layer: int, change: Float[Tensor, "run example pos d_model"]
) -> Float[Tensor, "run example head span"]:
    """Attention from the last position to each span, with `change` added to what the queries read.

    The values are made to mark the spans, so that what a head reads is its attention to them.
    """
    network, at, runs = prepared.network, prepared.clean.layers[layer], len(change)
    q = network.project(layer, "q", (at.before + change).flatten(0, 1)[:, :, None])
    marks = torch.zeros_like(at.at.v)
    marks[..., : len(prepared.spans)] = prepared.spans.movedim(0, -1)[:, :, None].to(marks)
    k, v = (x.expand(runs, *x.shape).flatten(0, 1) for x in (at.at.k, marks))
    z = network.attend(layer, Projections(q, k, v)).unflatten(0, (runs, -1))
    return z[:, :, -1, :, : len(prepared.spans)]


def direct_logit_attribution(
    problems: Problems, *, without: Collection[str] = (), batch_tokens: int = BATCH_TOKENS
) -> Scores:
    """`Σ_pos norm(c_u) · ∂m/∂(unembedding's input)`: each writer's own contribution, the final norm's scale frozen.

    For a metric that is linear in the logits (a logit difference) the writers' scores and the biases' sum to it; for
    any other it is the first-order term at the clean run. These are contributions, not effects of an ablation: a
    component that raises the metric scores above zero (nostalgebraist 2020; Wang et al. 2022, section 3.1).
    With the writers in `without` ablated, it is what the others contribute then.
    """
    return join([_attribution(part, part.without(without)) for part in parts_of(problems, batch_tokens)])


def _attribution(prepared: Prepared, recording: Recording) -> Scores:
    final = recording.final
    norm = prepared.network.model.parts.final_norm
    weight, scale, centres = _final_norm(norm, final)
    read = (final if norm is None else norm(final)).detach().requires_grad_()
    with torch.enable_grad():
        value = prepared.problem.metric(_logits(prepared, read)).sum()
        (gradient,) = torch.autograd.grad(value, read, allow_unused=True, materialize_grads=True)
    writes = recording.writes
    linear = (writes - writes.mean(-1, keepdim=True) if centres else writes) * (weight / scale)
    spans = prepared.spans.to(writes)
    terms = "writer example pos d_model, example pos d_model, span example pos -> example writer span"
    values = einsum(linear, gradient, spans, terms)
    return Scores(prepared.graph.writers, values, "direct logit attribution", prepared.span_names)


def _logits(prepared: Prepared, read: Float[Tensor, "example pos d_model"]) -> Tensor:
    if prepared.problem.read is not None:
        read = read[torch.arange(len(read), device=read.device), prepared.problem.read][:, None]
    return prepared.network.unembed(read)


def _final_norm(norm: NormPart | None, x: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Weight, scale and whether it centres; checked against the norm itself."""
    if norm is None or torch.equal(norm(x), x):
        return x.new_ones(x.shape[-1]), x.new_ones(*x.shape[:-1], 1), False
    centred = x - x.mean(-1, keepdim=True) if norm.centres else x
    scale = (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    weight = norm.weight()
    ours = centred / scale * weight + (0 if norm.bias is None else norm.bias)
    if not torch.allclose(ours, norm(x), rtol=1e-3, atol=1e-3 * float(ours.abs().max())):
        raise ModelError("The final norm is not a LayerNorm or RMSNorm; direct logit attribution is not supported.")
    return weight, scale, norm.centres
