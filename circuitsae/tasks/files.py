"""Pairs of prompts from a CSV or JSON file, and back.

Each row or object has `clean`, `corrupt` (or `corrupted`), `answers`, and if there are any `wrong` (or
`wrong_answers`), `template`, and roles. Answers are tokens, leading space included; several are a JSON list, or
separated by `|` in CSV. `roles` is a JSON object from a role to a word of the clean prompt ("John", or "John#2" for
its second occurrence); in CSV each role has a column `role:NAME`. Whole numbers under `correct_idx` and `incorrect_idx`
are token ids.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from circuitsae.tasks.base import Answer, Example
from circuitsae.tasks.filling import Span
from circuitsae.tasks.published import greater_than_example, ioi_example
from transcoders.errors import FileFormatError
from transcoders.files import write_file

_CORRUPT = ("corrupt", "corrupted")
_ANSWERS = ("answers", "answer", "correct_idx")
_WRONG = ("wrong", "wrong_answers", "incorrect_idx")
_IDS = ("correct_idx", "incorrect_idx")
_ROLE = "role:"


def read_examples(path: str | Path, *, corrupt: str | None = None) -> list[Example]:
    """The examples of a CSV or JSON file; `corrupt` names the field of the corrupt prompt where there are several.

    Raises `FileFormatError`, naming file and row, for what is not there, not of these forms, or lacks a field.
    """
    path = Path(path).expanduser()
    rows = _rows(path)
    return [_example(row, f"Row {number} of {path}", corrupt) for number, row in enumerate(rows, 1)]


def write_examples(path: str | Path, examples: Sequence[Example]) -> Path:
    """Write examples as JSON that `read_examples` reads back; spans of roles become numbered words."""
    document = [
        {
            "clean": example.clean,
            "corrupt": example.corrupt,
            "answers": list(example.answers),
            "wrong": list(example.wrong),
            "template": example.template,
            "roles": {role: _named(example.clean, span) for role, span in example.roles.items()},
            "boundary": list(example.boundary or ()),
            "facts": dict(example.facts),
        }
        for example in examples
    ]
    write_file(Path(path), json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    return Path(path)


def _rows(path: Path) -> list[Mapping[str, Any]]:
    if not path.is_file():
        raise FileFormatError(f"There is no task file at {path}; give a CSV or JSON file of prompt pairs.")
    if path.suffix.lower() not in (".csv", ".json"):
        raise FileFormatError(f"{path} is neither .csv nor .json; write the pairs in one of these forms.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    rows = _csv_rows(text, path) if path.suffix.lower() == ".csv" else _json_rows(text, path)
    if not rows:
        raise FileFormatError(f"{path} holds no examples; give at least one pair of prompts.")
    return rows


def _csv_rows(text: str, path: Path) -> list[Mapping[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise FileFormatError(
            f"{path} is not CSV (after line {reader.line_num}: {error}); check its quotes."
        ) from error
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise FileFormatError(
                f"Row {number} of {path} does not have the {len(reader.fieldnames or ())} fields of the header; "
                "put prompts with commas in double quotes."
            )
    return [{key: value for key, value in row.items() if value != ""} for row in rows]


def _json_rows(text: str, path: Path) -> list[Mapping[str, Any]]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise FileFormatError(
            f"{path} is not JSON (line {error.lineno}, column {error.colno}: {error.msg}); correct it there."
        ) from error
    if isinstance(document, dict):
        document = document.get("examples", document.get("prompts"))
    if not isinstance(document, list) or not all(isinstance(row, dict) for row in document):
        raise FileFormatError(
            f'{path} should be a JSON list of objects such as {{"clean": …, "corrupt": …, "answers": […]}}, '
            'or an object with that list under "examples".'
        )
    return document


def _example(row: Mapping[str, Any], where: str, corrupt: str | None) -> Example:
    clean = _text(row, ("clean",), where)
    other = _text(row, _CORRUPT if corrupt is None else (corrupt,), where)
    if clean == other:
        raise FileFormatError(
            f"{where}: the clean and the corrupt prompt are the same ({_shown(clean)}); one must differ."
        )
    if "correct_idx" in row and (known := _published(row, clean, other, where)):
        return known
    answers, wrong = _answers(row, _ANSWERS, where, needed=True), _answers(row, _WRONG, where)
    if both := set(answers) & set(wrong):
        raise FileFormatError(f"{where}: {_shown(both.pop())} is both an answer and a wrong answer; keep it in one.")
    boundary = _answers(row, ("boundary",), where)
    if len(boundary) not in (0, 2):
        raise FileFormatError(f"{where}: 'boundary' has {len(boundary)} answers; give those above and below.")
    return Example(
        clean=clean,
        corrupt=other,
        answers=answers,
        wrong=wrong,
        roles={role: _span(clean, word, role, where) for role, word in _roles(row, where)},
        template=str(row.get("template", "")),
        boundary=(boundary[0], boundary[1]) if boundary else None,
        facts={key: str(value) for key, value in _object(row, "facts", where).items()},
    )


def _published(row: Mapping[str, Any], clean: str, corrupt: str, where: str) -> Example | None:
    if "incorrect_idx" in row:
        return ioi_example(clean, corrupt)
    return greater_than_example(clean, corrupt, str(row["correct_idx"]), where)


def _text(row: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    name = next((name for name in names if name in row), None)
    if name is None:
        raise FileFormatError(f"{where} has no {names[0]!r}; its fields are: {_fields(row)}.")
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise FileFormatError(f"{where}: {name!r} is {_shown(value)}, not a prompt; write it as text.")
    return value


def _answers(row: Mapping[str, Any], names: Sequence[str], where: str, *, needed: bool = False) -> tuple[Answer, ...]:
    name = next((name for name in names if name in row), None)
    if name is None:
        if needed:
            fields = _fields(row)
            raise FileFormatError(f"{where} has no {names[0]!r}; its fields are: {fields}.")
        return ()
    value = row[name]
    parts = value.split("|") if isinstance(value, str) else value if isinstance(value, list) else [value]
    if name in _IDS:
        parts = [int(p) if isinstance(p, str) and p.strip().isdigit() else p for p in parts]
    good = all(type(part) is int or (isinstance(part, str) and part) for part in parts)
    if not good or (needed and not parts) or (name in _IDS and not all(type(part) is int for part in parts)):
        wanted = "token ids" if name in _IDS else "tokens, such as ' Mary' with its leading space"
        raise FileFormatError(f"{where}: {name!r} is {_shown(value)}; give {wanted}.")
    return tuple(parts)


def _roles(row: Mapping[str, Any], where: str) -> Iterator[tuple[str, object]]:
    yield from _object(row, "roles", where).items()
    yield from ((name.removeprefix(_ROLE), word) for name, word in row.items() if name.startswith(_ROLE))


def _object(row: Mapping[str, Any], name: str, where: str) -> dict[str, object]:
    value = row.get(name) or {}
    if not isinstance(value, dict):
        raise FileFormatError(f'{where}: {name!r} is {_shown(value)}; give a JSON object, such as {{"S1": "John#1"}}.')
    return value


def _span(clean: str, word: object, role: str, where: str) -> Span:
    text, _, nth = str(word).rpartition("#")
    if not (text and nth.isdigit()):
        text, nth = str(word), "1"
    found = list(re.finditer(re.escape(text), clean)) if isinstance(word, str) and word else []
    if not 1 <= int(nth) <= len(found):
        raise FileFormatError(
            f"{where}: role {_shown(role)} is {_shown(word)}, which is not in the clean prompt {_shown(clean)}."
        )
    return found[int(nth) - 1].span()


def _named(clean: str, span: Span) -> str:
    text = clean[slice(*span)]
    starts = [match.start() for match in re.finditer(re.escape(text), clean)]
    return f"{text}#{starts.index(span[0]) + 1}"


def _shown(value: Any) -> str:
    """A value inside an error message, not too long."""
    found = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return found if len(found) <= 200 else f"{found[:199]}…"


def _fields(row: Mapping[str, Any]) -> str:
    found = ", ".join(map(str, row)) or "none"
    return found if len(found) <= 200 else f"{found[:199]}…"
