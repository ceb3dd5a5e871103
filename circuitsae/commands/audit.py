"""`circuitsae audit`: what a circuit's evidence is worth, criterion by criterion, and what fails first."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console
from rich.text import Text

from circuitsae.commands.reproduce import UNFINISHED
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

if TYPE_CHECKING:
    from circuitsae.audit import Audit, Settings, Subject
    from circuitsae.audit.circuit_file import CircuitFile
    from circuitsae.audit.claim import Claim
    from circuitsae.audit.plan import Plan
    from circuitsae.replacement import ReplacementModel
    from transcoders.language_model import LanguageModel

_COLOURS = {"confirmed": "green", "partly": "cyan", "inconclusive": "yellow", "disconfirmed": "red"}


def audit(
    circuit: tyro.conf.Positional[str | None] = None,
    /,
    *,
    task: str | None = None,
    model: str = "pocket",
    dictionaries: str | None = None,
    kind: Literal["heads", "features"] = "heads",
    claim: Path | None = None,
    quick: bool = False,
    only: tuple[str, ...] = (),
    plan: bool = False,
    compare: tuple[str, str] | None = None,
    known: bool = False,
    out: Path | None = None,
    seed: int = 0,
    bos: Bos = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
    choices: ChoiceOptions = Choices(),
) -> None:
    """What a circuit's evidence is worth: each criterion measured against bars stated before; exit code 1 if one fails.

    Writes audit.html (offline), audit.json and, where the circuit was found here, circuit.json. Ended, the same command
    goes on after the last whole criterion.

    Args:
        circuit: A circuit file, as `reproduce` and `circuit` write it, the folder or file of a graph, or the name of a
            published circuit of GPT-2 small; without any, the circuit is found first, as `reproduce` finds it.
        task: ioi, greater-than or another task; default, the circuit's own.
        model: A hub name, a local Hugging Face folder, or "pocket".
        dictionaries: A folder or hub name, for features; default, those that the circuit names, or the pocket model's.
        kind: What circuit is found where none is given.
        claim: A file that says what is claimed, at which level, what would refute it and what it predicts.
        quick: Fewer prompts and circuits: minutes on two cores.
        only: Ask this criterion; may be repeated. Default: all.
        plan: Say what each criterion will cost, from a trial of a few prompts, and stop.
        compare: Two audits (audit.json, or their folders), or two circuits, which are audited first, side by side.
        known: Take only prompts that the model gets right.
        out: Folder to write; default reports/MODEL-TASK-audit.
        seed: Seed of prompts, random circuits and resamples.
        bos: Begin each prompt with the beginning-of-text token; default, as in the dictionaries' training.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        dtype: Precision of the model.
        weights: Which weights of the model.
        choices: Which of the dictionaries that the name offers.
    """
    from circuitsae.audit import Settings
    from circuitsae.audit.claim import Claim
    from circuitsae.audit.criteria import CRITERIA
    from circuitsae.audit.run import chosen_criteria
    from circuitsae.reproduce.result import is_large

    console = open_console(wide)
    if compare is not None and (circuit is not None or plan):
        raise InputError("--compare names both circuits or audits; leave out the other circuit, and --plan.")
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder for --out.")
    command = _command(locals())
    if compare is not None and (both := [one for path in compare if (one := _written(path)) is not None]):
        if len(both) < 2:
            raise InputError(f"Of {compare[0]} and {compare[1]} only one is an audit; give two audits or two circuits.")
        return _show_both(console, (both[0], both[1]), _names(compare), out or Path("reports"), command)
    if circuit is None and compare is None and task is None:
        raise InputError("Nothing is named to audit; give a circuit, or --task to find one.")
    keys = [key.replace("-", " ") for key in only]
    chosen_criteria(CRITERIA, keys)  # refused before anything long runs, as the claim file is
    claimed = None if claim is None else Claim.load(claim)
    own = _Given(task, model, dictionaries, kind, quick, seed, known, bos, choices, claimed)
    with told("loading") as progress:
        loaded = load_language_model(model, device, dtype, weights).with_bos(bos)
        settings = Settings.quick(seed, large=is_large(loaded)) if quick else Settings(seed=seed)
        folder = out or Path("reports") / f"{Path(model).name}-{Path(task or circuit or 'two').stem}-audit"
        asked = [circuit] if compare is None else list(compare)
        found: list[Audit] = []
        for name in asked:
            file, subject = own.subject(name, loaded, None if plan else folder / UNFINISHED, progress)
            if plan:
                from circuitsae.audit.plan import plan as planned

                return _show_plan(console, planned(subject, settings=settings, only=keys), subject, circuit is None)
            found.append(_audited(subject, settings, keys, folder / UNFINISHED, progress))
            if circuit is None and compare is None:
                file.save(folder / "circuit.json")
    if compare is not None:
        for one, side in zip(found, "ab", strict=True):
            _write(one, folder / side, command, None)
        return _show_both(console, (found[0], found[1]), _names(compare), folder, command, folder / UNFINISHED)
    show(console, found[0])
    _write(found[0], folder, command, folder / UNFINISHED)
    say(console, f"Written: {folder / 'audit.html'}")
    if failed := [finding for finding in found[0].findings if finding.status == "disconfirmed"]:
        said = "; ".join(f"{one.criterion}: {one.said}" for one in failed)
        raise CheckFailedError(f"{len(failed)} of {len(found[0].findings)} criteria are disconfirmed: {said}")
    return None


@dataclass(frozen=True)
class _Given:
    """What the command line says of a subject."""

    task: str | None
    model: str
    dictionaries: str | None
    kind: Literal["heads", "features"]
    quick: bool
    seed: int
    known: bool
    bos: bool | None
    choices: Choices
    claim: "Claim | None"

    def subject(
        self, circuit: str | None, loaded: "LanguageModel", keep: Path | None, tell: Any
    ) -> "tuple[CircuitFile, Subject]":
        """The circuit that was named, or the one that is found; without `keep`, a stand-in for it."""
        from circuitsae.audit.circuit_file import read_circuit
        from circuitsae.audit.discovery import find_circuit_file, find_sizes, stand_in, subject_of

        if circuit is None:
            assert self.task is not None
            task = self.task
            model, named = self.with_dictionaries(loaded, self.kind, self.dictionaries)
            if keep is None:
                file = stand_in(model, task, seed=self.seed)
            else:
                sizes = find_sizes(loaded, quick=self.quick, seed=self.seed, known=self.known)
                file = find_circuit_file(model, task, sizes, dictionaries=named, tell=tell, keep=keep)
        else:
            file = read_circuit(circuit, loaded, self.task or "", seed=self.seed)
            task = self.task or file.task
            if not task:
                raise InputError(f"{circuit} does not say of which task it is; give --task.")
            model, _ = self.with_dictionaries(loaded, file.kind, self.dictionaries or file.dictionaries)
        subject = subject_of(file, model, task, seed=self.seed, known=self.known)
        subject.claim = self.claim
        return file, subject

    def with_dictionaries(
        self, loaded: "LanguageModel", kind: str, named: str | None
    ) -> "tuple[LanguageModel | ReplacementModel, str]":
        """The model with the dictionaries that features take, or read as they were trained; and their name."""
        from circuitsae.loading import POCKET, dictionaries_for, load_dictionaries
        from circuitsae.replacement import ReplacementModel
        from transcoders.dictionaries.provenance import reading_as_trained

        if kind == "features" or named or self.model == POCKET:
            name = dictionaries_for(self.model, named or None)
            sets = load_dictionaries(name, device=loaded.device, **self.choices.wanted())
            if kind == "features":
                return ReplacementModel(loaded, sets, bos=self.bos), name
            return reading_as_trained(loaded, sets.provenance, self.bos), name
        return loaded, ""


def show(console: Console, found: "Audit") -> None:
    """What fails first, all criteria as a table, and the tier."""
    from circuitsae.audit.words import fails, in_all, reached

    say(console, fails(found))
    columns = [Column("family", 1, text=True), Column("criterion", text=True), Column("status", text=True)]
    columns += [Column("estimate"), Column("rule", 2, text=True), Column("what was found", 1, wraps=True)]
    rows = []
    for row, finding in zip(found.frame().to_dict("records"), found.findings, strict=True):
        status = Text(finding.status, style=_COLOURS.get(finding.status, "default"))
        estimate = "" if finding.estimate is None else str(finding.estimate)
        rows.append((row["family"], finding.criterion, status, estimate, row["rule"], finding.said))
    show_table(console, found.subject, columns, rows)
    say(console, in_all(found), reached(found))


def _audited(subject: "Subject", settings: "Settings", keys: list[str], keep: Path, progress: Any) -> "Audit":
    from circuitsae.audit import audit as run

    return run(subject, settings=settings, only=keys, progress=progress, keep=keep)


def _show_plan(console: Console, found: "Plan", subject: "Subject", stands_in: bool) -> None:
    rows = [(one.family, one.criterion, f"{one.runs:,}", _time(one.seconds)) for one in found.criteria]
    rows = [*rows, None, ("", "all", f"{found.runs:,}", _time(found.seconds))]
    columns = [Column("family", 1, text=True), Column("criterion", text=True), Column("prompts"), Column("time")]
    show_table(console, f"Planned: {subject.name}", columns, rows)
    say(console, f"{found.per_run:.3g} s a prompt in the trial; {found.memory / 2**30:.1f} GiB were held at most.",
        "What is searched by gradients, or run in other models, may take longer than the prompts say.")  # fmt: skip
    if stands_in:
        say(console, "The circuit is not found yet: one like it stood in, and the search for it comes on top.")


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else \
        f"{seconds / 3600:.1f} h"  # fmt: skip


def _show_both(
    console: Console, both: "tuple[Audit, Audit]", names: tuple[str, str], folder: Path, command: str,
    unfinished: Path | None = None,
) -> None:  # fmt: skip
    from circuitsae.audit.comparison import compare
    from circuitsae.audit.page import comparison_page
    from circuitsae.report.beside import ways_from
    from transcoders.files import remove_folder, write_file

    found = compare(*both, names=names)
    rows = []
    for row in found.rows:
        statuses = [
            Text(one.status, style=_COLOURS.get(one.status, "default")) if one else "" for one in (row.a, row.b)
        ]
        values = [str(one.estimate) if one and one.estimate else "" for one in (row.a, row.b)]
        difference = "" if row.difference is None else f"{row.difference:+.2f}"
        rows.append((row.criterion, statuses[0], statuses[1], *values, difference, row.apart))
    columns = [Column("criterion", text=True), *(Column(f"status {name}", text=True) for name in names)]
    columns += [*(Column(name, 1) for name in names), Column("difference"), Column("intervals", 1, text=True)]
    show_table(console, f"Two audits of {found.a.task}", columns, rows)
    page = folder / "comparison.html"
    write_file(page, comparison_page(found, command, ways=ways_from(page)))
    if unfinished is not None and unfinished.is_dir():
        remove_folder(unfinished)
    say(console, found.said, f"Written: {page}")


def _write(found: "Audit", folder: Path, command: str, unfinished: Path | None) -> None:
    from circuitsae.audit.page import page
    from circuitsae.report.beside import ways_from
    from transcoders.files import remove_folder, write_file

    file = folder / "audit.html"
    write_file(file, page(found, command, ways=ways_from(file)))
    found.save(folder / "audit.json")
    if unfinished is not None and unfinished.is_dir():
        remove_folder(unfinished)


def _written(path: str) -> "Audit | None":
    """The audit in a file or folder; None where it is something else."""
    from circuitsae.audit import Audit

    file = Path(path) / "audit.json" if Path(path).is_dir() else Path(path)
    try:
        is_audit = "findings" in json.loads(file.read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):  # no file of ours
        return None
    return Audit.load(file) if is_audit else None


def _names(paths: tuple[str, str]) -> tuple[str, str]:
    """What to call the two: their files, or folders where the files have one name."""
    first, second = (Path(path) for path in paths)
    if first.stem != second.stem:
        return first.stem, second.stem
    names = first.resolve().parent.name, second.resolve().parent.name
    return names if names[0] != names[1] else ("A", "B")


def _command(given: dict[str, Any]) -> str:
    """As it was typed, defaults left out."""
    words = ["circuitsae", "audit", *([given["circuit"]] if given["circuit"] else [])]
    named = ("task", "model", "dictionaries", "kind", "claim", "seed")
    usual = {"model": "pocket", "kind": "heads", "seed": 0}
    words += [word for name in named if (value := given[name]) not in (None, usual.get(name))
              for word in (f"--{name}", str(value))]  # fmt: skip
    words += [f"--{name}" for name in ("quick", "known") if given[name]]
    words += [word for key in given["only"] for word in ("--only", key)]
    words += ["--compare", *given["compare"]] if given["compare"] else []
    words += [] if given["bos"] is None else ["--bos" if given["bos"] else "--no-bos"]
    return shlex.join([*words, *given["choices"].words(), *given["weights"].words()])
