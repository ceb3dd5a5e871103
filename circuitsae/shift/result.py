"""What SHIFT comes to: a line for each classifier, the features that were judged, and their files."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from circuitsae.interventions import Feature, target_id
from circuitsae.shift.classifier import Groups
from transcoders.files import write_file, write_json


class Line(NamedTuple):
    """One classifier: what is taken out of the model under it, and how right it is on texts it was not trained on."""

    name: str
    ablated: int
    groups: Groups


@dataclass(frozen=True, eq=False)
class ShiftResult:
    """All lines, and the circuit."""

    lines: tuple[Line, ...]
    features: pd.DataFrame
    """A row per node of the circuit, the largest effect first: `id`, `effect` on the margin, `tells_intended` and
    `tells_unintended` (`tells`), `fires_on`, `example`, and `ablate`, yes or no; error nodes are never judged.
    """
    judged: tuple[Feature, ...]
    """What SHIFT takes out."""
    names: tuple[tuple[str, str], tuple[str, str]]
    """The two intended labels, and the two unintended ones."""
    settings: Mapping[str, Any]

    def line(self, name: str) -> Line:
        """The line of a name."""
        return next(line for line in self.lines if line.name == name)

    def to_frame(self) -> pd.DataFrame:
        """A row per line: `name`, `ablated`, `intended`, `unintended`, `worst`."""
        rows = [{"name": line.name, "ablated": line.ablated, **line.groups._asdict()} for line in self.lines]
        return pd.DataFrame(rows)

    def save(self, folder: Path | str) -> Path:
        """Write shift.json, and features.csv to be looked through and marked; each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "intended": list(self.names[0]), "unintended": list(self.names[1]), "settings": dict(self.settings),
            "judged": ids(self.judged), "lines": self.to_frame().to_dict("records"),
        }  # fmt: skip
        write_json(folder / "shift.json", record)
        text = io.StringIO()
        self.features.to_csv(text, index=False, lineterminator="\n")
        write_file(folder / "features.csv", text.getvalue())
        return folder / "features.csv"


def ids(features: Sequence[Feature]) -> list[str]:
    return [target_id(feature) for feature in features]
