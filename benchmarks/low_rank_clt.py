"""What decoders of low rank cost a cross-layer transcoder, trained and truncated: writes results/low_rank_clt.md.

    python benchmarks/low_rank_clt.py [--models pocket tinystories-656k] [--tokens 150k] [--work runs/low_rank]

Three parts: quality on the two small models, of full decoders, of decoders trained at a rank (`decoder_rank`), of the
full ones brought to the same rank afterwards (`truncate_decoders`), and of per-layer transcoders; bytes and time of a
step at a wider shape, on random vectors; and what `training_cost` says of two published shapes.
"""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro
from machine import RESULTS, machine
from trained_sets import BUFFER_MB, REPOSITORY, Setting, setting

from circuitsae.benchmark.result import Estimate, interval
from circuitsae.commands.shared import counts
from transcoders.dictionaries import DictionarySet
from transcoders.evaluation import evaluate
from transcoders.files import write_file, write_json
from transcoders.formats.files import read_json
from transcoders.formats.native import save_native
from transcoders.refining.truncation import truncate_decoders
from transcoders.training import CLTConfig, TrainConfig, Trainer, TranscoderConfig, VectorSource, train, training_cost

RANKS = (64, 32, 16, 8)
BATCH, L0 = 512, 16
METRICS = ("L0", "FVU", "loss recovered, one layer", "loss recovered, all")
WIDE = {"n_layers": 8, "d_model": 256}
WIDE_FEATURES, WIDE_RANKS, STEPS = 2048, (256, 64, 16), 8
PUBLISHED = {"GPT-2 small": (12, 768, 24_576), "Gemma 2 2B": (26, 2304, 16_384)}
PUBLISHED_RANKS = (None, 256, 64, 16)


@dataclass
class Options:
    """What to measure."""

    models: list[str] = field(default_factory=lambda: ["pocket", "tinystories-656k"])
    """Of pocket and tinystories-656k."""
    features: int = 512
    """Features per layer."""
    tokens: int = 150_000
    """Tokens to train each on."""
    held_out: int = 6_000
    """Tokens to measure on."""
    seeds: int = 3
    """How many of each."""
    work: Path = REPOSITORY / "runs" / "low_rank"
    """Where dictionaries and figures are kept."""
    threads: int = 1
    """Threads of torch."""


# quality


def configurations(where: Setting, seed: int, given: Options) -> dict[str, TrainConfig]:
    common = {
        "features": given.features, "tokens": given.tokens, "batch": BATCH, "lr": 2e-3, "activation": "batchtopk",
        "context": where.context, "separator": where.separator, "buffer_mb": BUFFER_MB, "seed": seed,
        "log_every": 200, "checkpoint_every": 10_000, "keep_last": 1,
    }  # fmt: skip
    k = L0 * where.model.n_layers
    ranked = {f"trained, rank {rank}": CLTConfig(**common, k=k, decoder_rank=rank) for rank in RANKS}
    return {"full": CLTConfig(**common, k=k), **ranked, "per-layer": TranscoderConfig(**common, k=L0)}


def measured(name: str, where: Setting, seed: int, given: Options) -> dict[str, dict[str, float]]:
    """Of each line the metrics, and the bytes of what is saved; what is done already is read."""
    folder = given.work / name / f"{given.features} features, {given.tokens} tokens, seed {seed}"
    if (file := folder / "figures.json").exists():
        return read_json(file)
    configs = configurations(where, seed, given)
    done = train(where.model, where.corpus, list(configs.values()), names=list(configs), out=folder,
                 resume=folder.exists(), progress=False)  # fmt: skip
    sets: dict[str, DictionarySet] = dict(zip(configs, done, strict=True))
    for rank in RANKS:
        sets[f"truncated, rank {rank}"] = truncate_decoders(where.model, sets["full"], where.corpus, rank=rank)
    figures = {line: _figures(where, dictionaries) for line, dictionaries in sets.items()}
    write_json(file, figures)
    return figures


