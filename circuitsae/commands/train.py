"""`circuitsae train`: dictionaries for all layers of a model, evaluated on held-out text."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import tyro

from circuitsae.commands.evaluate import LOSS_TOKENS
from circuitsae.commands.shared import (
    THE_WHOLE,
    CorpusPart,
    CorpusPartOptions,
    WeightOptions,
    Weights,
    Wide,
    corpus_for,
    device_for,
    load_language_model,
    say,
    say_next,
)
from circuitsae.tables import open_console
from transcoders.errors import InputError
from transcoders.sites import SiteKind
from transcoders.training.config import MLPSettings, TrainConfig
from transcoders.training.config_reading import config_of


def train(
    model: tyro.conf.Positional[str],
    /,
    *,
    corpus: str | None = None,
    part: CorpusPartOptions = CorpusPart(),
    out: Path,
    kind: Literal["clt", "plt", "sae"] = "clt",
    site: Annotated[SiteKind | None, tyro.conf.DisallowNone] = None,
    centred: Annotated[bool | None, tyro.conf.DisallowNone] = None,
    decoder_rank: Annotated[int | None, tyro.conf.DisallowNone] = None,
    start: Annotated[str | None, tyro.conf.DisallowNone] = None,
    resume: bool = False,
    plan: bool = False,
    ranks: Annotated[int | None, tyro.conf.DisallowNone] = None,
    evaluate_tokens: int = 20_000,
    loss_tokens: int = LOSS_TOKENS,
    device: str = "auto",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
    settings: Annotated[TrainConfig, tyro.conf.arg(name=""), tyro.conf.DisallowNone] = TrainConfig(),
    mlps: Annotated[MLPSettings, tyro.conf.arg(name=""), tyro.conf.DisallowNone] = MLPSettings(),
) -> None:
    """Train dictionaries for all layers of a model, evaluate them on held-out text, and save them.

    Args:
        model: A hub name, a local Hugging Face folder, or "pocket".
        corpus: A file or folder (.txt, .jsonl, .parquet), a hub data set, or a folder of `circuitsae activations`; the
            pocket model has its own text.
        part: Which part of a data set.
        out: Folder for the dictionaries, the metrics and the checkpoints.
        kind: clt: a cross-layer transcoder. plt: a transcoder per layer. sae: autoencoders of one site.
        site: SAEs only: what is read and reconstructed; resid_post unless given.
        centred: SAEs only: the encoder reads its input less the decoder's bias.
        decoder_rank: Cross-layer transcoders only: directions through which a layer's features write to later layers; a
            decoder for each pair of layers unless given.
        start: Dictionaries to train on instead of new weights: a folder or hub name. What they are is taken over:
            features, activation, k, skip term.
        resume: Go on from the latest checkpoint in the folder; a run that is complete is evaluated as it is. Without it
            the checkpoints there are removed.
        plan: Train nothing; print what the run would take, by a trial of ten seconds. Exit code 2 where it cannot fit.
        ranks: With --plan: for so many processes, which share the run; default, those that torchrun started.
        evaluate_tokens: Held-out tokens to evaluate on; 0 for no evaluation.
        loss_tokens: How many of them to measure losses, agreement and KL on, layer by layer.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        weights: Which weights of the model.
        settings: How to train.
        mlps: How to train transcoders.
    """
    if ranks is not None and (not plan or ranks < 1):
        raise InputError(f"--ranks {ranks} is for --plan, and at least 1; to train in several processes, use torchrun.")
    own = {
        key: value
        for key, value in (("site", site), ("centred", centred), ("decoder_rank", decoder_rank))
        if value is not None
    }
    own |= {key: value for key, value in asdict(mlps).items() if value != getattr(MLPSettings(), key)}
    config = config_of(kind, **asdict(settings), **own)

    import transcoders
    from circuitsae.console import show_evaluation, show_plan
    from circuitsae.loading import load_dictionaries
    from circuitsae.pocket.corpus import TRAINING
    from transcoders.formats.native import native_id
    from transcoders.kernels import keep_freed_memory, release_freed_memory
    from transcoders.training.distributed import device_of_rank, leave, rank_in_environment
    from transcoders.training.record import record_evaluation
    from transcoders.training.warm_start import Start

    console = open_console(wide)
    keep_freed_memory()  # this process has nothing else to do
    store = transcoders.ActivationStore(corpus) if corpus and transcoders.ActivationStore.is_store(corpus) else None
    if store is not None and part != THE_WHOLE:
        raise InputError(f"{corpus} holds activations, of which there is no part to choose; leave out --corpus-….")
    text = store or corpus_for(model, corpus, TRAINING, part)
    device = device_for(model, device_of_rank(device), weights)
    given = None if start is None else load_dictionaries(start, device=device)
    if given is not None:
        config = Start.of(given).config(config)
    language_model = load_language_model(model, device, "float32", weights).with_bos(config.bos)
    if plan:
        planned = transcoders.plan(
            language_model, text, config, out=out, evaluate_tokens=evaluate_tokens, loss_tokens=loss_tokens,
            ranks=ranks,
        )  # fmt: skip
        if rank_in_environment() == 0:
            show_plan(console, planned)
        planned.require_fit()
        return
    dictionaries = transcoders.train(language_model, text, config, out=out, resume=resume, start=given)
    leave()
    if rank_in_environment() > 0:  # the first of torchrun's processes reports
        return
    if evaluate_tokens and not isinstance(text, transcoders.ActivationStore):  # which has no text to hold out
        release_freed_memory()
        stream = {"context": config.context, "separator": config.separator}
        rows = transcoders.held_out_rows(language_model, text, tokens=evaluate_tokens, **stream)
        evaluation = transcoders.evaluate(language_model, dictionaries, rows, loss_tokens=loss_tokens, progress=True)
        show_evaluation(console, evaluation)
        evaluation.save(out / "evaluation.json", dictionaries_id=native_id(out))
        record_evaluation(out, evaluation)
    say(console, f"Dictionaries: {out}")
    if store is not None:
        say_next(console, f"circuitsae evaluate {model} {out} --corpus TEXT")
    elif kind != "sae":
        how = " ".join(["", *map(shlex.quote, weights.words())])
        say_next(console, f'circuitsae trace "Some prompt" --model {model} --dictionaries {out}{how}')
