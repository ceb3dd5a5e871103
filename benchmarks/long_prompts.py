"""Claim: a long prompt needs the memory of one layer's attention patterns, not of all.

Every measurement runs in a process of its own, on one thread, on a random model of GPT-2 small's sizes (12 layers, 768,
12 heads, 50,257 tokens; context as long as the prompt) or of the pocket model's (4 layers, 128, 8 heads, 2,176 tokens)
with random transcoders of which about 16 features a layer and position fire. First the prompt is traced (clean run,
features, errors), then attributed and pruned as `circuitsae trace` does. Memory is the peak above what model and
dictionaries hold. Parts are shares of the CPU seconds of attribution: patterns computed again; what attention makes of
what is carried; edges scored; influence summed; the rest (nodes, vectors, decoders, pruning).

    python benchmarks/long_prompts.py --cases gpt2,512,8192 gpt2,1024,8192 gpt2,2048,8192 gpt2,4096,8192

A case is a model, tokens and `max_features`.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from attribution import run_worker
from machine import RESULTS, write_table

SIZES: dict[str, dict[str, int]] = {
    "gpt2": {"n_layers": 12, "d_model": 768, "n_heads": 12, "d_vocab": 50257, "features": 4096},
    "pocket": {"n_layers": 4, "d_model": 128, "n_heads": 8, "d_vocab": 2176, "features": 1024},
}
ACTIVE = 16
PARTS = ("patterns", "attention", "edges", "influence", "the rest")
COLUMNS = [
    "model", "tokens", "features asked for", "patterns are", "MB of all patterns", "active features", "nodes", "edges",
    "CPU s of the trace", "peak MB of the trace", "CPU s of attribution", "peak MB of attribution", *PARTS,
]  # fmt: skip


@dataclass
class Options:
    """What to measure."""

    cases: list[str] = field(
        default_factory=lambda: [*(f"gpt2,{n},8192" for n in (512, 1024, 2048, 4096)), "pocket,1024,8192"]
    )
    """A model, tokens and `max_features` each."""
    held_mb: float = 1500.0
    """Patterns are also measured held where those of all layers take no more than this."""
    keep: bool = False
    """Keep the page's rows of other cases."""
    note: str = ""
    """Put under the claim: what this run leaves out."""


def main() -> None:
    options = tyro.cli(Options)
    rows: list[list[object]] = _rows_of_others(options.cases) if options.keep else []
    claim = str(__doc__).strip() + (f"\n\n{options.note}" if options.note else "")
    for case in options.cases:
        name, tokens, max_features = case.split(",")
        size = SIZES[name]
        pattern_mb = size["n_layers"] * size["n_heads"] * int(tokens) ** 2 * 4 / 2**20
        for patterns in ["held", "recomputed"] if pattern_mb <= options.held_mb else ["recomputed"]:
            task = {**size, "tokens": int(tokens), "max_features": int(max_features), "active": ACTIVE}
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder)
                found = run_worker(sys.executable, "long_prompt_worker.py", {**task, "patterns": patterns}, path)
            rows.append(
                [name, f"{int(tokens):,}", f"{int(max_features):,}", patterns, f"{pattern_mb:,.0f}", *_row(found)]
            )
            print(json.dumps(found), flush=True)
            write_table("long_prompts", claim, COLUMNS, rows)


def _rows_of_others(cases: list[str]) -> list[list[object]]:
    """Of the page as it is, without those of some cases."""
    lines = (RESULTS / "long_prompts.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith(tuple(f"| {name} " for name in SIZES))]
    return [[*row] for row in rows if ",".join(cell.replace(",", "") for cell in row[:3]) not in cases]


def _row(found: dict[str, Any]) -> list[object]:
    counts = [f"{found[name]:,}" for name in ("features", "nodes", "edges")]
    costs = [f"{found['trace_cpu']:.1f}", f"{found['trace_mb']:,.0f}", f"{found['cpu']:.1f}", f"{found['mb']:,.0f}"]
    total = sum(found["parts"].values())
    return [*counts, *costs, *(f"{found['parts'].get(part, 0) / total:.0%}" for part in PARTS)]


if __name__ == "__main__":
    main()
