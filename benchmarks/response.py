"""What a graph foresees of the live model: with attention and norms held (`frozen`), and as they answer (`linear`).

1. T̂, what removing a source does by all paths of the graph, against the model with everything live (its MLPs, attention
   and norms; `Model` of `benchmarks/claims.py`, which shares nothing with the graph): Spearman over the {edges} edges
   of most influence of each class, chosen from either graph; all of a source removed, and 1 % of it.
2. Cost: CPU seconds of one whole graph, the median of {runs} runs in turn, on one thread.

    python benchmarks/response.py

Pocket: cross-layer transcoders, {n} held-out prompts of each of its five tasks, seed {seed}, in float64.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import claims
import numpy as np
import pandas as pd
import torch
import tyro
from machine import write_table

import circuitsae as cs
from circuitsae.attribution.attribute import EngineName, Response
from circuitsae.pocket import prompts as pocket
from circuitsae.validation import agreement
from transcoders.dictionaries import random_dictionaries

RESPONSES: tuple[Response, ...] = ("frozen", "linear")


@dataclass
class Options:
    """What to measure."""

    n: int = 4
    """Prompts of each task."""
    seed: int = 20261130
    """Of these prompts."""
    runs: int = 5
    """Of each graph whose cost is measured; of the large model's, one."""


def foreseen(model: cs.ReplacementModel, prompts: Sequence[str | torch.Tensor]) -> pd.DataFrame:
    """A row per edge and graph that chose it: T̂ of both graphs, and the live model's effects."""
    frames = []
    for prompt in prompts:
        graphs = {name: cs.attribute(model, prompt, response=name) for name in RESPONSES}
        trace = model.trace(prompt)
        oracle = claims.Model(model, replace(trace, frozen=trace.frozen.live()))
        for by, graph in graphs.items():
            pairs = claims.chosen(graph, "influence")
            foretold = {name: claims.total_effects(other, pairs) for name, other in graphs.items()}
            frame = pairs.frame().assign(chosen=by, full=oracle.effects(pairs), small=oracle.effects(pairs, 0.01))
            frames.append(frame.assign(**foretold))
    return pd.concat(frames)


def table(edges: pd.DataFrame) -> list[list[str]]:
    """Rows of the first table."""
    rows = []
    for by in RESPONSES:
        for kind, part in claims.split(pd.DataFrame(edges[edges["chosen"] == by])):
            row = [by, kind, f"{len(part):,}"]
            for measured in ("full", "small"):
                for name in RESPONSES:
                    found = agreement(part[name].to_numpy(float), part[measured].to_numpy(float))
                    row += [f"{found.spearman:.3f}", f"{found.sign:.1%}"]
            rows.append(row)
    return rows


def seconds(model: cs.ReplacementModel, prompt: str | torch.Tensor, runs: int) -> dict[Response, float]:
    """CPU seconds of the whole graph, both kinds in turn."""
    found: dict[Response, list[float]] = {name: [] for name in RESPONSES}
    for _ in range(runs + 1):
        for name, times in found.items():
            times.append(_once(model, prompt, name))
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def _once(model: cs.ReplacementModel, prompt: str | torch.Tensor, name: Response, engine: EngineName = "auto") -> float:
    start = time.process_time()
    cs.attribute(model, prompt, response=name, engine=engine)
    return time.process_time() - start


def costs(runs: int) -> list[list[str]]:
    """Rows of the second table."""
    small = cs.ReplacementModel(cs.load_model("pocket"), cs.load_dictionaries("pocket"))
    rows = [_row("pocket, CLT", small, pocket.DEMONSTRATION, runs)]
    rows[0][-1] = f"{_once(small, pocket.DEMONSTRATION, 'linear', 'autograd'):.2f}"
    for family in ("gpt2", "llama"):
        large = cs.random_model(family, n_layers=6, d_model=768, n_heads=12, d_vocab=1000, seed=1)
        dictionaries = random_dictionaries("plt", n_layers=6, d_model=768, features=64, seed=1)
        tokens = torch.randint(1, 1000, (15,), generator=torch.Generator().manual_seed(1))
        rows.append(_row(f"random {family}, 6 × 768, PLT", cs.ReplacementModel(large, dictionaries), tokens, 1))
    return rows


def _row(said: str, model: cs.ReplacementModel, prompt: str | torch.Tensor, runs: int) -> list[str]:
    trace = model.trace(prompt)
    taken = seconds(model, prompt, runs)
    times = [f"{taken[name]:.2f}" for name in RESPONSES]
    return [said, f"{trace.n_positions}", f"{len(trace.features.value):,}", *times,
            f"{taken['linear'] / taken['frozen']:.2f}", ""]  # fmt: skip


def main(options: Options) -> None:
    torch.set_num_threads(1)
    said = str(__doc__).strip().format(edges=claims.EDGES, runs=options.runs, n=options.n, seed=options.seed)
    columns = ["model", "positions", "features", "frozen", "linear", "ratio", "linear by autograd"]
    print(write_table("response_cost", said, columns, costs(options.runs)))
    model = cs.ReplacementModel(cs.load_model("pocket", dtype="float64"), cs.load_dictionaries("pocket"))
    edges = foreseen(model, claims.pocket_prompts(options.n, options.seed))
    assert np.isfinite(edges[["full", "small"]].to_numpy()).all()
    removed = [f"{name}, {dose}" for dose in ("all", "1 %") for name in RESPONSES]
    columns = ["chosen from", "class", "n", *(c for name in removed for c in (f"T̂ {name}", "same sign"))]
    print(write_table("response", said, columns, table(edges)))


if __name__ == "__main__":
    main(tyro.cli(Options))
