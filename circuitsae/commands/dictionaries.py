"""`circuitsae dictionaries`: what a name offers, what a dictionary is, sets of several, and how they get to the hub."""

import json as json_
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from circuitsae.commands.shared import ChoiceOptions, Choices, Wide, layers_of, say, say_next
from circuitsae.tables import Column, open_console, show_table
from transcoders.errors import InputError

if TYPE_CHECKING:
    from transcoders.formats.offers import Offer

dictionaries = tyro.extras.SubcommandApp()
"""Dictionaries by name: what there is, what one is, and how it is published."""

Revision = Annotated[str | None, tyro.conf.DisallowNone]


@dictionaries.command(name="list")
def list_(
    name: tyro.conf.Positional[str],
    /,
    *,
    revision: Revision = None,
    most: int = 60,
    json: bool = False,
    wide: Wide = False,
    choices: ChoiceOptions = Choices(),
) -> None:
    """List what a folder or a repository offers: layers, sites, widths, L0s; downloads settings at most.

    Args:
        name: A folder or file, OWNER/NAME[@REVISION][/FOLDER] of the hub, or a release of SAELens.
        revision: Of a repository: a branch, a tag or a commit.
        most: Print at most this many; 0 for all.
        json: Print JSON instead of a table.
        choices: List these alone.
    """
    from circuitsae.loading import list_dictionaries
    from transcoders.formats.offers import Choice, fitting, summary_of

    if most < 0:
        raise InputError(f"--most {most} is no number of dictionaries; give 0 for all.")
    wanted = choices.wanted()
    choice = Choice.of(id=wanted.pop("sae_id"), **wanted)
    form, every = list_dictionaries(name, revision=revision)
    offers = fitting(every, choice, name)
    if (l0 := choices.l0) is not None:
        offers.sort(key=lambda offer: abs((offer.l0 or math.inf) - l0))
    console = open_console(wide)
    if json:
        rows = [offer.row() for offer in offers]
        console.print_json(json_.dumps({"name": name, "format": form, "dictionaries": rows}, ensure_ascii=False))
        return
    shown = offers[: most or None]
    _show_offers(console, f"{name}: {form}", shown)
    if len(shown) < len(offers):
        say(console, f"and {len(offers) - len(shown):,} more: --most 0 prints all, --layers, --site, --width … fewer.")
    say(console, f"{len(offers):,} of {len(every):,}: {summary_of(offers)}")
    say_next(console, shlex.join(["circuitsae", "dictionaries", "info", name, *_given(revision, choices)]))


@dictionaries.command
def info(
    name: tyro.conf.Positional[str],
    /,
    *,
    revision: Revision = None,
    json: bool = False,
    choices: ChoiceOptions = Choices(),
) -> None:
    """Load dictionaries and print what they are: kind, layers, sites, widths, activation, and of which model.

    Args:
        name: A folder or file, OWNER/NAME[@REVISION][/FOLDER] of the hub, or a release of SAELens.
        revision: Of a repository: a branch, a tag or a commit.
        json: Print JSON instead of a table.
        choices: Which of those that the name offers.
    """
    from circuitsae.loading import load_dictionaries
    from transcoders.formats.upload import described

    console = open_console()
    with Console(stderr=True).status("loading"):
        loaded = load_dictionaries(name, revision=revision, **choices.wanted())
    facts = described(loaded)
    if json:
        console.print_json(json_.dumps(facts, ensure_ascii=False))
        return
    rows = [(key, _shown(value)) for key, value in facts.items()]
    show_table(console, name, [Column("", text=True), Column("", wraps=True)], rows)
    if loaded.kind != "sae":
        model = "MODEL" if loaded.provenance.model in ("unknown", "random") else loaded.provenance.model
        say_next(console, f'circuitsae trace "Some prompt" --model {model} {_named(name, revision, choices)}')


@dictionaries.command
def mix(folder: tyro.conf.Positional[Path], layers: tyro.conf.Positional[tuple[str, ...]], /) -> None:
    """Put layers of several sets of one model into one: transcoders beside SAEs, other sites, other widths.

    Args:
        folder: The folder to write, in the native format.
        layers: Which layers of which dictionaries, as LAYERS=NAME such as 0-5,8=pocket-plt; several of them.
    """
    from circuitsae.loading import load_dictionaries
    from transcoders import mixed, save_dictionaries

    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"The folder {folder} is not empty; write to another.")
    of_layer: dict[int, str] = {}
    for text in layers:
        chosen, _, name = text.partition("=")
        if not name:
            raise InputError(f"Cannot read {text!r}; write LAYERS=NAME, such as 0-5,8=pocket-plt.")
        for layer in layers_of(chosen):
            if layer in of_layer:
                raise InputError(f"Layer {layer} is named twice, for {of_layer[layer]} and {name}; name it once.")
            of_layer[layer] = name
    console = open_console()
    with Console(stderr=True).status("loading"):
        names = dict.fromkeys(of_layer.values())
        sets = {name: load_dictionaries(name, layers=[i for i in of_layer if of_layer[i] == name]) for name in names}
        save_dictionaries(mixed({layer: sets[name] for layer, name in of_layer.items()}), folder)
    say(console, f"Dictionaries: {folder} (native)")
    say_next(console, f"circuitsae dictionaries info {folder}")


@dictionaries.command
def upload(
    folder: tyro.conf.Positional[Path], repository: tyro.conf.Positional[str], /, *, private: bool = False
) -> None:
    """Put a folder of dictionaries on the Hugging Face hub, with a card that says what they are.

    Args:
        folder: What `train` or `convert` wrote, or a folder in any format that is read.
        repository: OWNER/NAME; made where there is none. Log in with `hf auth login` first.
        private: Only you can see it.
    """
    from transcoders.formats import upload_dictionaries

    with Console(stderr=True).status("uploading"):
        address = upload_dictionaries(folder, repository, private=private)
    console = open_console()
    say(console, f"Uploaded: {address}")
    say_next(console, f"circuitsae dictionaries list {repository}")


def _given(revision: str | None, choices: Choices) -> list[str]:
    """The options that were given, as on the command line."""
    return ([] if revision is None else ["--revision", revision]) + choices.words()


def _named(name: str, revision: str | None, choices: Choices) -> str:
    """Dictionaries as commands with a model take them, where `--revision` is the model's."""
    whole = name if revision is None or f"@{revision}" in name else f"{name}@{revision}"
    return shlex.join(["--dictionaries", whole, *choices.words()])


def _show_offers(console: Console, title: str, offers: "list[Offer]") -> None:
    """A table of the columns that are known of any."""
    rows = [{**offer.row(), "id": offer.id or "one set"} for offer in offers]
    known = [key for key in rows[0] if any(row[key] not in (None, "") for row in rows)]
    text = {"site", "kind", "variant", "id"}
    columns = [
        Column(key, keep=0 if key in ("layer", "id") else len(known) - i, text=key in text)
        for i, key in enumerate(known)
    ]
    show_table(console, title, columns, [[_shown(row[key]) for key in known] for row in rows])


def _shown(value: Any) -> str:
    match value:
        case None | "":
            return ""
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:g}"
        case _:
            return str(value)
