"""Claim: a per-layer run on a real model has no spike in any layer's FVU.

From the metrics of a run of `circuitsae train` on SmolLM2-135M with default outliers (tokens of massive activations are
left out): 30 layers × 2,048 features, TopK 32, skip term, derivative .1 from the middle on, batches of 1,024 tokens of
the English text. FVU of one batch every five steps. *Worst*: the largest over the median of the twenty values around
it, after the warm-up; a spike is one above 3, as in outliers.md.

    python benchmarks/spikes.py RUN
"""

import argparse
import json
from pathlib import Path

import numpy as np
from machine import write_table

SPIKE, AROUND, WARM = 3.0, 10, 100
COLUMNS = ("layer", "FVU at step 100", "last", "worst", "at step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    lines = (parser.parse_args().run / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["step"] >= WARM]
    steps = np.array([record["step"] for record in records])
    fvu = np.array([record["fvu_per_layer"] for record in records])
    usual = np.array([np.median(fvu[max(0, i - AROUND) : i + AROUND + 1], axis=0) for i in range(len(fvu))])
    worst = fvu / usual
    at = worst.argmax(0)
    rows = [
        [layer, f"{fvu[0, layer]:.3f}", f"{usual[-1, layer]:.3f}", f"{worst[at[layer], layer]:.2f}", steps[at[layer]]]
        for layer in range(fvu.shape[1])
    ]
    spikes = int((worst > SPIKE).any(0).sum())
    rows.append(["mean", f"{fvu[0].mean():.3f}", f"{usual[-1].mean():.3f}", f"spikes in {spikes} layers", ""])
    claim = f"{str(__doc__).strip()}\n\nSteps {steps[0]:,} to {steps[-1]:,}."
    print(write_table("spikes", claim, COLUMNS, rows))


if __name__ == "__main__":
    main()
