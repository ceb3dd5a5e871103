"""Attribution patching of edges: first-order estimates of what exact patching measures.

Every reader's input gets a zero *probe*; the gradient of the metric by the probes, at one or several points between
the clean and the ablated run, times each writer's change, is the score:
`score[u→v] = Σ_pos Δ_u · ∂m/∂in[v]` with `Δ_u = ablated − clean`, which estimates metric after − metric before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from circuitsae.components.exact import head_changes, live_patches
from circuitsae.components.network import Edge, Projections
from circuitsae.components.problem import BATCH_TOKENS, Prepared, Problems, parts_of
from circuitsae.components.scores import Scores, join
from transcoders.errors import InputError


@dataclass(frozen=True)
class Start:
    """Where a run begins: the stream before block `layer`, and the one after its attention if that is past."""

    stream: Float[Tensor, "example pos d_model"]
    layer: int = 0
    middle: Float[Tensor, "example pos d_model"] | None = None


@dataclass
class Probes:
    """Gradients of the metric by what each stage reads, and by each head's z."""

    reads: dict[tuple[int, str], Float[Tensor, "example pos reader d_model"]] = field(default_factory=dict)
    z: dict[int, Float[Tensor, "example pos head d_head"]] = field(default_factory=dict)

    def add(self, other: "Probes", weight: float) -> None:
        """Add another's gradients, weighed."""
        for stage, value in other.reads.items():
            self.reads[stage] = weight * value + self.reads.get(stage, 0)
        for layer, value in other.z.items():
            self.z[layer] = weight * value + self.z.get(layer, 0)


def eap(problems: Problems, *, batch_tokens: int = BATCH_TOKENS) -> Scores:
    """Edge attribution patching: the gradient at the clean run (Syed et al. 2023, arXiv:2310.10348)."""
    return _by_parts(
        problems, batch_tokens, lambda prepared: _scores(prepared, gradients(prepared, _clean(prepared)), "EAP")
    )


def eap_ig(problems: Problems, *, steps: int = 5, batch_tokens: int = BATCH_TOKENS) -> Scores:
    """Integrated gradients over inputs: gradients averaged between clean and ablated embeddings (Hanna et al. 2024).

    As published the sum starts at the clean run: `α = 0, 1/m, …, (m − 1)/m` of the way, with m `steps`.
    """
    _check_steps(steps)

    def score(prepared: Prepared) -> Scores:
        return _scores(
            prepared, _averaged(prepared, _embedding_starts(prepared, [k / steps for k in range(steps)])), "EAP-IG"
        )

    return _by_parts(problems, batch_tokens, score)


def eap_ig_activations(problems: Problems, *, steps: int = 5, batch_tokens: int = BATCH_TOKENS) -> Scores:
    """Integrated gradients over activations: the outputs of one layer's writers at a time go from clean to ablated.

    Edges from these writers are scored by the gradients averaged along that path, by the midpoint rule
    (Hanna et al. 2024; MIB, 2025).
    """
    _check_steps(steps)

    def score(prepared: Prepared) -> Scores:
        graph, clean = prepared.graph, prepared.clean
        alphas = [(k + 0.5) / steps for k in range(steps)]
        parts = [(range(1 + graph.positional), _embedding_starts(prepared, alphas))]
        for layer, at in enumerate(clean.layers):
            first = graph.first_after(f"a{layer}.h0.q")
            heads = range(first, first + graph.n_heads)
            change = prepared.delta[heads.start : heads.stop].sum(0)
            parts.append((heads, [Start(at.before, layer, at.middle + alpha * change) for alpha in alphas]))
            change = prepared.delta[heads.stop]
            starts = [Start(at.after + alpha * change, layer + 1) for alpha in alphas]
            parts.append((range(heads.stop, heads.stop + 1), starts))
        values = _empty(prepared)
        for writers, starts in parts:
            values += _products(prepared, _averaged(prepared, starts), writers)
        return _edge_scores(prepared, values, "EAP-IG-activations")

    return _by_parts(problems, batch_tokens, score)


