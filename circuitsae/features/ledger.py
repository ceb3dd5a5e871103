"""Labels of features and supernodes, each with the evidence for it.

A label is a claim. It carries at most one row of each kind, with the measurement and the command that made it:

| row                   | asks                                                                     | causal |
|-----------------------|--------------------------------------------------------------------------|--------|
| `top examples`        | does it fire where the label says, on the texts that it was read from?   |        |
| `held-out examples`   | and on other texts?                                                      |        |
| `detection`           | on held-out texts, does the label tell where it fires? (balanced accuracy) |      |
| `fuzzing`             | does a reader with the label tell marked tokens that it fires on from others? |   |
| `target ablation`     | does removing it do to the output what the label says?                   | yes    |
| `negative control`    | do other features of the same size leave the output alone?               |        |
| `steering`            | does pushing it do to the output what the label says, on held-out prompts? | yes    |
| `paraphrase stability`| does it say the same of the same prompt in other words?                  |        |

A label with no causal row that is supported or contradicted is a hypothesis. It is shown as one everywhere: with the
score of its `detection` where it has one, `“John” after “and” (.93)`, and with the word before it otherwise.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from circuitsae.graph.checking import (
    Limits,
    MalformedError,
    mapping,
    parse_json,
    plain,
    read_bytes,
    sequence,
    shown,
    text,
)
from transcoders.errors import FileFormatError, InputError
from transcoders.files import write_file

FORMAT = "circuitsae-ledger/1"
RowKind = Literal[
    "top examples", "held-out examples", "detection", "fuzzing",
    "target ablation", "negative control", "steering", "paraphrase stability",
]  # fmt: skip
_LIMITS = Limits(file_bytes=2**26)
FITS = 0.7
"""Balanced accuracy on held-out text from which on `detection` and `fuzzing` support a label."""
CAUSAL: tuple[RowKind, ...] = ("target ablation", "steering")


class Verdict(StrEnum):
    SUPPORTED = "supported"
    """What was measured is what the label says."""
    OPEN = "open"
    """Not measured, or the measurement does not decide."""
    CONTRADICTED = "contradicted"
    """What was measured is not what the label says."""


class Status(StrEnum):
    HYPOTHESIS = "hypothesis"
    """Nothing causal was decided."""
    SUPPORTED = "supported"
    """A causal row supports it, and no row contradicts it."""
    CONTRADICTED = "contradicted"
    """Some row contradicts it."""


@dataclass(frozen=True)
class Evidence:
    """One row: what was asked, the answer, the numbers, and the command that made them."""

    kind: RowKind
    verdict: Verdict
    measurement: Mapping[str, Any]
    """JSON values."""
    command: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(RowKind):
            raise InputError(
                f"{shown(self.kind)} is no row of the ledger; the rows are {', '.join(get_args(RowKind))}."
            )
        if self.verdict is not Verdict.OPEN and not (self.measurement and self.command):
            raise InputError(
                f"Row {self.kind!r} is {self.verdict}, but says not how: give the measurement and the command that "
                "made it, or leave it open."
            )


@dataclass(frozen=True)
class Label:
    """A claim about a feature, or about several (a supernode)."""

    text: str
    features: tuple[str, ...]
    """Ids without position, `2.713`; those of other forms, such as `2.713@5`, are brought into this one."""
    rows: Mapping[RowKind, Evidence] = field(default_factory=dict)
    source: str = ""
    """Who says so: `rules`, the name of a language model, a file that somebody published; empty for a person here."""

    def __post_init__(self) -> None:
        if not self.text.strip() or not self.features:
            raise InputError(
                f"A label needs a text and a feature; got {shown(self.text)} for {ascii(self.features)[:200]}."
            )
        object.__setattr__(self, "features", tuple(dict.fromkeys(map(feature_id, self.features))))

    @property
    def status(self) -> Status:
        """Contradicted by any row; supported by a causal one; otherwise a hypothesis."""
        verdicts = {kind: row.verdict for kind, row in self.rows.items()}
        if Verdict.CONTRADICTED in verdicts.values():
            return Status.CONTRADICTED
        if any(verdicts.get(kind) is Verdict.SUPPORTED for kind in CAUSAL):
            return Status.SUPPORTED
        return Status.HYPOTHESIS

    @property
    def display(self) -> str:
        """How every table, page and graph shows it: the text alone where it is supported.

        A hypothesis with a supported detection shows its balanced accuracy, `“John” after “and” (.93)`, and so does
        what rules say; otherwise, `hypothesis: …` and `contradicted: …`.
        """
        if self.status is Status.SUPPORTED:
            return self.text
        row = self.rows.get("detection")
        score = row.measurement.get("balanced_accuracy") if row else None
        if self.status is Status.HYPOTHESIS and row and (row.verdict is Verdict.SUPPORTED or self.source == "rules"):
            return self.text if score is None else f"{self.text} ({_share(score)})"
        return f"{self.status}: {self.text}"

    @property
    def evidence(self) -> list[str]:
        """Each row in words: what was asked, the verdict, the numbers, the command."""
        lines = []
        for row in self.rows.values():
            numbers = ", ".join(f"{name} {_words(value)}" for name, value in row.measurement.items())
            lines.append(" · ".join(part for part in (f"{row.kind}: {row.verdict}", numbers, row.command) if part))
        return lines

    def with_rows(self, *rows: Evidence) -> "Label":
        """This label with rows added; a row takes the place of an earlier one of its kind."""
        return replace(self, rows={**self.rows, **{row.kind: row for row in rows}})

    def frame(self) -> pd.DataFrame:
        """Every kind of row, those not measured as open: `row`, `verdict`, `measurement`, `command`."""
        rows = [
            (kind, str(row.verdict), json.dumps(row.measurement, ensure_ascii=False), row.command)
            if (row := self.rows.get(kind))
            else (kind, str(Verdict.OPEN), "", "")
            for kind in get_args(RowKind)
        ]
        return pd.DataFrame(rows, columns=["row", "verdict", "measurement", "command"])

    def __str__(self) -> str:
        return f"{', '.join(self.features)}: {self.display}"


@dataclass
class Ledger:
    """The labels of some dictionaries or of a graph."""

    labels: list[Label] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    """Model and dictionaries that the labels are about."""
    _indexed: list[Label] = field(default_factory=list, init=False, repr=False, compare=False)
    _by_feature: dict[str, list[Label]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def add(self, label: Label) -> Label:
        """Add a label, in the place of one with the same text and features."""
        self.labels = [old for old in self.labels if (old.text, old.features) != (label.text, label.features)]
        self.labels.append(label)
        return label

    def of(self, feature: str) -> list[Label]:
        """The labels of one feature, by its id with or without position; those of supernodes that hold it included."""
        if self._indexed != self.labels:  # quick where they are the same objects
            self._indexed, self._by_feature = list(self.labels), {}
            for label in self.labels:
                for name in label.features:
                    self._by_feature.setdefault(name, []).append(label)
        return list(self._by_feature.get(feature_id(feature), ()))

    def display(self, feature: str) -> str:
        """What to show beside a feature: its own labels first, then its supernodes'; empty for none."""
        return "; ".join(label.display for label in self.shown(feature))

    def shown(self, feature: str) -> list[Label]:
        """The labels to show of a feature, its own before its supernodes'; what rules say where nobody else does."""
        found = sorted(self.of(feature), key=lambda label: len(label.features))
        return [label for label in found if label.source != "rules"] or found

    def frame(self) -> pd.DataFrame:
        """One row per label: `features`, `label` as displayed, `status`, and the verdict of every row."""
        rows = [
            {"features": ", ".join(label.features), "label": label.display, "status": str(label.status)}
            | {k: str(label.rows[k].verdict) if k in label.rows else str(Verdict.OPEN) for k in get_args(RowKind)}
            for label in self.labels
        ]
        return pd.DataFrame(rows, columns=["features", "label", "status", *get_args(RowKind)])

    def save(self, path: str | Path) -> Path:
        """Write JSON, whole or not at all; a folder (of dictionaries or of a graph) gets `ledger.json`."""
        path = ledger_path(path)
        tables = _tables(self.labels)
        document = {"format": FORMAT, "provenance": self.provenance} | ({"tables": tables} if tables else {})
        lines = ",\n".join(_json(_to_json(label, tables)) for label in self.labels)
        write_file(path, f'{_json(document)[:-1]}, "labels": [\n{lines}\n]}}\n')
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Ledger":
        """The ledger that `save` wrote. Raises `FileFormatError` for a file that is none."""
        path = ledger_path(path)
        try:
            there = path.is_file()
        except OSError:  # a name too long, a folder that may not be read
            there = False
        if not there:
            raise FileFormatError(f"There is no ledger at {path}; make one with Ledger(...).save(folder).")
        try:
            document = parse_json(read_bytes(path, _LIMITS), _LIMITS)
            if document.get("format") != FORMAT:
                raise MalformedError(f"format {shown(document.get('format'))}, expected {FORMAT!r}")
            tables = {kind: mapping(t, "a table") for kind, t in mapping(document.get("tables", {}), "tables").items()}
            labels = [_from_json(row, tables) for row in sequence(document.get("labels"), "labels")]
            return cls(labels, plain(mapping(document.get("provenance"), "provenance")))
        except ValueError as error:
            raise FileFormatError(f"{path} is no ledger ({error}); restore it, or test the labels again.") from error


