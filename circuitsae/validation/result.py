"""What validation found of the edges of a graph."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from circuitsae.graph import AttributionGraph
from circuitsae.validation.statistics import Agreement, agreement
from transcoders.files import write_file

CONTROL_COLUMNS = ("source", "target", "kind", "predicted", "measured")


@dataclass(frozen=True)
class Validation:
    """Predicted and measured effects of edges.

    `edges` has a row per edge: `source`, `target`, `kind` (class of edge, "feature→logit"), `weight`, `predicted`, a
    column per regime (`frozen`, `replacement`, `measured` for the model regime), `ratio` (measured / predicted),
    `control` (95th percentile of the random controls' absolute effects in the model regime), `verdict`; with
    paraphrases the columns of `circuitsae.validation.paraphrases.intervals`.

    verdict: `confirmed` if the sign is as predicted and |measured| > control; `reversed` if the sign is the opposite
    and |measured| > control; `null` otherwise.
    """

    edges: pd.DataFrame
    controls: pd.DataFrame
    """Every control: `source`, `target`, `kind`, `predicted` (of the edge it stands in for), `measured`."""
    frozen_error: float
    """Largest |frozen − predicted| over the largest |predicted|; rounding, or this code is wrong."""
    logit_error: float
    """The same of the replacement model's logits, with its error nodes, and the model's own (`logit_error`)."""
    paraphrases: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Every edge on every paraphrase: `paraphrase`, `source`, `target`, `active`, `predicted`, `measured`."""
    budget: pd.DataFrame = field(default_factory=pd.DataFrame)
    """The error budget of the edges that miss most, as in `circuitsae.validation.budget`."""

    def verdicts(self) -> dict[str, int]:
        """How many edges got each verdict."""
        given = self.edges["verdict"].tolist() if "verdict" in self.edges else []
        return {name: given.count(name) for name in ("confirmed", "null", "reversed")}

    def agreement(self, regime: str = "measured", *, bootstrap: int = 0, seed: int = 0) -> dict[str, Agreement]:
        """Agreement with the prediction for all edges and by class of edge; `random` is that of the controls.

        `bootstrap` resamples of the edges give each figure an interval.
        """
        table = {name: _agreement(rows, regime, bootstrap, seed) for name, rows in by_kind(self.edges).items()}
        if regime == "measured" and len(self.controls):
            table["random"] = _agreement(self.controls, regime, bootstrap, seed)
        return table

    def random_agreement(self, *, bootstrap: int = 0, seed: int = 0) -> dict[str, Agreement]:
        """`agreement` of the controls, by the class of the edge they stand in for."""
        return {name: _agreement(rows, "measured", bootstrap, seed) for name, rows in by_kind(self.controls).items()}

    def frame(self, regime: str = "measured", *, bootstrap: int = 200) -> pd.DataFrame:
        """A row per class of edge: figures with intervals, and those of the random controls as `random_…`."""
        random = self.random_agreement() if regime == "measured" else {}
        return agreement_frame(self.agreement(regime, bootstrap=bootstrap), random)

    def annotate(self, graph: AttributionGraph) -> AttributionGraph:
        """The graph with these columns on its edges, those of the error budget as `miss_…`."""
        notes = self.edges.drop(columns=["kind", "weight"])
        if len(self.budget):
            parts = self.budget.drop(columns=["kind", "predicted", "measured", "miss", "largest"])
            renamed = parts.rename(columns={c: f"miss_{c}" for c in parts if c not in ("source", "target")})
            notes = notes.merge(renamed, on=["source", "target"], how="left")
        return graph.annotate(notes)

    def to_json(self) -> dict[str, Any]:
        """Tables and summary as JSON values; NaN becomes null."""
        document = {
            "verdicts": self.verdicts(),
            "frozen_error": self.frozen_error,
            "logit_error": self.logit_error,
            "agreement": {name: asdict(value) for name, value in self.agreement().items()},
            "random": {name: asdict(value) for name, value in self.random_agreement().items()},
            "edges": self.edges.to_dict("records"),
            "paraphrases": self.paraphrases.to_dict("records"),
            "budget": self.budget.to_dict("records"),
        }
        return jsonable(document)

    def save(self, path: str | Path) -> Path:
        """Write tables and summary as JSON."""
        text = json.dumps(self.to_json(), ensure_ascii=False, indent=1, allow_nan=False)
        write_file(Path(path), text)
        return Path(path)


def by_kind(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """All rows, and those of each class of edge."""
    return {"all": rows} | ({str(kind): part for kind, part in rows.groupby("kind")} if len(rows) else {})


def agreement_frame(table: dict[str, Agreement], random: dict[str, Agreement]) -> pd.DataFrame:
    """Agreements as rows, intervals as `_low` and `_high`, those of random controls beside them."""
    records = []
    for name, found in table.items():
        record: dict[str, Any] = {"edges": name, "n": found.n}
        for figure in ("spearman", "sign", "slope", "r2"):
            record[figure] = getattr(found, figure)
            if figure in found.intervals:
                record[f"{figure}_low"], record[f"{figure}_high"] = found.intervals[figure]
            if name in random:
                record[f"random_{figure}"] = getattr(random[name], figure)
        records.append(record)
    return pd.DataFrame(records)


def jsonable(value: Any) -> Any:
    """Plain numbers, texts, lists and dictionaries; what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [jsonable(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _agreement(rows: pd.DataFrame, regime: str, bootstrap: int, seed: int) -> Agreement:
    predicted, measured = rows["predicted"].to_numpy(float), rows[regime].to_numpy(float)
    return agreement(predicted, measured, bootstrap=bootstrap, seed=seed)
