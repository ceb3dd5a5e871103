"""Claim: 500 edges of a pocket graph are validated in under 20 s on 2 cores; batched and one by one agree.

Three regimes, 20 random controls for each edge. `one by one` is the same with one ablation per forward pass, in the
same process; the difference is that of any measured effect, over the largest one. Error budgets are timed beside.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from machine import write_table

import circuitsae as cs
from circuitsae.interventions.forward import MEMORY
from circuitsae.validation import Validation, error_budget

PROMPT = "When John and Mary went to the store, John gave a drink to"
COLUMNS = ("frozen", "replacement", "measured", "control")
EDGES, NODES = 500, 0.95


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    found = work()
    return found, time.perf_counter() - start


def main() -> None:
    model = cs.ReplacementModel(cs.load_model("pocket"), cs.load_dictionaries("pocket"))
    graph = cs.attribute(model, PROMPT).prune(nodes=NODES)

    def validate(controls: int, memory: int) -> Validation:
        regimes = ("frozen", "replacement", "model")
        return cs.validate(model, graph, edges=EDGES, regimes=regimes, controls=controls, memory=memory)

    cs.validate(model, graph, edges=5, controls=1)  # what is loaded on first use
    rows = []
    for controls in (0, 20):
        (together, fast), (alone, slow) = (timed(lambda m=m, n=controls: validate(n, m)) for m in (MEMORY, 1))
        columns = [c for c in COLUMNS if c in together.edges]
        ours, theirs = (check.edges[columns].to_numpy(float) for check in (together, alone))
        far = np.abs(ours - theirs).max() / np.abs(theirs).max()
        sources = together.edges["source"].nunique()
        verdicts = [check.edges.get("verdict", together.edges["kind"]).to_numpy() for check in (together, alone)]
        same = f"{(verdicts[0] == verdicts[1]).mean():.1%}" if controls else "–"
        what = f"{len(together.edges)} edges, {controls} controls"
        rows.append([what, sources, f"{fast:.1f}", f"{slow:.1f}", f"{slow / fast:.1f}×", f"{far:.1e}", same])
        if controls:
            _, seconds = timed(lambda check=together: error_budget(model, graph, check.edges))
            rows.append([f"error budgets of {len(together.edges)} edges", sources, f"{seconds:.1f}", "", "", "", ""])
    columns = ["what", "sources", "batched, s", "one by one, s", "ratio", "difference", "same verdict"]
    print(write_table("validation", str(__doc__).strip(), columns, rows))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
