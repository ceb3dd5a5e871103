"""SAEBench's tasks on the pocket model's dictionaries, and absorption of wide, narrow and Matryoshka autoencoders.

Claim asked for: absorption is higher for a wide sparse dictionary than for a Matryoshka one; the table says what was
seen. The first table takes pocket, pocket-plt and pocket-sae with three baselines each through all tasks at the middle
layer. The others measure absorption of autoencoders that are alike but for what their name says, each seed with its own
weights and batches: of that layer's `resid_post`, on classes of words, the same halves of which all are tested on; and
of `SuperpositionModel`, most of whose features fire only where a more frequent one does, on its twenty most frequent
parents.

    python benchmarks/saebench.py [--seeds 3] [--tokens 200000]    # goes on where it was; --fresh starts over
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kept_results import joined, kept, table
from machine import RESULTS, machine
from torch import Tensor

from circuitsae.benchmark import BenchmarkConfig, BenchmarkLayer, BenchmarkResult, benchmark
from circuitsae.benchmark.absorption import absorption
from circuitsae.benchmark.layers import Seen
from circuitsae.benchmark.result import HEADLINES, Measured, interval, line_name
from circuitsae.loading import load_dictionaries, load_model
from circuitsae.pocket.corpus import held_out_text, text_stream
from transcoders.data import take_rows
from transcoders.data.activations import sites_of
from transcoders.dictionaries import SAE, DictionaryProvenance, SAESet
from transcoders.files import write_file
from transcoders.language_model import LanguageModel
from transcoders.sites import Site
from transcoders.synthetic import SuperpositionModel
from transcoders.training import SAEConfig, train

NAMES = ("pocket", "pocket-plt", "pocket-sae")
CONTEXT, VECTORS, BATCH, TOKENS = 96, 100_000, 1024, 2048
K = 16
KINDS: dict[str, dict[str, Any]] = {
    "TopK, narrow": {"features": 256, "activation": "topk"},
    "TopK, wide": {"features": 2048, "activation": "topk"},
    "BatchTopK, wide": {"features": 2048, "activation": "batchtopk"},
    "Matryoshka BatchTopK, wide": {
        "features": 2048, "activation": "batchtopk", "matryoshka": (0.03125, 0.125, 0.5, 1.0),
    },
}  # fmt: skip
PLANTED: dict[str, dict[str, Any]] = {
    "TopK, narrow": {"features": 64, "activation": "topk"},
    "TopK, wide": {"features": 512, "activation": "topk"},
    "BatchTopK, wide": {"features": 512, "activation": "batchtopk"},
    "Matryoshka BatchTopK, wide": {"features": 512, "activation": "batchtopk", "matryoshka": (0.0625, 0.25, 1.0)},
}
PLANTED_K, PLANTED_TOKENS, PARENTS, SAMPLES = 6, 600_000, 20, 4000
ABSORPTION = ("fraction", "full", "split", "classes", "f1")


def main() -> None:
    """Measure what is not measured yet, and write all tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=200_000, help="to train each autoencoder on")
    parser.add_argument("--work", type=Path, default=Path("runs/saebench"))
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    model = load_model("pocket", device="cpu")
    began = time.perf_counter()
    kinds = {
        kind: [
            kept(options.work / f"{kind}-{seed}", options.fresh, lambda k=kind, s=seed: absorbed(model, k, s, options))
            for seed in range(options.seeds)
        ]
        for kind in KINDS
    }
    tasks: dict[str, list[BenchmarkResult]] = {name: [] for name in NAMES}
    for seed in range(options.seeds):
        for name, done in tasks.items():
            folder = options.work / f"{name}-{seed}"
            done.append(kept(folder, options.fresh, lambda n=name, s=seed: all_tasks(model, n, s)))
    planted = {
        kind: [
            kept(options.work / f"planted {kind}-{seed}", options.fresh, lambda k=kind, s=seed: hierarchy(k, s))
            for seed in range(options.seeds)
        ]
        for kind in PLANTED
    }
    text = page([joined(each) for each in tasks.values()], kinds, planted, options.seeds, options.tokens)
    write_file(RESULTS / "saebench.md", text)
    print(text, f"{time.perf_counter() - began:.0f} s", sep="\n")


