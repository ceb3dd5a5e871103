"""What a reader of a served page keeps in the graph's folder: labels of features, and what the page opens with.

    ledger.json   labels, as in any ledger; they stand before those of the dictionaries
    opened.json   pinned nodes, groups and notes

Files are written whole or not at all, and nothing outside the folder is read or written: not through a symbolic link
that leads out of it either.
"""

import json
from collections.abc import Collection, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from circuitsae.features.ledger import Label, Ledger, feature_id
from circuitsae.graph.checking import Limits, MalformedError, mapping, parse_json, read_bytes, sequence, shown, text
from transcoders.errors import FileFormatError, InputError, WriteError
from transcoders.files import write_file

FILES = OPENED, LEDGER = "opened.json", "ledger.json"
FORMAT = "circuitsae-opened/1"
LONGEST_LABEL, LONGEST_NAME, LONGEST_NOTE = 20_000, 80, 2_000
"""Characters; of names and notes as many as the page takes."""
MOST_GROUPS, MOST_NOTES, MOST_PINNED = 60, 200, 20_000
_LIMITS = Limits(file_bytes=2**24)


def own_labels(folder: Path) -> Ledger | None:
    """The graph's own labels, None where it has none. Raises `FileFormatError` for a file that is no ledger."""
    place = inside(folder, LEDGER)
    return Ledger.load(place) if place.is_file() else None


def save_label(folder: Path, feature: str, said: Any) -> Ledger:
    """Give a feature this label in the graph's own ledger, in the place of what a person called it; "" takes it away.

    Labels that others gave, and those with evidence, stay. Raises `InputError` for what is no text, or too long.
    """
    try:
        said, feature = _text(said, "a label", LONGEST_LABEL), feature_id(feature)
    except MalformedError as error:
        raise InputError(f"The label was not kept: {error}.") from error
    ledger = own_labels(folder) or Ledger()
    ledger.labels = [label for label in ledger.labels if not _is_by_hand(label, feature)]
    if said.strip():
        ledger.labels.insert(0, Label(said, (feature,)))
    ledger.save(inside(folder, LEDGER))
    return ledger


def with_own(own: Ledger | None, others: Ledger | None) -> Ledger | None:
    """The labels of both; a feature that the first names is not named by the second as well."""
    if own is None or others is None:
        return own or others
    named = {feature for label in own.labels for feature in label.features}
    rest = [label for label in others.labels if not set(label.features) <= named]
    return Ledger([*own.labels, *rest], others.provenance)


def save_opened(folder: Path, document: Any, ids: Sequence[str]) -> dict[str, Any]:
    """Keep what the page opens with: `pinned`, `groups` (each a name and ids of nodes), `note`, `notes` (by node).

    Returns it as it was kept. Raises `InputError` for anything else, and for nodes that the graph lacks.
    """
    try:
        kept = _checked(document, set(ids))
    except MalformedError as error:
        raise InputError(f"Pins, groups and notes were not kept: {error}; reload the page and try again.") from error
    content = json.dumps({"format": FORMAT, **kept}, ensure_ascii=False, indent=1)
    write_file(inside(folder, OPENED), content)
    return kept


def add_groups(folder: Path, groups: Sequence[tuple[str, Sequence[str]]], ids: Sequence[str]) -> int:
    """Keep groups, a name and ids of nodes, after those that are kept; how many there was room for.

    A node stays in the group that has it, and a group with fewer than two others is none. Raises `InputError` for nodes
    that the graph lacks, and what `opened_in` raises.
    """
    kept = opened_in(folder, ids) or {}
    own: list[list[str]] = [[name, *members] for name, members in kept.get("groups", {}).items()]
    before, taken = len(own), {node for _, *members in own for node in members}
    for name, members in groups:
        free = [node for node in members if node not in taken]
        if len(free) > 1 and len(own) < MOST_GROUPS:
            own.append([name, *free])
            taken.update(free)
    if len(own) > before:
        save_opened(folder, {**kept, "groups": own}, ids)
    return len(own) - before


def opened_in(folder: Path, ids: Sequence[str]) -> dict[str, Any] | None:
    """What a page of the graph opens with, as `write_html` takes it; None where nothing was kept.

    Nodes that the graph lacks are passed over. Raises `FileFormatError` for a file that is none of ours.
    """
    place = inside(folder, OPENED)
    if not place.is_file():
        return None
    try:
        read = parse_json(read_bytes(place, _LIMITS), _LIMITS)
        if read.get("format") != FORMAT:
            raise MalformedError(f"format {shown(read.get('format'))}, expected {FORMAT!r}")
        kept = _checked(read, None)
    except ValueError as error:
        raise FileFormatError(f"{place} holds no pins and groups of ours ({error}); remove it.") from error
    known = set(ids)
    groups = {name: [node for node in members if node in known] for name, *members in kept["groups"]}
    return {
        "pinned": [node for node in kept["pinned"] if node in known],
        "groups": {name: members for name, members in groups.items() if members},
        "note": kept["note"],
        "notes": {node: note for node, note in kept["notes"].items() if node in known},
    }


def inside(folder: Path, name: str) -> Path:
    """A file of the folder. Raises `WriteError` where a link leads out of it."""
    root = folder.resolve()
    place = root / name
    if place.resolve().parent != root:
        raise WriteError(f"{place} is a link that leads out of the graph's folder; remove it, and try again.")
    return place


def _is_by_hand(label: Label, feature: str) -> bool:
    return label.features == (feature,) and not label.rows and not label.source


def _checked(document: Any, known: set[str] | None) -> dict[str, Any]:
    """The same with plain lists and texts of bounded lengths. Raises `MalformedError`."""
    fields = mapping(document, "what the page keeps")
    pinned = _ids(fields.get("pinned", []), "pinned nodes", known)
    groups: dict[str, list[str]] = {}
    for row in _bounded(sequence(fields.get("groups", []), "groups"), MOST_GROUPS, "groups"):
        name, *members = sequence(row, "a group") or [""]
        groups[_free(_text(name, "the name of a group", LONGEST_NAME), groups)] = _ids(members, "a group", known)
    notes = mapping(fields.get("notes", {}), "notes")
    _bounded(_ids(list(notes), "notes", known), MOST_NOTES, "notes")
    return {
        "pinned": pinned,
        "groups": [[name, *members] for name, members in groups.items()],
        "note": _text(fields.get("note", ""), "the note", LONGEST_NOTE),
        "notes": {node: _text(note, "a note", LONGEST_NOTE) for node, note in notes.items()},
    }


def _free(name: str, taken: Collection[str]) -> str:
    """The name, or the first with a number that no other group has."""
    return next(one for one in chain([name], (f"{name} ({n})" for n in count(2))) if one not in taken)


def _ids(values: Any, what: str, known: set[str] | None) -> list[str]:
    found = [text(value, f"a node of {what}") for value in _bounded(sequence(values, what), MOST_PINNED, what)]
    if known is not None and (unknown := [node for node in found if node not in known]):
        raise MalformedError(f"{shown(unknown[0])}, of {what}, is no node of the graph")
    return list(dict.fromkeys(found))


def _bounded(values: list[Any], most: int, what: str) -> list[Any]:
    if len(values) > most:
        raise MalformedError(f"{len(values):,} {what} are more than the {most:,} that a page takes")
    return values


def _text(value: Any, what: str, most: int) -> str:
    written = text(value, what)
    if len(written) > most:
        raise MalformedError(f"{what} has {len(written):,} characters; expected {most:,} at most")
    return written
