"""Claim: `circuitsae reproduce TASK --model gpt2` needs no other change: the whole path runs on a model of that shape.

GPT-2 small cannot be downloaded where this is built. A model of its exact shape with random weights and GPT-2's own
tokenizer stands in for it, with random per-layer transcoders; it lies in a folder called `gpt2`, so that all that is
compared with published figures of GPT-2 small is. The figures mean nothing, and the claims about them fail, as they
must; that every stage ran, and what each took, is what is shown. Two prompts a stage, 50 edges patched exactly.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from machine import write_table

from transcoders import save_dictionaries
from transcoders.dictionaries import random_dictionaries

FILES = ("vocab.json", "merges.txt")
FEATURES = 16
"""Of each layer; half of them fire at every position, for their weights are random."""
COLUMNS = ["task", "what", "measured", "published", "verdict"]


@dataclass
class Options:
    """What to run."""

    tasks: list[str] = field(default_factory=lambda: ["ioi", "greater-than"])
    """The tasks with published figures."""
    tokenizer: Path = Path(__file__).resolve().parents[2] / "shared/data/tokenizers/gpt2"
    """A folder with GPT-2's vocab.json and merges.txt."""


def stand_in(folder: Path, tokenizer: Path) -> tuple[Path, Path]:
    """Folders of the random model and of its transcoders."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    model.save_pretrained(folder / "gpt2")
    for name in FILES:
        shutil.copy(tokenizer / name, folder / "gpt2")
    config = model.config
    transcoders = random_dictionaries("plt", n_layers=config.n_layer, d_model=config.n_embd, features=FEATURES, seed=0)
    save_dictionaries(transcoders, folder / "transcoders")
    return folder / "gpt2", folder / "transcoders"


def dry_run(task: str, model: Path, dictionaries: Path, out: Path) -> dict[str, Any]:
    """What `report.json` says after the command; raises where it did not get to its end."""
    words = ["reproduce", task, "--model", str(model), "--dictionaries", str(dictionaries), "--quick"]
    words += ["--prompts", "2", "--rescore", "50", "--out", str(out)]
    done = subprocess.run(
        [Path(sys.executable).with_name("circuitsae"), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    if done.returncode not in (0, 1) or not (out / "report.html").exists():
        raise RuntimeError(f"circuitsae {' '.join(words)} stopped with {done.returncode}:\n{done.stderr[-3000:]}")
    (report,) = json.loads((out / "report.json").read_text())
    return report


def rows_of(report: dict[str, Any]) -> list[list[object]]:
    """A row per stage, then one per claim."""
    task = report["task"]
    rows: list[list[object]] = []
    for stage, seconds in report["seconds"].items():
        rows.append([task, f"stage: {stage}", f"{seconds:.0f} s", "", "ran"])
    for claim in report["claims"]:
        published = "" if claim["published"] is None else f"{claim['published']:g}"
        measured = "" if claim["measured"] is None else f"{claim['measured']:.3g}"
        rows.append([task, claim["name"], measured, published, claim["verdict"]])
    return rows


def main() -> None:
    options = tyro.cli(Options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, dictionaries = stand_in(folder, options.tokenizer)
        rows: list[list[object]] = []
        for task in options.tasks:
            rows += rows_of(dry_run(task, model, dictionaries, folder / task))
            print(write_table("gpt2_dry_run", str(__doc__).strip(), COLUMNS, rows))


if __name__ == "__main__":
    main()
