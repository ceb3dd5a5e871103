"""Claim: without aligned training the encoder·decoder scores have two modes, with it one, and it costs or gains this.

The score of a feature is the cosine of its encoder and its decoder, in five bins; bimodality is Sarle's coefficient
(5/9 for a uniform distribution; above it, look at the bins). Every pair of rows has the same data, batches and seeds,
and differs in `aligned` alone. Data: `SuperpositionModel` with correlated groups and a hierarchy, 1,024 latents for
its 512 features; an SAE and a transcoder on the middle layer of pocket, on its own text. Tied: the first decoder is
the encoder's transpose, so that all scores start at one; untied: it is drawn by itself, and they start around zero.
Dead: fired on none of the held-out vectors. No remedy for dead latents, so that what the constraint does is seen by
itself.

    python benchmarks/aligned.py [--seeds 3] [--tokens 240000]
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import mean
from typing import Any, NamedTuple

import torch
from machine import write_table
from torch import Tensor

from circuitsae.loading import load_model
from circuitsae.pocket.corpus import text_stream
from transcoders.data import take_rows
from transcoders.data.activations import sites_of
from transcoders.dictionaries import DictionarySet
from transcoders.evaluation import alignment, compare_seeds
from transcoders.evaluation.statistics import Statistics, bimodality
from transcoders.sites import Site
from transcoders.synthetic import SuperpositionModel
from transcoders.training import SAEConfig, TrainConfig, TranscoderConfig, train

K = 8
KINDS: dict[str, dict[str, Any]] = {
    "topk, untied": {"activation": "topk", "k": K, "decoder_init": "random"},
    "topk, tied": {"activation": "topk", "k": K, "decoder_init": "transpose"},
    "p-annealing, untied": {
        "activation": "relu", "penalty": "p_anneal", "target_l0": float(K), "decoder_init": "random",
    },
}  # fmt: skip
SETTINGS: dict[str, Any] = {"lr": 2e-3, "dead_after": 100_000}
"""What was the default when the table was made."""
EDGES = (-1.0, 0.2, 0.4, 0.6, 0.8, 1.0)
COLUMNS = (
    "data", "kind", "aligned", "FVU", "L0", "dead", "score: mean", "< .2", ".2–.4", ".4–.6", ".6–.8", "> .8",
    "bimodality", "MMCS across seeds",
)  # fmt: skip
TRAIN, HELD_OUT, CONTEXT = 100_000, 10_000, 96


class Vectors(NamedTuple):
    """What a dictionary of one layer reads and writes; the last `HELD_OUT` are for measuring."""

    reads: Tensor
    writes: Tensor


@dataclass(frozen=True)
class Data:
    """Vectors with what is trained on them."""

    of: type[TrainConfig]
    features: int
    draw: Callable[[], Vectors]


def superposed() -> Vectors:
    toy = SuperpositionModel(correlation=0.5, hierarchy=0.5)
    x = toy.vectors(TRAIN + HELD_OUT, torch.Generator().manual_seed(1))
    return Vectors(x, x)


def of_pocket(read: str, write: str) -> Vectors:
    model = load_model("pocket")
    count = -(-(TRAIN + HELD_OUT) // (CONTEXT - 1))
    rows = take_rows(model, text_stream(0), rows=count, context=CONTEXT, separator="\n")
    middle = model.n_layers // 2
    sites = sites_of(model, rows, [Site(middle, read)], [Site(middle, write)])  # pyright: ignore[reportArgumentType]
    return Vectors(sites.reads[: TRAIN + HELD_OUT, 0], sites.writes[: TRAIN + HELD_OUT, 0])


DATA = {
    "superposition": Data(SAEConfig, 1024, superposed),
    "pocket, SAE": Data(SAEConfig, 1024, lambda: of_pocket("resid_post", "resid_post")),
    "pocket, transcoder": Data(TranscoderConfig, 1024, lambda: of_pocket("mlp_in", "mlp_out")),
}


@dataclass(frozen=True)
class Figures:
    """One run."""

    dictionaries: DictionarySet
    fvu: float
    l0: float
    dead: float
    scores: Tensor


def train_one(vectors: Vectors, config: TrainConfig) -> Figures:
    reads, writes = (side[:-HELD_OUT] for side in vectors)
    dictionaries = train(None, reads if config.kind == "sae" else (reads, writes), config, progress=False)
    statistics = Statistics(dictionaries)
    with torch.no_grad():
        for read, write in zip(*(side[-HELD_OUT:].unsqueeze(1).split(5000) for side in vectors), strict=True):
            statistics.update(read, write)
    scores = alignment(dictionaries, 0).cosine
    return Figures(dictionaries, statistics.fvu[0], statistics.l0[0], statistics.dead[0], scores)


def row(data: str, kind: str, aligned: bool, runs: Sequence[Figures]) -> list[str]:
    """Means over seeds; of the dead share and MMCS the range as well."""
    scores = torch.cat([run.scores for run in runs])
    shares = [float(((scores > a) & (scores <= b)).double().mean()) for a, b in pairwise(EDGES)]
    mmcs = [compare_seeds(a.dictionaries, b.dictionaries)[0].mmcs for a, b in combinations(runs, 2)]
    dead = [run.dead for run in runs]
    return [
        data, kind, "yes" if aligned else "no", f"{mean(run.fvu for run in runs):.3f}",
        f"{mean(run.l0 for run in runs):.2f}", f"{mean(dead):.1%} ({min(dead):.1%}–{max(dead):.1%})",
        f"{float(scores.mean()):.3f}", *(f"{share:.1%}" for share in shares),
        f"{mean(bimodality(run.scores) for run in runs):.2f}",
        f"{mean(mmcs):.3f} ({min(mmcs):.3f}–{max(mmcs):.3f})" if mmcs else "",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), metavar="DATA")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=240_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--remedy", choices=("none", "auxiliary", "resample"), default="none")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    table = []
    for name in given.data:
        data = DATA[name]
        vectors = data.draw()
        for kind, settings in KINDS.items():
            if data.of is TranscoderConfig and kind.endswith(", tied"):
                continue  # it reads one space and writes another
            for aligned in (False, True):
                common = {"features": data.features, "tokens": given.tokens, "batch": given.batch} | SETTINGS
                if data.of is SAEConfig:
                    common |= {"centred": False, "encoder_scale": 0.1 if settings["activation"] == "topk" else 1.0}
                common |= {"remedy": given.remedy, "aligned": aligned} | settings
                runs = [train_one(vectors, data.of(**common, seed=seed)) for seed in range(given.seeds)]
                table.append(row(name, kind, aligned, runs))
                print(" | ".join(table[-1]), flush=True)
    said = (
        f"{given.tokens:,} samples seen, batch {given.batch}, remedy {given.remedy}, {given.seeds} seeds: mean (range)."
    )
    print(write_table("aligned", f"{str(__doc__).strip()}\n\n{said}", COLUMNS, table))


if __name__ == "__main__":
    main()