def all_tasks(model: LanguageModel, name: str, seed: int) -> BenchmarkResult:
    rows = take_rows(model, held_out_text(TOKENS, seed), rows=-(-TOKENS // CONTEXT), context=CONTEXT)
    config = BenchmarkConfig(texts=20, entities=16, first_seed=seed)
    return benchmark(model, {name: load_dictionaries(name)}, rows, config=config, progress=True)


def absorbed(model: LanguageModel, kind: str, seed: int, options: argparse.Namespace) -> BenchmarkResult:
    """The absorption of an autoencoder that is trained with a seed; the halves of words are the same for all."""
    middle = model.n_layers // 2
    config = SAEConfig(k=K, tokens=options.tokens, batch=BATCH, seed=seed, lr=2e-3, **KINDS[kind])
    trained = train(None, vectors(model, middle), config, progress=False)
    assert isinstance(trained, SAESet)
    rows = take_rows(model, held_out_text(8192), rows=-(-8192 // CONTEXT), context=CONTEXT)
    config = BenchmarkConfig(only=("core", "absorption"), layers=(middle,), baselines=False)
    result = benchmark(model, {kind: at_layer(trained[0], model, middle)}, rows, config=config, progress=True)
    return BenchmarkResult(
        tuple(row._replace(seed=seed) for row in result.rows), result.seconds, result.model, result.settings
    )


def hierarchy(kind: str, seed: int) -> BenchmarkResult:
    """The absorption of parents by children in an autoencoder of a hierarchy that is known."""
    toy = SuperpositionModel(
        features=256, d_model=64, l0=PLANTED_K, hierarchy=0.7, noise=0.02, zipf=0.8, max_probability=0.2, seed=seed
    )
    x = toy.vectors(VECTORS, torch.Generator().manual_seed(1 + seed))
    config = SAEConfig(k=PLANTED_K, tokens=PLANTED_TOKENS, batch=BATCH, seed=seed, lr=2e-3, **PLANTED[kind])
    trained = train(None, x, config, progress=False)
    assert isinstance(trained, SAESet)
    layer = BenchmarkLayer(trained, 0)
    sample = toy.sample(SAMPLES, torch.Generator().manual_seed(1000 + seed))
    parents = sorted(set(toy.parents.tolist()) - {-1})[:PARENTS]
    y = (sample.activations[:, parents] > 0).numpy()
    with torch.no_grad():
        a, rest = layer.activations(sample.x), layer.offset(sample.x)
        seen = Seen((sample.x - rest).double().numpy(), a.double().numpy())
        error = sample.x - trained[0](sample.x)
    half = SAMPLES // 2
    figures = {("absorption", name): value for name, value in absorption(
        layer, seen[:half], seen[half:], y[:half], y[half:]).items()}  # fmt: skip
    figures["core", "l0"] = float((a > 0).sum(dim=1).double().mean())
    figures["core", "fvu"] = float(error.square().sum() / (sample.x - sample.x.mean(dim=0)).square().sum())
    figures["core", "dead"] = float(((a > 0).sum(dim=0) == 0).double().mean())
    rows = [
        Measured(kind, "", 0, seed, task, "classes" if task == "absorption" else "", name, value)
        for (task, name), value in figures.items()
    ]
    return BenchmarkResult(tuple(rows), {}, "SuperpositionModel", {})


def vectors(model: LanguageModel, layer: int) -> Tensor:
    rows = take_rows(model, text_stream(0), rows=-(-VECTORS // (CONTEXT - 1)), context=CONTEXT, separator="\n")
    site = Site(layer, "resid_post")
    return sites_of(model, rows, [site], [site]).reads[:VECTORS, 0]


def at_layer(sae: SAE, model: LanguageModel, layer: int) -> SAESet:
    """An autoencoder that was trained on vectors, as one of a model's layer."""
    here = SAE(
        W_enc=sae.W_enc.detach(), b_enc=sae.b_enc.detach(), W_dec=sae.W_dec.detach(), b_dec=sae.b_dec.detach(),
        activation=sae.activation, site=Site(layer, "resid_post"), centred=sae.centred,
    )  # fmt: skip
    layers = [
        here if i == layer else SAE.absent(i, model.d_model, "resid_post", torch.float32) for i in range(model.n_layers)
    ]
    return SAESet(layers, DictionaryProvenance(model=model.name, bos=True)).requires_grad_(False)


def page(
    tasks: Sequence[BenchmarkResult], kinds: dict[str, list[BenchmarkResult]],
    planted: dict[str, list[BenchmarkResult]], seeds: int, tokens: int,
) -> str:  # fmt: skip
    """All tables, and what those of absorption answer."""
    lines = [
        "# saebench", "", (__doc__ or "").partition("\n\n")[2].partition("\n\n")[0].replace("\n", " "), "",
        f"Machine: {machine()}, shared with other work. {seeds} seeds, ± half of the 95 % interval by Student's t.", "",
        "## All tasks", "",
        "Pocket model, middle layer; ↑ more is better, ↓ less. What each column is: `docs/benchmark.md`.", "",
    ]  # fmt: skip
    arrows = {True: " ↑", False: " ↓", None: ""}
    lines += table(
        ["dictionary", *(each.title + arrows[each.more_is_better] for each in HEADLINES)],
        [
            [line_name(line), *(str(result.estimate(line, each.task, each.metric)) for each in HEADLINES)]
            for result in tasks
            for line in result.lines
        ],
    )
    lines += ["", "RAVEL's parts, and what unlearning costs:", ""]
    parts = (("ravel", "cause"), ("ravel", "isolation"), ("ravel", "whole"), ("unlearning", "forgotten"),
             ("unlearning", "lost"), ("scr", "base"), ("scr", "oracle"), ("tpp", "clean"), ("probing", "write"),
             ("absorption", "full"), ("absorption", "f1"))  # fmt: skip
    lines += table(
        ["dictionary", *(f"{task}: {metric}" for task, metric in parts)],
        [
            [line_name(line), *(str(result.estimate(line, task, metric)) for task, metric in parts)]
            for result in tasks
            for line in result.lines
        ],
    )
    spent = {task: sum(result.seconds[task] for result in tasks) for task in tasks[0].seconds}
    lines += ["", "Seconds: " + ", ".join(f"{task} {seconds:.0f}" for task, seconds in spent.items()) + ".", ""]
    lines += [
        "## Absorption by width and kind, pocket", "",
        f"Autoencoders of {tokens:,} tokens, k = {K}, narrow 256 features, wide 2,048; classes of words.", "",
        *by_kind(kinds), "", difference(kinds), "",
        "## Absorption by width and kind, planted hierarchy", "",
        f"256 features in 64 dimensions, L0 {PLANTED_K}, 70 % of them children; {PLANTED_TOKENS:,} vectors, "
        f"k = {PLANTED_K}, narrow 64 features, wide 512.", "",
        *by_kind(planted), "", difference(planted), "",
    ]  # fmt: skip
    return "\n".join(lines)


def by_kind(kinds: dict[str, list[BenchmarkResult]]) -> list[str]:
    columns = [("core", "l0"), ("core", "fvu"), ("core", "dead"), *(("absorption", each) for each in ABSORPTION)]
    rows = [
        [kind, *(str(interval(values(results, kind, task, metric))) for task, metric in columns)]
        for kind, results in kinds.items()
    ]
    return table(["kind", "L0", "FVU", "dead", *ABSORPTION], rows)


def values(results: Sequence[BenchmarkResult], kind: str, task: str, metric: str) -> list[float]:
    """One figure for each seed; of absorption, on classes of words."""
    data = "classes" if task == "absorption" else ""
    return [result.estimate((kind, ""), task, metric, data).mean for result in results]


def difference(kinds: dict[str, list[BenchmarkResult]]) -> str:
    """What the claim comes to, seed by seed."""
    sentences = []
    matryoshka = "Matryoshka BatchTopK, wide"
    for metric in ("fraction", "full"):
        for kind in ("TopK, wide", "BatchTopK, wide", "TopK, narrow"):
            pairs = zip(*(values(kinds[each], each, "absorption", metric) for each in (kind, matryoshka)), strict=True)
            found = interval([one - other for one, other in pairs])
            clear = "higher" if found.mean - found.half > 0 else "lower" if found.mean + found.half < 0 else "undecided"
            sentences.append(f"{kind} less Matryoshka, {metric}: {found} ({clear})")
    return "Paired by seed: " + "; ".join(sentences) + "."


if __name__ == "__main__":
    main()
