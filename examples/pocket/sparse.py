"""Training and measuring the embedded dictionaries: a cross-layer transcoder, per-layer transcoders, residual SAEs."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from circuitsae.pocket.corpus import CONTEXT, SEPARATOR, TRAINING, held_out_text
from transcoders import LanguageModel, load_dictionaries, load_model, refine, save_dictionaries
from transcoders.data import take_rows
from transcoders.dictionaries import DictionarySet
from transcoders.evaluation import Evaluation, Splice, evaluate
from transcoders.files import new_folder, write_file, write_json
from transcoders.formats.files import read_json
from transcoders.training import CLTConfig, SAEConfig, TrainConfig, TranscoderConfig, train
from transcoders.training.checkpoint import latest_checkpoint
from transcoders.training.config import MLPConfig

logger = logging.getLogger(__name__)

MARGIN = 0.02

MIRRORED = 0.5
"""Share of the tokens from which on a feature is turned round after training."""


@dataclass(frozen=True)
class Trained:
    """One kind, as it is shipped: read back from its file in half precision."""

    name: str
    stages: Sequence[TrainConfig]
    evaluation: Evaluation
    decided: "Decided"
    megabytes: float
    seconds: float


@dataclass(frozen=True)
class Decided:
    """Top-1 agreement where the model prefers one token: the names and words of the corpus are drawn evenly."""

    share: float
    """Of the tokens, those where the model's best two probabilities differ by more than `MARGIN`."""
    agreement: float
    """On those, how often the model with all layers replaced has the same best token."""


def configurations(*, quick: bool) -> dict[str, list[TrainConfig]]:
    """The stages of each kind, by the name of its folder; `quick`: useless ones within seconds, for tests.

    After a stage transcoders are refined, and the next stage goes on from there.
    """
    common = {
        "features": 16 if quick else 1024,
        "batch": 64 if quick else 512,
        "lr": 3e-3,
        "context": 16 if quick else CONTEXT,
        "separator": SEPARATOR,
        "buffer_mb": 1 if quick else 256,
    }
    answers = common | {"skip": True, "derivative": 0.3, "derivative_from": 0.25}
    again = answers | {"derivative_from": 0.0, "lr": 1.5e-3, "sparsity_warmup": 0.0, "seed": 1}
    tokens = (lambda _: 256) if quick else (lambda millions: millions * 1_000_000)
    return {
        "clt": [CLTConfig(tokens=tokens(5), sparsity=1e-3, **answers)],
        "plt": [
            TranscoderConfig(tokens=tokens(2), sparsity=1.6e-3, **answers),
            TranscoderConfig(tokens=tokens(1), sparsity=1.6e-3, **again),
        ],
        "sae": [SAEConfig(tokens=tokens(1), activation="topk", k=4 if quick else 24, site="resid_post", **common)],
    }


def train_all(model_dir: Path, out: Path, work: Path, *, quick: bool, progress: bool = True) -> list[Trained]:
    """Train every kind on the model's activations and write `out/<kind>/`; a run that was killed goes on."""
    model = load_model(model_dir)
    model.name = "pocket"
    text = held_out_text(2_000 if quick else 16_000)
    results = []
    for name, stages in configurations(quick=quick).items():
        started = time.monotonic()
        learnt = None
        for number, config in enumerate(stages):
            learnt = learn(model, config, work / name / str(number), learnt, quick=quick, progress=progress)
        assert learnt is not None
        seconds = time.monotonic() - started
        with new_folder(target := out / name) as fresh:
            save_dictionaries(learnt, fresh, storage_dtype=torch.float16)
        shipped = load_dictionaries(target)
        rows = take_rows(model, text, rows=8 if quick else 120, context=stages[0].context, separator=SEPARATOR)
        evaluation = evaluate(model, shipped, rows)
        note_agreement(target, evaluation)
        decided = decided_agreement(model, shipped, rows)
        megabytes = sum(file.stat().st_size for file in target.iterdir()) / 1e6
        results.append(Trained(name, stages, evaluation, decided, megabytes, seconds))
        logger.info("%s: %s", name, table_row(results[-1]))
    return results


def learn(
    model: LanguageModel,
    config: TrainConfig,
    work: Path,
    start: DictionarySet | None,
    *,
    quick: bool,
    progress: bool = False,
) -> DictionarySet:
    """One stage, from new weights or from those of the stage before."""
    if (done := work / "dictionaries").exists():
        return load_dictionaries(done)
    resume = latest_checkpoint(work) is not None
    learnt = train(model, TRAINING, config, out=work, resume=resume, progress=progress, start=start)
    if isinstance(config, MLPConfig):
        learnt = refined(model, learnt, quick=quick, progress=progress)
    with new_folder(done) as fresh:
        save_dictionaries(learnt, fresh)
    return learnt


