"""Claim: a skip term and a derivative in the loss make a transcoder pass on what its MLP does, at no cost of FVU.

Transcoders of one layer of SmolLM2-135M, TopK 32 of 2,048 features unless said otherwise, trained on the same 98,304
tokens of English for 1,500 steps of 512 and measured on 8,192 held-out tokens: FVU, L0, and the mean cosine and ratio
of norms of what is passed on of a change, Ĵ v, and what the MLP makes of it, J v. Natural directions: one token's
embedding moves towards that of another, attention patterns and norm scales are held; the nudged token and later ones
that it reaches, J v above a thousandth of the median. (`jacobian_agreement` takes a thousandth of the largest in a row
of text, so that its cosines are of other tokens and do not compare with these.) Random directions: of a normal
distribution in the reads' own coordinates. CPU-seconds are of a step on activations that are there already, without the
model's part. ±: half the range over seeds.

    python benchmarks/derivative.py MODEL [--layer 10] [--seeds 3] [--only skip …]

Directions of training come as in a run: by nudges at embeddings and MLPs (`transcoders.training.derivative.Nudges`).
What is done is kept under --work, so that a run that was killed goes on.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from machine import earlier_rate, write_table
from molt import Mixture, step, trainer
from safetensors.torch import load_file, save_file
from torch import Tensor

from transcoders import LanguageModel, TranscoderConfig, load_model
from transcoders.data import take_rows
from transcoders.data.activations import sites_of
from transcoders.data.chunks import Chunk
from transcoders.data.outliers import find_outliers, positions_of
from transcoders.held import HeldModel
from transcoders.kernels import keep_freed_memory
from transcoders.sites import Site
from transcoders.training.activations import Gated
from transcoders.training.config import compares_at
from transcoders.training.derivative import Directions, Nudges
from transcoders.training.initialise import measure_scales
from transcoders.training.step import Run

REPOSITORY = Path(__file__).resolve().parents[1]
CORPUS = REPOSITORY.parent / "shared" / "data" / "corpora" / "english_news_prose_speeches.txt"
CONTEXT, TOKENS, DIRECTIONS, HELD_OUT = 128, 98_304, 24_576, 8_192
BASE = TranscoderConfig(
    features=2048, activation="topk", k=32, batch=512, tokens=512 * 1500, lr=earlier_rate(2048), context=CONTEXT,
    derivative_from=0.0,
)  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "reconstruction": {},
    "derivative .1": {"derivative": 0.1},
    "derivative .3": {"derivative": 0.3},
    "derivative 1": {"derivative": 1.0},
    "skip": {"skip": True},
    "skip, derivative .1": {"skip": True, "derivative": 0.1},
    "skip, derivative .3": {"skip": True, "derivative": 0.3},
    "skip, derivative 1": {"skip": True, "derivative": 1.0},
    "skip, derivative .3 in the second half": {"skip": True, "derivative": 0.3, "derivative_from": 0.5},
    "skip, derivative .3, on an eighth": {"skip": True, "derivative": 0.3, "derivative_share": 0.125},
    "skip, derivative .3, penalty .01 on W_skip": {"skip": True, "derivative": 0.3, "skip_penalty": 0.01},
    "skip, derivative .3, along .3": {"skip": True, "derivative": 0.3, "derivative_along": 0.3},
    "skip, derivative .3, along 1": {"skip": True, "derivative": 0.3, "derivative_along": 1.0},
    "skip, derivative .3, k 64": {"skip": True, "derivative": 0.3, "k": 64},
    "skip, derivative .3, 4,096 features": {"skip": True, "derivative": 0.3, "features": 4096},
    "skip, derivative .3, BatchTopK": {"skip": True, "derivative": 0.3, "activation": "batchtopk"},
    "skip, derivative .3, JumpReLU": {"skip": True, "derivative": 0.3, "activation": "jumprelu", "target_l0": 32.0},
    "skip of rank 64, derivative .3": {"skip": True, "skip_rank": 64, "derivative": 0.3},
    "skip of rank 16, derivative .3": {"skip": True, "skip_rank": 16, "derivative": 0.3},
    "32 of 124 transforms of rank 16": {"mixture": {"rank": 16, "k": 32}},
    "32 of 240 transforms of rank 8, derivative .3": {"mixture": {"rank": 8, "k": 32}, "derivative": 0.3},
    "32 of 124 transforms of rank 16, derivative .3": {"mixture": {"rank": 16, "k": 32}, "derivative": 0.3},
    "8 of 124 transforms of rank 16, derivative .3": {"mixture": {"rank": 16, "k": 8}, "derivative": 0.3},
    "skip, derivative .3, gated": {"skip": True, "derivative": 0.3, "activation": "gated", "target_l0": 32.0},
}


def truncated(model: Path, layers: int, work: Path) -> LanguageModel:
    """The model without what follows a layer, which one layer's transcoder needs nothing of."""
    folder = work / f"first-{layers}-layers"
    if not folder.is_dir():
        shutil.copytree(model, folder)
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": layers}))
    return load_model(folder)


