"""`circuitsae features explain` and `import-labels`: labels by a language model, and those that others published."""

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from circuitsae.commands.features import context_for
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
    layers_of,
    load_language_model,
    say,
    say_next,
)
from circuitsae.tables import Column, open_console, show_table
from transcoders.errors import InputError

if TYPE_CHECKING:
    from circuitsae.features.labels.explainers import Explainer
    from circuitsae.features.ledger import Label

TestName = Literal["detection", "fuzzing"]


def explain(
    model: tyro.conf.Positional[str] = "pocket",
    /,
    *,
    by: Annotated[str, tyro.conf.arg(name="with")],
    name: Annotated[str | None, tyro.conf.DisallowNone] = None,
    dictionaries: str | None = None,
    corpus: str | None = None,
    part: CorpusPartOptions = CorpusPart(),
    separator: str | None = None,
    features: tuple[str, ...] = (),
    only_layers: Annotated[str | None, tyro.conf.DisallowNone] = None,
    most: int = 100,
    tests: tuple[TestName, ...] = (),
    texts: int = 10,
    tokens: int = 100_000,
    context: int | None = None,
    plan: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    price: Annotated[tuple[float, float] | None, tyro.conf.DisallowNone] = None,
    key: str = "OPENAI_API_KEY",
    at_once: int = 8,
    timeout: float = 120.0,
    answers: Path | None = None,
    out: Path | None = None,
    seed: int = 0,
    bos: Bos = None,
    device: str = "auto",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
    choices: ChoiceOptions = Choices(),
) -> None:
    """Label features with a language model, which then judges the labels on held-out text; the ledger keeps both.

    A label is made from a feature's card (`features collect`). Detection: which held-out texts does it fire in?
    Fuzzing: are the marked tokens those it fires on? Ended, the same command goes on: answers are kept as they come.

    Args:
        model: A hub name, a local Hugging Face folder, or "pocket".
        by: Who explains: the address of an OpenAI-compatible service (https://api.openai.com/v1,
            http://localhost:11434/v1), or a hub name or folder of a chat model that runs here.
        name: Of an address: the model's name there, such as gpt-4o-mini.
        dictionaries: A folder of dictionaries with cards; the pocket model has its own.
        corpus: A file or folder (.txt, .jsonl, .parquet), or a hub data set, whose held-out documents are judged on;
            the pocket model has its own.
        part: Which part of it.
        separator: What stands between documents; default, as in the corpus, or the model's end-of-text token.
        features: Which features, such as 2.311; repeat it for several. Default a random sample of those that fire.
        only_layers: Sample from these layers only, such as 12 or 0-5,8.
        most: Sample at most this many features.
        tests: Which tests to judge by; repeat it for both. Default both.
        texts: Held-out texts that a feature fires in, and as many that it does not, for each of the tests.
        tokens: Held-out tokens to look for them in.
        context: Tokens of a row; default 128, and what it was trained with for the pocket model.
        plan: Ask nothing; print how many calls and tokens it would take, and at --price how much to pay.
        price: Of the service: for a million tokens in, and for a million out.
        key: The environment variable that holds the key of the address.
        at_once: Questions that an address is asked at the same time.
        timeout: Seconds to wait for one answer.
        answers: Where answers are kept; default answers.jsonl in the ledger's folder.
        out: The ledger; default ledger.json in the dictionaries' folder, where every command looks for it. Labels of
            other sources in it stay.
        seed: Of the samples.
        bos: Begin each row with the beginning-of-text token; default, as in the dictionaries' training.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        weights: Which weights of the model.
        choices: Which of the dictionaries that the name offers.
    """
    from circuitsae.features.cards import FeatureCards
    from circuitsae.features.labels.answers import FILE, Answers
    from circuitsae.features.labels.explain import TESTS, choose_features
    from circuitsae.features.labels.explain import explain as run
    from circuitsae.features.labels.explain import plan as planned
    from circuitsae.features.labels.held_out import held_out_texts
    from circuitsae.features.ledger import ledger_path
    from circuitsae.loading import dictionaries_for, load_dictionaries
    from circuitsae.pocket.corpus import UNSEEN

    if most < 1 or texts < 1:
        raise InputError(f"--most {most} and --texts {texts} must be 1 or more.")
    console, named = open_console(wide), dictionaries_for(model, dictionaries)
    folder = _local_folder(named)
    ledger = ledger_path(out or folder)
    cards = FeatureCards.load(folder)
    places = [layer_and_number(one, f"--features {one!r} is no feature; write it like 2.311.") for one in features]
    layers = None if only_layers is None else layers_of(only_layers)
    chosen = choose_features(cards, places, most=most, layers=layers, seed=seed)
    source = corpus_for(model, corpus, UNSEEN, part)
    asked = Answers(_explainer(by, name, key, at_once, timeout, device), answers or ledger.parent / FILE)
    context = context_for(model, context)
    language_model = load_language_model(model, device, "float32", weights)
    loaded = load_dictionaries(named, device=language_model.device, **choices.wanted())
    cards.check_fits(loaded)
    found = held_out_texts(
        language_model, loaded, source, chosen, tokens=tokens, context=context, separator=separator, bos=bos,
        progress=True,
    )  # fmt: skip
    how: dict[str, Any] = {"tests": tests or TESTS, "seed": seed}
    held_out = partial(found.excerpts, n=texts, seed=seed)
    cost = planned(asked, cards, chosen, held_out, **how)
    say(console, f"To ask of {asked.name} for {len(chosen):,} features: {cost.words(price, about=True)}")
    if plan:
        return
    words = ["circuitsae", "features", "explain", model, "--with", by, *(["--name", name] if name else [])]
    command = shlex.join(words)
    made = run(asked, cards, chosen, held_out, command=command, progress=True, **how)
    _save(made.added_to, ledger)
    _show(console, list(made.labels.values()))
    if made.unread:
        said = f"No label for {len(made.unread):,} features, for the answers could not be read"
        say(console, f"{said}: {_ids(made.unread)}")
    say(console, f"Asked: {made.cost.words(price)}", f"Ledger: {ledger}", f"Answers: {asked.path}")
    _say_browse(console, named, ledger if out else None)


