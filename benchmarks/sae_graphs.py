"""Claim: a whole graph of autoencoders takes less than a CPU-second on a prompt of 15 tokens, on small models.

Every active feature gets its row. Beside it the same derivatives by backward passes through the whole model: one for
each target, as the definition says, and many at once (`is_grads_batched`) with as many targets a pass. Edges of all
three are compared. The Llama has the sizes of TinyStories-656K and random weights, its autoencoders keep 32 features,
those of a deeper GPT-2 eight. One thread; processor seconds.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from machine import write_table
from torch import Tensor

import circuitsae as cs
from circuitsae.attribution.attribute import attribute_trace
from circuitsae.attribution.nodes import Endpoints
from circuitsae.attribution.targets import LogitTargets, explained
from circuitsae.graph import NodeKind
from circuitsae.replacement import ReplacementModel, Trace
from transcoders.dictionaries import random_dictionaries

PROMPT = "When John and Mary went to the store, John gave a drink to"
BATCH = 128


def cases() -> Iterator[tuple[str, ReplacementModel, Trace]]:
    pocket = cs.ReplacementModel(cs.load_model("pocket"), cs.load_dictionaries("pocket-sae"))
    yield "pocket", pocket, pocket.trace(PROMPT)
    sizes: list[tuple[Literal["llama", "gpt2"], int, int, int, int, int]]
    sizes = [("llama", 2, 128, 8, 1024, 32), ("gpt2", 12, 128, 8, 1024, 8)]
    for family, n_layers, d_model, n_heads, features, k in sizes:
        model = cs.random_model(family, n_layers=n_layers, d_model=d_model, n_heads=n_heads, d_vocab=2048)
        saes = random_dictionaries("sae", n_layers=n_layers, d_model=d_model, features=features, activation="topk", k=k)
        replacement = cs.ReplacementModel(model, saes)
        tokens = torch.randint(1, 2048, (15,), generator=torch.Generator().manual_seed(0))
        yield f"{family}, {n_layers} layers of {d_model}", replacement, replacement.trace(tokens)


class Whole:
    """The model on one leaf for all sites: rows of features and errors, layer by layer, by their definition."""

    def __init__(self, model: ReplacementModel, trace: Trace, token: Tensor) -> None:
        self.model, self.trace = model, trace
        self.targets = Endpoints.of(model, explained(model, trace, LogitTargets(token.tolist()))).targets.take(
            torch.arange(len(trace.features.value) + len(token))
        )
        self.leaf = trace.frozen.writes.mlp_out.clone().requires_grad_()
        with torch.enable_grad():
            reads = trace.frozen.live()(replace(trace.frozen.writes, mlp_out=self.leaf))
            self.reads = torch.cat([reads.by_layer, reads.final[None]])

    @torch.enable_grad()
    def rows(self, size: int) -> Float[np.ndarray, "target source"]:
        found = []
        for start in range(0, len(self.targets.layer), size):
            layer, pos, vector = self.targets.take(slice(start, start + size))
            values = torch.einsum("td,td->t", self.reads[layer, pos], vector)
            if size == 1:
                gradient = torch.autograd.grad(values[0], self.leaf, retain_graph=True)[0][None]
            else:
                every = torch.eye(len(layer))
                gradient = torch.autograd.grad(values, self.leaf, every, retain_graph=True, is_grads_batched=True)[0]
            found.append(self._score(gradient.detach()))
        return torch.cat(found).numpy()

    def _score(self, gradient: Float[Tensor, "target layer pos d"]) -> Float[Tensor, "target source"]:
        (layer, pos, feature), value = self.trace.features.index.unbind(1), self.trace.features.value
        decoders = value.new_empty(len(value), gradient.shape[-1])
        for at in layer.unique().tolist():
            decoders[layer == at] = self.model.dictionaries.decoder_rows(at, feature[layer == at], at).detach()
        features = torch.einsum("tnd,nd->tn", gradient[:, layer, pos], decoders * value[:, None])
        return torch.cat([features, torch.einsum("tlpd,lpd->tlp", gradient, self.trace.errors).flatten(1)], dim=1)


def seconds(work: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """The least processor seconds of up to three times."""
    least, found = float("inf"), np.zeros(0)
    for _ in range(3):
        began = time.process_time()
        found = work()
        took = time.process_time() - began
        least = min(least, took)
        if took > 1:
            break
    return least, found


def measured(name: str, model: ReplacementModel, trace: Trace) -> list[object]:
    graph = attribute_trace(model, trace)
    logits = [node for node in graph.nodes if node.kind is NodeKind.LOGIT]
    n, n_features = len(trace.features.value) + len(logits), len(trace.features.value)

    def ours() -> np.ndarray:
        return attribute_trace(model, trace).weights.toarray()

    def whole(size: int) -> np.ndarray:
        return Whole(model, trace, torch.tensor([node.index for node in logits])).rows(size)

    took, edges = seconds(ours)
    at_once, batched = seconds(lambda: whole(BATCH))
    one, single = seconds(lambda: whole(1))
    own = edges[[*range(n_features), *(graph.position[node.id] for node in logits)], :n_features]
    off = max(np.abs(own - rows[:, :n_features]).max() for rows in (batched, single)) / np.abs(own).max()
    times = [f"{took:.2f}", f"{at_once:.2f}", f"{one:.2f}", f"{at_once / took:.1f}", f"{one / took:.1f}"]
    return [name, trace.n_positions, n, graph.weights.nnz, *times, f"{off:.0e}"]


def main() -> None:
    torch.set_num_threads(1)
    columns = ["model", "tokens", "targets", "edges", "CPU s", f"whole model, {BATCH} a pass", "one a pass"]
    columns += ["times", "times (one)", "largest difference of edges"]
    with torch.no_grad():
        rows = [measured(*case) for case in cases()]
    print(write_table("sae_graphs", str(__doc__).strip(), columns, rows))


if __name__ == "__main__":
    main()
