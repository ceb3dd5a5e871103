"""`circuitsae reproduce`: a published circuit from behaviour to features, each claim with its verdict."""

import shlex
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console
from rich.text import Text

from circuitsae.commands.shared import (
    Bos,
    ChoiceOptions,
    Choices,
    Dtype,
    WeightOptions,
    Weights,
    Wide,
    load_language_model,
    say,
    told,
)
from circuitsae.tables import Column, open_console, show_table
from transcoders.errors import CheckFailedError, InputError

UNFINISHED = "unfinished"
"""In the folder of a report: the stages that are done, until all are."""
_COLOURS = {"not met": "red", "differs": "yellow", "met": "green", "agrees": "green"}

if TYPE_CHECKING:
    from circuitsae.reproduce import Reproduction, Settings
    from transcoders.dictionaries import DictionarySet


def reproduce(
    task: tyro.conf.Positional[Literal["ioi", "greater-than", "induction", "two-hop", "agreement", "all"]],
    /,
    *,
    model: str = "pocket",
    dictionaries: str | None = None,
    quick: bool = False,
    prompts: int | None = None,
    rescore: int | None = None,
    known: bool = False,
    out: Path | None = None,
    docs: Path | None = None,
    seed: int = 0,
    bos: Bos = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
    choices: ChoiceOptions = Choices(),
) -> None:
    """Reproduce a circuit: behaviour, heads and MLPs, features, published figures; exit code 1 if a bar fails.

    Writes report.html (offline), report.json, the circuits for `audit`, TASK-circuit.json (heads) and, with
    dictionaries, TASK-features.json and a graph per task, TASK.html; with matplotlib the circuit of heads by roles,
    TASK-circuit.svg. Ended, the same command goes on after the last whole stage.

    Args:
        task: ioi, greater-than, induction, two-hop, agreement, or all of them.
        model: A hub name, a local Hugging Face folder, or "pocket".
        dictionaries: A folder or hub name of transcoders; the pocket model has its own. Without any, features are left
            out.
        quick: Fewer prompts: minutes on two cores, for a model larger than pocket half an hour.
        prompts: At most this many prompts in any stage, and no search: for a large model on a small machine.
        rescore: Patch this many edges exactly; by default a tenth of all, or, with --quick and a large model, 200.
        known: Take only prompts that the model gets right, but where its behaviour is measured.
        out: Folder to write; default reports/MODEL-TASK.
        docs: Also write the report as Markdown to this file.
        seed: Seed of prompts and resamples.
        bos: Begin each prompt with the beginning-of-text token; default, as in the dictionaries' training.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        dtype: Precision of the model.
        weights: Which weights of the model.
        choices: Which of the dictionaries that the name offers.
    """
    from circuitsae.reproduce import TASKS, Settings
    from circuitsae.reproduce import reproduce as run
    from circuitsae.sentences import of_claims

    console = open_console(wide)
    settings = replace(Settings.quick(seed) if quick else Settings(seed=seed), rescore=rescore, known=known)
    if prompts is not None:
        settings = settings.capped(prompts)
    folder = out or Path("reports") / f"{Path(model).name}-{task}"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder for --out.")
    with told("loading") as progress:
        loaded = load_language_model(model, device, dtype, weights).with_bos(bos)
        if quick and (small := settings.quick_for(loaded, prompts)) != settings:
            settings = small
            say(console, f"{loaded.name} is large for --quick: {small.discovery} prompts in every stage and "
                f"{small.rescore} edges patched exactly; --prompts and --rescore take more.")  # fmt: skip
        own, audit_with = _dictionaries(model, dictionaries, str(loaded.device), choices)
        found = []
        for name in TASKS if task == "all" else (task,):
            how = {"settings": settings, "audit_with": audit_with, "progress": progress, "keep": folder / UNFINISHED}
            found.append(run(name, loaded, own, **how))
            show(console, found[-1])
    sizes = {"--prompts": prompts, "--rescore": rescore, "--seed": seed or None}
    flags = {"--quick": quick, "--known": known}
    command = _command(task, model, dictionaries, flags, bos, sizes, docs, weights, choices)
    _write(found, folder, docs, command)
    _write_circuits(found, folder, settings, dictionaries or ("pocket" if own is not None else ""))
    failed = [claim for report in found for claim in report.failed]
    barred = sum(bool(claim.bar) for report in found for claim in report.claims)
    say(console, of_claims(barred - len(failed), barred), f"Written: {folder / 'report.html'}")
    if failed:
        said = "; ".join(f"{c.task}: {c.name} {c.measured:.3f}, wanted {c.bar}" for c in failed)
        raise CheckFailedError(f"{len(failed)} claims do not meet their bar: {said}.")


