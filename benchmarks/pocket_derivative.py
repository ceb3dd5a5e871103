"""Claim: trained for the derivative beside a skip term, the embedded transcoders answer as MLPs at no cost of FVU.

Transcoders of the pocket model, 1,024 JumpReLU features a layer unless said otherwise, trained on the recipe's text and
measured on the recipe's held-out rows, stored in half precision: L0, FVU, loss recovered and KL of the model with all
MLPs replaced, and the Jacobian agreement along natural directions, the mean over layers. λ: the weight of the
derivative in the loss, from the share of the steps that is said on. *As before*: the recipe of those that were shipped
before. *First stage*: those that are shipped now, as training leaves them; *shipped*: as they are, refined after each
stage with features that fire on more than half of the tokens turned round. One seed; the other rows were looked at to
choose the recipe.

    python benchmarks/pocket_derivative.py [--only NAME …]

What is done is kept under --work, so that a run that was killed goes on.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import write_table

from circuitsae.pocket import MODEL_DIR
from circuitsae.pocket.corpus import CONTEXT, SEPARATOR, TRAINING, held_out_text
from examples.pocket.sparse import configurations
from transcoders import LanguageModel, load_dictionaries, load_model, save_dictionaries
from transcoders.data import take_rows
from transcoders.evaluation import Evaluation, evaluate
from transcoders.training import train
from transcoders.training.config import MLPConfig

PLAIN = {"skip": False, "derivative": 0.0}
EARLY = {"derivative": 1.0, "derivative_from": 0.0, "tokens": 800_000}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "per layer, as before": ("plt", PLAIN | {"sparsity": 3e-3}),
    "per layer, first stage": ("plt", {}),
    "per layer, half the tokens, denser": ("plt", {"tokens": 1_000_000, "sparsity": 1e-3}),
    "per layer, denser still": ("plt", EARLY | {"sparsity": 1e-4, "start_l0": 64}),
    "per layer, TopK 32": ("plt", EARLY | {"activation": "topk", "k": 32, "sparsity": 5e-3}),
    "cross-layer, as before": ("clt", PLAIN | {"tokens": 3_000_000, "sparsity": 2.4e-3}),
    "cross-layer, first stage": ("clt", {}),
    "cross-layer, three million tokens": ("clt", {"tokens": 3_000_000}),
    "cross-layer, one million tokens, denser": ("clt", {"tokens": 1_000_000, "sparsity": 8e-4}),
}
SHIPPED = {"per layer, shipped": ("plt", "pocket-plt"), "cross-layer, shipped": ("clt", "pocket")}
COLUMNS = (
    "dictionaries", "tokens", "sparsity", "λ, from", "L0", "L0 by layer", "FVU", "loss recovered", "KL", "cosine",
    "norm ratio",
)  # fmt: skip


def config_of(name: str) -> MLPConfig:
    kind, changes = RUNS[name]
    config = configurations(quick=False)[kind][0]
    assert isinstance(config, MLPConfig)
    return replace(config, **changes)


def trained(model: LanguageModel, config: MLPConfig, folder: Path) -> Evaluation:
    """Train, store as the package does, and measure."""
    save_dictionaries(
        train(model, TRAINING, config, out=folder / "run", progress=False),
        folder / "dictionaries",
        storage_dtype=torch.float16,
    )
    return measured(model, folder / "dictionaries")


def measured(model: LanguageModel, dictionaries: Path | str) -> Evaluation:
    """On the rows that the recipe measures on."""
    rows = take_rows(model, held_out_text(16_000), rows=120, context=CONTEXT, separator=SEPARATOR)
    return evaluate(model, load_dictionaries(dictionaries), rows)


def figures(found: Evaluation) -> dict[str, Any]:
    assert found.agreement is not None
    assert found.replaced is not None
    return {
        "l0": [layer.l0 for layer in found.layers],
        "fvu": found.fvu,
        "recovered": found.replaced.recovered_zero,
        "kl": found.replaced.kl,
        "cosine": found.agreement.cosine,
        "norm_ratio": found.agreement.norm_ratio,
    }


def row(name: str, found: dict[str, Any]) -> list[str]:
    stages = configurations(quick=False)[SHIPPED[name][0]] if name in SHIPPED else [config_of(name)]
    config, l0 = stages[0], found["l0"]
    assert isinstance(config, MLPConfig)
    tokens = " + ".join(f"{stage.tokens / 1e6:g}" for stage in stages)
    compared = f"{config.derivative:g}, {config.derivative_from:g}" if config.derivative else "–"
    return [
        name, f"{tokens} M", "–" if config.activation == "topk" else f"{config.sparsity:g}", compared,
        f"{sum(l0) / len(l0):.1f}", ", ".join(f"{layer:.1f}" for layer in l0), f"{found['fvu']:.4f}",
        f"{found['recovered']:.2%}", f"{found['kl']:.3f}", f"{found['cosine']:.3f}", f"{found['norm_ratio']:.3f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [*RUNS, *SHIPPED]
    parser.add_argument("--only", nargs="*", default=names, choices=names, metavar="NAME")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "circuitsae-pocket")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(MODEL_DIR)
    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / "runs.jsonl"
    lines = kept.read_text().splitlines() if kept.exists() else []
    done = {record["name"]: record for record in map(json.loads, lines)}
    for name in options.only:
        if name not in done:
            if name in SHIPPED:
                found = measured(model, SHIPPED[name][1])
            else:
                found = trained(model, config_of(name), options.work / name)
            done[name] = {"name": name} | figures(found)
            with kept.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
    rows = [row(name, done[name]) for name in names if name in done]
    print(write_table("pocket_derivative", str(__doc__).strip(), COLUMNS, rows))


if __name__ == "__main__":
    main()
