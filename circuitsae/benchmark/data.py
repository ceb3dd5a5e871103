"""What the tasks are about: labelled texts, words of classes, and facts; from files, and halved for tests."""

import csv
import io
import json
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from transcoders.errors import FileFormatError, InputError

FEWEST = 4
"""Examples that a label needs, half of which are held out."""


@dataclass(frozen=True)
class Labelled:
    """Texts, a label of each, and a second one, such as what somebody is and who."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    others: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path | str) -> "Labelled":
        """From a CSV or JSONL file with the fields `text`, `label` and, if wanted, `second`."""
        path = Path(path)
        records = read_records(path, ("text", "label"))
        second = tuple(record["second"] for record in records) if all("second" in r for r in records) else ()
        return cls(path.stem, tuple(r["text"] for r in records), tuple(r["label"] for r in records), second)


@dataclass(frozen=True)
class Words:
    """Words with a class each, in a place of their own in a text."""

    name: str
    words: tuple[str, ...]
    labels: tuple[str, ...]
    template: str = "The {word}"

    @classmethod
    def read(cls, path: Path | str) -> "Words":
        """From a CSV or JSONL file with the fields `word` and `label`."""
        path = Path(path)
        records = read_records(path, ("word", "label"))
        return cls(path.stem, tuple(r["word"] for r in records), tuple(r["label"] for r in records))


@dataclass(frozen=True)
class Fact:
    """A prompt about an entity, which it names once or last of all, and what follows for one of its attributes."""

    entity: str
    attribute: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Facts:
    """Facts of entities of one type."""

    name: str
    facts: tuple[Fact, ...]

    @classmethod
    def read(cls, path: Path | str) -> "Facts":
        """From a CSV or JSONL file with the fields `entity`, `attribute`, `prompt` and `answer`."""
        path = Path(path)
        fields = ("entity", "attribute", "prompt", "answer")
        facts = [Fact(**{field: record[field] for field in fields}) for record in read_records(path, fields)]
        for number, fact in enumerate(facts, 1):
            if fact.entity not in fact.prompt:
                raise FileFormatError(
                    f"Row {number} of {path}: the prompt {fact.prompt[:60]!r} does not name {fact.entity!r}; it must."
                )
        return cls(path.stem, tuple(facts))


def read_records(path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV or JSONL file, all as text; `FileFormatError` where a field is missing or empty."""
    wanted = ", ".join(fields)
    if not path.is_file():
        raise FileFormatError(f"There is no file {path}; give a .csv or .jsonl file with the fields {wanted}.")
    if path.suffix not in (".csv", ".jsonl"):
        raise FileFormatError(f"{path} is neither .csv nor .jsonl; write the fields {wanted} in one of these forms.")
    try:
        text = path.read_text("utf-8-sig")
        if path.suffix == ".csv":
            rows: list[Any] = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (csv.Error, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read ({error}); expected the fields {wanted}, in UTF-8.") from error
    if not rows:
        raise FileFormatError(f"{path} holds no rows; give some with the fields {wanted}.")
    return [_record(row, f"Row {number} of {path}", fields) for number, row in enumerate(rows, 1)]


def _record(row: Any, where: str, fields: Sequence[str]) -> dict[str, str]:
    if not isinstance(row, dict) or None in row or None in row.values():
        raise FileFormatError(f"{where} is no row of the fields {', '.join(fields)}; put texts with commas in quotes.")
    if lacking := [field for field in fields if not str(row.get(field, "")).strip()]:
        raise FileFormatError(f"{where} has nothing under {lacking[0]!r}; expected the fields {', '.join(fields)}.")
    return {str(key): str(value) for key, value in row.items()}


def halves(strata: Sequence[Hashable], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of a training and a test half, each with half of every stratum, in an order drawn from `seed`.

    Raises `InputError` for a stratum of fewer than four.
    """
    if few := [stratum for stratum, count in Counter(strata).items() if count < FEWEST]:
        raise InputError(f"There are fewer than {FEWEST} examples of {few[0]!r}; give more, half are held out.")
    generator = np.random.default_rng(seed)
    train, test = [], []
    for stratum in dict.fromkeys(strata):
        places = generator.permutation([i for i, other in enumerate(strata) if other == stratum])
        train.append(places[: len(places) // 2])
        test.append(places[len(places) // 2 :])
    return generator.permutation(np.concatenate(train)), generator.permutation(np.concatenate(test))


def classes_of(labels: Sequence[str]) -> tuple[list[str], Bool[np.ndarray, "n class_"]]:
    """The labels there are, in order, and which example has which."""
    names = sorted(set(labels))
    return names, np.array([[label == name for name in names] for label in labels], dtype=bool)
