"""`circuitsae features`: collect the cards of a dictionary's features, and browse them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    load_language_model,
    say,
    say_next,
)
from circuitsae.tables import Column, open_console, show_table
from transcoders.errors import InputError

if TYPE_CHECKING:
    from circuitsae.features.cards import FeatureCards

features = tyro.extras.SubcommandApp()
"""Feature cards and labels: what every feature of a dictionary fires on, and what it writes."""


@features.command
def collect(
    model: tyro.conf.Positional[str] = "pocket",
    /,
    *,
    dictionaries: str | None = None,
    corpus: str | None = None,
    part: CorpusPartOptions = CorpusPart(),
    separator: str | None = None,
    out: Path | None = None,
    tokens: int = 1_000_000,
    context: int | None = None,
    top: int = 10,
    strata: int = 4,
    per_stratum: int = 2,
    seed: int = 0,
    resume: bool = True,
    bos: Bos = None,
    device: str = "auto",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
    choices: ChoiceOptions = Choices(),
) -> None:
    """Collect feature cards of all layers in one pass over a corpus; a run that was killed goes on.

    Args:
        model: A hub name, a local Hugging Face folder, or "pocket".
        dictionaries: A folder of dictionaries; the pocket model has its own.
        corpus: A file or folder (.txt, .jsonl, .parquet), or a hub data set; the pocket model has its own.
        part: Which part of it.
        separator: What stands between documents; default, as in the corpus, or the model's end-of-text token.
        out: Folder for the cards; default cards/ in the dictionaries' folder, where every command looks for them.
        tokens: Tokens to read.
        context: Tokens of a row; default 128, and what it was trained with for the pocket model.
        top: Strongest examples of a feature.
        strata: Parts of the range of its activations to sample more examples from: 1, 2, 4, 8, 16 or 32.
        per_stratum: Examples of each part.
        seed: Of the samples.
        resume: Go on from where an earlier run was killed.
        bos: Begin each row with the beginning-of-text token; default, as in the dictionaries' training.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        weights: Which weights of the model.
        choices: Which of the dictionaries that the name offers.
    """
    from circuitsae.features.collection import CollectConfig, collect
    from circuitsae.loading import dictionaries_for, load_dictionaries
    from circuitsae.pocket.corpus import UNSEEN

    name = dictionaries_for(model, dictionaries)
    target = out or folder_of(name, "cards", "FOLDER") / "cards"
    asked = {"tokens": tokens, "top": top, "strata": strata, "per_stratum": per_stratum, "seed": seed}
    config = CollectConfig(context=context_for(model, context), **asked)
    source = corpus_for(model, corpus, UNSEEN, part)
    language_model = load_language_model(model, device, "float32", weights)
    loaded = load_dictionaries(name, device=language_model.device, **choices.wanted())
    how: dict[str, Any] = {"separator": separator, "bos": bos, "resume": resume, "progress": True}
    cards = collect(language_model, loaded, source, config, out=target, **how)
    console = open_console(wide)
    _show(console, cards)
    say(console, f"Cards: {target}")
    say_next(console, f"circuitsae features browse {target if out else name} --out features")


def folder_of(name: str, what: str, instead: str) -> Path:
    """The folder of dictionaries, to keep something beside them."""
    from circuitsae.pocket import dictionary_folder

    folder = dictionary_folder(name)
    if not folder.is_dir():
        raise InputError(f"{name!r} is no local folder to keep the {what} in; give --out {instead}.")
    return folder


def context_for(model: str, context: int | None) -> int:
    """Tokens of a row, such as suit the model."""
    from circuitsae.loading import POCKET
    from circuitsae.pocket.corpus import CONTEXT

    return context if context is not None else CONTEXT if model == POCKET else 128


@features.command
def browse(
    dictionary: tyro.conf.Positional[str] = "pocket", /, *, out: Path, labels: Path | None = None, wide: Wide = False
) -> None:
    """Write static pages of all features of a dictionary, with search and filters; needs no model.

    Args:
        dictionary: A dictionary with cards, its folder of cards, or "pocket", "pocket-plt", "pocket-sae".
        out: Folder for the pages.
        labels: A ledger of labels; default the one in the dictionary's folder, if there is one.
    """
    from circuitsae.features.cards import FeatureCards
    from circuitsae.features.ledger import Ledger, ledger_path
    from circuitsae.pocket import dictionary_folder
    from circuitsae.report.browser import write_browser

    folder = dictionary_folder(dictionary)
    own = ledger_path(folder)
    ledger = Ledger.load(labels) if labels is not None else Ledger.load(own) if own.is_file() else None
    cards = FeatureCards.load(folder, ledger=ledger)
    index = write_browser(cards, out)
    console = open_console(wide)
    _show(console, cards)
    say(console, f"Pages: {index.resolve()}")


def _show(console: Console, cards: "FeatureCards") -> None:
    """A table of the layers, and how many features fired."""
    from circuitsae.sentences import of_cards

    frame = cards.frame()
    rows = []
    for layer, members in frame.groupby("layer"):
        alive = members[~members.dead]
        median = f"{alive.firing_rate.median():.3%}" if len(alive) else ""
        labelled = (members.status != "").sum()
        rows.append((str(layer), f"{len(members):,}", f"{members.dead.sum():,}", median, f"{labelled:,}"))
    columns = [Column("layer"), Column("features"), Column("dead", 3), Column("median share of tokens", 2)]
    show_table(console, f"Features over {cards.tokens_seen:,} tokens", [*columns, Column("labelled", 1)], rows)
    say(console, of_cards(len(frame), int(frame.dead.sum()), int((frame.status != "").sum())))