def ledger_path(path: str | Path) -> Path:
    """`ledger.json` of a folder, or the file itself."""
    path = Path(path)
    return path if path.suffix == ".json" else path / "ledger.json"


def feature_id(name: str) -> str:
    """`2.713` of `2.713@5`, ` 2.713` or `02.713`; what names no feature stays as it is, but for the position."""
    name = name.strip().partition("@")[0].rstrip()
    found = re.fullmatch(r"([0-9]{1,9})\.([0-9]{1,9})", name)
    return name if found is None else f"{int(found[1])}.{int(found[2])}"


def _words(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _share(score: float) -> str:
    """Of .937, `.93`: a score that is not reached is not shown."""
    return "1.0" if score >= 1 else f".{int(score * 100 + 1e-9):02d}"


# A ledger of all features of a dictionary has thousands of rows with the same names of numbers, the same command and
# the same source: a table says them once, and such a row is a list of its verdict and its numbers.
_ROWS_OF_A_TABLE = 20


def _tables(labels: Sequence[Label]) -> dict[str, dict[str, Any]]:
    """Of each kind of row that many labels have: its command, its source, and the names of its numbers."""
    found = Counter((kind, *_table_of(label.source, row)) for label in labels for kind, row in label.rows.items())
    tables: dict[str, dict[str, Any]] = {}
    for (kind, source, command, names), count in found.most_common():
        if count >= _ROWS_OF_A_TABLE and kind not in tables:
            tables[kind] = {"source": source, "command": command, "names": list(names)}
    return tables


def _table_of(source: str, row: Evidence) -> tuple[str, str, tuple[str, ...]]:
    return source, row.command, tuple(row.measurement)


def _to_json(label: Label, tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    rows, source = [], label.source
    for kind, row in label.rows.items():
        if (table := tables.get(kind)) and (table["source"], table["command"], tuple(table["names"])) == _table_of(
            label.source, row
        ):
            rows.append([kind, str(row.verdict), *row.measurement.values()])
            source = ""
        else:
            rows.append({"kind": kind, "verdict": str(row.verdict), "measurement": dict(row.measurement),
                         "command": row.command})  # fmt: skip
    made: dict[str, Any] = {"text": label.text, "features": list(label.features)}
    if label.status is not Status.HYPOTHESIS:
        made["status"] = str(label.status)  # derived: for readers of the file, and never read back
    return made | {"rows": rows} | ({"source": source} if source else {})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ": "))