def import_labels(
    file: tyro.conf.Positional[Path],
    /,
    *,
    dictionaries: str,
    source: Annotated[str | None, tyro.conf.DisallowNone] = None,
    of: Annotated[str | None, tyro.conf.arg(name="set"), tyro.conf.DisallowNone] = None,
    out: Path | None = None,
    wide: Wide = False,
) -> None:
    """Read labels that others published into a ledger: Neuronpedia's exports, circuit-tracer's feature files, graphs.

    Args:
        file: A file of Neuronpedia's explanations (.json, .jsonl, .jsonl.gz), a folder of such, a feature file or a
            folder of feature files of circuit-tracer, or the JSON of a graph whose nodes are labelled.
        dictionaries: The folder of the dictionaries that the labels are of.
        source: Who says so; default, what the file says.
        of: Of an export of several dictionaries, those of this name only, such as res-jb or 6-res-jb.
        out: The ledger; default ledger.json in the dictionaries' folder. Labels of other sources in it stay.
        wide: Keep every column of the tables, however narrow the terminal is.
    """
    from circuitsae.features.labels.published import add_labels, read_labels
    from circuitsae.features.ledger import ledger_path

    console, folder = open_console(wide), _local_folder(dictionaries)
    ledger = ledger_path(out or folder)
    found = read_labels(file, source=source, of=of)
    _require_fit(found.labels, folder)
    _save(partial(add_labels, found), ledger)
    _show(console, found.labels)
    say(console, f"Ledger: {ledger}")
    _say_browse(console, dictionaries, ledger if out else None)


def _say_browse(console: Console, dictionaries: str, ledger: Path | None) -> None:
    say_next(
        console, f"circuitsae features browse {dictionaries} --out features" + (f" --labels {ledger}" * bool(ledger))
    )


def _local_folder(name: str) -> Path:
    from circuitsae.pocket import dictionary_folder

    folder = dictionary_folder(name)
    if not folder.is_dir():
        raise InputError(f"{name!r} is no local folder; labels are kept beside dictionaries, so download them first.")
    return folder


def _require_fit(labels: "Sequence[Label]", folder: Path) -> None:
    """Raises `InputError` for labels of features that the dictionaries do not have, as far as their cards tell."""
    from circuitsae.features.cards import FeatureCards

    cards = FeatureCards.load(folder) if FeatureCards.beside(folder) else None
    for name in (label.features[0] for label in labels):
        layer, feature = map(int, name.split("."))
        if cards is not None and (layer, feature) not in cards:
            sizes = f"{len(cards.widths)} layers of {max(cards.widths):,} features"
            raise InputError(
                f"The file labels feature {name}, which these dictionaries do not have ({sizes}); give those that the "
                "labels are of."
            )


def _explainer(by: str, name: str | None, key: str, at_once: int, timeout: float, device: str) -> "Explainer":
    from circuitsae.features.labels.explainers import Address, Local

    if "://" in by:
        return Address.with_key_of(key, by, name or "", at_once=at_once, timeout=timeout)
    if name is not None:
        raise InputError(f"--name is of a model behind an address; {by!r} is none, and has its own name.")
    return Local(by, device=device)


def _save(added: Any, path: Path) -> None:
    """The ledger that is there, if any, with what is new."""
    from circuitsae.features.ledger import Ledger

    added(Ledger.load(path) if path.is_file() else Ledger()).save(path)


def _show(console: Console, labels: "Sequence[Label]") -> None:
    """How many labels each layer got, and how they did."""
    from circuitsae.features.ledger import FITS

    by_layer: dict[str, list[Label]] = {}
    for label in labels:
        by_layer.setdefault(label.features[0].partition(".")[0], []).append(label)
    rows = []
    for layer, own in sorted(by_layer.items(), key=lambda pair: (len(pair[0]), pair[0])):
        rows.append((layer, f"{len(own):,}", *(_share(own, test, FITS) for test in ("detection", "fuzzing"))))
    columns = [Column("layer"), Column("labels"), Column(f"detection ≥ {FITS:g}", 2), Column(f"fuzzing ≥ {FITS:g}", 1)]
    show_table(console, "Labels", columns, rows)


def _share(labels: "Sequence[Label]", test: Any, least: float) -> str:
    """Of the labels whose score was measured, or is stated by whoever published them, how many reach `least`."""
    rows = [label.rows[test].measurement for label in labels if test in label.rows]
    scores = [row.get("balanced_accuracy", row.get("stated")) for row in rows]
    known = [score for score in scores if isinstance(score, float)]
    return f"{sum(score >= least for score in known)} of {len(known)}" if known else "–"


def _ids(places: Sequence[tuple[int, int]]) -> str:
    shown = ", ".join(f"{layer}.{feature}" for layer, feature in places[:5])
    return shown + (f" and {len(places) - 5:,} more" if len(places) > 5 else "")
