"""`circuitsae convert`: a dictionary from one community's layout to another's, or a graph between tools."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from circuitsae.commands.exchange import export_graph, import_graph
from circuitsae.commands.shared import (
    Bos,
    ChoiceOptions,
    Choices,
    CorpusPart,
    CorpusPartOptions,
    load_language_model,
    opened_corpus,
    say,
    say_next,
)
from circuitsae.tables import Column, open_console, show_table
from transcoders.errors import DictionaryError, InputError

if TYPE_CHECKING:
    from transcoders.data import Corpus
    from transcoders.dictionaries import DictionarySet
    from transcoders.formats.format import FormatName
    from transcoders.training import CalibratedLayer

_GRAPHS = (".json", ".graphml", ".gexf")


def convert(
    source: tyro.conf.Positional[str],
    target: tyro.conf.Positional[Path],
    /,
    *,
    format: Annotated[str | None, tyro.conf.DisallowNone] = None,
    storage_dtype: Annotated[
        Literal["float32", "float64", "bfloat16", "float16"] | None, tyro.conf.DisallowNone
    ] = None,
    revision: Annotated[str | None, tyro.conf.DisallowNone] = None,
    calibrate_on: Annotated[str | None, tyro.conf.DisallowNone] = None,
    part: CorpusPartOptions = CorpusPart(),
    model: Annotated[str | None, tyro.conf.DisallowNone] = None,
    tokens: int = 8192,
    context: int = 128,
    bos: Bos = None,
    device: str = "auto",
    overwrite: bool = False,
    choices: ChoiceOptions = Choices(),
) -> None:
    """Convert dictionaries to the layout of another package, or a graph to the format of another tool.

    What is given says which of the two it is. A graph's folder becomes a file, and a file of another tool a folder, as
    `export` and `import` do.

    Args:
        source: Dictionaries, as every command takes them; or a graph's folder, or its .json, .graphml or .gexf.
        target: The folder to write; of a graph: the file.
        format: Of what is written; native unless given, and what the suffix says for a graph.
        storage_dtype: Precision of the weights that are stored; default, that of the dictionaries.
        revision: Of a repository: a branch, a tag or a commit.
        calibrate_on: Replace TopK by thresholds that leave as many features active on this text, for formats that
            have no TopK; a file or folder (.txt, .jsonl, .parquet), or a hub data set.
        part: With --calibrate-on: which part of the text.
        model: With --calibrate-on: the model of the dictionaries; default, the one that they name.
        tokens: With --calibrate-on: tokens of text, and as many held-out ones to measure the difference on.
        context: With --calibrate-on: tokens of a row.
        bos: With --calibrate-on: begin rows with the beginning-of-text token; default, as in their training.
        device: With --calibrate-on: auto, cpu, cuda, cuda:1 or mps.
        overwrite: Write dictionaries over those that the folder holds.
        choices: Which of the dictionaries that the name offers.
    """
    if is_graph(source):
        of_dictionaries = {
            "--storage-dtype": storage_dtype, "--revision": revision, "--calibrate-on": calibrate_on, "--model": model,
        }  # fmt: skip
        _refuse_options(source, [name for name, value in of_dictionaries.items() if value] + choices.words())
        _convert_graph(Path(source), target, format)
        return
    from circuitsae.loading import load_dictionaries
    from transcoders.formats.registry import FORMATS

    form: Any = format or "native"
    if form not in FORMATS:
        raise InputError(f"Unknown format {format!r}; dictionaries are written as {', '.join(FORMATS)}.")
    if not overwrite:
        _require_empty(target)
    console = open_console()
    text = opened_corpus(calibrate_on, part)
    with Console(stderr=True).status("converting"):
        loaded = load_dictionaries(source, revision=revision, **choices.wanted())
        if text is not None:
            name = model or loaded.provenance.model
            loaded, layers = _calibrated(loaded, name, text, tokens, context, bos, device)
            _show_calibration(console, layers)
        _save(loaded, target, form, storage_dtype)
    say(console, f"Dictionaries: {target} ({form})")
    say_next(console, f"circuitsae dictionaries info {target}")


def _require_empty(target: Path) -> None:
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"The folder {target} is not empty; write to another, or give --overwrite.")


def is_graph(source: str) -> bool:
    """Whether what a user names is a graph of ours, or a file of another tool."""
    path = Path(source)
    return (path / "graph.json").is_file() or (path.is_file() and path.suffix.lower() in _GRAPHS)


def _refuse_options(source: str, words: list[str]) -> None:
    if words:
        raise InputError(f"{source} is a graph, but {words[0]} is for dictionaries; leave it out.")


def _convert_graph(source: Path, target: Path, format: str | None) -> None:
    from circuitsae.graph.exchange import read_graph, write_graph
    from circuitsae.graph.exchange.registry import FORMATS

    form: Any = format
    if form is not None and form not in FORMATS:
        raise InputError(f"Unknown format {format!r}; graphs are written as {', '.join(FORMATS)}.")
    if source.is_dir():
        export_graph(source, target, format=form)
    elif form is None and not target.suffix:
        import_graph(source, out=target)
    else:
        path = write_graph(read_graph(source), target, format=form)
        say(open_console(), f"Written: {path.resolve()}")


def _calibrated(
    dictionaries: "DictionarySet", model: str, text: "Corpus", tokens: int, context: int, bos: bool | None, device: str
) -> "tuple[DictionarySet, list[CalibratedLayer]]":
    from transcoders.training import calibrate_topk

    language_model = load_language_model(model, device)
    return calibrate_topk(language_model, dictionaries, text, tokens=tokens, context=context, bos=bos)


def _show_calibration(console: Console, layers: "list[CalibratedLayer]") -> None:
    columns = [
        Column("layer"),
        Column("L0 with TopK"),
        Column("with thresholds"),
        Column("FVU with TopK"),
        Column("with thresholds"),
    ]
    rows = [
        (
            str(each.layer),
            f"{each.l0_before:.1f}",
            f"{each.l0_after:.1f}",
            f"{each.fvu_before:.4f}",
            f"{each.fvu_after:.4f}",
        )
        for each in layers
    ]
    show_table(console, "TopK → JumpReLU, on held-out text", columns, rows)


def _save(dictionaries: "DictionarySet", target: Path, form: "FormatName", storage_dtype: Any) -> None:
    from transcoders.formats import save_dictionaries

    try:
        save_dictionaries(dictionaries, target, format=form, storage_dtype=storage_dtype)
    except DictionaryError as error:
        if not _has_topk(dictionaries):
            raise
        raise DictionaryError(
            f"{str(error).rstrip('.')}; or let thresholds take TopK's place: --calibrate-on TEXT --model NAME."
        ) from error


def _has_topk(dictionaries: "DictionarySet") -> bool:
    from transcoders.dictionaries import TopK

    own = getattr(dictionaries, "activation", None)
    return any(isinstance(each, TopK) for each in (own, *(d.activation for d in getattr(dictionaries, "layers", ()))))
