"""Claim: transcoders of a real model are better layer by layer than all together; this says by how much.

Per-layer transcoders of SmolLM2-135M on held-out rows of the English text: of every layer FVU, L0, dead features and
the loss recovered (against zero) with that layer's MLP replaced alone; of all layers the means, and what the model
loses with all MLPs replaced at once. Each reads as it was trained: with BOS or without, massive activations left out or
not.

    circuitsae evaluate RUN --tokens 4000 --loss-tokens 1000 --out FILE.json
    python benchmarks/layers.py NAME=FILE.json [NAME=FILE.json …]
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from machine import write_table

COLUMNS = ("dictionaries", "layer", "FVU", "L0", "dead", "loss recovered", "loss", "top-1 agreement", "KL")
FIGURES = ("fvu", "l0", "dead", "recovered_zero")


def rows_of(name: str, found: Mapping[str, Any]) -> Iterator[list[str]]:
    layers, replaced = found["layers"], found["replaced"]
    means = [mean(layer[figure] for layer in layers) for figure in FIGURES]
    yield [name, "none replaced", "", "", "", "", f"{found['loss']:.3f}", "", ""]
    yield [name, "each alone, mean", *cells(*means), "", "", ""]
    together = [f"{replaced[figure]:.3f}" for figure in ("loss", "top1_agreement", "kl")]
    yield [name, "all together", "", "", "", f"{replaced['recovered_zero']:.3f}", *together]
    for layer in layers:
        ends = [f"{layer[figure]:.3f}" for figure in ("loss_spliced", "top1_agreement", "kl")]
        yield [name, str(layer["layer"]), *cells(*(layer[figure] for figure in FIGURES)), *ends]


def cells(fvu: float, l0: float, dead: float, recovered: float) -> list[str]:
    return [f"{fvu:.3f}", f"{l0:.1f}", f"{dead:.1%}", f"{recovered:.3f}"]


if __name__ == "__main__":
    given = (argument.partition("=") for argument in sys.argv[1:])
    lines = [row for name, _, file in given for row in rows_of(name, json.loads(Path(file).read_text()))]
    print(write_table("layers_smollm2", str(__doc__).strip(), COLUMNS, lines))
