"""`circuitsae connections`: what a feature is connected with, whatever the prompt."""

from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

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
    layer_and_number,
    load_replacement,
    say,
)
from circuitsae.tables import Column, open_console, show_table

if TYPE_CHECKING:
    import pandas as pd


def connections(
    feature: tyro.conf.Positional[str],
    /,
    *,
    model: str = "pocket",
    dictionaries: Annotated[str | None, tyro.conf.DisallowNone] = None,
    corpus: Annotated[str | None, tyro.conf.DisallowNone] = None,
    part: CorpusPartOptions = CorpusPart(),
    separator: Annotated[str | None, tyro.conf.DisallowNone] = None,
    tokens: int = 20_000,
    context: Annotated[int | None, tyro.conf.DisallowNone] = None,
    top: int = 10,
    by: Literal["twera", "era", "weight"] = "twera",
    bos: Bos = None,
    device: str = "auto",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
    choices: ChoiceOptions = Choices(),
) -> None:
    """Show which features add most to a feature over a corpus, and to which it adds most (global weights).

    The weight is that of the residual stream, decoder times encoder with the norm's weights between; era and twera are
    what it carries where both features are active, at the same position.

    Args:
        feature: Its layer and number, such as 2.311.
        model: A hub name, a local Hugging Face folder, or "pocket".
        dictionaries: A folder of transcoders or a published set; the pocket model has its own.
        corpus: A file or folder (.txt, .jsonl, .parquet), or a hub data set; the pocket model has its own.
        part: Which part of it.
        separator: What stands between documents; default, as in the corpus, or the model's end-of-text token.
        tokens: Tokens to read.
        context: Tokens of a row; default 128, and what it was trained with for the pocket model.
        top: Rows of each table.
        by: Largest first: twera (expected, weighted by how active the target is), era (expected), or weight.
        bos: Begin each row with the beginning-of-text token; default, as in the dictionaries' training.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        weights: Which weights of the model.
        choices: Which of the dictionaries that the name offers.
    """
    place = layer_and_number(
        feature, f"{feature!r} names no feature; write it like 2.311, its layer and its number there."
    )
    from circuitsae.features import Connections
    from circuitsae.features.coactivation import CONTEXT
    from circuitsae.loading import POCKET
    from circuitsae.pocket import corpus as pocket

    source = corpus_for(model, corpus, pocket.UNSEEN, part)
    replacement = load_replacement(model, dictionaries, device, "float32", bos, weights, choices)
    if context is None:
        context = pocket.CONTEXT if model == POCKET else CONTEXT
    found = Connections.collect(
        replacement, source, [place], tokens=tokens, context=context, separator=separator, progress=True
    )
    console, name = open_console(wide), f"{place[0]}.{place[1]}"
    _show(console, f"Inputs of {name}", found.top_inputs(place, top, by=by))
    _show(console, f"Outputs of {name}", found.top_outputs(place, top, by=by))
    say(console, f"{name} is active on {found.over.count[found.over.columns[0]]:,} of {found.over.tokens:,} tokens.")
    if len(largest := found.top_inputs(place, top, by="weight")):
        say(
            console,
            f"{sum(largest['never_together'])} of the {len(largest)} largest weights into it are interference, from "
            "features that are never active together with it.",
        )


def _show(console: Console, title: str, frame: "pd.DataFrame") -> None:
    columns = [Column("feature"), Column("weight", 3), Column("TWERA"), Column("ERA", 1), Column("active together", 2)]
    rows = [
        (row["feature"], f"{row['weight']:+.3f}", f"{row['twera']:+.4f}", f"{row['era']:+.2e}",
         "never" if row["never_together"] else f"{row['together']:.1%}")
        for row in frame.to_dict("records")
    ]  # fmt: skip
    show_table(console, title, columns, rows)
