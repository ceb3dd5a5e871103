"""Task files as others published them, read into examples that any tokenizer can take.

The CSV files of EAP-IG (Hanna et al. 2024) hold token ids of GPT-2, or a year, under `correct_idx`; answers are read
from the prompts instead. MIB (Mueller et al. 2025) gives IOI as JSON lists of templates, names, places and objects.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from circuitsae.tasks.base import Example
from circuitsae.tasks.greater_than import FIRST, LAST, YEARS
from transcoders.errors import FileFormatError

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
