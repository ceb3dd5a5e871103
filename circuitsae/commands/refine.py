"""`circuitsae refine`: better derivatives for dictionaries that somebody published, without training anew."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from circuitsae.commands.runs import TrainedOn
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
    corpus_for,
    load_language_model,
    opened_corpus,
    say,
    say_next,
)
from circuitsae.tables import open_console
from transcoders.errors import InputError
from transcoders.refining.config import RefineConfig

if TYPE_CHECKING:
    from transcoders.refining import Refinement


def refine(
    dictionaries: tyro.conf.Positional[str],
    /,
    *,
    model: Annotated[str | None, tyro.conf.DisallowNone] = None,
    corpus: Annotated[str | None, tyro.conf.DisallowNone] = None,
    part: CorpusPartOptions = CorpusPart(),
    out: Path,
    storage_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    overwrite: bool = False,
    bos: Bos = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
    choices: ChoiceOptions = Choices(),
    settings: Annotated[RefineConfig, tyro.conf.arg(name=""), tyro.conf.DisallowNone] = RefineConfig(),
) -> None:
    """Refine transcoders that are there: a skip term and biases in closed form, then a short training for derivatives.

    Graphs add up derivatives, of which dictionaries pass on less than they reconstruct. A layer that would be worse on
    held-out text keeps what it had. Writes the dictionaries, README.md and refine.json with the figures before and
    after.

    Args:
        dictionaries: A folder or hub name; the pocket model has "pocket" and "pocket-plt".
        model: A hub name, a local Hugging Face folder, or "pocket"; default, the one that the dictionaries name.
        corpus: A file or folder (.txt, .jsonl, .parquet), or a hub data set; the pocket model has its own text.
        part: Which part of it.
        out: Folder for the refined dictionaries.
        storage_dtype: Precision of the weights that are stored; they are computed in float32.
        overwrite: Write over dictionaries that the folder holds.
        bos: Begin each row with the beginning-of-text token; default, as in the dictionaries' training.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        dtype: Precision of the model; fine-tuning and derivatives need float32.
        weights: Which weights of the model.
        choices: Which of the dictionaries that the name offers.
        settings: How to refine.
    """
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise InputError(f"The folder {out} is not empty; write to another, or give --overwrite.")
    console = open_console(wide)

    from circuitsae.console import show_refinement
    from circuitsae.loading import load_dictionaries
    from circuitsae.pocket.corpus import TRAINING
    from transcoders.files import claimed, write_file, write_json
    from transcoders.formats import save_dictionaries
    from transcoders.refining.refinement import refinable, refinement

    text = opened_corpus(corpus, part) if model is None else corpus_for(model, corpus, TRAINING, part)
    with Console(stderr=True).status("loading"):
        loaded = refinable(load_dictionaries(dictionaries, device=device, dtype="float32", **choices.wanted()))
        name = model or loaded.provenance.model
        text = text or corpus_for(name, corpus, TRAINING, part)
        language_model = load_language_model(name, device, dtype, weights)
    with claimed(out):
        refined = refinement(language_model, loaded, text, settings, bos=bos, progress=True)
        save_dictionaries(refined.dictionaries, out, storage_dtype=storage_dtype)
        write_json(out / "refine.json", {"dictionaries": dictionaries, "model": name, **refined.to_json()})
        write_file(out / "README.md", readme(dictionaries, name, refined))
        TrainedOn.given(name, corpus, weights, part).save(out)
    show_refinement(console, refined)
    say(console, f"Dictionaries: {out}")
    say_next(console, f"circuitsae evaluate {out}")


def readme(dictionaries: str, model: str, refined: "Refinement") -> str:
    """What was done to which dictionaries, and their figures before and after."""
    from transcoders.training.export import library_versions
    from transcoders.training.record import command_line

    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    settings = ", ".join(f"{name}={value!r}" for name, value in refined.config.to_json().items())
    heads, cells = refined.table()
    rows = [" | ".join(row) for row in cells]
    lines = [
        f"# {dictionaries}, refined for {model}", "",
        f"By `{command_line()}`, with {versions}.", "",
        f"Settings: {settings}.", "",
        f"Skip terms and biases: ridge regression of each layer's error on its read, on {refined.tokens:,} tokens of "
        f"{refined.corpus}. Figures: on {refined.held_out_tokens:,} held-out tokens, before → after; cosine and norm "
        "ratio of the derivative: `J_dictionary v` against `J_mlp v`.", "",
        f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *(f"| {row} |" for row in rows),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