def _figures(where: Setting, dictionaries: DictionarySet) -> dict[str, float]:
    e = evaluate(where.model, dictionaries, where.rows, loss_tokens=2048, jacobian_tokens=0)
    with tempfile.TemporaryDirectory() as folder:
        save_native(dictionaries, Path(folder) / "set")
        size = (Path(folder) / "set" / "weights.safetensors").stat().st_size
    return dict(zip(METRICS, (e.l0, e.fvu, e.recovered_zero, e.replaced.recovered_zero), strict=True)) | {"bytes": size}


def quality(name: str, where: Setting, given: Options) -> str:
    seeds = [measured(name, where, seed, given) for seed in range(given.seeds)]
    configs = configurations(where, 0, given)
    shape = {"n_layers": where.model.n_layers, "d_model": where.model.d_model}
    rows = []
    for line in ("full", *(f"{how}, rank {r}" for r in RANKS for how in ("trained", "truncated")), "per-layer"):
        cost = training_cost(configs.get(line, configs["full"]), **shape)
        rows.append([
            line, f"{cost.parameters / 1e6:.2f} M", f"{cost.checkpoint / 1e6:.1f} MB",
            f"{seeds[0][line]['bytes'] / 1e6:.1f} MB",
            *(_estimate([seed[line][metric] for seed in seeds]) for metric in METRICS),
            _estimate([seed[line][METRICS[-1]] - seed["full"][METRICS[-1]] for seed in seeds], signed=True),
        ])  # fmt: skip
    columns = ("decoders", "trained numbers", "a checkpoint", "saved", *METRICS, "less full's, same seed")
    return (
        f"## {name}\n\n{shape['n_layers']} layers of width {shape['d_model']}, {given.features} features a layer, "
        f"BatchTopK, {L0} a token and layer asked for, {given.tokens:,} tokens in batches of {BATCH}, {given.seeds} "
        f"seeds.\n\n{_table(columns, rows)}"
    )


def _estimate(values: Sequence[float], *, signed: bool = False) -> str:
    """Mean and half the 95 % interval by Student's t."""
    found: Estimate = interval(values)
    return f"{found.mean:+.3f} ±{found.half:.3f}" if signed else str(found)


# bytes and time


def wide_configurations() -> dict[str, TrainConfig]:
    common = {"features": WIDE_FEATURES, "batch": BATCH, "activation": "topk", "tokens": 100 * BATCH}
    k = L0 * WIDE["n_layers"]
    ranked = {str(rank): CLTConfig(**common, k=k, decoder_rank=rank) for rank in WIDE_RANKS}
    return {"full": CLTConfig(**common, k=k), **ranked, "plt": TranscoderConfig(**common, k=L0, layers_at_once=8)}


def _vectors() -> VectorSource:
    draw = torch.Generator().manual_seed(0)
    reads, writes = (torch.randn(4 * BATCH, *WIDE.values(), generator=draw) for _ in range(2))
    return VectorSource(reads, writes, seed=0)


