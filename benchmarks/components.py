"""Claim: every edge of a 4-layer, 8-head model is patched exactly on 64 prompts in minutes, and not in hours.

A random GPT-2 of the pocket model's size. `one at a time` is what hooks do: for each edge a run of the whole model in
which one reader's input is changed, here timed on a sample of the edges and extrapolated (*). The effects must agree.
`find_circuit` is the default method on the same problem. With --device cuda, the same on a GPU.
"""

import time
from dataclasses import dataclass

import torch
import tyro
from machine import write_table

from circuitsae.components import Edge, PatchingProblem, Prepared, exact_edges, find_circuit
from circuitsae.components.problem import BATCH_TOKENS
from transcoders.random_models import random_model


@dataclass
class Options:
    """What to measure."""

    layers: int = 4
    """Of the model."""
    heads: int = 8
    """Of each layer."""
    width: int = 128
    """Of the residual stream."""
    vocabulary: int = 2048
    """Number of tokens."""
    prompts: int = 64
    """Pairs of prompts."""
    tokens: int = 16
    """Of each prompt."""
    sample: int = 40
    """How many edges are patched one at a time."""
    batch_tokens: int = BATCH_TOKENS
    """How many tokens go through the model together."""
    device: str = "cpu"
    """Where to run."""
    name: str = "components"
    """Of the table."""


def patch_one(prepared: Prepared, edge: Edge) -> torch.Tensor:
    """The effect of one edge by hooks: one whole run of the model with one reader's query, key, value or input set."""
    problem, network = prepared.problem, prepared.network
    change = prepared.delta[prepared.graph.writer_index[edge.writer]]
    if edge.reader == "logits":
        hook, edit = "ln_final.hook_in", lambda value: value + change
    elif edge.reader.startswith("m"):
        hook, edit = f"blocks.{edge.reader[1:]}.ln2.hook_in", lambda value: value + change
    else:
        layer, head, kind = int(edge.reader[1 : edge.reader.index(".")]), edge.reader.split(".")[1], edge.reader[-1]
        patched = (prepared.clean.layers[layer].before + change)[:, :, None]
        projected = network.project(layer, kind, patched)[:, :, int(head[1:])]

        def edit(value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            value[:, :, int(head[1:])] = projected
            return value

        hook = f"blocks.{layer}.attn.{kind}.hook_out"
    logits, _ = problem.model.run_hooked(problem.clean, write={hook: edit})
    return problem.metric(logits) - prepared.clean_value


@torch.no_grad()
def main() -> None:
    options = tyro.cli(Options)
    model = random_model(
        "gpt2", n_layers=options.layers, d_model=options.width, n_heads=options.heads, d_vocab=options.vocabulary,
        context=max(64, options.tokens),
    )  # fmt: skip
    model.bridge.to(options.device)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, options.vocabulary, (2, options.prompts, options.tokens), generator=generator)
    clean, corrupt = drawn.to(options.device)
    last = torch.full((options.prompts,), options.tokens - 1, device=clean.device)
    problem = PatchingProblem(model, clean, corrupt, lambda logits: logits[:, -1, 0] - logits[:, -1, 1], read=last)
    started = time.perf_counter()
    exact = exact_edges(problem, batch_tokens=options.batch_tokens)
    exact.values.sum().item()
    batched = time.perf_counter() - started
    edges = [edge for edge in exact.items if isinstance(edge, Edge)]
    prepared = Prepared(problem)
    picks = torch.randperm(len(exact.items), generator=generator)[: options.sample].tolist()
    patch_one(prepared, edges[0])
    started = time.perf_counter()
    single = torch.stack([patch_one(prepared, edges[i]) for i in picks], 1)
    single.sum().item()
    alone = (time.perf_counter() - started) * len(exact.items) / len(picks)
    error = float((single - exact.values[:, picks, 0]).abs().max() / exact.values.abs().max())
    one_pair = _one_pair(problem, [edges[i] for i in picks[:10]]) * len(edges) * len(clean)
    started = time.perf_counter()
    found = find_circuit(problem, batch_tokens=options.batch_tokens)
    default = time.perf_counter() - started
    ratio = {name: seconds / batched for name, seconds in (("alone", alone), ("pair", one_pair), ("default", default))}
    count, made = f"{len(edges):,}", f"{found.scored.scores.patches:,} and {found.runs:,} circuits"
    circuit = f"find_circuit: {len(found.circuit)} edges, faithfulness {found.faithfulness:.3f}"
    rows = [
        ["exact_edges", count, f"{exact.patches:,}", f"{batched:.1f}", "1.0", "0"],
        ["one edge at a time *", count, len(picks), f"{alone:.1f}", f"{ratio['alone']:.1f}", f"{error:.0e}"],
        ["one edge, one pair at a time *", count, 10, f"{one_pair:.0f}", f"{ratio['pair']:.0f}", ""],
        [circuit, count, made, f"{default:.1f}", f"{ratio['default']:.2f}", ""],
    ]
    columns = ["method", "edges", "patched runs made", "seconds", "times exact_edges", "largest difference, relative"]
    print(write_table(options.name, str(__doc__).strip(), columns, rows))


def _one_pair(problem: PatchingProblem, edges: list[Edge]) -> float:
    """Seconds for one edge of one pair of prompts."""
    prepared = Prepared(problem.take(torch.tensor([0])))
    started = time.perf_counter()
    for edge in edges:
        patch_one(prepared, edge).sum().item()
    return (time.perf_counter() - started) / len(edges)


if __name__ == "__main__":
    main()
