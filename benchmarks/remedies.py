"""Question: what do remedies for dead latents leave dead, and what do they cost or gain in FVU?

Rows of one block have the same data, batches, first weights and seeds, and differ in the remedy alone: none; AuxK or
its like for penalised kinds (`auxiliary`), with 64 latents per token and the batch's residual as its unit (the
defaults), with the size that Gao et al. choose by the width, and in other units; ghost gradients; new directions
(`resample`). Dead: fired on none of the 10,000 held-out vectors. A latent counts as dead, for every remedy, once it has
been silent for 10,000 tokens, which suits runs as short as these. Data: `SuperpositionModel` with 512 features in 64
dimensions, correlated groups and a hierarchy; the middle layer of pocket, 128 wide, on its own text, where Gao et al.'s
size is 64 as well and its row left out. 512 latents. Untied: the first decoder is drawn by itself, where TopK's own is
the encoder's transpose, and the encoder has a tenth of its norm. A cell is the mean over seeds ± half of its 95 %
t-interval.

    python benchmarks/remedies.py [--seeds 3] [--tokens 160000]
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from machine import earlier_rate, write_table
from torch import Tensor

from circuitsae.benchmark.result import interval
from circuitsae.loading import load_model
from circuitsae.pocket.corpus import text_stream
from transcoders.data import take_rows
from transcoders.data.activations import sites_of
from transcoders.evaluation.statistics import Statistics
from transcoders.sites import Site
from transcoders.synthetic import SuperpositionModel
from transcoders.training import SAEConfig, train
from transcoders.training.revival import auxk_size

TRAIN, HELD_OUT, CONTEXT, K = 100_000, 10_000, 96, 8
COMMON: dict[str, Any] = {
    "features": 512, "batch": 1024, "dead_after": 10_000, "log_every": 1000, "lr": earlier_rate(512),
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "TopK": {"activation": "topk", "k": K},
    "TopK, untied": {"activation": "topk", "k": K, "decoder_init": "random", "encoder_scale": 0.1},
    "p-annealing, untied": {
        "activation": "relu", "penalty": "p_anneal", "target_l0": float(K), "decoder_init": "random",
    },
}  # fmt: skip
REMEDIES: dict[str, dict[str, Any]] = {
    "none": {"remedy": "none"},
    "auxiliary": {"remedy": "auxiliary"},
    "auxiliary, Gao et al.'s size": {"remedy": "auxiliary", "k_aux": 0},
    "auxiliary, by token": {"remedy": "auxiliary", "aux_pooling": "token"},
    "auxiliary, of the variance": {"remedy": "auxiliary", "aux_pooling": "none"},
    "ghost": {"remedy": "ghost"},
    "resample": {"remedy": "resample"},
}
RANKED_ONLY = ("auxiliary, Gao et al.'s size", "auxiliary, by token", "auxiliary, of the variance")


def superposed() -> Tensor:
    toy = SuperpositionModel(d_model=64, correlation=0.5, hierarchy=0.5)
    return toy.vectors(TRAIN + HELD_OUT, torch.Generator().manual_seed(1))


def of_pocket() -> Tensor:
    model = load_model("pocket")
    rows = take_rows(
        model, text_stream(0), rows=-(-(TRAIN + HELD_OUT) // (CONTEXT - 1)), context=CONTEXT, separator="\n"
    )
    sites = [Site(model.n_layers // 2, "resid_post")]
    return sites_of(model, rows, sites, sites).reads[: TRAIN + HELD_OUT, 0]


DATA: dict[str, Callable[[], Tensor]] = {"superposition": superposed, "pocket": of_pocket}


def figures(x: Tensor, config: SAEConfig) -> tuple[float, float, float]:
    """Dead share, FVU and L0 on the held-out vectors."""
    dictionaries = train(None, x[:-HELD_OUT], config, progress=False)
    statistics = Statistics(dictionaries)
    with torch.no_grad():
        for batch in x[-HELD_OUT:].unsqueeze(1).split(5000):
            statistics.update(batch, batch)
    return statistics.dead[0], statistics.fvu[0], statistics.l0[0]


def row(x: Tensor, settings: dict[str, Any], seeds: int) -> list[str]:
    """Means over seeds with intervals."""
    runs = [figures(x, SAEConfig(seed=seed, **settings)) for seed in range(seeds)]
    dead, fvu, l0 = (interval(values) for values in zip(*runs, strict=True))
    return [
        f"{dead.mean:.1%} ± {dead.half:.1%}", f"{fvu.mean:.4f} ± {fvu.half:.4f}",
        f"{l0.mean:.2f} ± {l0.half:.2f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=160_000)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    table = []
    for data, draw in DATA.items():
        x = draw()
        for kind, settings in KINDS.items():
            for remedy, options in REMEDIES.items():
                made = COMMON | {"tokens": given.tokens} | settings | options
                config = SAEConfig(**made)
                same = config.k_aux == 0 and auxk_size(config, x.shape[1]) == SAEConfig.k_aux
                if remedy in RANKED_ONLY and (same or not config.ranks):
                    continue
                table.append([data, kind, remedy, *row(x, made, given.seeds)])
                print(*table[-1], sep=" | ", flush=True)
    claim = f"{__doc__}\n{given.tokens:,} vectors seen, batch {COMMON['batch']:,}, {given.seeds} seeds."
    write_table("remedies", claim, ["data", "kind", "remedy", "dead", "FVU", "L0"], table)


if __name__ == "__main__":
    main()