def memory_of(name: str) -> int:
    """Bytes that this process takes for a few steps of one configuration with dense kernels, beyond its vectors."""
    source, config = _vectors(), replace(wide_configurations()[name], kernels="dense")
    config_small = type(config)(features=64, activation="topk", k=8, batch=BATCH, tokens=3 * BATCH)
    Trainer(source, [config_small]).run(progress=False)  # libraries and their buffers
    before = _resident("VmRSS")
    Trainer(source, [config]).run(until=3, progress=False)
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    """Bytes, of this process alone; `ru_maxrss` would count the one that started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def steps() -> str:
    """To be measured first: what is forked before anything was trained takes memory of its own."""
    configs, rows = wide_configurations(), []
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        taken = dict(zip(configs, pool.map(memory_of, configs, chunksize=1), strict=True))
    trainers = {name: Trainer(_vectors(), [config]) for name, config in configs.items()}
    spent: dict[str, list[float]] = {name: [] for name in configs}
    for step in range(1, STEPS + 1):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            trainer.run(until=step, progress=False)
            spent[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(times[2:]) for name, times in spent.items()}
    for name, config in configs.items():
        cost = training_cost(config, n_layers=WIDE["n_layers"], d_model=WIDE["d_model"])
        rows.append([
            _line(name), f"{cost.parameters / 1e6:.1f} M", f"{cost.memory / 2**20:.0f} MB",
            f"{taken[name] / 2**20:.0f} MB", f"{cost.checkpoint / 2**20:.0f} MB", f"{cost.sparse_flops / 1e6:.1f} M",
            f"{seconds[name] / seconds['full']:.2f}",
        ])  # fmt: skip
    columns = (
        "decoders", "trained numbers", "memory, computed", "memory, measured", "a checkpoint",
        "operations a token, sparse", "time of a step, of full's",
    )  # fmt: skip
    return (
        f"## A step at a wider shape\n\n{WIDE['n_layers']} layers of width {WIDE['d_model']}, {WIDE_FEATURES:,} "
        f"features a layer, TopK with {L0} a token and layer, batches of {BATCH}, on random vectors. Computed: "
        "`training_cost(…).memory`. Measured: by how much a process grows in three steps with dense kernels; sparse "
        f"ones take less. Time: median of {STEPS - 2} steps with the kernels that `auto` takes, the configurations in "
        "turn.\n\n"
        f"{_table(columns, rows)}"
    )


def published() -> str:
    rows = []
    for name, (n_layers, d_model, features) in PUBLISHED.items():
        for rank in PUBLISHED_RANKS:
            config = CLTConfig(
                features=features, batch=4096, activation="batchtopk", k=20 * n_layers, decoder_rank=rank
            )
            cost = training_cost(config, n_layers=n_layers, d_model=d_model, device="cuda")
            rows.append([
                name, "full" if rank is None else f"rank {rank}", f"{cost.parameters / 1e9:.2f} G",
                f"{(cost.weights + cost.moments + cost.gradients) / 1e9:.1f} GB", f"{cost.sparse_flops / 1e9:.2f} G",
            ])  # fmt: skip
    columns = ("shape", "decoders", "trained numbers", "weights, gradients, moments", "operations a token, sparse")
    return (
        "## Published shapes, computed\n\n`training_cost` of GPT-2 small (12 × 24,576 features) and Gemma 2 2B (26 × "
        f"16,384), 20 active features a layer and token. Nothing was trained.\n\n{_table(columns, rows)}"
    )


def _line(name: str) -> str:
    return {"full": "full", "plt": "per-layer"}.get(name, f"rank {name}")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


CLAIM = """Decoders to later layers go through r directions that a layer's features share, `W_dec[l→l'] = C_l B_{l→l'}`;
each layer's own decoder is full. *Trained*: `CLTConfig(decoder_rank=r)`. *Truncated*: the full transcoder of the same
seed brought to rank r by the singular value decomposition weighted with its activations (`truncate_decoders`).
*Per-layer*: transcoders without later layers. Mean and half the 95% interval over seeds (Student's t). Loss recovered:
against zeros, with one layer's MLP replaced, on average, and with all. Checkpoints are of weights and Adam's moments;
saved, a low-rank transcoder is its factors. Written by `benchmarks/low_rank_clt.py`."""


def main(given: Options) -> None:
    torch.set_num_threads(given.threads)
    wide = steps()
    models: Mapping[str, Setting] = {name: setting(name, given.held_out) for name in given.models}
    parts = [quality(name, where, given) for name, where in models.items()]
    page = ["# low_rank_clt", CLAIM, f"Machine: {machine()}", *parts, wide, published()]
    write_file(RESULTS / "low_rank_clt.md", "\n\n".join(part.strip() for part in page) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, registry=counts()))
