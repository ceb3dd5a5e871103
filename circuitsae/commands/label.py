"""`circuitsae features label`: labels for all features, by rules."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from circuitsae.commands.features import context_for, folder_of
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
    say,
)
from circuitsae.tables import Column, open_console, show_table

if TYPE_CHECKING:
    from circuitsae.features.ledger import Ledger


def label(
    model: tyro.conf.Positional[str] = "pocket",
    /,
    *,
    dictionaries: Annotated[str | None, tyro.conf.DisallowNone] = None,
    corpus: Annotated[str | None, tyro.conf.DisallowNone] = None,
    part: CorpusPartOptions = CorpusPart(),
    separator: Annotated[str | None, tyro.conf.DisallowNone] = None,
    out: Annotated[Path | None, tyro.conf.DisallowNone] = None,
    tokens: int = 100_000,
    held_out: int = 50_000,
    context: Annotated[int | None, tyro.conf.DisallowNone] = None,
    bos: Bos = None,
    device: str = "auto",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
    choices: ChoiceOptions = Choices(),
) -> None:
    """Label all features by rules on the text around a token, each scored on text that it was not chosen on.

    A rule is a label where it tells with a balanced accuracy of .7 or more, token by token, whether the feature fires.
    Labels in the ledger that people or language models made are kept.

    Args:
        model: A hub name, a local Hugging Face folder, or "pocket".
        dictionaries: A folder of dictionaries; the pocket model has its own.
        corpus: A file or folder (.txt, .jsonl, .parquet), or a hub data set; the pocket model has its own.
        part: Which part of it.
        separator: What stands between documents; default, as in the corpus, or the model's end-of-text token.
        out: The ledger, or a folder for ledger.json; default the dictionaries' folder, where every command looks.
        tokens: Tokens to search rules on.
        held_out: Tokens to score them on, of every twentieth document, which are not searched or trained on.
        context: Tokens of a row; default 128, and what it was trained with for the pocket model.
        bos: Begin each row with the beginning-of-text token; default, as in the dictionaries' training.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        weights: Which weights of the model.
        choices: Which of the dictionaries that the name offers.
    """
    from circuitsae.features.labels.label import LabelConfig, label_features, replace_rules
    from circuitsae.features.ledger import Ledger, ledger_path
    from circuitsae.loading import dictionaries_for, load_dictionaries
    from circuitsae.pocket.corpus import UNSEEN

    name = dictionaries_for(model, dictionaries)
    path = ledger_path(out or folder_of(name, "ledger", "LEDGER"))
    old = Ledger.load(path) if path.is_file() else Ledger()
    config = LabelConfig(tokens=tokens, held_out=held_out, context=context_for(model, context))
    source = corpus_for(model, corpus, UNSEEN, part)
    language_model = load_language_model(model, device, "float32", weights)
    loaded = load_dictionaries(name, device=language_model.device, **choices.wanted())
    options = {"--dictionaries": dictionaries, "--corpus": corpus, "--tokens": tokens, "--held-out": held_out}
    stated = [f"{option} {value}" for option, value in options.items() if value is not None]
    how: dict[str, Any] = {"separator": separator, "bos": bos, "progress": True}
    command = " ".join(["circuitsae features label", model, *stated])
    ledger = replace_rules(old, label_features(language_model, loaded, source, config, command=command, **how))
    ledger.save(path)
    console = open_console(wide)
    _show(console, ledger)
    say(console, f"Ledger: {path}")


def _show(console: Console, ledger: "Ledger") -> None:
    """A table of the layers."""
    from circuitsae.features.labels.label import share_labelled

    rows = []
    for layer, counts in enumerate(layers := ledger.provenance["layers"]):
        share, median = share_labelled([counts]), counts["median"]
        numbers = (f"{counts[key]:,}" for key in ("features", "firing", "too_rare", "labelled"))
        rows.append(
            (str(layer), *numbers, "" if share is None else f"{share:.1%}", "" if median is None else f"{median:.2f}")
        )
    columns = [
        Column("layer"), Column("features"), Column("fire", 2), Column("too rarely", 3), Column("labelled"),
        Column("share"), Column("median score", 1),
    ]  # fmt: skip
    held_out = ledger.provenance["held_out"]
    show_table(console, f"Labels by rules, scored on {held_out:,} held-out tokens", columns, rows)
    share = share_labelled(layers)
    found = "No feature fires often enough to be scored." if share is None else (
        f"A rule tells where {share:.1%} of the features that fire fire, with a balanced accuracy of .7 or more."
    )  # fmt: skip
    say(console, found)
