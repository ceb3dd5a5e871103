"""Claim: errors that answer cost a trace six to nine times as much, and more of the influence comes from tokens.

SmolLM2-135M with its published per-layer transcoders (30 × 2,048 features, TopK 32), after loading, all features:
`attribute_pruned`, which `trace` calls, with errors held and answering (`errors="linear"`), and with linear response as
well. *CPU s*, *clock s*: of both threads, and on the clock. *GB*: the most memory above what was held before. *Kept*:
nodes and edges after pruning. *Replacement*, *completeness*: scores of the whole graph. *Past*: the share of its weight
in what passed by errors and no feature.

    python benchmarks/answering_cost.py MODEL DICTIONARIES
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from machine import write_table
from smollm2 import PROMPTS, spent

import circuitsae as cs
from circuitsae.attribution import attribute_pruned
from circuitsae.attribution.limits import Errors, Response

WAYS: tuple[tuple[Response, Errors], ...] = (("frozen", "held"), ("frozen", "linear"), ("linear", "linear"))
COLUMNS = (
    "prompt", "response", "errors", "nodes", "edges", "CPU s", "clock s", "GB", "kept: nodes", "edges", "replacement",
    "completeness", "past",
)  # fmt: skip


def row(model: cs.ReplacementModel, prompt: str, response: Response, errors: Errors) -> list[object]:
    began = time.perf_counter()
    (graph, full), seconds, memory = spent(partial(attribute_pruned, model, prompt, response=response, errors=errors))
    clock, scores = time.perf_counter() - began, graph.scores
    size = [f"{full.nodes:,}", f"{full.edges:,}", seconds, f"{clock:.1f}", memory]
    kept = [f"{len(graph.nodes):,}", f"{graph.weights.nnz:,}", f"{scores.replacement:.3f}"]
    past = "" if scores.past is None else f"{scores.past:.3f}"
    return [prompt, response, errors, *size, *kept, f"{scores.completeness:.3f}", past]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("dictionaries")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    dictionaries = cs.load_dictionaries(arguments.dictionaries, dtype="float32")
    model = cs.ReplacementModel(cs.load_model(arguments.model), dictionaries)
    cs.attribute(model, "Hello", max_features=10)
    table = []
    for prompt in PROMPTS:
        table += [row(model, prompt, *way) for way in WAYS]
        assert __doc__ is not None
        print(write_table("answering_cost", __doc__.strip(), COLUMNS, table), flush=True)


if __name__ == "__main__":
    main()