def refined(model: LanguageModel, dictionaries: DictionarySet, *, quick: bool, progress: bool = True) -> DictionarySet:
    """With features that fire on most tokens turned round, and skip terms fitted anew in closed form.

    A feature that is always on is a line with a kink where hardly any token is: what is taken out of it goes far beyond
    the kink, and graphs mispredict it. Turned round it fires on the exceptions, and the line is in the skip term.
    """
    tokens = (256, 64) if quick else (200_000, 10_000)
    return refine(
        model, dictionaries, TRAINING, mirror=MIRRORED, tokens=tokens[0], held_out_tokens=tokens[1],
        agreement_tokens=0, progress=progress,
    )  # fmt: skip


def note_agreement(folder: Path, evaluation: Evaluation) -> None:
    """Ship the Jacobian agreement, where there is one, with the dictionaries: graphs made with them show it."""
    if evaluation.agreement is not None:
        record = read_json(folder / "config.json")
        record["provenance"]["agreement"] = evaluation.agreement.summary()
        write_json(folder / "config.json", record)


@torch.no_grad()
def decided_agreement(model: LanguageModel, dictionaries: DictionarySet, rows: Int[Tensor, "row pos"]) -> Decided:
    """`Decided` on the rows, first positions left out."""
    original, _ = model.run(rows)
    replaced, _ = model.run(rows, edits=Splice(dictionaries).edits())
    best = original[:, 1:].softmax(-1).topk(2).values
    decided = best[..., 0] - best[..., 1] > MARGIN
    same = original[:, 1:].argmax(-1) == replaced[:, 1:].argmax(-1)
    return Decided(float(decided.float().mean()), float(same[decided].float().mean()))


HEADING = "## Dictionaries"

COLUMNS = (
    "trained on", "minutes", "MB", "L0", "L0 by layer", "FVU", "dead", "loss recovered", "top-1 agreement",
    "where decided", "KL", "cosine", "norm ratio",
)  # fmt: skip
_SECTION = """{heading}

Written by `python -m examples.pocket.recipe --stage dictionaries`: {features} features per layer, JumpReLU in
transcoders and TopK in SAEs, trained on the recipe's own text, stored in half precision, and measured on {tokens:,}
tokens of held-out text. L0, FVU and dead
features are means over the layers; loss recovered, agreement and KL are those of the model with all layers replaced at
once and no error terms. Many tokens of the corpus are drawn evenly from a list, so that the best token is a matter of
chance: "where decided" is the agreement on the {decided:.0%} of tokens where the model's best two probabilities differ
by more than {margin}.

| | {columns} |
|---|{rules}
{rows}

The names are `pocket` (the CLT), `pocket-plt` (per-layer transcoders) and `pocket-sae` (on `resid_post`). Transcoders
have a skip term and are trained for the derivative: cosine and norm ratio are of what they pass on of a small change.
Their penalty was chosen for a cosine of about .85 ([other choices](pocket_derivative.md)). After each stage of training
features that fire on more than {mirrored:.0%} of tokens were turned round and skip terms fitted anew
(`refine(mirror=…)`).
"""


def table_row(trained: Trained) -> str:
    """A row of the page's table."""
    evaluation, layers = trained.evaluation, trained.evaluation.layers
    replaced, agreement = evaluation.replaced, evaluation.agreement
    cells = (
        trained.name,
        f"{' + '.join(f'{stage.tokens / 1e6:g}' for stage in trained.stages)} M tokens",
        f"{trained.seconds / 60:.0f}",
        f"{trained.megabytes:.1f}",
        f"{evaluation.l0:.1f}",
        ", ".join(f"{layer.l0:.1f}" for layer in layers),
        f"{evaluation.fvu:.3f}",
        f"{sum(layer.dead for layer in layers) / len(layers):.1%}",
        f"{replaced.recovered_zero:.1%}",
        f"{replaced.top1_agreement:.1%}",
        f"{trained.decided.agreement:.1%}",
        f"{replaced.kl:.3f}",
        *((f"{agreement.cosine:.3f}", f"{agreement.norm_ratio:.3f}") if agreement is not None else ("", "")),
    )
    return f"| {' | '.join(cells)} |"


def write_section(page: Path, results: list[Trained]) -> None:
    """Put the section on dictionaries at the end of the page, in the place of an earlier one."""
    section = _SECTION.format(
        heading=HEADING,
        features=results[0].stages[0].features,
        tokens=results[0].evaluation.tokens,
        decided=results[0].decided.share,
        margin=MARGIN,
        mirrored=MIRRORED,
        columns=" | ".join(COLUMNS),
        rules="---|" * len(COLUMNS),
        rows="\n".join(map(table_row, results)),
    )
    before = page.read_text(encoding="utf-8").split(HEADING)[0].rstrip() + "\n\n" if page.exists() else ""
    write_file(page, before + section)
