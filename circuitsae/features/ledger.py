"""Labels of features and supernodes, each with the evidence for it.

A label is a claim. It carries at most one row of each kind, with the measurement and the command that made it:

| row                   | asks                                                                     | causal |
|-----------------------|--------------------------------------------------------------------------|--------|
| `top examples`        | does it fire where the label says, on the texts that it was read from?   |        |
| `held-out examples`   | and on other texts?                                                      |        |
| `target ablation`     | does removing it do to the output what the label says?                   | yes    |
| `negative control`    | do other features of the same size leave the output alone?               |        |
| `steering`            | does pushing it do to the output what the label says, on held-out prompts? | yes    |
| `paraphrase stability`| does it say the same of the same prompt in other words?                  |        |

A label with no causal row that is supported or contradicted is a hypothesis, and is shown as one everywhere.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from circuitsae.graph.files import write_atomically
from transcoders.errors import FileFormatError, InputError

FORMAT = "circuitsae-ledger/1"
RowKind = Literal[
    "top examples", "held-out examples", "target ablation", "negative control", "steering", "paraphrase stability"
]
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
            raise InputError(f"{self.kind!r} is no row of the ledger; the rows are {', '.join(get_args(RowKind))}.")
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
    """Ids without position, `2.713`."""
    rows: Mapping[RowKind, Evidence] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.text.strip() or not self.features:
            raise InputError(f"A label needs a text and a feature; got {self.text!r} for {self.features!r}.")

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
        """How every table, page and graph shows it: `hypothesis: …` and `contradicted: …`, or the text alone."""
        return self.text if self.status is Status.SUPPORTED else f"{self.status}: {self.text}"

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

    def add(self, label: Label) -> Label:
        """Add a label, in the place of one with the same text and features."""
        self.labels = [old for old in self.labels if (old.text, old.features) != (label.text, label.features)]
        self.labels.append(label)
        return label

    def of(self, feature: str) -> list[Label]:
        """The labels of one feature, by its id with or without position; those of supernodes that hold it included."""
        return [label for label in self.labels if feature.partition("@")[0] in label.features]

    def display(self, feature: str) -> str:
        """What to show beside a feature: its own labels first, then its supernodes'; empty for none."""
        found = sorted(self.of(feature), key=lambda label: len(label.features))
        return "; ".join(label.display for label in found)

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
        document = {"format": FORMAT, "provenance": self.provenance, "labels": [_to_json(x) for x in self.labels]}
        write_atomically(path, json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1).encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Ledger":
        """The ledger that `save` wrote. Raises `FileFormatError` for a file that is none."""
        path = ledger_path(path)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document.get("format") != FORMAT:
                raise ValueError(f"format {document.get('format')!r}, expected {FORMAT!r}")
            return cls([_from_json(row) for row in document["labels"]], document["provenance"])
        except FileNotFoundError:
            raise FileFormatError(f"There is no ledger at {path}; make one with Ledger(...).save(folder).") from None
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path} is no ledger ({error}); restore it, or test the labels again.") from error


def ledger_path(path: str | Path) -> Path:
    """`ledger.json` of a folder, or the file itself."""
    path = Path(path)
    return path if path.suffix == ".json" else path / "ledger.json"


def _to_json(label: Label) -> dict[str, Any]:
    rows = [
        {"kind": row.kind, "verdict": str(row.verdict), "measurement": dict(row.measurement), "command": row.command}
        for row in label.rows.values()
    ]
    # The status is derived; it is written for readers of the file, and never read back.
    return {"text": label.text, "features": list(label.features), "status": str(label.status), "rows": rows}


def _from_json(record: Mapping[str, Any]) -> Label:
    rows: Iterable[Evidence] = (
        Evidence(row["kind"], Verdict(row["verdict"]), row["measurement"], row["command"]) for row in record["rows"]
    )
    return Label(record["text"], tuple(record["features"])).with_rows(*rows)