def atp_star(problems: Problems, *, drop: bool = True, batch_tokens: int = BATCH_TOKENS) -> Scores:
    """AtP* for edges (Kramár et al. 2024): attention recomputed for q and k, one layer's gradient dropped at a time.

    1. An edge into q or k: the head's z is recomputed with the patched input, and its change times ∂m/∂z is the score,
       so that a saturated softmax does not hide it.
    2. GradDrop (`drop`): the backward pass leaves out what one layer's components write, each layer in turn, and the
       sizes are averaged: direct and indirect effects that cancel come apart. The sign is the undropped score's, and
       so is the size where that is larger (a departure: in a model of few layers every path may cross each of them).
    """

    def score(prepared: Prepared) -> Scores:
        graph, plain = prepared.graph, _with_attention(prepared, gradients(prepared, _clean(prepared)))
        if not drop or graph.n_layers == 1:
            return _edge_scores(prepared, plain, "AtP*")
        size = torch.zeros_like(plain)
        for layer in range(graph.n_layers):
            size += _with_attention(prepared, gradients(prepared, _clean(prepared), drop=layer)).abs()
        # A reader's own layer, dropped, gives zero; the logits have no layer.
        runs = size.new_tensor([graph.n_layers - (reader != "logits") for reader in graph.readers])
        return _edge_scores(prepared, plain.sign() * torch.maximum(size / runs[:, None], plain.abs()), "AtP*")

    return _by_parts(problems, batch_tokens, score)


def gradients(prepared: Prepared, start: Start, *, drop: int | None = None) -> Probes:
    """Gradients of the metric by every read (and z) after `start`; none flow through what layer `drop` writes."""
    network, graph = prepared.network, prepared.graph
    probes = Probes()
    stream = start.stream
    with torch.enable_grad():
        for layer in range(start.layer, graph.n_layers):
            before, dropped = stream, layer == drop
            if layer == start.layer and start.middle is not None:
                stream = start.middle
            else:
                written = _probed_attention(prepared, layer, stream, probes)
                stream = stream + (written.detach() if dropped else written)
            probe = probes.reads[layer, "m"] = _probe(stream[:, :, None])
            written = network.mlp(layer, (before if graph.parallel else stream) + probe[:, :, 0])
            stream = stream + (written.detach() if dropped else written)
        probe = probes.reads[graph.n_layers, "logits"] = _probe(stream[:, :, None])
        value = prepared.problem.metric(prepared.logits(stream + probe[:, :, 0])).sum()
    leaves = [*probes.reads.values(), *probes.z.values()]
    if not value.requires_grad:
        found = tuple(torch.zeros_like(leaf) for leaf in leaves)
    else:
        found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    names = [*((probes.reads, key) for key in probes.reads), *((probes.z, key) for key in probes.z)]
    for (table, key), gradient in zip(names, found, strict=True):
        table[key] = gradient  # pyright: ignore[reportArgumentType]
    return probes


def _probed_attention(prepared: Prepared, layer: int, stream: Tensor, probes: Probes) -> Tensor:
    network, graph = prepared.network, prepared.graph
    inputs = []
    for kind in "qkv":
        n = len(graph.head_readers(layer, kind))
        probe = probes.reads[layer, kind] = _probe(stream[:, :, None].expand(-1, -1, n, -1))
        inputs.append(network.project(layer, kind, stream[:, :, None] + probe))
    z = network.attend(layer, Projections(*inputs))
    probes.z[layer] = _probe(z)
    out = network.head_result(layer, z + probes.z[layer], tuple(range(graph.n_heads)))
    return network.after_attention(layer, out + network.attention_bias(layer))


def _probe(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device, requires_grad=True)


def _clean(prepared: Prepared) -> Start:
    return Start(prepared.clean.layers[0].before)


def _embedding_starts(prepared: Prepared, alphas: Sequence[float]) -> list[Start]:
    change = prepared.delta[: 1 + prepared.graph.positional].sum(0)
    return [Start(prepared.clean.layers[0].before + alpha * change) for alpha in alphas]


