"""Claim: rows that change a late position are run from there on; of longer prompts that saves half of a validation.

Attention looks back only, so a pass over rows that change positions from p on takes the keys and values before p from
the clean run. `whole prompts`: every row is run from the first position on, as before. CPU seconds of `validate` with
all three claims, the faster of two runs; the difference is the largest of any measured effect, as a share of it or of
the median one.

    python benchmarks/passes.py
"""

import time

import numpy as np
import torch
from machine import write_table

import circuitsae as cs
from circuitsae.interventions import passes
from transcoders.dictionaries import random_dictionaries
from transcoders.loading import random_model

EDGES = 300
PROMPTS = (
    "The capital of the state containing Dallas is",
    "When John and Mary went to the store, John gave a drink to",
    "When John and Mary went to the store, John gave a drink to Mary. When Tom and Anna went to the park, Tom gave a "
    "ball to Anna. When Paul and Jane went to the school, Jane gave a book to",
)


def cost(model: cs.ReplacementModel, graph: cs.AttributionGraph, worth: int) -> tuple[float, np.ndarray]:
    """CPU seconds of validating a graph, and the effects that were measured."""
    passes.WORTH, seconds, measured = worth, [], np.zeros(0)
    for _ in range(2):
        started = time.process_time()
        edges = cs.validate(model, graph, edges=EDGES).edges
        seconds.append(time.process_time() - started)
        measured = edges.filter(regex="_measured$|^measured$").to_numpy(float)
    return min(seconds), measured


def row(
    name: str, model: cs.ReplacementModel, prompt: str | torch.Tensor, max_features: int | None = None
) -> list[str]:
    """Both ways on one prompt."""
    own = passes.WORTH
    graph = cs.attribute(model, prompt, max_features=max_features).prune()
    cs.validate(model, graph, edges=10)  # what is found out once
    whole, before = cost(model, graph, 2**60)
    parts, after = cost(model, graph, own)
    passes.WORTH = own
    finite = np.isfinite(before) & np.isfinite(after)
    assert (np.isfinite(before) == np.isfinite(after)).all()
    before, after = before[finite], after[finite]
    difference = (np.abs(after - before) / np.maximum(np.abs(before), np.median(np.abs(before)))).max()
    length = max(node.pos for node in graph.nodes) + 1
    return [name, f"{length}", f"{whole:.2f}", f"{parts:.2f}", f"{whole / parts:.2f}", f"{difference:.1e}"]


def main() -> None:
    pocket = cs.ReplacementModel(cs.load_model("pocket"), cs.load_dictionaries("pocket"))
    rows = [row("pocket, CLT", pocket, prompt) for prompt in PROMPTS]
    random = cs.ReplacementModel(
        random_model("gpt2", n_layers=4, d_model=256, context=256),
        random_dictionaries("plt", n_layers=4, d_model=256, features=512, activation="topk", k=16),
    )
    tokens = torch.randint(1, 64, (128,), generator=torch.Generator().manual_seed(0))
    rows.append(row("random GPT-2, 4 layers × 256", random, tokens, max_features=1000))
    columns = ("model", "tokens", "whole prompts", "from the change on", "ratio", "difference")
    print(write_table("passes", str(__doc__).strip(), columns, rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
