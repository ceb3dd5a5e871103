"""Dictionaries of every kind for the two small models, trained once and kept: what several benchmarks compare.

    python benchmarks/trained_sets.py [--models pocket tinystories-656k] [--work runs/sets]    # train them beforehand

The models are pocket with its own text and tinystories-656k with the TinyStories text (beside the repository, in
../shared). All sets of one model, width and seed are trained together, from one pass over the model.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.logging import RichHandler

from circuitsae.commands.shared import counts
from circuitsae.loading import load_model
from circuitsae.pocket.corpus import held_out_text, text_stream
from transcoders.data import Corpus, held_out_rows, take_rows
from transcoders.data.corpora import CorpusSource
from transcoders.dictionaries import DictionarySet
from transcoders.language_model import LanguageModel
from transcoders.training import CLTConfig, SAEConfig, TrainConfig, TranscoderConfig, train

logger = logging.getLogger("trained_sets")

REPOSITORY = Path(__file__).resolve().parents[1]
WORK = REPOSITORY / "runs" / "sets"

BUFFER_MB = 64
"""A larger buffer is filled by the model before the first step, more than a short run needs."""

ACTIVATIONS: dict[str, dict[str, Any]] = {
    "ReLU, L1": {"activation": "relu", "penalty": "l1"},
    "ReLU, L1, unit decoders": {"activation": "relu", "penalty": "unit_l1"},
    "p-annealing": {"activation": "relu", "penalty": "p_anneal"},
    "Gated": {"activation": "gated"},
    "JumpReLU, tanh": {"activation": "jumprelu", "penalty": "tanh"},
    "JumpReLU, L0": {"activation": "jumprelu", "penalty": "l0"},
    "TopK": {"activation": "topk"},
    "TopK, aligned": {"activation": "topk", "aligned": True},
    "BatchTopK": {"activation": "batchtopk"},
    "BatchTopK, aligned": {"activation": "batchtopk", "aligned": True},
    "Matryoshka BatchTopK": {"activation": "batchtopk", "matryoshka": (0.125, 0.25, 0.5, 1.0)},
}
CROSS_LAYER = ("JumpReLU, tanh", "TopK", "BatchTopK", "BatchTopK, aligned")
KINDS: dict[str, tuple[type[TrainConfig], dict[str, Any]]] = {
    **{f"SAE {name}": (SAEConfig, settings) for name, settings in ACTIVATIONS.items()},
    **{f"transcoder {name}": (TranscoderConfig, settings) for name, settings in ACTIVATIONS.items()},
    "transcoder TopK, skip": (TranscoderConfig, {"activation": "topk", "skip": True}),
    **{f"CLT {name}": (CLTConfig, ACTIVATIONS[name]) for name in CROSS_LAYER},
}
COMPARED = (
    "transcoder TopK", "transcoder BatchTopK", "transcoder Matryoshka BatchTopK", "transcoder JumpReLU, tanh",
    "transcoder Gated", "transcoder p-annealing", "transcoder TopK, aligned", "transcoder TopK, skip", "CLT BatchTopK",
    "CLT JumpReLU, tanh", "SAE TopK", "SAE BatchTopK", "SAE JumpReLU, tanh",
)  # fmt: skip
"""Kinds whose graphs are compared."""


@dataclass(frozen=True)
class Setting:
    """A model, its text, and how the text is cut."""

    model: LanguageModel
    corpus: CorpusSource
    rows: torch.Tensor
    """Of text that nothing is trained on."""
    context: int
    separator: str


def setting(name: str, held_out: int) -> Setting:
    """A model with `held_out` tokens, about."""
    if name == "pocket":
        model, context, separator = load_model("pocket"), 96, "\n"
        corpus = Corpus("pocket", lambda: text_stream(0))
        count = -(-held_out // context)
        rows = take_rows(model, held_out_text(count * context), rows=count, context=context, separator=separator)
        return Setting(model, corpus, rows, context, separator)
    data = REPOSITORY.parent / "shared" / "data"
    model, context, separator = load_model(data / "models" / name), 128, "\n\n"
    path = data / "corpora" / "tiny_stories_944k.txt"
    rows = held_out_rows(model, path, tokens=held_out, context=context, separator=separator)
    return Setting(model, path, rows, context, separator)


def sparsity(kind: str, l0: int, n_layers: int) -> dict[str, Any]:
    """TopK-like kinds are given k (a cross-layer transcoder's counts all layers), the others a target."""
    of, settings = KINDS[kind]
    if of(**settings).ranks:
        return {"k": l0 * n_layers if of is CLTConfig else l0}
    return {"target_l0": float(l0)}


def trained_sets(
    name: str,
    where: Setting,
    kinds: Sequence[str] = COMPARED,
    *,
    features: int = 512,
    l0: int = 16,
    tokens: int = 300_000,
    batch: int = 512,
    seed: int = 0,
    work: Path = WORK,
) -> dict[str, DictionarySet]:
    """Of each kind the set of a model, trained where `work` does not have it; a run that was killed goes on."""
    configs = [
        KINDS[kind][0](
            features=features, tokens=tokens, batch=batch, lr=2e-3, context=where.context, separator=where.separator,
            buffer_mb=BUFFER_MB, seed=seed, log_every=200, checkpoint_every=500, keep_last=1,
            **KINDS[kind][1], **sparsity(kind, l0, where.model.n_layers),
        )
        for kind in kinds
    ]  # fmt: skip
    of_all = "all" if tuple(kinds) == COMPARED else "+".join(kinds)
    out = work / name / f"{features}x{l0}, {tokens} tokens, seed {seed}, {of_all}"
    done = train(where.model, where.corpus, configs, names=list(kinds), out=out, resume=out.exists(), progress=False)
    return dict(zip(kinds, done, strict=True))


@dataclass
class Options:
    """What to train beforehand."""

    models: list[str] = field(default_factory=lambda: ["pocket", "tinystories-656k"])
    """Of pocket and tinystories-656k."""
    kinds: list[str] = field(default_factory=lambda: list(COMPARED))
    """Names of kinds."""
    features: int = 512
    """Features per layer."""
    l0: int = 16
    """Active features per token and layer that are asked for."""
    tokens: int = 300_000
    """Tokens to train each on."""
    seeds: int = 3
    """How many of each."""
    work: Path = WORK
    """Where they are kept."""
    threads: int = 1
    """Threads of torch."""


def main(given: Options) -> None:
    """Train what is not there, and say how good each is."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False)])
    logger.setLevel(logging.INFO)
    torch.set_num_threads(given.threads)
    for name in given.models:
        where = setting(name, 1024)
        for seed in range(given.seeds):
            trained_sets(
                name, where, given.kinds, features=given.features, l0=given.l0, tokens=given.tokens, seed=seed,
                work=given.work,
            )  # fmt: skip
            logger.info("%s, seed %d: %d sets of %d features", name, seed, len(given.kinds), given.features)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, registry=counts()))
