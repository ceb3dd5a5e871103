"""Trains every kind of dictionary on a model, all layers in one pass, and writes results/kinds.md.

    python benchmarks/kinds.py                              # both models, in full
    python benchmarks/kinds.py --tokens 100k --kinds topk   # a look
    python benchmarks/kinds.py --models pocket --l0 8 16 32 # a sweep: the Pareto plot gets a line for each kind

The models are tinystories-656k with the TinyStories text (beside the repository, in ../shared) and pocket with its own.
All kinds and sparsities are trained together, from one pass over the model. What is done is kept under --work, so that
a run that was killed goes on; --fresh starts over.
"""

import logging
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro
from machine import RESULTS, machine
from rich.logging import RichHandler
from trained_sets import BUFFER_MB, KINDS, Setting, setting, sparsity

from circuitsae.commands.shared import counts
from transcoders.data.activations import sites_of
from transcoders.dictionaries import DictionarySet
from transcoders.evaluation import Evaluation, evaluate, write_pareto
from transcoders.files import write_file, write_json
from transcoders.formats.files import read_json
from transcoders.training import (
    SAEConfig,
    TrainConfig,
    Trainer,
    VectorSource,
    train,
)
from transcoders.training.checkpoint import latest_checkpoint

logger = logging.getLogger("kinds")


@dataclass
class Options:
    """What to train."""

    models: list[str] = field(default_factory=lambda: ["tinystories-656k", "pocket"])
    """Of tinystories-656k and pocket."""
    kinds: list[str] = field(default_factory=list)
    """Parts of the names of kinds; all without."""
    tokens: int = 1_000_000
    """Tokens to train each kind on."""
    features: int = 1024
    """Features per layer."""
    l0: list[int] = field(default_factory=lambda: [8, 32])
    """Active features per token and layer that are asked for."""
    batch: int = 1024
    """Tokens per step."""
    lr: float = 2e-3
    """Peak learning rate."""
    held_out: int = 20_000
    """Tokens to measure on."""
    threads: int = 2
    """Threads of torch."""
    work: Path = Path("runs/kinds")
    """Where evaluations and the plots go."""
    page: Path = RESULTS / "kinds.md"
    """The file for the tables."""
    fresh: bool = False
    """Whether to repeat what is done already."""


@dataclass(frozen=True)
class Done:
    """One kind at one sparsity."""

    kind: str
    asked: int
    evaluation: Evaluation
    tokens_per_s: float


def configuration(kind: str, l0: int, n_layers: int, where: Setting, given: Options) -> TrainConfig:
    of, settings = KINDS[kind]
    asked = sparsity(kind, l0, n_layers)
    if of is SAEConfig:  # what was the default when the table was made
        asked |= {"centred": False, "remedy": "auxiliary", "encoder_scale": 0.1 if of(**settings).ranks else 1.0}
    return of(
        features=given.features,
        tokens=given.tokens,
        batch=given.batch,
        lr=given.lr,
        context=where.context,
        separator=where.separator,
        buffer_mb=BUFFER_MB,
        log_every=200,
        checkpoint_every=500,
        **settings,
        **asked,
    )


def train_all(name: str, kinds: list[str], where: Setting, given: Options) -> list[Done]:
    """All kinds and sparsities from one pass over the model; what is kept under `work` is not done again."""
    folder = given.work / name
    record = {key: getattr(given, key) for key in ("tokens", "features", "batch", "lr", "l0")} | {"kinds": kinds}
    file = folder / "results.json"
    if file.exists() and not given.fresh and (found := read_json(file))["record"] == record:
        return [Done(d["kind"], d["asked"], Evaluation.from_json(d["evaluation"]), d["speed"]) for d in found["done"]]
    plan = [(kind, l0) for kind in kinds for l0 in given.l0]
    configs = [configuration(kind, l0, where.model.n_layers, where, given) for kind, l0 in plan]
    names = [f"{kind} {l0}" for kind, l0 in plan]
    out = folder / "training"
    resume = not given.fresh and latest_checkpoint(out) is not None
    trained = train(where.model, where.corpus, configs, names=names, out=out, resume=resume)
    done = []
    for (kind, l0), config, dictionaries in zip(plan, configs, trained, strict=True):
        evaluation = evaluate(where.model, dictionaries, where.rows)
        done.append(Done(kind, l0, evaluation, speed(where, dictionaries, config)))
        logger.info("%s: %s", name, row(done[-1]))
    entries = [
        {"kind": d.kind, "asked": d.asked, "evaluation": d.evaluation.to_json(), "speed": d.tokens_per_s} for d in done
    ]
    write_json(file, {"record": record, "done": entries})
    return done