def collected(model: LanguageModel, layer: int, file: Path) -> dict[str, Tensor]:
    """Activations of the layer, directions at it, and the same of held-out text; kept in a file."""
    if file.is_file():
        return load_file(file)
    rows = -(-(TOKENS + HELD_OUT) // (CONTEXT - 1)) + 1
    text = CORPUS.read_text().split("<|endoftext|>")
    tokens = take_rows(model, text, rows=rows, context=CONTEXT, separator="\n\n")
    later, seen = tokens[: -(-HELD_OUT // (CONTEXT - 1))], tokens[-(-HELD_OUT // (CONTEXT - 1)) :]
    reads, writes = ([Site(i, kind) for i in range(model.n_layers)] for kind in ("mlp_in", "mlp_out"))
    limits = find_outliers(
        model, seen[:32], [*reads, *writes], times=20.0, first=1, positions=positions_of(seen[:32])
    ).limits
    at = slice(layer, layer + 1)
    found: dict[str, Tensor] = {}
    for name, part in (("train", seen), ("held_out", later)):
        batch = sites_of(model, part, reads[at], writes[at], limits={s: limits[s] for s in (*reads[at], *writes[at])})
        found |= {f"{name}.reads": batch.reads, f"{name}.writes": batch.writes}
    nudges = Nudges(model, reads, writes, [replace(BASE, batch=4096)], limits=limits)
    chunk, pieces = Chunk(0, 0, seen, positions_of(seen)), []
    while sum(piece.reads.shape[1] for piece in pieces) < DIRECTIONS:
        pieces.append(nudges.of(len(pieces), chunk).of_layers(at))
    pieces = [Directions(*(torch.cat(side, dim=1)[0] for side in zip(*pieces, strict=True)))]
    for name, piece in (("directions", pieces[0]), ("natural", natural(model, later, reads, writes, layer))):
        found |= {f"{name}.{side}": value for side, value in piece._asdict().items()}
    save_file({name: value.contiguous() for name, value in found.items()}, file)
    return found


def natural(model: LanguageModel, rows: Tensor, reads: list[Site], writes: list[Site], layer: int) -> Directions:
    """One token of every row is nudged, four times over; what it reaches."""
    generator, sides = torch.Generator().manual_seed(1), []
    for group in rows.split(16):
        held = HeldModel(model, group, reads, writes)
        for _ in range(4):
            at, other = (torch.randint(1, CONTEXT * 3 // 4, (len(group),), generator=generator) for _ in range(2))
            each, embed = torch.arange(len(group)), torch.zeros_like(held.embed)
            embed[each, at] = held.embed[each.roll(1), other] - held.embed[each, at]
            changes = held.nudge(embed)
            reached = torch.arange(CONTEXT) >= at[:, None]
            sides.append(
                [held.clean.reads[layer][reached], changes.reads[layer][reached], changes.writes[layer][reached]]
            )
    return Directions(*(torch.cat(side) for side in zip(*sides, strict=True)))


def drawn(
    data: dict[str, Tensor], names: Sequence[str], batch: int, generator: torch.Generator
) -> Iterator[list[Tensor]]:
    """Endless batches of some of the activations, in new orders."""
    while True:
        order = torch.randperm(len(data[names[0]]), generator=generator)
        for chosen in order.split(batch)[: len(order) // batch]:
            yield [data[name][chosen] for name in names]


class Learner:
    """A transcoder in training, as `train` has it."""

    def __init__(self, settings: dict[str, Any], seed: int, reads: Tensor, writes: Tensor) -> None:
        self.config = replace(BASE, seed=seed, **settings)
        self.run = Run.start(self.config, reads, writes)
        self.scales = self.run.scales

    def step(self, number: int, reads: Tensor, writes: Tensor, given: Directions | None) -> None:
        self.run.step(number, reads, writes, directions=given, measure=False)

    def rebuilt(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction and activations; all in the coordinates of training."""
        weights = self.run.weights
        a = weights.activate(weights.pre_activations(x[None]))
        return weights.reconstruct(a, x[None])[0], a[0]

    def passed_on(self, given: Directions) -> Tensor:
        """J v with the active features held."""
        weights = self.run.weights
        slope = weights.activation.r.exp()[:, None] if isinstance(weights.activation, Gated) else 1.0
        active = weights.activate(weights.pre_activations(given.reads)) > 0
        passed_on = weights.decode(torch.where(active, given.changes @ weights.encoder().mT, 0.0) * slope)
        skipped = weights.skipped(given.changes)
        return (passed_on if skipped is None else passed_on + skipped)[0]


class MixtureLearner:
    """A mixture of linear transforms of as many parameters."""

    def __init__(self, settings: dict[str, Any], seed: int, reads: Tensor, writes: Tensor) -> None:
        shape = dict(settings["mixture"])
        self.config = replace(BASE, seed=seed, **{k: v for k, v in settings.items() if k != "mixture"})
        self.scales = measure_scales(reads, writes, self.config)
        d_model = reads.shape[-1]
        transforms = 2 * BASE.features * d_model // (d_model * (2 * shape["rank"] + 1))
        first = reads[:, 0] * self.scales.read[0]
        self.mixture = Mixture(d_model, transforms, shape["rank"], shape["k"], first)
        self.optimizer = trainer(self.mixture, self.config)

    def step(self, number: int, reads: Tensor, writes: Tensor, given: Directions | None) -> None:
        scaled = None if given is None else given.scaled(self.scales.read, self.scales.write)
        x, y = reads[:, 0] * self.scales.read, writes[:, 0] * self.scales.write
        step(self.mixture, self.optimizer, self.config, number, self.mixture.loss(x, y, scaled, self.config.derivative))

    def rebuilt(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mixture(x), self.mixture.gates(x)

    def passed_on(self, given: Directions) -> Tensor:
        return self.mixture.passed_on(given.reads[0], given.changes[0])


def measured(data: dict[str, Tensor], settings: dict[str, Any], seed: int) -> dict[str, float]:
    """What one training comes to."""
    generator = torch.Generator().manual_seed(1000 + seed)
    first = data["train.reads"][:4096], data["train.writes"][:4096]
    learner = (MixtureLearner if "mixture" in settings else Learner)(settings, seed, *first)
    config = learner.config
    batches = drawn(data, ("train.reads", "train.writes"), config.batch, generator)
    names = [f"directions.{side}" for side in Directions._fields]
    directions = drawn(data, names, max(1, round(config.derivative_share * config.batch)), generator)
    began = time.process_time()
    for number in range(config.steps):
        reads, writes = next(batches)
        given = Directions(*(side[None] for side in next(directions))) if compares_at(config, number) else None
        learner.step(number, reads, writes, given)
    seconds = (time.process_time() - began) / config.steps
    return {**figures(learner, data), "seconds": seconds}


@torch.no_grad()
def figures(learner: Learner | MixtureLearner, data: dict[str, Tensor]) -> dict[str, float]:
    """Held out: of the weights in training, which are those that are handed out."""
    x, y = (
        data[f"held_out.{side}"][:, 0] * scale
        for side, scale in (("reads", learner.scales.read), ("writes", learner.scales.write))
    )
    rebuilt, a = learner.rebuilt(x)
    found = {
        "fvu": float((y - rebuilt).square().sum() / (y - y.mean(dim=0)).square().sum()),
        "l0": float((a > 0).sum(-1).float().mean()),
    }
    for name in ("natural", "random"):
        found |= agreement(learner, Directions(*(data[f"{name}.{side}"][None] for side in Directions._fields)), name)
    return found


def agreement(learner: Learner | MixtureLearner, given: Directions, name: str) -> dict[str, float]:
    """Cosine and ratio of norms, means over the tokens that a change reaches."""
    given = given.scaled(learner.scales.read, learner.scales.write)
    responses, passed_on = given.responses[0], learner.passed_on(given)
    size = responses.norm(dim=-1)
    reached = size > 1e-3 * size.median()
    cosine = torch.nn.functional.cosine_similarity(passed_on, responses, dim=-1)[reached]
    ratio = (passed_on.norm(dim=-1) / size)[reached]
    return {f"{name}_cosine": float(cosine.mean()), f"{name}_ratio": float(ratio.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="Names of runs; all unless given.")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "circuitsae-derivative")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = truncated(arguments.model, arguments.layer + 1, arguments.work)
    data = collected(model, arguments.layer, arguments.work / f"layer-{arguments.layer}.safetensors")
    mlp, generator = model.parts.blocks[arguments.layer].mlp, torch.Generator().manual_seed(2)
    reads = data["held_out.reads"][:, 0]
    changes = torch.randn(reads.shape, generator=generator) * reads.norm(dim=-1, keepdim=True) / reads.shape[-1] ** 0.5
    with torch.no_grad():
        responses = (mlp((reads + 1e-2 * changes)[None]) - mlp((reads - 1e-2 * changes)[None]))[0] / 2e-2
    data |= {"random.reads": reads, "random.changes": changes, "random.responses": responses}
    kept = arguments.work / f"layer-{arguments.layer}.jsonl"
    done = (
        {tuple(r["key"]): r["found"] for r in map(json.loads, kept.read_text().splitlines())} if kept.exists() else {}
    )
    for seed in range(arguments.seeds):
        for name in arguments.only or RUNS:
            if (name, seed) in done:
                continue
            done[name, seed] = measured(data, RUNS[name], seed)
            with kept.open("a") as file:
                file.write(json.dumps({"key": [name, seed], "found": done[name, seed]}) + "\n")
            print(name, seed, {k: round(v, 3) for k, v in done[name, seed].items()}, flush=True)
            write(done, arguments.layer)


def write(done: dict[tuple[str, int], dict[str, float]], layer: int) -> None:
    columns = (
        "transcoder",
        "FVU",
        "L0",
        "cosine",
        "norm ratio",
        "random: cosine",
        "norm ratio",
        "CPU-s a step",
        "seeds",
    )
    keys = ("fvu", "l0", "natural_cosine", "natural_ratio", "random_cosine", "random_ratio", "seconds")
    rows = []
    for name in RUNS:
        found = [result for (run, _), result in done.items() if run == name]
        if found:
            cells = [_mean([result[key] for result in found], 1 if key == "l0" else 3) for key in keys]
            rows.append((name, *cells, len(found)))
    assert __doc__ is not None
    claim = __doc__.replace("Transcoders of one layer of", f"Transcoders of layer {layer} of", 1)
    write_table("derivative", claim, columns, rows)


def _mean(values: list[float], digits: int) -> str:
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
