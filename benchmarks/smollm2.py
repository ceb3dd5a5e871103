"""Claim: the graph of a prompt in a model of thirty layers takes seconds, and is exact where it says so.

SmolLM2-135M with per-layer transcoders (30 × 2,048 features, TopK 32), after loading, on one thread: CPU time, and the
most memory above what was held before, of `attribute_pruned`, which `trace` calls, and of `validate` with 100 edges.
*Nodes*, *edges*: of the graph before it is pruned. *Conservation*: the largest difference between what a node's edges
sum to and its value, over the largest edge. *Direct*, *graph*: Spearman of predicted and measured over the tested
feature→feature and feature→logit edges.

    python benchmarks/smollm2.py MODEL NAME=DICTIONARIES [NAME=DICTIONARIES …]
"""

import argparse
import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import write_table
from trace_memory import resident

import circuitsae as cs
from circuitsae.attribution import attribute_pruned
from circuitsae.graph import AttributionGraph

PROMPTS = ("When John and Mary went to the store, John gave a drink to", "The capital of France is")
CLASSES = ("feature→feature", "feature→logit")
COLUMNS = (
    "dictionaries", "prompt", "tokens", "nodes", "edges", "attribute: CPU s", "GB", "conservation", "in float64",
    "validate: CPU s", "GB", *(f"{claim}: {kind}" for claim in ("direct", "graph") for kind in CLASSES),
)  # fmt: skip


def spent(run: Callable[[], Any]) -> tuple[Any, str, str]:
    """What it gives, CPU seconds, and GB at the peak above what was held before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = resident("VmRSS"), time.process_time()
    result = run()
    return result, f"{time.process_time() - start:.1f}", f"{(resident('VmHWM') - before) / 1000:.2f}"


def conservation(graph: AttributionGraph) -> str:
    return f"{abs(graph.residual()).max() / abs(graph.weights).max():.0e}"


def row(name: str, models: tuple[cs.ReplacementModel, cs.ReplacementModel], prompt: str) -> list[object]:
    model, exact = models
    (pruned, _), seconds, memory = spent(lambda: attribute_pruned(model, prompt))
    full = cs.attribute(model, prompt)
    size = [len(full.token_ids), f"{len(full.nodes):,}", f"{full.weights.nnz:,}"]
    found = conservation(full)
    del full
    check, testing, held = spent(lambda: cs.validate(model, pruned))
    agreed = [check.agreement(claim)[kind].spearman for claim in ("direct", "graph") for kind in CLASSES]
    again = conservation(cs.attribute(exact, prompt))
    return [name, prompt, *size, seconds, memory, found, again, testing, held, *(f"{value:.3f}" for value in agreed)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("dictionaries", nargs="+", help="NAME=FOLDER")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    usual, exact = (cs.load_model(arguments.model, dtype=dtype) for dtype in ("float32", "float64"))
    table = []
    for each in arguments.dictionaries:
        name, _, folder = each.partition("=")
        models = (
            cs.ReplacementModel(usual, cs.load_dictionaries(folder, dtype="float32")),
            cs.ReplacementModel(exact, cs.load_dictionaries(folder, dtype="float64")),
        )
        table += [row(name, models, prompt) for prompt in PROMPTS]
        assert __doc__ is not None
        print(write_table("smollm2", __doc__.strip(), COLUMNS, table), flush=True)


if __name__ == "__main__":
    main()