def _from_json(record: Any, tables: Mapping[str, Mapping[str, Any]]) -> Label:
    fields = mapping(record, "a label")
    names = sequence(fields.get("features"), "features of a label")
    source = text(fields.get("source", ""), "source of a label")
    said = text(fields.get("text"), "text of a label")
    rows: dict[RowKind, Evidence] = {}
    for row in sequence(fields.get("rows"), "rows of a label"):
        if isinstance(row, list):
            row, source = _of_table(row, tables)
        evidence = _evidence(mapping(row, "a row"))
        rows[evidence.kind] = evidence
    return Label(said, tuple(text(name, "a feature") for name in names), rows, source)


def _of_table(row: list[Any], tables: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    """A row that is a list, as the object it stands for, and the source of its label."""
    kind, verdict, *values = row if len(row) >= 2 else (None, None)
    table = tables.get(kind) if isinstance(kind, str) else None
    if table is None:
        raise MalformedError(f"the row {shown(row)} is a list, but no table says what its numbers are")
    names = sequence(table.get("names"), "names of a table")
    if len(names) != len(values) or not all(isinstance(name, str) for name in names):
        raise MalformedError(f"the row {shown(row)} has {len(values)} numbers; its table has {len(names)} names")
    measurement = dict(zip(names, values, strict=True))
    made = {"kind": kind, "verdict": verdict, "measurement": measurement, "command": table.get("command")}
    return made, text(table.get("source", ""), "source of a table")


def _evidence(row: Mapping[str, Any]) -> Evidence:
    kind, verdict, command = (text(row.get(name), f"{name} of a row") for name in ("kind", "verdict", "command"))
    if kind not in get_args(RowKind):
        raise MalformedError(f"{shown(kind)} is no row; the rows are {', '.join(get_args(RowKind))}")
    measurement = plain(mapping(row.get("measurement"), "measurement of a row"))
    return Evidence(kind, Verdict(verdict), measurement, command)  # pyright: ignore[reportArgumentType]
