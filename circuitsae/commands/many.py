"""`circuitsae trace --prompts`: a folder of graphs, one for each prompt of a file; begun again, it goes on.

A prompt's folder holds its graph and `prompt.json`, what was asked and what came of it, moved in together: a kill
leaves both or neither. It is done where the record's key is that of the prompt, the settings and the weights. All
processes that torchrun started look at the folder before any of them writes, and then share what is missing.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitsae.commands.graph_folders import check_identities, slug, write_folder
from circuitsae.commands.shared import say, say_next, write_page
from circuitsae.commands.targets import TargetChoice
from circuitsae.tables import open_console
from transcoders.errors import CheckFailedError, CircuitsaeError, FileFormatError, InputError
from transcoders.files import claimed, new_files, remove_folder, settle, short_hash, write_file

if TYPE_CHECKING:
    from circuitsae.attribution import Asked, Attributed
    from circuitsae.attribution.expansion import FullSize
    from circuitsae.graph import AttributionGraph
    from circuitsae.replacement import ReplacementModel
    from transcoders.training.distributed import World

RECORD, LISTING = "prompt.json", "index.jsonl"
_NUMBERED = re.compile(r"(\d{4,})-.+")
_SAID = 5
"""Prompts that failed, as many as are printed."""


@dataclass(frozen=True)
class Kept:
    """What is asked of every prompt; `named` is the source that graphs name."""

    explained: TargetChoice
    settings: dict[str, Any]
    named: dict[str, Any]
    validate: int
    html: bool

    def key(self, model: "ReplacementModel") -> "Callable[[Asked], str]":
        """Tells whether a graph is of a prompt, these settings and these weights."""
        from circuitsae.attribution.attribute import weights_of_dictionaries

        weights = [model.model.fingerprint(), weights_of_dictionaries(model)]
        how = [repr(self.explained), self.settings, self.named, self.validate, str(model.model.dtype)]
        how.append(model.model.adds_bos)
        return lambda asked: short_hash([json.dumps([asked.prompt, asked.targets, weights, how])])


@dataclass(frozen=True)
class Place:
    """A prompt of the file, the folder for its graph, and the key by which it is known to be done."""

    number: int
    asked: "Asked"
    folder: Path
    key: str

    def record(self) -> dict[str, Any] | None:
        """What is recorded of this very prompt."""
        record = _record(self.folder)
        return record if record is not None and record.get("key") == self.key else None

    @property
    def done(self) -> bool:
        record = self.record()
        return record is not None and record.get("error") is None and (self.folder / "graph.json").is_file()


def read_asked(path: Path) -> "list[Asked]":
    """The prompts of a file: one a line, or, of .jsonl, objects with "prompt", and maybe "target(s)" and "id".

    Other entries of an object are passed over. Raises `InputError` for a file that is not there, and
    `FileFormatError` with the line that is none of that.
    """
    from circuitsae.attribution import Asked
    from circuitsae.validation.prompts import read_prompts

    if path.suffix.lower() == ".json":
        raise FileFormatError(f"{path} is one JSON document; give JSON lines (.jsonl), an object for each prompt.")
    lines = read_prompts(path)
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return [Asked(line) for line in lines]
    return [_asked(line, f"Prompt {number} of {path}") for number, line in enumerate(lines, 1)]


def trace_many(
    file: Path,
    out: Path | None,
    load: Callable[..., "ReplacementModel"],
    kept: Kept,
    device: str,
    overwrite: bool,
    wide: bool,
) -> None:
    """The command; raises `CheckFailedError` at the end where prompts failed."""
    from transcoders.training.distributed import device_of_rank, join, leave, rank_in_environment

    asked, folder = read_asked(file), out or Path("graphs") / slug(file.stem)
    first = rank_in_environment() == 0
    with claimed(folder) if first else nullcontext(True) as mine:
        if not mine:
            raise InputError(f"Another process writes to {folder}; wait for it, or give another --out.")
        model = load(device=device_of_rank(device))
        world = join(model.model.device)
        try:
            places = places_in(folder, asked, kept.key(model))
            strangers = in_the_way(folder, places, overwrite)
            for path in strangers if first else ():
                remove_folder(path)
            missing = [place for place in places if not place.done]
            world.wait()  # nobody writes before all have looked
            _trace(model, missing[world.rank :: world.size], kept, world)
            world.wait()
        finally:
            leave()
        if world.first:
            _finish(folder, places, kept, wide, begun=len(places) - len(missing))


def places_in(folder: Path, asked: "Sequence[Asked]", key: "Callable[[Asked], str]") -> list[Place]:
    """A place for each prompt, by its number."""
    return [
        Place(number, one, folder / f"{number:04d}-{slug(str(one.prompt))}", key(one))
        for number, one in enumerate(asked, 1)
    ]


def in_the_way(folder: Path, places: Sequence[Place], overwrite: bool) -> list[Path]:
    """Numbered folders below `folder` that hold nothing of these prompts, and will be removed.

    Raises `InputError` where one holds a graph, unless `overwrite`.
    """
    own, found = {place.folder: place for place in places}, []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not _NUMBERED.fullmatch(path.name) or not path.is_dir():
            continue
        settle(path)
        has_graph = (path / "graph.json").is_file()
        if (path in own and own[path].record() is not None) or not (has_graph or (path / RECORD).is_file()):
            continue
        if has_graph and not overwrite:
            raise InputError(
                f"{path} holds the graph of another prompt, or of other settings or weights; give another --out, or "
                "--overwrite to remove it."
            )
        found.append(path)
    return found


def _trace(model: "ReplacementModel", places: Sequence[Place], kept: Kept, world: "World") -> None:
    from circuitsae.attribution import attribute_many
    from transcoders.progress import progress_bar
    from transcoders.training.stopping import stop_requests

    asked, targets = (place.asked for place in places), kept.explained.chosen()
    found = attribute_many(model, asked, targets=targets, **kept.settings)
    what = "tracing" if world.size == 1 else f"tracing, rank {world.rank} of {world.size}"
    with stop_requests() as stop, progress_bar(shown=world.first) as bar, _said_once():
        task = bar.add_task(what, total=len(places))
        for done, (place, one) in enumerate(zip(places, found, strict=True), 1):
            _write(model, place, one, kept)
            bar.advance(task)
            if stop.number is not None and done < len(places):
                raise stop.stopped(f"Stopped after {done:,} of {len(places):,} prompts; the same command goes on.")


def _write(model: "ReplacementModel", place: Place, found: "Attributed", kept: Kept) -> None:
    graph, check, error = found.graph, None, found.error
    if graph is not None:
        shares = [kept.settings["nodes"], kept.settings["edges"]]
        graph = replace(graph, provenance={**graph.provenance, "source": kept.named, "pruned": shares})
        try:
            if kept.validate:
                from circuitsae.validation import validate

                check = validate(model, graph, edges=kept.validate)
                graph = check.annotate(graph)
                check_identities(check, str(model.model.dtype).removeprefix("torch."))
        except CircuitsaeError as wrong:
            graph, error = None, wrong
    record = {"key": place.key, "number": place.number, "id": place.asked.id, "prompt": place.asked.prompt}
    record |= {"targets": list(place.asked.targets or kept.explained.target), "folder": place.folder.name}
    if graph is None:
        with new_files(place.folder, without=["graph.json", "edges.npz", "validation.json", "graph.html"]) as temporary:
            (temporary / RECORD).write_text(json.dumps(record | {"error": str(error)}), encoding="utf-8")
        return
    assert found.full is not None
    content = json.dumps(record | _summary(graph, found.full) | {"error": None})
    write_folder(graph, check, place.folder, page=kept.html, more={RECORD: content.encode()})


def _summary(graph: "AttributionGraph", full: "FullSize") -> dict[str, Any]:
    from circuitsae.graph import NodeKind

    best = graph.top_logits()[0]
    return {
        "answer": best.text,
        "probability": best.probability,
        "scores": graph.scores.as_dict(),
        "tokens": len(graph.tokens),
        "features": int(graph.mask(NodeKind.FEATURE).sum()),
        "nodes": len(graph.nodes),
        "edges": int(graph.weights.nnz),
        "full": {"nodes": full.nodes, "edges": full.edges},
    }


def _finish(folder: Path, places: Sequence[Place], kept: Kept, wide: bool, begun: int) -> None:
    from circuitsae.report import write_index
    from circuitsae.report.index import MOST

    console, records = open_console(wide), [place.record() or {} for place in places]
    rows = [{name: value for name, value in record.items() if name != "key"} for record in records]
    write_file(folder / LISTING, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    failed = [row for row in rows if row.get("error", "") is not None]
    index = None
    if len(failed) < len(rows) <= MOST:
        index = write_index(folder, write_page=write_page if kept.html else None)
    before = f", {begun:,} of them before" if begun else ""
    say(console, f"Graphs: {folder} ({len(rows) - len(failed):,} of {len(rows):,} prompts{before})")
    say(console, f"Index:  {folder / LISTING}", *([f"HTML:   {index.resolve()}"] if index else []))
    if failed:
        first = "; ".join(f"{row.get('folder')}: {str(row.get('error')).rstrip('.')}" for row in failed[:_SAID])
        more = f" and {len(failed) - _SAID:,} more in {folder / LISTING}" if len(failed) > _SAID else ""
        raise CheckFailedError(f"{len(failed):,} of {len(rows):,} prompts have no graph ({first}{more}).")
    say_next(console, f"circuitsae show {folder}" + ("" if kept.html else "  # draws the page of each graph"))


def _asked(line: str, what: str) -> "Asked":
    from circuitsae.attribution import Asked

    expected = 'expected an object such as {"prompt": "The capital of", "target": " Paris", "id": "paris"}'
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{what} is no JSON ({line:.40}); {expected}.") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise FileFormatError(f"{what} has no prompt ({line:.40}); {expected}.")
    given, name = row.get("targets", row.get("target")), row.get("id")
    targets = tuple(given) if isinstance(given, list) else () if given is None else (given,)
    if not all(isinstance(one, str | int) and not isinstance(one, bool) for one in targets):
        raise FileFormatError(f"{what} has the target {given!r:.40}; give a token, its number, or a list of them.")
    return Asked(row["prompt"], targets, None if name is None else str(name))


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


@contextmanager
def _said_once() -> Iterator[None]:
    """A warning that holds for every prompt is printed for the first."""
    seen: set[tuple[str, Any]] = set()

    def first(record: logging.LogRecord) -> bool:
        known = (record.name, record.msg) in seen
        seen.add((record.name, record.msg))
        return not known

    handlers = list(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(first)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(first)