def speed(where: Setting, dictionaries: DictionarySet, config: TrainConfig) -> float:
    """Tokens/s of training steps on activations that are in memory."""
    activations = sites_of(where.model, where.rows, dictionaries.reads, dictionaries.writes)
    warm, timed = 5, 30
    short = replace(config, tokens=(warm + timed) * config.batch)
    writes = None if isinstance(config, SAEConfig) else activations.writes
    trainer = Trainer(VectorSource(activations.reads, writes, seed=0), [short])
    trainer.run(until=warm, progress=False)
    start = time.perf_counter()
    trainer.run(progress=False)
    return timed * config.batch / (time.perf_counter() - start)


def row(done: Done) -> str:
    e = done.evaluation
    own = "" if e.replaced.features == "replaced" else " †"
    cells = (
        done.kind, str(done.asked), f"{e.l0:.1f}", f"{e.fvu:.3f}", f"{e.dead:.1%}", f"{e.recovered_zero:.1%}",
        f"{e.replaced.recovered_zero:.1%}{own}", f"{e.replaced.top1_agreement:.1%}{own}", f"{e.replaced.kl:.3f}{own}",
        f"{done.tokens_per_s:,.0f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


COLUMNS = (
    "kind", "L0 asked", "L0", "FVU", "dead", "loss recovered, one layer", "loss recovered, all", "top-1 agreement",
    "KL", "tokens/s",
)  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def section(name: str, results: list[Done], where: Setting, given: Options) -> str:
    layers = where.model.n_layers
    return f"""## {name}

{layers} layers, width {where.model.d_model}, {given.features:,} features a layer, {given.tokens:,} tokens in batches of
{given.batch:,}; measured on {results[0].evaluation.tokens:,} held-out tokens. The model's loss is
{results[0].evaluation.loss:.3f}.

{HEAD}
{chr(10).join(map(row, results))}
"""


def explanation() -> str:
    return f"""# Kinds

L0, FVU and dead features are means over layers. Loss recovered is against zeros: of one layer replaced at a time (mean
over layers), and of all layers replaced at once, as are top-1 agreement and KL (nats). SAEs replace `resid_post`, the
transcoders what the MLPs write: their losses do not compare. † TopK over the layers of a token needs the later layers
before it knows the features of the earlier ones, so they are those of the original model's stream, without errors that
add up. Tokens/s are those of training steps for all layers at once, on activations in memory, on
{machine()}, beside other work on the same cores: compare them by order of magnitude. Written by
`python {" ".join(["benchmarks/kinds.py", *sys.argv[1:]])}`.
"""


def main(given: Options) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False)])
    logger.setLevel(logging.INFO)
    torch.set_num_threads(given.threads)
    kinds = [kind for kind in KINDS if not given.kinds or any(part.lower() in kind.lower() for part in given.kinds)]
    sections = []
    for name in given.models:
        where = setting(name, given.held_out)
        done = train_all(name, kinds, where, given)
        sections.append(section(name, done, where, given))
        plot = write_pareto(
            {kind: [d.evaluation for d in done if d.kind == kind] for kind in kinds},
            given.work / name / "pareto.html",
            title=f"{name}: {given.tokens:,} tokens, {given.features:,} features a layer",
        )
        logger.info("plot: %s", plot)
    write_file(given.page, "\n".join([explanation(), *sections]))
    logger.info("written: %s", given.page)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, registry=counts()))
