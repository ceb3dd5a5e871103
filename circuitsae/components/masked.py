"""Runs in which any set of edges is ablated together, many sets at a time."""

from collections.abc import Collection, Iterable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitsae.components.network import Network, Projections
from circuitsae.components.nodes import ComponentGraph, Edge
from circuitsae.components.problem import PatchingProblem
from circuitsae.components.recording import BATCH_TOKENS, Prepared, Problems, parts_of
from circuitsae.components.scores import Scores

Mask = Bool[Tensor, "run reader writer"]


def edge_mask(graph: ComponentGraph, sets: Sequence[Collection[Edge]]) -> Mask:
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
    problems: Problems, sets: Sequence[Collection[Edge]], *, batch_tokens: int = BATCH_TOKENS
) -> Float[Tensor, "run example"]:
    """The metric with only these edges kept, for each set: every other edge carries its writer's ablated output.

    A kept edge carries what its writer writes in this same run, ablations before it included.
    """
    found = []
    for part in parts_of(problems, batch_tokens):
        masks = edge_mask(part.graph, sets).to(part.problem.clean.device)
        found.append(torch.cat([_masked(part, mask) for mask in masks.split(part.runs_at_once(batch_tokens))]))
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

    def __init__(self, prepared: Prepared, keep: Mask) -> None:
        self.graph = prepared.graph
        self.cut = (~keep).to(prepared.clean.writes)
        self.target = prepared.replacement
        self.runs = len(keep)
        writers, *shape = self.target.shape
        self.gap = self.target.new_zeros(self.runs, writers, *shape)
        self.stream = self.target.new_zeros(self.runs, *shape)
        self.written = 0

    def write(self, contribution: Float[Tensor, "run example pos d_model"]) -> None:
        """The next writer's contribution; the stream is updated apart."""
        self.gap[:, self.written] = self.target[self.written] - contribution
        self.written += 1

    def read(self, readers: Sequence[str], stream: Tensor) -> Float[Tensor, "row pos reader d_model"]:
        """What each of these readers reads, where the uncut stream is `stream`."""
        n = self.graph.first_after(readers[0])
        cut = self.cut[:, [self.graph.reader_index[reader] for reader in readers], :n]
        if not cut.any():
            return stream.flatten(0, 1)[:, :, None]
        shape = self.gap.shape[2:]
        patched = (cut @ self.gap[:, :n].flatten(2)).unflatten(-1, shape) + stream[:, None]
        return patched.movedim(1, 3).flatten(0, 1)


def _masked(prepared: Prepared, keep: Mask) -> Float[Tensor, "run example"]:
    network, graph, clean = prepared.network, prepared.graph, prepared.clean
    state = _State(prepared, keep)
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
        for contribution in network.share(layer, results, total).unbind(2):
            state.write(contribution.unflatten(0, (state.runs, -1)))
        stream = before + network.after_attention(layer, total).unflatten(0, (state.runs, -1))
        read = state.read([f"m{layer}"], before if graph.parallel else stream)[:, :, 0]
        mlp = network.mlp(layer, read).unflatten(0, (state.runs, -1))
        state.write(mlp)
        stream = stream + mlp
    final = state.read(["logits"], stream)[:, :, 0].unflatten(0, (state.runs, -1))
    return prepared.values(final)
