"""`circuitsae finetune`: all layers of dictionaries trained together, in the place of the model's MLPs."""

import shlex
from pathlib import Path
from typing import Annotated

import tyro

from circuitsae.commands.evaluate import LOSS_TOKENS
from circuitsae.commands.runs import TrainedOn
from circuitsae.commands.shared import (
    Bos,
    ChoiceOptions,
    Choices,
    CorpusPart,
    CorpusPartOptions,
    WeightOptions,
    Weights,
    Wide,
    corpus_for,
    load_language_model,
    opened_corpus,
    say,
    say_next,
)
from circuitsae.tables import open_console
from transcoders.training.end_to_end_config import EndToEndConfig


def finetune(
    dictionaries: tyro.conf.Positional[str],
    /,
    *,
    model: Annotated[str | None, tyro.conf.DisallowNone] = None,
    corpus: Annotated[str | None, tyro.conf.DisallowNone] = None,
    part: CorpusPartOptions = CorpusPart(),
    out: Path,
    resume: bool = False,
    evaluate_tokens: int = 20_000,
    loss_tokens: int = LOSS_TOKENS,
    bos: Bos = None,
    device: str = "auto",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
    choices: ChoiceOptions = Choices(),
    settings: Annotated[EndToEndConfig, tyro.conf.arg(name=""), tyro.conf.DisallowNone] = EndToEndConfig(),
) -> None:
    """Train all layers of transcoders together, in the place of the model's MLPs, and evaluate them.

    Attention patterns and norm scales are held, as in an attribution graph. The loss is the KL of the next-token
    distributions, how wrongly the logits change with embeddings and features, and what each layer leaves unexplained.

    Args:
        dictionaries: A folder or hub name; the pocket model has "pocket" and "pocket-plt".
        model: A hub name, a local Hugging Face folder, or "pocket"; default, the one that the dictionaries name.
        corpus: A file or folder (.txt, .jsonl, .parquet), or a hub data set; the pocket model has its own text.
        part: Which part of it.
        out: Folder for the dictionaries, the metrics and the checkpoints.
        resume: Go on from the latest checkpoint in the folder. Without it the checkpoints there are removed.
        evaluate_tokens: Held-out tokens to evaluate on; 0 for no evaluation.
        loss_tokens: How many of them to measure losses, agreement and KL on, layer by layer.
        bos: Begin each row with the beginning-of-text token; default, as in the dictionaries' training.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        weights: Which weights of the model.
        choices: Which of the dictionaries that the name offers.
        settings: How to fine-tune.
    """
    import json

    import transcoders
    from circuitsae.console import show_evaluation
    from circuitsae.loading import load_dictionaries
    from circuitsae.pocket.corpus import TRAINING
    from transcoders.files import write_file
    from transcoders.kernels import keep_freed_memory, release_freed_memory

    console = open_console(wide)
    keep_freed_memory()
    text = opened_corpus(corpus, part) if model is None else corpus_for(model, corpus, TRAINING, part)
    loaded = load_dictionaries(dictionaries, device=device, dtype="float32", **choices.wanted())
    name = model or loaded.provenance.model
    text = text or corpus_for(name, corpus, TRAINING, part)
    language_model = load_language_model(name, device, "float32", weights).with_bos(bos)
    tuned = transcoders.finetune(language_model, loaded, text, settings, out=out, resume=resume)
    TrainedOn.given(name, corpus, weights, part).save(out)
    if evaluate_tokens:
        release_freed_memory()
        (record,) = tuned.provenance.config["end_to_end"][-1:]
        stream = {"context": record["context"], "separator": record["separator"]}
        rows = transcoders.held_out_rows(language_model, text, tokens=evaluate_tokens, **stream)
        evaluation = transcoders.evaluate(language_model, tuned, rows, loss_tokens=loss_tokens, progress=True)
        show_evaluation(console, evaluation)
        write_file(out / "evaluation.json", json.dumps(evaluation.to_json(), indent=1))
    say(console, f"Dictionaries: {out}")
    how = " ".join(["", *map(shlex.quote, weights.words())])
    say_next(console, f'circuitsae trace "Some prompt" --model {name} --dictionaries {out}{how}')
