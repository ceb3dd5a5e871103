"""What aligned training does, claim by claim of its abstract, on data where it can be measured in minutes.

Brzozowski & Chung 2026, *Aligned Training* (arXiv 2605.18629), hold ⟨encoder, decoder⟩, the alignment score, at one for
every feature. Their abstract says that without it the score has two modes, and that with it reconstruction is better,
no features are dead, and seeds agree more; with TopK, BatchTopK and p-annealing too. JumpReLU is beside them here.

Every pair of rows has the same data, batches and seeds, and differs in `aligned` alone; there is no remedy for dead
latents, so that what the constraint does is seen by itself, and all else is the package's default. Data:
`SuperpositionModel` with correlated groups and a hierarchy (512 directions in 128 dimensions); the stream after the
middle layer of pocket and of tinystories-656k; transcoders of pocket's middle MLP. Start: with the decoder as the
encoder's transpose (tied), or drawn by itself (apart; for transcoders the only one, as they write another space than
they read). Dead: fired on none of 10,000 held-out vectors. Recovered: share of the loss that zeros in the place of this
layer's write cost. Size: of reconstructions, one where right. MMCS: of the pairs of seeds, among all features and among
those that fire.

    python benchmarks/aligned.py [--seeds 3] [--tokens 120000]    # goes on where it was; --fresh starts over
"""

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal, NamedTuple

import torch
from aligned_page import Case, Run, page
from machine import RESULTS, earlier_rate
from torch import Tensor
from trained_sets import REPOSITORY, setting

from transcoders.data import open_corpus, take_rows
from transcoders.data.activations import sites_of
from transcoders.dictionaries import DictionaryProvenance, SAESet, TranscoderSet
from transcoders.evaluation import alignment, evaluate
from transcoders.evaluation.statistics import Statistics
from transcoders.files import write_file, write_json
from transcoders.formats.files import read_json
from transcoders.formats.native import save_native
from transcoders.formats.registry import load_dictionaries
from transcoders.language_model import LanguageModel
from transcoders.sites import Site, SiteKind
from transcoders.synthetic import SuperpositionModel
from transcoders.training import SAEConfig, TrainConfig, TranscoderConfig, train

K = 8
FEATURES, BATCH = 512, 256
KINDS: dict[str, dict[str, Any]] = {
    "TopK": {"activation": "topk", "k": K},
    "BatchTopK": {"activation": "batchtopk", "k": K},
    "p-annealing": {"activation": "relu", "penalty": "p_anneal", "target_l0": float(K)},
    "JumpReLU": {"activation": "jumprelu", "target_l0": float(K)},
}
STARTS: dict[str, Literal["transpose", "random"]] = {"tied": "transpose", "apart": "random"}
TRAIN, HELD_OUT, LOSS_TOKENS = 100_000, 10_000, 2048


class Vectors(NamedTuple):
    """What a dictionary of one layer reads and writes; the last `HELD_OUT` are for measuring."""

    reads: Tensor
    writes: Tensor


class Place(NamedTuple):
    """Where in a model a dictionary stands, and the tokens on which the loss is measured."""

    model: LanguageModel
    read: Site
    write: Site
    rows: Tensor


@dataclass(frozen=True)
class Data:
    """Vectors with what is trained on them, and the model that they are of, if any."""

    of: type[TrainConfig]
    draw: Callable[[], tuple[Vectors, Place | None]]
    starts: tuple[str, ...] = ("tied", "apart")


def superposed() -> tuple[Vectors, None]:
    toy = SuperpositionModel(correlation=0.5, hierarchy=0.5)
    x = toy.vectors(TRAIN + HELD_OUT, torch.Generator().manual_seed(1))
    return Vectors(x, x), None


