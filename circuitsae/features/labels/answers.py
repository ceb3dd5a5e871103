"""Answers that were paid for once, on disk, and what all of them cost.

A file of JSON lines, one for each answer, told by a hash of the model's name, the messages and the length allowed. A
line is added as soon as its answer is there: a run that was ended goes on with the same questions, and asks the rest.
"""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitsae.features.labels.explainers import Answer, Explainer, Messages
from transcoders.errors import FileFormatError
from transcoders.files import short_hash, write_error

FILE = "answers.jsonl"


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run asked, and what it was answered."""

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    kept: int = 0
    """Answers that were there already, and cost nothing."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, name) + getattr(other, name) for name in Cost.__slots__))

    def money(self, price: tuple[float, float]) -> float:
        """At so much for a million tokens in, and for a million out."""
        return (self.tokens_in * price[0] + self.tokens_out * price[1]) / 1e6

    def words(self, price: tuple[float, float] | None = None, *, about: bool = False) -> str:
        """In one line, such as `120 calls (30 more were there already), 84,000 tokens in and 9,000 out, 0.02`."""
        kept = f" ({self.kept:,} more were there already)" if self.kept else ""
        tokens = f"{'about ' * about}{self.tokens_in:,} tokens in and {self.tokens_out:,} out"
        return f"{self.calls:,} calls{kept}, {tokens}" + ("" if price is None else f", {self.money(price):,.2f} to pay")


class Answers:
    """An explainer whose answers are kept in a file, and taken from there; it may be asked from several threads."""

    def __init__(self, explainer: Explainer, path: str | Path) -> None:
        """Raises `FileFormatError` for a file of something else."""
        self.explainer, self.path, self.cost = explainer, Path(path), Cost()
        self._lock = threading.Lock()
        self._known = _read(self.path)

    @property
    def name(self) -> str:
        return self.explainer.name

    @property
    def at_once(self) -> int:
        return self.explainer.at_once

    def known(self, messages: Messages, most: int) -> Answer | None:
        """The answer that is kept, if there is one."""
        return self._known.get(self._key(messages, most))

    def answer(self, messages: Messages, most: int) -> Answer:
        key = self._key(messages, most)
        if (kept := self._known.get(key)) is not None:
            self._count(Cost(kept=1))
            return kept
        found = self.explainer.answer(messages, most)
        self._count(Cost(1, found.tokens_in, found.tokens_out))
        with self._lock:
            self._known[key] = found
            self._write({"key": key, "model": self.name, "text": found.text, "in": found.tokens_in,
                         "out": found.tokens_out})  # fmt: skip
        return found

    def _key(self, messages: Messages, most: int) -> str:
        return short_hash([json.dumps([self.name, most, [[each["role"], each["content"]] for each in messages]])])

    def _count(self, cost: Cost) -> None:
        with self._lock:
            self.cost = self.cost + cost

    def _write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                if file.seek(0, 2):
                    file.seek(-1, 2)
                    line = line if file.read(1) == b"\n" else b"\n" + line  # a kill has cut the line before
                file.write(line)
        except OSError as error:
            raise write_error(self.path, error) from error


def _read(path: Path) -> dict[str, Answer]:
    """What is kept; a line that a kill has cut is passed over."""
    if not path.exists():
        return {}
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise FileFormatError(
            f"{path} cannot be read ({error.strerror}); give another place for the answers."
        ) from error
    found = dict(pair for line in lines if (pair := _answer(line)) is not None)
    if not found and any(line.strip() for line in lines[:-1]):
        raise FileFormatError(f"{path} holds no answers of language models; give another place for them.")
    return found


def _answer(line: bytes) -> tuple[str, Answer] | None:
    try:
        record = json.loads(line)
        return str(record["key"]), Answer(str(record["text"]), int(record["in"]), int(record["out"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
