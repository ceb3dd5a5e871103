"""Claim: verdicts are the same in float32 (≥ 99 %), in another order (all), against other controls (≥ 95 %).

Of five tasks a prompt that nothing was built with (seed 170018), both kinds of dictionary of the pocket model; of each
graph 100 edges against 200 controls, the graph claim and the direct edge. Every run is compared with the one in float64
and seed 0: `order and batches` has the edges shuffled and a quarter of the memory, `controls` has seed 1. `far` is the
largest difference of a ratio in another order.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from machine import write_table

import circuitsae as cs
from circuitsae.interventions import Recording
from circuitsae.interventions.forward import MEMORY
from circuitsae.tasks import load_task
from circuitsae.validation.choice import choose_edges
from circuitsae.validation.claims import Pairs, Settings, judge
from circuitsae.validation.edges import values_of

TASKS = ("ioi", "greater-than", "two-hop", "induction", "agreement")
DICTIONARIES = {"pocket": "CLT", "pocket-plt": "per layer"}
SEED, EDGES, NODES = 170018, 100, 0.9
COLUMNS = ["dictionary", "task", "verdicts", "float32", "order and batches", "far", "controls"]
VERDICTS = ["graph_verdict", "direct_verdict"]


def models(dictionaries: str) -> list[cs.ReplacementModel]:
    """In float64 and float32."""
    return [
        cs.ReplacementModel(cs.load_model("pocket", dtype=dtype), cs.load_dictionaries(dictionaries, dtype=dtype))
        for dtype in (torch.float64, torch.float32)
    ]


def judged(model: cs.ReplacementModel, prompt: str, ends: list, **settings: Any) -> pd.DataFrame:
    """The claims of some pairs of nodes."""
    recording = Recording(model, model.trace(prompt))
    values = values_of([recording])
    return judge(model, recording, Pairs.of(ends), Settings(claims=("graph", "direct"), **settings), elsewhere=values)


def measured(dictionaries: str) -> Iterator[list]:
    """A row for each task: how many verdicts, and how many of them each other run gives as well."""
    exact, coarse = models(dictionaries)
    for task in TASKS:
        prompt = load_task(task, exact.model, n=1, seed=SEED).examples[0].clean
        graph = cs.attribute(exact, prompt).prune(nodes=NODES)
        rows = choose_edges(graph, EDGES).rows
        ends = [(graph.nodes[s], graph.nodes[t]) for s, t in rows[["s", "t"]].to_numpy()]
        shuffled = np.random.default_rng(SEED).permutation(len(ends))
        first = judged(exact, prompt, ends)
        mixed = judged(exact, prompt, [ends[i] for i in shuffled], memory=MEMORY // 4)
        others = [judged(coarse, prompt, ends), mixed.iloc[np.argsort(shuffled)], judged(exact, prompt, ends, seed=1)]
        same = [int((first[VERDICTS].to_numpy() == other[VERDICTS].to_numpy()).sum()) for other in others]
        far = np.nanmax(np.abs(first["graph_ratio"].to_numpy() - others[1]["graph_ratio"].to_numpy()))
        yield [DICTIONARIES[dictionaries], task, 2 * len(ends), *same[:2], f"{far:.0e}", same[2]]


def main() -> None:
    rows = [row for dictionaries in DICTIONARIES for row in measured(dictionaries)]
    n = sum(row[2] for row in rows)
    shares = [f"{sum(row[column] for row in rows) / n:.1%}" for column in (3, 4, 6)]
    rows.append(["all", "", n, *shares[:2], "", shares[2]])
    print(write_table("invariance", str(__doc__).strip(), COLUMNS, rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
