"""SHIFT on the pocket model: how far a biased classifier is freed by taking features out of its circuit.

Two classifiers of the stream after the third of four blocks, each trained where topic (food or animals) and gender (a
man's or a woman's text) always go together, and tested where they do not: one is to tell gender from the mean over a
text's tokens, where the topic is plainer; the other is to tell the topic from a text's last token, where gender is.
Features of pocket-sae, judged by the rule; taken out as zero, as in the paper, or as their mean. Seeds draw texts and
halves; dictionaries and model stay.

    python benchmarks/shift.py [--seeds 3] [--texts 60]    # goes on where it was; --fresh starts over
"""

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd
from machine import RESULTS, machine

from circuitsae.benchmark.result import interval
from circuitsae.benchmark.templates import topics
from circuitsae.loading import load_dictionaries, load_model
from circuitsae.replacement import ReplacementModel
from circuitsae.shift import ShiftConfig, shift
from transcoders.files import write_file
from transcoders.formats.files import read_json

LABELS = ("food", "animals")
CASES: dict[str, dict[str, Any]] = {
    "Gender, biased by topic; mean of tokens": {"intended": "second", "pool": "mean"},
    "Topic, biased by gender; last token": {"intended": "label", "pool": "last"},
}
COLUMNS = ("intended", "unintended", "worst")


def main() -> None:
    """Measure what is not measured yet, and write all tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=60, help="of each topic and gender")
    parser.add_argument("--work", type=Path, default=Path("runs/shift"))
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    model = ReplacementModel(load_model("pocket", device="cpu"), load_dictionaries("pocket-sae"))
    began = time.perf_counter()
    lines = [
        "# shift", "", (__doc__ or "").partition("\n\n")[2].partition("\n\n    ")[0].replace("\n", " "), "",
        f"Machine: {machine()}, shared with other work. {options.seeds} seeds, {options.texts} texts of each of four "
        "cells, ± half of the 95 % interval by Student's t. Intended and unintended: the share of answers that agree "
        "with that label, cells counted alike; worst: of right answers in the worst cell.", "",
    ]  # fmt: skip
    for case, settings in CASES.items():
        for ablation in ("zero", "mean"):
            config = {"labels": LABELS, "ablation": ablation, "effect_texts": 32, "steps": 5, **settings}
            found = [measured(model, config, seed, options) for seed in range(options.seeds)]
            lines += [f"## {case}; {ablation} ablation", "", *table(found), ""]
    write_file(RESULTS / "shift.md", "\n".join(lines))
    print(*lines, f"{time.perf_counter() - began:.0f} s", sep="\n")


def measured(model: ReplacementModel, config: dict[str, Any], seed: int, options: argparse.Namespace) -> pd.DataFrame:
    """The lines of one seed, from before or now."""
    folder = options.work / f"{config['intended']}-{config['pool']}-{config['ablation']}-{options.texts}-{seed}"
    if options.fresh or not (folder / "shift.json").is_file():
        shift(model, topics(options.texts, seed), config=ShiftConfig(seed=seed, **config), progress=True).save(folder)
    return pd.DataFrame(read_json(folder / "shift.json")["lines"])


def table(found: list[pd.DataFrame]) -> list[str]:
    """Each line's means over seeds."""
    rows = ["| classifier | taken out | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (2 + len(COLUMNS))]
    together = pd.concat(found)
    for name in found[0]["name"]:
        own = together[together["name"] == name]
        cells = [str(interval(own[column].tolist())) for column in COLUMNS]
        rows.append(f"| {name} | {own['ablated'].mean():.0f} | " + " | ".join(cells) + " |")
    return rows


if __name__ == "__main__":
    main()
