"""Claim: each default of a TopK autoencoder's training earns its place: with it changed back, FVU is this much higher.

One row for each cause: everything as it is by default but the settings named. FVU on held-out vectors after 500 and
3,000 steps of a run that was planned for that many (rates and remedies follow the length); mean (range) over seeds,
which differ in first weights and order of the data. Data: `superposition`, `SuperpositionModel()`, 128 → 512, k 8;
`zipf`, the generator of `benchmarks/training.py`, the same shape; `tinystories`, resid_post of layer 1 of
tinystories-656k on its own text (beside the repository, in ../shared), 128 → 1,024, k 16.

    python benchmarks/ablation.py [--data superposition] [--steps 500] [--seeds 3] [--work FOLDER]

What is done is kept under --work, so that a run that was killed goes on.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from machine import write_table
from quality_data import synthetic
from torch import Tensor

from circuitsae.loading import load_model
from transcoders.data import take_rows
from transcoders.data.activations import sites_of
from transcoders.evaluation.statistics import Statistics
from transcoders.files import write_json
from transcoders.formats.files import read_json
from transcoders.kernels import keep_freed_memory
from transcoders.sites import Site
from transcoders.synthetic import SuperpositionModel
from transcoders.training import SAEConfig, train

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLES, HELD_OUT, BATCH, CONTEXT = 190_000, 8_192, 1024, 128
EARLIER: dict[str, Any] = {
    "encoder_scale": 0.1, "lr": 2e-3, "centred": False, "remedy": "auxiliary", "dead_after": 100_000,
}  # fmt: skip
CAUSES: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "all as before": EARLIER,
    "first encoders of norm 0.1": {"encoder_scale": 0.1},
    "learning rate 2e-3": {"lr": 2e-3},
    "learning rate 4e-3": {"lr": 4e-3},
    "encoder reads x, not x − b_dec": {"centred": False},
    "AuxK after 100,000 tokens": {"remedy": "auxiliary", "dead_after": 100_000},
    "no remedy for dead latents": {"remedy": "none"},
    "Adam's β₂ .999": {"betas": (0.9, 0.999)},
    "Adam's β₁ 0": {"betas": (0.0, 0.99)},
    "no warm-up, no decay": {"warmup": 0.0, "decay": 0.0},
    "k falls from 4 k": {"k_start": 4.0},
    "no clipping": {"clip": 0.0},
}


def of_tinystories() -> Tensor:
    data = REPOSITORY.parent / "shared" / "data"
    model = load_model(data / "models" / "tinystories-656k")
    text = (data / "corpora" / "tiny_stories_944k.txt").read_text()
    count = -(-(SAMPLES + HELD_OUT) // (CONTEXT - 1))
    rows = take_rows(model, text, rows=count, context=CONTEXT)
    site = Site(1, "resid_post")
    vectors = sites_of(model, rows, [site], [site]).reads[:, 0]
    return vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))]


@dataclass(frozen=True)
class Data:
    """Vectors with the shape of what is trained on them; the last `HELD_OUT` are for measuring."""

    features: int
    k: int
    draw: Callable[[], Tensor]


DATA = {
    "superposition": Data(
        512, 8, lambda: SuperpositionModel().vectors(SAMPLES + HELD_OUT, torch.Generator().manual_seed(1))
    ),
    "zipf": Data(512, 8, lambda: torch.from_numpy(synthetic(128, "sae", SAMPLES + HELD_OUT)[0][:, 0])),
    "tinystories": Data(1024, 16, of_tinystories),
}


def fvu_of(vectors: Tensor, config: SAEConfig) -> float:
    """After training, on the vectors held out."""
    dictionaries = train(None, vectors[:-HELD_OUT], config, progress=False)
    statistics = Statistics(dictionaries)
    with torch.no_grad():
        for part in vectors[-HELD_OUT:].unsqueeze(1).split(2048):
            statistics.update(part, part)
    return statistics.fvu[0]


class Done:
    """What has been measured, in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, read_json(path) if path.exists() else {}

    def __call__(self, key: str, vectors: Tensor, config: SAEConfig) -> float:
        if key not in self.found:
            self.found[key] = fvu_of(vectors, config)
            write_json(self.path, self.found)
        return self.found[key]


def spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4f} ({min(values):.4f}–{max(values):.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), metavar="DATA")
    parser.add_argument("--steps", nargs="+", type=int, default=[500, 3000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("ablation"))
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    given.work.mkdir(parents=True, exist_ok=True)
    done = Done(given.work / "done.json")
    table = []
    for name in given.data:
        data = DATA[name]
        vectors = data.draw()
        for cause, settings in CAUSES.items():
            cells = []
            for steps in given.steps:
                common: dict[str, Any] = {"features": data.features, "activation": "topk", "k": data.k, "batch": BATCH}
                config = SAEConfig(**{**common, "tokens": BATCH * steps, **settings})
                cells.append([
                    done(f"{name} | {cause} | {steps} | {seed}", vectors, replace(config, seed=seed))
                    for seed in range(given.seeds)
                ])  # fmt: skip
            table.append([name, cause, *(spread(values) for values in cells)])
            print(" | ".join(table[-1]), flush=True)
    said = f"{str(__doc__).strip()}\n\n{given.seeds} seeds, batch {BATCH}."
    print(write_table("ablation", said, ["data", "changed", *(f"FVU, {n:,} steps" for n in given.steps)], table))


if __name__ == "__main__":
    main()
