"""Claim: activations stored in int8 are four times smaller than in float32, and what is trained on them is as good.

A store of each precision is written once from the same text, read by the runs of every seed, and each dictionary is
measured on held-out text, on the model's own float32 activations. Runs of one seed see the same tokens in the same
order, so that a difference to float32 comes from what was stored. Error: of what is read back, as a fraction of the
variance. Waiting: the mean share of a run's time, `data_wait` of its metrics, without the first measurement. Reading:
tokens per second that a store gives where nothing else is done.

The model: 2 layers, 656k parameters, trained by others on TinyStories (../shared/data/models/tinystories-656k).

    python benchmarks/store.py [--kinds sae transcoder] [--seeds 3] [--tokens 1000000] [--kept runs.json]

`--kept`: where runs that are done are kept, so that a stopped measurement goes on.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

import torch
from machine import earlier_rate, write_table
from torch import Tensor

from transcoders import ActivationStore, held_out_rows, load_model, write_activations
from transcoders.data import StoreStream, sites_of
from transcoders.evaluation.statistics import Statistics
from transcoders.files import write_json
from transcoders.language_model import LanguageModel
from transcoders.training import SAEConfig, TrainConfig, TranscoderConfig, train
from transcoders.training.batches import sites_of_kind

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
DTYPES = ("float32", "bf16", "int8")
SETTINGS: dict[str, Any] = {
    "activation": "topk", "k": 16, "features": 512, "batch": 512, "lr": earlier_rate(512), "log_every": 50,
}  # fmt: skip
KINDS: dict[str, type[TrainConfig]] = {"sae": SAEConfig, "transcoder": TranscoderConfig}
CONTEXT, HELD_OUT, BATCH = 128, 10_000, 512
COLUMNS = (
    "kind", "stored as", "times smaller", "error", "FVU", "FVU less float32's, by seed", "waiting", "trained, tokens/s",
    "reading, tokens/s",
)  # fmt: skip


class Run(NamedTuple):
    """A dictionary that was trained on a store."""

    fvu: float
    wait: float
    tokens_per_second: float


def everything(store: ActivationStore, sites: Any) -> Tensor:
    """All that is stored, in the order in which it was written."""
    return torch.cat([store.read(s, b, sites) for s in range(len(store.shards)) for b in range(store.blocks(s))])


def written(model: LanguageModel, corpus: Path, out: Path, sites: Any, dtype: Any) -> ActivationStore:
    store = write_activations(model, corpus, out, sites=sites, dtype=dtype, shard_mb=128, progress=False)
    assert store is not None
    return store


def run(model: LanguageModel, store: ActivationStore, config: TrainConfig, held_out: Tensor) -> Run:
    with TemporaryDirectory() as out:
        began = perf_counter()
        dictionaries = train(None, store, config, progress=False, out=out)
        seconds = perf_counter() - began
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    sides = sites_of(model, held_out, *sites_of_kind(config, model.n_layers))
    statistics = Statistics(dictionaries)
    with torch.no_grad():
        for read, write in zip(*(side.split(2048) for side in sides), strict=True):
            statistics.update(read, write)
    wait = mean(line["data_wait"] for line in lines[1:])
    return Run(mean(statistics.fvu), wait, config.tokens / seconds)


def kept_run(path: Path | None, name: str, measure: Callable[[], Run]) -> Run:
    """What was measured before, or is now."""
    kept = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    if name not in kept:
        kept[name] = measure()
        if path is not None:
            write_json(path, kept)
    return Run(*kept[name])


def reading_speed(store: ActivationStore, config: TrainConfig, n_layers: int) -> float:
    reads, writes = sites_of_kind(config, n_layers)
    stream = StoreStream(store, sorted({*reads, *writes}), batch=BATCH, seed=0)
    began = perf_counter()
    batches = sum(1 for _ in islice(stream, store.tokens // BATCH))
    return batches * BATCH / (perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kept", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = load_model(SHARED / "models/tinystories-656k")
    corpus = SHARED / "corpora/tiny_stories_944k.txt"
    held_out = held_out_rows(model, corpus, tokens=HELD_OUT, context=CONTEXT)
    table, tokens = [], 0
    for kind in given.kinds:
        configs = [KINDS[kind](**SETTINGS, tokens=given.tokens, seed=seed) for seed in range(given.seeds)]
        sites = sorted({site for side in sites_of_kind(configs[0], model.n_layers) for site in side})
        with TemporaryDirectory() as folder:
            stores = {dtype: written(model, corpus, Path(folder) / dtype, sites, dtype) for dtype in DTYPES}
            tokens = stores["float32"].tokens
            exact: list[Run] = []
            for dtype, store in stores.items():
                runs = [
                    kept_run(
                        given.kept, f"{kind} {dtype} {config.seed} {given.tokens}",
                        partial(run, model, store, config, held_out),
                    )
                    for config in configs
                ]  # fmt: skip
                exact = exact or runs
                x, stored = everything(stores["float32"], sites).double(), everything(store, sites).double()
                error = float((stored - x).square().sum() / (x - x.mean(dim=0)).square().sum())
                fvu = [r.fvu for r in runs]
                table.append([
                    kind, dtype, f"{store.smaller:.2f}", f"{error:.1e}",
                    f"{mean(fvu):.4f} ({min(fvu):.4f}–{max(fvu):.4f})",
                    ", ".join(f"{a.fvu - b.fvu:+.4f}" for a, b in zip(runs, exact, strict=True)),
                    f"{mean(r.wait for r in runs):.1%}", f"{mean(r.tokens_per_second for r in runs):,.0f}",
                    f"{reading_speed(store, configs[0], model.n_layers):,.0f}",
                ])  # fmt: skip
                print(" | ".join(table[-1]), flush=True)
    said = (
        f"{tokens:,} tokens stored; {given.tokens:,} seen in training, batch "
        f"{BATCH}, {SETTINGS['features']} features, k {SETTINGS['k']}, {given.seeds} seeds: mean (range)."
    )
    print(write_table("store", f"{str(__doc__).strip()}\n\n{said}", COLUMNS, table))


if __name__ == "__main__":
    main()
