"""`circuitsae attention`: why a head looks from one position of a prompt to another."""

import json as json_
from typing import TYPE_CHECKING

import tyro
from rich.console import Console

from circuitsae.commands.shared import (
    Bos,
    ChoiceOptions,
    Choices,
    Dtype,
    WeightOptions,
    Weights,
    Wide,
    cards_of,
    layer_and_number,
    load_replacement,
    say,
    say_next,
)
from circuitsae.report.text import visible
from circuitsae.tables import Column, open_console, show_table
from transcoders.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from circuitsae.attribution import AttentionReasons
    from circuitsae.attribution.attention_sources import Namer, SourceKind
    from circuitsae.replacement import ReplacementModel, Trace


def attention(
    prompt: tyro.conf.Positional[str],
    /,
    *,
    head: str | None = None,
    query: int = -1,
    key: int,
    against: int | None = None,
    writers: bool = False,
    top: int = 8,
    json: bool = False,
    model: str = "pocket",
    dictionaries: str | None = None,
    bos: Bos = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
    choices: ChoiceOptions = Choices(),
) -> None:
    """Why a head looks from one position to another: its score before the softmax, by what wrote its query and its key.

    Without --head: which heads look there.

    Args:
        prompt: The text to run.
        head: The head, as LAYER.HEAD, such as 2.3.
        query: The position that looks; negative: from the end.
        key: The position that is looked at.
        against: Another position: why not there? Of what both have in common nothing is left.
        writers: Sources are what writes at the two positions themselves, each earlier head one of them; without, the
            nodes of the graph, which earlier heads and skip terms are followed back to.
        top: How many sources and pairs to print.
        json: Print JSON instead of tables.
        model: A hub name, a local Hugging Face folder, or "pocket".
        dictionaries: A folder or hub name of transcoders; the pocket model has its own.
        bos: Begin the prompt with the beginning-of-text token; default, as in the dictionaries' training.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        dtype: Precision of the model.
        weights: Which weights of the model.
        choices: Which of the dictionaries that the name offers.
    """
    place = None
    if head is not None:
        place = layer_and_number(head, f"--head {head!r} is no head; write it as LAYER.HEAD, such as 2.3.")
    if top < 1:
        raise InputError(f"--top {top} prints nothing; give at least 1.")
    if place is None and (against is not None or writers):
        raise InputError("--against and --writers are asked of one head; give --head LAYER.HEAD, such as 2.3.")
    from circuitsae.attribution import explain_attention, looking_heads

    console = open_console(wide)
    loaded = load_replacement(model, dictionaries, device, dtype, bos, weights, choices)
    trace = loaded.trace(prompt)
    if place is None:
        found = looking_heads(loaded, trace, query, key).head(top)
        if json:
            console.print_json(found.to_json(orient="records"))
            return
        _show_heads(console, trace, found)
        say_next(console, f"the same with --head {found['layer'][0]}.{found['head'][0]} says why")
        return
    names, kind = _names(loaded, model, dictionaries), _kind(writers)
    reasons = explain_attention(loaded, trace, *place, query, key, sources=kind, names=names)
    shown = reasons if against is None else reasons.contrast(against)
    if json:
        console.print_json(json_.dumps(_document(shown, top), ensure_ascii=False))
        return
    _show(console, trace, reasons, shown, top)


def _kind(writers: bool) -> "SourceKind":
    return "writers" if writers else "nodes"


def _names(loaded: "ReplacementModel", model: str, dictionaries: str | None) -> "Namer | None":
    """Of features, by the cards beside their dictionaries."""
    from circuitsae.attribution.attribute import weights_of_dictionaries
    from circuitsae.loading import dictionaries_for

    cards, _ = cards_of(dictionaries_for(model, dictionaries), weights_of_dictionaries(loaded))
    return None if cards is None else cards.name


def _document(shown: "AttentionReasons", top: int) -> dict[str, object]:
    numbers = ("layer", "head", "query", "key", "other", "score", "pattern", "constant")
    tables = {
        "by_query": shown.by_query().head(top), "by_key": shown.by_key().head(top), "pairs": shown.contributions(top),
    }  # fmt: skip
    found: dict[str, object] = {name: getattr(shown, name) for name in numbers}
    found["by_kind"] = shown.by_kind().to_dict("index")
    return found | {name: table.to_dict("records") for name, table in tables.items()}


def _show_heads(console: Console, trace: "Trace", found: "pd.DataFrame") -> None:
    say(console, _tokens(trace))
    rows = [(f"{row['layer']}.{row['head']}", f"{row['pattern']:.3f}") for row in found.to_dict("records")]
    show_table(console, "", [Column("head", text=True), Column("attention")], rows)


def _show(console: Console, trace: "Trace", reasons: "AttentionReasons", shown: "AttentionReasons", top: int) -> None:
    say(console, _tokens(trace), _sentence(trace, reasons, shown))
    places = [Column("source", text=True), Column("token or feature", 2, text=True), Column("gives")]
    for title, table in (("By what wrote the query", shown.by_query()), ("By what wrote the key", shown.by_key())):
        rows = [
            (row["source"], _text(row["text"]), f"{row['contribution']:+.3f}")
            for row in table.head(top).to_dict("records")
        ]
        show_table(console, title, places, rows)
    kinds = shown.by_kind()
    rows = [(kind, *(f"{value:+.3f}" for value in row)) for kind, row in zip(kinds.index, kinds.values, strict=True)]
    names = [Column("query ↓  key →", text=True), *(Column(str(kind)) for kind in kinds.columns)]
    show_table(console, "By kinds of sources", names, rows)
    columns = [
        Column("query", text=True), Column("token or feature", 2, text=True), Column("key", text=True),
        Column("token or feature", 2, text=True), Column("gives"),
    ]  # fmt: skip
    rows = [
        (row["query"], _text(row["query_text"]), row["key"], _text(row["key_text"]), f"{row['contribution']:+.3f}")
        for row in shown.contributions(top).to_dict("records")
    ]
    show_table(console, "By pairs", columns, rows)


def _text(text: str) -> str:
    return text and visible(text)


def _tokens(trace: "Trace") -> str:
    return " ".join(f"{pos}:{visible(text)}" for pos, text in enumerate(trace.token_strings))


def _sentence(trace: "Trace", reasons: "AttentionReasons", shown: "AttentionReasons") -> str:
    def at(pos: int) -> str:
        return f"{pos} ({visible(trace.token_strings[pos])})"

    found = (
        f"Head {reasons.layer}.{reasons.head} looks from {at(reasons.query)} to {at(reasons.key)}: score "
        f"{reasons.score:+.3f}, attention {reasons.pattern:.3f}"
    )
    if shown.other is None:
        return f"{found}."
    return f"{found}; {shown.score:+.3f} and {shown.pattern:+.3f} more than to {at(shown.other)}."
