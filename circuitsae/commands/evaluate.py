"""`circuitsae evaluate`: the figures of some dictionaries on held-out text, as a table and as JSON."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from circuitsae.commands.runs import TrainedOn, require_run
from circuitsae.commands.shared import (
    Bos,
    ChoiceOptions,
    Choices,
    CorpusPart,
    CorpusPartOptions,
    Dtype,
    WeightOptions,
    Weights,
    Wide,
    load_language_model,
    opened_corpus,
    say,
)
from circuitsae.tables import open_console
from transcoders.errors import CheckFailedError, InputError

if TYPE_CHECKING:
    from torch import Tensor

    from transcoders.data import Corpus
    from transcoders.dictionaries import DictionarySet
    from transcoders.evaluation import Evaluation
    from transcoders.language_model import LanguageModel

_CONTEXT = 128
_TOKENS = 20_000
JACOBIAN_TOKENS = 2_048
LOSS_TOKENS = 5_000
"""Of the held-out tokens, how many losses are measured on unless told otherwise."""


def evaluate(
    model: tyro.conf.Positional[str],
    dictionaries: Annotated[tyro.conf.Positional[str | None], tyro.conf.DisallowNone] = None,
    /,
    *,
    corpus: str | None = None,
    part: CorpusPartOptions = CorpusPart(),
    tokens: int = _TOKENS,
    loss_tokens: int = LOSS_TOKENS,
    jacobian_tokens: int = JACOBIAN_TOKENS,
    memory_mb: int = 512,
    context: int | None = None,
    separator: str | None = None,
    out: Path | None = None,
    require_fvu: float | None = None,
    require_agreement: float | None = None,
    bos: Bos = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
    choices: ChoiceOptions = Choices(),
) -> None:
    """Evaluate dictionaries on held-out text: sparsity, reconstruction, and what the model loses with them in place.

    Of the corpus every twentieth document is read, those that `train` leaves out. A folder that `train` wrote can be
    named alone: `circuitsae evaluate RUN`, on the model and the text that it was trained on.

    Args:
        model: A hub name, a local Hugging Face folder, or "pocket"; or, alone, a folder that `train` wrote.
        dictionaries: A folder or hub name; the pocket model has "pocket", "pocket-plt" and "pocket-sae".
        corpus: A file or folder (.txt, .jsonl, .parquet), or a hub data set; default, that of a run's training; the
            pocket model has its own.
        part: Which part of it.
        tokens: How many held-out tokens to read, at most.
        loss_tokens: How many of them to measure losses, agreement and KL on, layer by layer; they take nearly all of
            the time.
        jacobian_tokens: How many of them to measure Jacobian agreement on (how much of a small change the dictionaries
            pass on); 0 leaves it out, and SAEs have none.
        memory_mb: Memory to take beside the model and the dictionaries.
        context: Tokens per row of text; default, what the dictionaries were trained with, or 128.
        separator: Text between documents; default, what the dictionaries were trained with.
        out: Where to write the JSON; default evaluation.json in the folder of the dictionaries, or here.
        require_fvu: Fail (exit code 1) where the mean FVU is above this.
        require_agreement: Fail (exit code 1) where top-1 agreement with all layers replaced is below this.
        bos: Begin each row with the beginning-of-text token; default, as in the dictionaries' training.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        dtype: Precision of the model and of the dictionaries.
        weights: Which weights of the model.
        choices: Which of the dictionaries that the name offers.
    """
    for option, value in (("tokens", tokens), ("loss-tokens", loss_tokens), ("memory-mb", memory_mb)):
        if value < 1:
            raise InputError(f"--{option} {value} leaves nothing to measure; give at least 1.")
    if jacobian_tokens < 0:
        raise InputError(f"--jacobian-tokens {jacobian_tokens} is no number of tokens; give 0 to leave them out.")
    _refuse_impossible_bars(require_fvu, require_agreement)
    if out is not None and out.is_dir():
        raise InputError(f"--out {out} is a folder; give the name of a JSON file.")
    console = open_console(wide)
    language_model, loaded, text = _opened(model, dictionaries, corpus, part, device, dtype, weights, choices)

    from circuitsae.console import show_evaluation
    from transcoders.dictionaries.provenance import reading_as_trained
    from transcoders.evaluation import evaluate as measure
    from transcoders.formats.native import native_id
    from transcoders.training.record import record_evaluation

    language_model = reading_as_trained(language_model, loaded.provenance, bos)
    length = min(context or recorded(loaded, "context", _CONTEXT), language_model.context)
    separator = separator if separator is not None else recorded(loaded, "separator", None)
    rows = text_rows(language_model, text, tokens, length, separator)
    evaluation = measure(
        language_model, loaded, rows, loss_tokens=loss_tokens, jacobian_tokens=jacobian_tokens,
        memory=memory_mb * 2**20, progress=True,
    )  # fmt: skip
    show_evaluation(console, evaluation)
    folder = Path(model if dictionaries is None else dictionaries)
    path = out or (folder if folder.is_dir() else Path()) / "evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    evaluation.save(path, dictionaries_id=native_id(folder) if path.parent == folder else None)
    if path.parent == folder:
        record_evaluation(folder, evaluation)
    say(console, f"Written: {path}")
    _check(evaluation, require_fvu, require_agreement)


def _opened(
    model: str,
    dictionaries: str | None,
    corpus: str | None,
    part: CorpusPart,
    device: str,
    dtype: Dtype,
    weights: Weights,
    choices: Choices,
) -> "tuple[LanguageModel, DictionarySet, Corpus | None]":
    """The model, the dictionaries and the text: named, or those of a run; no text for the pocket model's own."""
    from circuitsae.loading import POCKET, load_dictionaries

    if dictionaries is None:
        if model == POCKET:
            dictionaries = POCKET
        else:
            folder = require_run(model)
            run = TrainedOn.of(folder)
            model, dictionaries, weights = run.model, str(folder), run.weights(weights)
            corpus, part = (corpus, part) if corpus else (run.corpus, run.part(part))
    text = _text(model, corpus, part)
    with Console(stderr=True).status("loading"):
        language_model = load_language_model(model, device, dtype, weights)
        loaded = load_dictionaries(dictionaries, device=language_model.device, dtype=dtype, **choices.wanted())
    return language_model, loaded, text


