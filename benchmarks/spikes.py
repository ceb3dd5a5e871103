r"""Claim: a per-layer run on a real model has no spike in any layer's FVU.

From the metrics of a run on SmolLM2-135M with default outliers (tokens of massive activations are left out): FVU of one
batch in five, since it logs every fifth step. *Worst*: the largest over the median of the fifty values before it; a
spike is one above 3, as in outliers.md.

    circuitsae train MODEL --corpus TEXT --kind plt --activation topk --k 32 --features 2048 --tokens 1600000 \
        --batch 1024 --lr 0.002 --skip --derivative 0.1 --buffer-mb 1024 --log-every 5 --out RUN
    python benchmarks/spikes.py RUN
"""

import argparse
import json
import statistics
from pathlib import Path

from machine import write_table
from outliers import SPIKE, WINDOW, worst

COLUMNS = ("layer", "FVU of the last batches", "worst", "at step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    lines = (parser.parse_args().run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    rows: list[list[object]] = []
    found = []
    for layer, fvu in enumerate(zip(*(record["fvu_per_layer"] for record in records), strict=True)):
        ratio, at = worst(list(fvu))
        found.append(ratio)
        rows.append([layer, f"{statistics.median(fvu[-WINDOW:]):.3f}", f"{ratio:.2f}", records[at - 1]["step"]])
    said = (
        f"Up to step {records[-1]['step']:,}: {sum(ratio > SPIKE for ratio in found)} of {len(found)} layers have one."
    )
    print(write_table("spikes", f"{str(__doc__).strip()}\n\n{said}", COLUMNS, rows))


if __name__ == "__main__":
    main()
