"""Claim: on data with known features, dictionaries of every kind find them, at the sparsity that was asked for.

400,000 samples of `SuperpositionModel()` (width 128, 512 known directions, Zipf frequencies, L0 8), 3.07 million
samples seen, figures on 50,000 held-out samples. Seeds differ in first weights and order of the data, which are the
same. "ceiling" starts from the known directions. Bars: TopK FVU ≤ .145 and ≥ 96 % of the directions, BatchTopK ≤ .130
and ≥ 95 %, JumpReLU within 5 % of the L0 asked for and FVU ≤ .18.

    python benchmarks/superposition.py [--kinds topk batchtopk] [--seeds 3] [--tokens 3072000]
"""

import argparse
import time
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import mean
from typing import Any

import torch
from machine import write_table
from torch import Tensor

from transcoders.dictionaries import DictionarySet
from transcoders.evaluation import alignment, compare_seeds, recovery
from transcoders.evaluation.statistics import Statistics
from transcoders.synthetic import SuperpositionModel
from transcoders.training import SAEConfig, Trainer, VectorSource, train_on

L0 = 8
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"activation": "topk", "k": L0},
    "topk aligned": {"activation": "topk", "k": L0, "aligned": True},
    "topk resampled": {"activation": "topk", "k": L0, "remedy": "resample"},
    "topk no remedy": {"activation": "topk", "k": L0, "remedy": "none"},
    "batchtopk": {"activation": "batchtopk", "k": L0},
    "batchtopk aligned": {"activation": "batchtopk", "k": L0, "aligned": True},
    "matryoshka batchtopk": {"activation": "batchtopk", "k": L0, "matryoshka": (0.25, 0.5, 1.0)},
    "jumprelu tanh": {"activation": "jumprelu", "penalty": "tanh", "target_l0": float(L0)},
    "jumprelu l0": {"activation": "jumprelu", "penalty": "l0", "target_l0": float(L0)},
    "gated": {"activation": "gated", "target_l0": float(L0)},
    "relu l1": {"activation": "relu", "penalty": "l1", "target_l0": float(L0)},
    "relu unit l1": {"activation": "relu", "penalty": "unit_l1", "target_l0": float(L0)},
    "p-annealing": {"activation": "relu", "penalty": "p_anneal", "target_l0": float(L0)},
    "p-annealing aligned": {"activation": "relu", "penalty": "p_anneal", "target_l0": float(L0), "aligned": True},
    "topk ceiling": {"activation": "topk", "k": L0},
    "batchtopk ceiling": {"activation": "batchtopk", "k": L0},
}
COLUMNS = (
    "kind", "FVU", "directions > .9 cosine", "spurious", "dead", "L0 got", "alignment", "below ½", "bimodality",
    "MMCS across seeds", "samples/s",
)  # fmt: skip


@dataclass(frozen=True)
class Data:
    """One toy model with its samples."""

    toy: SuperpositionModel
    train: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class Figures:
    """One run."""

    fvu: float
    recovered: float
    spurious: float
    dead: float
    l0: float
    aligned: float
    below_half: float
    bimodality: float
    speed: float


def draw(samples: int, held_out: int) -> Data:
    toy = SuperpositionModel()
    first, second = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    return Data(toy, toy.vectors(samples, first), toy.vectors(held_out, second))


def run(kind: str, data: Data, config: SAEConfig) -> tuple[DictionarySet, Figures]:
    start = time.perf_counter()
    fit = from_truth if kind.endswith("ceiling") else lambda d, c: train_on(d.train, c, progress=False)
    dictionaries = fit(data, config)
    seconds = time.perf_counter() - start
    statistics = Statistics(dictionaries)
    with torch.no_grad():
        for part in data.held_out.unsqueeze(1).split(5000):
            statistics.update(part, part)
    found = recovery(dictionaries.decoder_rows(0, torch.arange(config.features), 0), data.toy.directions)
    summary = alignment(dictionaries, 0).summary()
    return dictionaries, Figures(
        fvu=statistics.fvu[0],
        recovered=found.recovered,
        spurious=found.spurious,
        dead=statistics.dead[0],
        l0=statistics.l0[0],
        aligned=summary.mean,
        below_half=summary.below_half,
        bimodality=summary.bimodality,
        speed=config.steps * config.batch / seconds,
    )


def from_truth(data: Data, config: SAEConfig) -> DictionarySet:
    """Trained with the known directions as first encoder and decoder, and biases of zero."""
    trainer = Trainer(VectorSource(data.train, None, seed=config.seed), [config])
    trainee = trainer.runs[0].trainee
    with torch.no_grad():
        trainee.W_enc[0].copy_(data.toy.directions)
        trainee.W_dec[0][:, 0].copy_(data.toy.directions)
        trainee.b_enc.zero_()
        trainee.b_dec.zero_()
    trainer.run(progress=False)
    return trainer.finish()[0]


def row(kind: str, runs: list[tuple[DictionarySet, Figures]]) -> list[str]:
    """Means over seeds, with the range of FVU and directions."""

    def each(name: str) -> list[float]:
        return [getattr(figures, name) for _, figures in runs]

    def spread(name: str, form: str) -> str:
        values = each(name)
        return f"{mean(values):{form}} ({min(values):{form}}–{max(values):{form}})"

    mmcs = [compare_seeds(a, b)[0].mmcs for (a, _), (b, _) in combinations(runs, 2)]
    return [
        kind, spread("fvu", ".4f"), spread("recovered", ".1%"), f"{mean(each('spurious')):.1%}",
        f"{mean(each('dead')):.1%}", f"{mean(each('l0')):.2f}", f"{mean(each('aligned')):.3f}",
        f"{mean(each('below_half')):.1%}", f"{mean(each('bimodality')):.2f}",
        f"{mean(mmcs):.3f}" if mmcs else "", f"{mean(each('speed')):,.0f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=400_000)
    parser.add_argument("--held-out", type=int, default=50_000)
    parser.add_argument("--tokens", type=int, default=3_072_000, help="samples seen in training")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=SAEConfig.lr)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    data = draw(given.samples, given.held_out)
    base = SAEConfig(features=data.toy.n_features, tokens=given.tokens, batch=given.batch, lr=given.lr)
    table = []
    for kind in given.kinds:
        config = replace(base, **KINDS[kind])
        table.append(row(kind, [run(kind, data, replace(config, seed=seed)) for seed in range(given.seeds)]))
        print(" | ".join(table[-1]), flush=True)
    settings = f"{given.tokens:,} samples seen, batch {given.batch}, {given.seeds} seeds: mean (range)."
    print(write_table("superposition", f"{str(__doc__).strip()}\n\n{settings}", COLUMNS, table))


if __name__ == "__main__":
    main()
