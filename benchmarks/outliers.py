"""Tokens of massive activations in a real model, and whether training on the others is steady in every layer.

    OMP_NUM_THREADS=1 python benchmarks/outliers.py MODEL TEXT --out RUNS

First where norms are far above the median of their site. Then a transcoder for every layer, whose FVU is measured at
every step: the largest of each layer in medians of the steps before it, with the tokens left out and (`--without
STEPS`) with all of them in. A run goes on where it was stopped. Writes benchmarks/results/outliers.md. For
SmolLM2-135M see `benchmarks/training_memory.py`.
"""

import argparse
import json
import statistics
from pathlib import Path

from machine import earlier_rate, write_table

import transcoders as tc
from transcoders.data import find_outliers
from transcoders.kernels import keep_freed_memory
from transcoders.sites import Site

WINDOW = 50
"""Steps whose median a step's FVU is compared with."""
WARM = 10
"""Steps without such a comparison at the start."""
SPIKE = 3.0
"""A step's FVU over that median that counts as a spike."""


def worst(values: list[float]) -> tuple[float, int]:
    """The largest value over the median of the steps before it, and its step."""
    ratios = [
        (values[step] / statistics.median(values[max(0, step - WINDOW) : step]), step + 1)
        for step in range(WARM, len(values))
    ]
    return max(ratios, default=(float("nan"), 0))


def fvu_by_layer(
    model: tc.LanguageModel, text: str, out: Path, outliers: float, steps: int, given: argparse.Namespace
) -> list[list[float]]:
    """[layer][step], of a run that is trained as far as that."""
    config = tc.TranscoderConfig(
        features=given.features, activation="topk", k=32, batch=given.batch, tokens=given.steps * given.batch,
        lr=earlier_rate(given.features), outliers=outliers, buffer_mb=256, log_every=1, checkpoint_every=25,
    )  # fmt: skip
    source = tc.training.ModelSource(model, text, config)
    resume = any(out.glob("checkpoint-*"))
    tc.training.Trainer(source, [config], out=out, resume=resume).run(until=steps, progress=False)
    lines = [json.loads(line)["fvu_per_layer"] for line in (out / "metrics.jsonl").read_text().splitlines()[:steps]]
    return [list(values) for values in zip(*lines, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000, help="of the whole run, by which its rates are set")
    parser.add_argument("--until", type=int, default=None, help="stop after this many of them")
    parser.add_argument("--without", type=int, default=0, help="steps of a run that leaves no token out")
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    given = parser.parse_args()
    keep_freed_memory()
    model = tc.load_model(given.model)
    corpus = tc.open_corpus(given.text)
    rows = tc.take_rows(
        model, corpus.training(), rows=64, context=128, separator=corpus.separator_or(None)
    )  # fmt: skip
    sites = [Site(layer, kind) for layer in range(model.n_layers) for kind in ("mlp_in", "mlp_out")]
    found = find_outliers(model, rows, sites)
    steps = given.until or given.steps
    runs = {"left out": fvu_by_layer(model, given.text, given.out / "left-out", found.times, steps, given)}
    if given.without:
        runs["in"] = fvu_by_layer(model, given.text, given.out / "in", 0.0, given.without, given)
    table = []
    for layer in range(model.n_layers):
        row: list[object] = [layer]
        row += [f"{found.largest.get(Site(layer, kind), 0):.0f}" for kind in ("mlp_in", "mlp_out")]
        for fvu in (run[layer] for run in runs.values()):
            ratio, step = worst(fvu)
            row += [f"{statistics.median(fvu[-WINDOW:]):.3f}", f"{ratio:.2f} (step {step})"]
        table.append(row)
    spikes = {name: sum(worst(fvu)[0] > SPIKE for fvu in run) for name, run in runs.items()}
    said = "; ".join(f"with them {name}, {n} of {model.n_layers} layers have one" for name, n in spikes.items())
    claim = (
        f"{found.describe()} ({rows.numel():,} tokens of {Path(given.text).name}.)\n\n"
        f"Transcoders of {given.features} features (TopK, k 32) for all layers of {Path(given.model).name}, batches of "
        f"{given.batch} tokens, {steps} of {given.steps} steps"
        f"{f' ({given.without} with no token left out)' if given.without else ''}. A spike is an FVU of a batch above "
        f"{SPIKE:g} times the median of the {WINDOW} steps before: {said}. By `benchmarks/outliers.py`. Norms are the "
        "largest where over the limit, in medians of the site; FVU is the median of the last steps, and beside it the "
        "largest of a step over the median before it."
    )
    columns = ["layer", "norm of mlp_in", "of mlp_out"]
    columns += [f"{what} ({name})" for name in runs for what in ("FVU", "worst step")]
    print(write_table("outliers", claim, columns, table))


if __name__ == "__main__":
    main()
