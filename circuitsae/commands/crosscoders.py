"""`circuitsae crosscoder` and `circuitsae diff`: latents over several sites, of one model or of two."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from circuitsae.commands.shared import (
    CorpusPart,
    CorpusPartOptions,
    WeightOptions,
    Weights,
    Wide,
    corpus_for,
    load_language_model,
    say,
)
from circuitsae.tables import Column, open_console, show_table
from transcoders.errors import InputError
from transcoders.files import write_file, write_json
from transcoders.sites import Site
from transcoders.training.config import SAEConfig, TrainConfig
from transcoders.training.config_reading import config_of

if TYPE_CHECKING:
    from torch import Tensor

    from transcoders.crosscoders import CrosscoderEvaluation, ModelDiff
    from transcoders.data import Corpus
    from transcoders.language_model import LanguageModel

_DEFAULT = TrainConfig(activation="batchtopk")
"""What is trained unless something else is asked for: L1 penalties make latents look exclusive that are not."""
_SHOWN, _CONTEXT = 20, 6
"""Exclusive latents in the table, and tokens before each of theirs."""


def crosscoder(
    model: tyro.conf.Positional[str],
    /,
    *,
    corpus: str | None = None,
    part: CorpusPartOptions = CorpusPart(),
    out: Path,
    sites: tuple[str, ...] = (),
    resume: bool = False,
    plan: bool = False,
    evaluate_tokens: int = 8_192,
    device: str = "auto",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
    settings: Annotated[TrainConfig, tyro.conf.arg(name=""), tyro.conf.DisallowNone] = _DEFAULT,
) -> None:
    """Train a crosscoder, whose latents read several sites of a model at once and write all of them, and evaluate it.

    Args:
        model: A hub name, a local Hugging Face folder, or "pocket".
        corpus: A file or folder (.txt, .jsonl, .parquet), or a hub data set; the pocket model has its own text.
        part: Which part of it.
        out: Folder for the crosscoder, its evaluation, and the run's metrics and checkpoints (in run/).
        sites: Sites like 2.resid_post, of one width; default, resid_post of all layers.
        resume: Go on from the latest checkpoint in the folder.
        plan: Train nothing; print what the run would take, by a trial of ten seconds. Exit code 2 where it cannot fit.
        evaluate_tokens: Held-out tokens to evaluate on; 0 for no evaluation.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        weights: Which weights of the model.
        settings: How to train; k, and target_l0, count the active latents of all sites together.
    """
    config = _config(settings)
    chosen = [Site.parse(site) for site in sites] or None
    text = _text(model, corpus, part)
    from circuitsae.console import show_plan
    from transcoders.crosscoders import evaluate_crosscoder, plan_crosscoder, train_crosscoder

    console = open_console(wide)
    language_model = load_language_model(model, device, "float32", weights).with_bos(config.bos)
    if plan:
        planned = plan_crosscoder(language_model, text, config, sites=chosen, out=out)
        show_plan(console, planned)
        planned.require_fit()
        return
    trained = train_crosscoder(language_model, text, config, sites=chosen, out=out, resume=resume)
    if evaluate_tokens:
        rows = _held_out(language_model, text, evaluate_tokens, config)
        evaluation = evaluate_crosscoder(language_model, trained, rows)
        write_json(out / "evaluation.json", evaluation.to_json())
        show_evaluation(console, evaluation)
    say(console, f"Crosscoder: {out}")


def diff(
    model: tyro.conf.Positional[str],
    other: tyro.conf.Positional[str],
    /,
    *,
    corpus: str | None = None,
    part: CorpusPartOptions = CorpusPart(),
    out: Path,
    at: Annotated[str | None, tyro.conf.DisallowNone] = None,
    resume: bool = False,
    evaluate_tokens: int = 8_192,
    device: str = "auto",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
    settings: Annotated[TrainConfig, tyro.conf.arg(name=""), tyro.conf.DisallowNone] = _DEFAULT,
) -> None:
    """Compare a model with one that was trained from it: which latents of a crosscoder over both are of one alone.

    Args:
        model: A hub name, a local Hugging Face folder, or "pocket".
        other: Another one of the same width and tokenizer.
        corpus: A file or folder (.txt, .jsonl, .parquet), or a hub data set; the pocket model has its own text.
        part: Which part of it.
        out: Folder for the crosscoder, diff.json and diff.csv.
        at: The site to compare, like 2.resid_post; default, resid_post of the middle layer.
        resume: Go on from the latest checkpoint in the folder, or from its crosscoder.
        evaluate_tokens: Held-out tokens to compare on.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        weights: Which weights of the first model.
        settings: How to train the crosscoder; k counts the active latents of both models together.
    """
    if evaluate_tokens < 1:
        raise InputError(f"--evaluate-tokens {evaluate_tokens} leaves nothing to compare on; give at least 1.")
    config = _config(settings)
    site = None if at is None else Site.parse(at)
    text = _text(model, corpus, part)
    from transcoders.crosscoders import ModelPair, diff_models, evaluate_crosscoder, train_crosscoder

    console = open_console(wide)
    first = load_language_model(model, device, "float32", weights).with_bos(config.bos)
    pair = ModelPair(first, load_language_model(other, str(first.device), "float32"))
    trained = train_crosscoder(
        pair, text, config, sites=None if site is None else pair.both(site), out=out, resume=resume
    )
    rows = _held_out(pair, text, evaluate_tokens, config)
    show_evaluation(console, evaluate_crosscoder(pair, trained, rows))
    found = diff_models(pair, trained, rows)
    tokens = {latent: [_words(pair, rows, row, pos) for _, row, pos in top] for latent, top in found.top.items()}
    show_diff(console, found, tokens)
    record = found.to_json() | {"site": str(trained.sites[0]), "top": {str(k): v for k, v in tokens.items()}}
    write_file(out / "diff.json", json.dumps(record, indent=1))
    write_file(out / "diff.csv", found.frame.to_csv(index=False))
    say(console, f"Written: {out / 'diff.json'}, diff.csv and the crosscoder")


def _config(settings: TrainConfig) -> SAEConfig:
    config = config_of("sae", **asdict(settings))
    assert isinstance(config, SAEConfig)
    return config


def _text(model: str, corpus: str | None, part: CorpusPart) -> "Corpus":
    from circuitsae.pocket.corpus import TRAINING

    return corpus_for(model, corpus, TRAINING, part)


def _held_out(model: "LanguageModel", text: "Corpus", tokens: int, config: SAEConfig) -> "Tensor":
    from transcoders.data import held_out_rows

    context = min(config.context, model.context)
    return held_out_rows(model, text, tokens=tokens, context=context, separator=config.separator)


def _words(model: "LanguageModel", rows: "Tensor", row: int, pos: int) -> str:
    """A token in brackets, after some of those before it."""
    before = [model.token_string(int(t)) for t in rows[row, max(0, pos - _CONTEXT) : pos]]
    return f"{''.join(before)}[{model.token_string(int(rows[row, pos]))}]".replace("\n", "↵")


def show_evaluation(console: Console, evaluation: "CrosscoderEvaluation") -> None:
    """A row for each site, and at how many sites the latents are."""
    names = ("site", "FVU", "loss spliced", "loss, mean", "recovered")
    columns = [Column(name, text=number == 0, keep=5 - number) for number, name in enumerate(names)]
    rows = [
        [each.site, *(f"{x:.3f}" for x in (each.fvu, each.loss_spliced, each.loss_mean, each.recovered))]
        for each in evaluation.sites
    ]
    title = f"{evaluation.tokens} tokens, L0 {evaluation.l0:.1f}, dead {evaluation.dead:.1%}"
    show_table(console, title, columns, rows)
    spread = ", ".join(f"{n} at {count}" for count, n in enumerate(evaluation.spread, start=1))
    say(console, f"Latents by the number of sites that they are at: {spread}.")


def show_diff(console: Console, found: "ModelDiff", tokens: dict[int, list[str]]) -> None:
    """How many latents are of which model, and the exclusive ones with what they are most active on."""
    columns = [Column("", text=True), Column("latents"), Column("live"), Column("confirmed")]
    first, second = found.models
    titles = {"first": f"{first} alone", "second": f"{second} alone", "shared": "both alike", "between": "between"}
    rows = []
    for name, row in found.counts().iterrows():
        confirmed = str(row["confirmed"]) if name in ("first", "second") else ""
        rows.append([titles[str(name)], str(row["latents"]), str(row["live"]), confirmed])
    show_table(console, f"{first} and {second}, {found.tokens} tokens", columns, rows)
    exclusive: Any = found.frame[found.frame["latent"].isin(list(tokens))]
    exclusive = exclusive.sort_values(["confirmed", "density"], ascending=False).head(_SHOWN)
    if exclusive.empty:
        return
    columns = [Column("latent"), Column("of", text=True), Column("ν"), Column("error", keep=2),
               Column("reconstruction", keep=1), Column("confirmed"), Column("most active on", text=True)]  # fmt: skip
    cells = [
        [
            str(row["latent"]), str(row["class"]), f"{row['nu']:.2f}", f"{row['ratio_error']:.2f}",
            f"{row['ratio_reconstruction']:.2f}", "yes" if row["confirmed"] else "no",
            " · ".join(tokens[row["latent"]][:3]),
        ]
        for row in exclusive.to_dict("records")
    ]  # fmt: skip
    show_table(console, "Latents of one model alone (ratios: docs/crosscoders.md)", columns, cells)