def _text(model: str, corpus: str | None, part: CorpusPart) -> "Corpus | None":
    from circuitsae.loading import POCKET

    if corpus is None and model != POCKET:
        raise InputError(f"No text was named to evaluate on; give --corpus FILE, what {model} should read.")
    return opened_corpus(corpus, part)


def text_rows(
    model: "LanguageModel", corpus: "Corpus | None", tokens: int, context: int, separator: str | None
) -> "Tensor":
    """Rows of a named corpus, or of the pocket model's own text."""
    from circuitsae.pocket.corpus import held_out_text
    from transcoders.data import held_out_rows, take_rows

    if corpus is not None:
        return held_out_rows(model, corpus, tokens=tokens, context=context, separator=separator)
    rows = -(-tokens // context)
    return take_rows(model, held_out_text(rows * context), rows=rows, context=context, separator=separator)


def recorded(dictionaries: "DictionarySet", setting: str, default: Any) -> Any:
    """A setting that the dictionaries were trained with, where they record it."""
    return dictionaries.provenance.config.get(setting, default)


def _refuse_impossible_bars(fvu: float | None, agreement: float | None) -> None:
    if fvu is not None and fvu < 0:
        raise InputError(f"--require-fvu {fvu} cannot be met; an FVU is at least 0.")
    if agreement is not None and not 0 <= agreement <= 1:
        raise InputError(f"--require-agreement {agreement} is not a share; give a number from 0 to 1.")


def _check(evaluation: "Evaluation", fvu: float | None, agreement: float | None) -> None:
    """Raises `CheckFailedError` where a bar that the user set is missed."""
    if fvu is not None and not evaluation.fvu <= fvu:
        raise CheckFailedError(f"the mean FVU is {evaluation.fvu:.4f}, above the {fvu:g} that was required.")
    found = evaluation.replaced.top1_agreement
    if agreement is not None and not found >= agreement:
        raise CheckFailedError(f"top-1 agreement is {found:.1%}, below the {agreement:.1%} that was required.")