def show(console: Console, report: "Reproduction") -> None:
    """The claims of one task as a table."""
    from circuitsae.reproduce.page import shown

    columns = [Column("claim", wraps=True), Column("measured"), Column("bar", 3, text=True), Column("published", 2)]
    columns += [Column("verdict", text=True), Column("note", 1, wraps=True)]
    rows = []
    for claim in report.claims:
        colour = _COLOURS.get(claim.verdict, "default")
        note = "; ".join(filter(None, (claim.source, claim.note)))
        verdict = Text(claim.verdict, style=colour)
        rows.append((claim.name, shown(claim.measured), claim.bar, shown(claim.published), verdict, note))
    title = f"{report.task} ({report.model}, {sum(report.seconds.values()):.0f} s)"
    show_table(console, title, columns, rows)


def _dictionaries(
    model: str, named: str | None, device: str, choices: Choices
) -> "tuple[DictionarySet | None, dict[str, DictionarySet]]":
    """The dictionaries of the feature stages, and those that the audit compares."""
    from circuitsae.loading import POCKET, load_dictionaries

    if model == POCKET and named is None:
        both = {name: load_dictionaries(name, device=device) for name in ("pocket", "pocket-plt")}
        return both["pocket"], {"CLT": both["pocket"], "PLT": both["pocket-plt"]}
    return (None if named is None else load_dictionaries(named, device=device, **choices.wanted())), {}


def _write(found: "list[Reproduction]", folder: Path, docs: Path | None, command: str) -> None:
    from circuitsae.report.beside import way_to, ways_from
    from circuitsae.reproduce.page import markdown, page
    from circuitsae.reproduce.result import write_json
    from transcoders.files import remove_folder, write_file

    folder.mkdir(parents=True, exist_ok=True)
    drawn = {f"graph of {report.task}": folder / f"{report.task}.html" for report in found if report.graph is not None}
    report_page = folder / "report.html"
    ways = [*ways_from(report_page), *(way_to(graph, report_page, text) for text, graph in drawn.items())]
    write_file(report_page, page(found, command, ways=ways))
    write_json(found, folder / "report.json")
    for report in found:
        if report.graph is not None:
            report.graph.write_html(folder / f"{report.task}.html", title=f"{report.task} — {report.model}")
        if report.picture is not None and find_spec("matplotlib") is not None:
            report.picture.save(folder / f"{report.task}-circuit.svg")
    if docs is not None:
        write_file(docs, markdown(found, command))
    if (folder / UNFINISHED).is_dir():
        remove_folder(folder / UNFINISHED)


def _write_circuits(found: "list[Reproduction]", folder: Path, settings: "Settings", dictionaries: str) -> None:
    """As `audit` reads them."""
    from circuitsae.audit.discovery import features_file, heads_file

    for report in found:
        if report.edges:
            made = heads_file(report.task, report.model, report.edges, settings)
            made.save(folder / f"{report.task}-circuit.json")
        if report.nodes is not None:
            made = features_file(report.task, report.model, report.nodes, settings, dictionaries)
            made.save(folder / f"{report.task}-features.json")


def _command(
    task: str,
    model: str,
    dictionaries: str | None,
    flags: dict[str, bool],
    bos: bool | None,
    sizes: dict[str, int | None],
    docs: Path | None,
    weights: Weights,
    choices: Choices,
) -> str:
    words = ["circuitsae", "reproduce", task]
    words += ["--model", model] if model != "pocket" else []
    words += ["--dictionaries", dictionaries] if dictionaries else []
    words += [flag for flag, given in flags.items() if given]
    words += [] if bos is None else ["--bos" if bos else "--no-bos"]
    words += [word for name, value in sizes.items() if value is not None for word in (name, str(value))]
    words += ["--docs", str(docs)] if docs else []
    words += [*choices.words(), *weights.words()]
    return shlex.join(words)