def _averaged(prepared: Prepared, starts: Sequence[Start]) -> Probes:
    total = Probes()
    for start in starts:
        total.add(gradients(prepared, start), 1 / len(starts))
    return total


def _products(
    prepared: Prepared, probes: Probes, writers: range | None = None
) -> Float[Tensor, "example span reader writer"]:
    """`Σ_pos Δ_u · ∂m/∂in[v]` for every reader v that has a gradient and writer u before it."""
    graph = prepared.graph
    out = _empty(prepared)
    first, last = (0, len(graph.writers)) if writers is None else (writers.start, writers.stop)
    for (layer, kind), gradient in probes.reads.items():
        readers = _stage_readers(prepared, layer, kind)
        stop = min(last, graph.first_after(readers[0]))
        at = [graph.reader_index[reader] for reader in readers]
        for span, here in enumerate(prepared.spans):
            if first < stop:
                delta = prepared.delta[first:stop] * here[..., None]
                terms = "writer example pos d_model, example pos reader d_model -> example reader writer"
                out[:, span, at[0] : at[-1] + 1, first:stop] = einsum(delta, gradient, terms)
    return out


def _with_attention(prepared: Prepared, probes: Probes) -> Float[Tensor, "example span reader writer"]:
    """`_products`, with the edges into q and k scored by the recomputed change of z."""
    graph = prepared.graph
    out = _products(prepared, probes)
    for layer, gradient in probes.z.items():
        for kind in "qk":
            readers = graph.head_readers(layer, kind)
            first = graph.reader_index[readers[0]]
            out[:, :, first : first + len(readers)] = 0
            before = range(graph.first_after(readers[0]))
            for batch, delta in live_patches(prepared, before, prepared.runs_at_once(BATCH_TOKENS)):
                with torch.no_grad():
                    change = head_changes(prepared, layer, kind, delta)
                by_head = (change * gradient).sum((2, 4))  # patch example head
                by_reader = by_head.unflatten(2, (len(readers), -1)).sum(3)
                for (writer, span), scores in zip(batch, by_reader, strict=True):
                    out[:, span, first : first + len(readers), writer] = scores
    return out


def _stage_readers(prepared: Prepared, layer: int, kind: str) -> list[str]:
    if kind in ("m", "logits"):
        return [f"m{layer}" if kind == "m" else "logits"]
    return prepared.graph.head_readers(layer, kind)


def _empty(prepared: Prepared) -> Tensor:
    graph = prepared.graph
    return prepared.delta.new_zeros(len(prepared.problem), len(prepared.spans), len(graph.readers), len(graph.writers))


def _scores(prepared: Prepared, probes: Probes, method: str) -> Scores:
    return _edge_scores(prepared, _products(prepared, probes), method)


def _edge_scores(prepared: Prepared, table: Float[Tensor, "example span reader writer"], method: str) -> Scores:
    graph = prepared.graph
    readers = [graph.reader_index[edge.reader] for edge in graph.edges]
    writers = [graph.writer_index[edge.writer] for edge in graph.edges]
    return Scores(graph.edges, table[:, :, readers, writers].mT.detach(), method, prepared.span_names)


def _by_parts(problems: Problems, batch_tokens: int, score: Callable[[Prepared], Scores]) -> Scores:
    return join([score(part) for part in parts_of(problems, batch_tokens)])


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise InputError(f"Integrated gradients need at least one step; got {steps}.")


def node_scores(edges: Scores) -> Scores:
    """Node attribution patching from edge scores: a writer's score is the sum over the edges that leave it.

    First order, an output's change acts through each of its readers, and the sum is `Σ_pos Δ_u · ∂m/∂out[u]`.
    """
    names = tuple(dict.fromkeys(edge.writer for edge in edges.items if isinstance(edge, Edge)))
    place = {name: index for index, name in enumerate(names)}
    at = torch.tensor([place[e.writer] for e in edges.items if isinstance(e, Edge)], device=edges.values.device)
    shape = (len(edges.values), len(names), edges.values.shape[2])
    values = edges.values.new_zeros(shape).index_add(1, at, edges.values)
    return Scores(names, values, f"{edges.method}, nodes", edges.spans)