def of_model(name: str, read: SiteKind, write: SiteKind) -> tuple[Vectors, Place]:
    where = setting(name, LOSS_TOKENS)
    count = -(-(TRAIN + HELD_OUT) // (where.context - 1))
    text = open_corpus(where.corpus).training()
    rows = take_rows(where.model, text, rows=count, context=where.context, separator=where.separator)
    middle = where.model.n_layers // 2
    place = Place(where.model, Site(middle, read), Site(middle, write), where.rows)
    sites = sites_of(where.model, rows, [place.read], [place.write])
    mixed = torch.randperm(TRAIN + HELD_OUT, generator=torch.Generator().manual_seed(0))
    return Vectors(sites.reads[mixed, 0], sites.writes[mixed, 0]), place


DATA = {
    "superposition": Data(SAEConfig, superposed),
    "pocket, SAE": Data(SAEConfig, lambda: of_model("pocket", "resid_post", "resid_post")),
    "pocket, transcoder": Data(TranscoderConfig, lambda: of_model("pocket", "mlp_in", "mlp_out"), ("apart",)),
    "tinystories-656k, SAE": Data(
        SAEConfig, lambda: of_model("tinystories-656k", "resid_post", "resid_post"), ("tied",)
    ),
}


def cases(names: list[str]) -> Iterator[tuple[Data, Case]]:
    """All that is compared, and with what."""
    for name in names:
        for start in DATA[name].starts:
            for kind in KINDS:
                yield DATA[name], Case(name, kind, start)


def one_run(data: Data, case: Case, aligned: bool, seed: int, options: argparse.Namespace) -> Run:
    """What was measured before, or is now."""
    folder = options.work / f"{case.data}, {case.kind}, {case.start}, {'aligned' if aligned else 'free'}, {seed}"
    done = folder / "run.json"
    if not done.is_file() or options.fresh:
        rmtree(folder, ignore_errors=True)
        config = data.of(
            features=FEATURES, batch=BATCH, tokens=options.tokens, seed=seed, aligned=aligned, remedy="none",
            lr=earlier_rate(FEATURES), decoder_init=STARTS[case.start], **KINDS[case.kind],
        )  # fmt: skip
        vectors, place = drawn(case.data)
        dictionaries, figures = trained(vectors, place, config)
        save_native(dictionaries, folder / "dictionary")
        write_json(done, figures)
    record = read_json(done)
    record["alive"] = torch.tensor(record["alive"], dtype=torch.bool)
    dictionary = load_dictionaries(folder / "dictionary")
    scores = alignment(dictionary, 0)
    return Run(dictionary=dictionary, product=scores.product, cosine=scores.cosine, **record)


@cache
def drawn(name: str) -> tuple[Vectors, Place | None]:
    return DATA[name].draw()


def trained(
    vectors: Vectors, place: Place | None, config: TrainConfig
) -> tuple[SAESet | TranscoderSet, dict[str, Any]]:
    """A dictionary of one layer, and what is measured of it on held-out vectors."""
    reads, writes = (side[:-HELD_OUT] for side in vectors)
    dictionaries = train(None, reads if config.kind == "sae" else (reads, writes), config, progress=False)
    assert isinstance(dictionaries, SAESet | TranscoderSet)
    statistics = Statistics(dictionaries)
    with torch.no_grad():
        for read, write in zip(*(side[-HELD_OUT:].unsqueeze(1).split(5000) for side in vectors), strict=True):
            statistics.update(read, write)
    figures = {name: getattr(statistics, name)[0] for name in ("fvu", "l0", "dead", "shrinkage")}
    figures["alive"] = statistics.alive[0].int().tolist()
    return dictionaries, figures | {"recovered": None if place is None else recovered(dictionaries, place)}


def recovered(dictionaries: SAESet | TranscoderSet, place: Place) -> float:
    """With this layer's write alone replaced."""
    dictionary = dictionaries[0]
    dictionary.read, dictionary.writes = place.read, (place.write,)
    layers = [dictionary if layer == place.read.layer else dictionaries.absent(layer)
              for layer in range(place.model.n_layers)]  # fmt: skip
    whole = type(dictionaries)(layers, DictionaryProvenance(model=place.model.name))  # pyright: ignore[reportArgumentType]
    found = evaluate(place.model, whole, place.rows, jacobian_tokens=0)
    return found.layers[0].recovered_zero


def main() -> None:
    """Train and measure what is not there, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), metavar="DATA")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=120_000, help="to train each dictionary on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs" / "aligned")
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)  # L0 that is off its target is in the table
    began = time.perf_counter()
    runs: dict[Case, dict[bool, list[Run]]] = {}
    for data, case in cases(options.data):
        runs[case] = {
            aligned: [one_run(data, case, aligned, seed, options) for seed in range(options.seeds)]
            for aligned in (False, True)
        }
        print(f"{time.perf_counter() - began:6.0f} s  {case}", flush=True)
    said = (
        f"{options.tokens:,} vectors seen of {TRAIN:,}, batch {BATCH}, {FEATURES:,} features, L0 {K} asked for, "
        f"{options.seeds} seeds."
    )
    write_file(RESULTS / "aligned.md", page((__doc__ or "").strip(), said, runs))


if __name__ == "__main__":
    main()
