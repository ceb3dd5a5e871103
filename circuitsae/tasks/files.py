"""Pairs of prompts from files, ours and those of others, and back."""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from circuitsae.tasks.greater_than import FIRST, LAST, YEARS
from circuitsae.tasks.task import Answer, Example
from circuitsae.tasks.wording import Span
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


_PAIR = re.compile(r"\b([A-Z]\w+) and ([A-Z]\w+)\b")
# Without its names, its years and what follows an article, a prompt is its template.
_NOUN = re.compile(r"(?:(?<=[Tt]he )(?!year\b)|(?<= a )|(?<= an ))\w+")
_YEARS = re.compile(r"\b(\d\d)(\d\d)\b.* (\d\d)$")


def ioi_example(clean: str, corrupt: str) -> Example | None:
    """The example of an IOI prompt, found by its names ("A and B …, A …"); None for a text of another form."""
    pair = _PAIR.search(clean)
    if pair is None:
        return None
    again = re.compile(rf"\b(?:{pair[1]}|{pair[2]})\b").search(clean, pair.end())
    if again is None:
        return None
    abba = again[0] == pair[2]
    io, s1 = (pair.span(1), pair.span(2)) if abba else (pair.span(2), pair.span(1))
    indirect, subject = clean[slice(*io)], clean[slice(*s1)]
    template = _NOUN.sub("_", re.sub(rf"\b(?:{indirect}|{subject})\b", "_", clean))
    return Example(
        clean=clean,
        corrupt=corrupt,
        answers=(" " + indirect,),
        wrong=(" " + subject,),
        roles={"IO": io, "S1": s1, "S1+1": (s1[1], s1[1] + 1), "S2": again.span()},
        template=f"{template} {'ABBA' if abba else 'BABA'}",
    )


def greater_than_example(clean: str, corrupt: str, year: str, where: str) -> Example | None:
    """The example of a greater-than prompt; None for a text of another form.

    Raises `FileFormatError` where `year` is not the one in the prompt.
    """
    match = _YEARS.search(clean)
    if match is None or match[1] != match[3] or not FIRST <= int(match[2]) <= LAST:
        return None
    start = int(match[2])
    if year.strip() not in (str(start), match[2]):
        raise FileFormatError(f"{where}: correct_idx is {year!r}, but the prompt {clean!r} starts in {match[2]}.")
    begin = match.start(1)
    return Example(
        clean=clean,
        corrupt=corrupt,
        answers=YEARS[start + 1 :],
        wrong=YEARS[: start + 1],
        roles={"XX1": (begin, begin + 2), "YY": (begin + 2, begin + 4)},
        template=_NOUN.sub("_", re.sub(r"\d+", "_", clean)),
        boundary=(YEARS[start + 1], YEARS[start - 1]),
    )


def is_template_list(document: object) -> bool:
    """Whether a JSON document is a list of IOI templates."""
    return isinstance(document, list) and bool(document) and all(isinstance(t, str) and "{" in t for t in document)


def ioi_word_lists(path: Path) -> Mapping[str, list[str]]:
    """Templates, names, places and objects from a file `…templates.json` and its neighbours `…names.json` and so on.

    Raises `FileFormatError` for a neighbour that is no list of words; one that is absent is left out.
    """
    lists: dict[str, list[str]] = {}
    for kind in ("templates", "names", "places", "objects"):
        file = path.with_name(path.name.replace("templates", kind))
        if kind != "templates" and (file == path or not file.is_file()):
            continue
        try:
            words = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise FileFormatError(f"{file} is not JSON ({error}); it should be a list of {kind}.") from error
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise FileFormatError(f"{file} should be a JSON list of {kind}, each a string.")
        lists[kind] = words
    return lists
