"""What validation found of the edges of a graph."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from circuitsae.graph import AttributionGraph
from circuitsae.graph.notes import CLAIMS, VERDICTS, Claim
from circuitsae.validation.statistics import FIGURES, Agreement, agreement
from transcoders._lazy import public
from transcoders.errors import InputError
from transcoders.files import write_file

FORMAT = "claims"
OLD = "old"
"""Files written before the three claims: one verdict, of a total effect against a direct edge."""


@dataclass(frozen=True)
class Validation:
    """Predicted and measured effects of edges, claim by claim.

    `edges` has a row per edge: `source`, `target`, `kind` (class of edge, "feature→logit"), `hops` (layers between),
    `weight`, `influence` (the share of all influence that the edge carries); and, after the name of a claim and an
    underscore (`graph_ratio`):

    * of `graph`, `direct` and `model`: `predicted`, `measured` (the full removal), `ratio` over doses, its interval
      `low` to `high`; of a graph of derivatives `measured` of `graph` and `direct` is ten times a tenth's removal;
    * of `graph` and `direct`: `controls` (how many), `p`, `q`, `verdict`, and the `reason` of an undecided one;
    * `direct_patterns`, `direct_norms`: with `direct_predicted` they sum to `direct_measured`; `direct_head`: where
      attention carries the edge, the head ("2.3") whose pattern does most (of `heads` edges; "" of others);
    * `miss_dictionary`, `miss_curvature`, `miss_first`, `miss_patterns`, `miss_norms`: they sum to `model_measured` −
      `model_predicted`; `miss` names the largest ("" where one is no finite number).

    With other prompts the columns of `circuitsae.validation.prompts.stability`.
    """

    edges: pd.DataFrame
    share: float = np.nan
    """Of the influence of all edges that can be tested, how much these hold."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """The same by class of edge."""
    frozen_error: float = np.nan
    """Largest |frozen effect + weight| over the largest |weight|; rounding, or this code is wrong. Of derivatives the
    frozen effect is that of a small change, and rounding in float32 may be a thousandth. NaN where errors answer for
    features that are not in the graph."""
    logit_error: float = np.nan
    """The same of the replacement model's logits, with its error nodes, and the model's own (`logit_error`)."""
    prompts: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Every edge on every other prompt."""
    jacobian: Mapping[str, float] = field(default_factory=dict)
    """How small changes are passed on by the dictionaries (`DictionaryProvenance.agreement`), where that is known."""
    response: str = "frozen"
    """The graph's: `linear` where edges are derivatives, which have no `direct_patterns`, `direct_norms`, `direct_head`
    and no `miss_first`, `miss_patterns`, `miss_norms`."""
    errors: str = "held"
    """The graph's: `linear` where errors answer; edges are derivatives then, too."""
    format: str = FORMAT
    """`old` for files written before the three claims; their edges have one `verdict`."""

    @property
    def derivatives(self) -> bool:
        """Whether the graph's edges are derivatives, which are predicted and tested at small doses."""
        return "linear" in (self.response, self.errors)

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The claims that were tested."""
        return tuple(claim for claim in CLAIMS if f"{claim}_measured" in self.edges)

    def claim(self, name: Claim) -> pd.DataFrame:
        """One claim of every edge, columns without its name. Raises `InputError` where it was not tested."""
        if name not in self.claims:
            raise InputError(f"The claim {name!r} was not tested; these were: {', '.join(self.claims) or 'none'}.")
        own = [c for c in self.edges if c.split("_")[0] not in CLAIMS]
        part = {c: c.removeprefix(f"{name}_") for c in self.edges if c.startswith(f"{name}_")}
        return pd.DataFrame(self.edges[[*own, *part]]).set_axis([*own, *part.values()], axis=1)

    def verdicts(self, claim: Claim = "graph") -> dict[str, int]:
        """How many edges got each verdict; those that none got are left out."""
        column = "verdict" if self.format == OLD else f"{claim}_verdict"
        given = self.edges[column].tolist() if column in self.edges else []
        return {name: given.count(name) for name in VERDICTS if name in given}

    def agreement(self, claim: Claim = "graph", *, bootstrap: int = 0, seed: int = 0) -> dict[str, Agreement]:
        """Agreement of one claim's measurements with its predictions, for all edges and by class of edge.

        `bootstrap` resamples of the edges give each figure an interval.
        """
        return {
            name: agreement(
                rows["predicted"].to_numpy(float), rows["measured"].to_numpy(float), bootstrap=bootstrap, seed=seed
            )
            for name, rows in by_kind(self.claim(claim)).items()
        }

    def frame(self, claim: Claim = "graph", *, bootstrap: int = 200) -> pd.DataFrame:
        """A row per class of edge: figures with intervals."""
        return agreement_frame(self.agreement(claim, bootstrap=bootstrap))

    def annotate(self, graph: AttributionGraph) -> AttributionGraph:
        """The graph with these columns on its edges."""
        return graph.annotate(self.edges.drop(columns=["kind", "weight"]))

    def _repr_html_(self) -> str:
        return public("circuitsae.report.validation_html")(self)

    def to_json(self) -> dict[str, Any]:
        """Tables and summary as JSON values; NaN becomes null."""
        document = {
            "format": self.format,
            "response": self.response,
            "errors": self.errors,
            "verdicts": {claim: self.verdicts(claim) for claim in self.claims if claim != "model"},
            "share": self.share,
            "shares": dict(self.shares),
            "frozen_error": self.frozen_error,
            "logit_error": self.logit_error,
            "agreement": {
                claim: {name: asdict(value) for name, value in self.agreement(claim).items()} for claim in self.claims
            },
            "edges": self.edges.to_dict("records"),
            "prompts": self.prompts.to_dict("records"),
            "jacobian": dict(self.jacobian),
        }
        return jsonable(document)

    def save(self, path: str | Path) -> Path:
        """Write tables and summary as JSON."""
        write_file(Path(path), json.dumps(self.to_json(), ensure_ascii=False, indent=1, allow_nan=False))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "Validation":
        """Read what `save` wrote, also before the three claims (then `format` is "old").

        Raises `InputError` for a file that is none.
        """
        try:
            document = json.loads(Path(path).read_text())
            known = {
                "edges": pd.DataFrame(document["edges"]),
                "frozen_error": _number(document["frozen_error"]),
                "logit_error": _number(document["logit_error"]),
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no validation of ours ({error}); give a validation.json.") from error
        if document.get("format") != FORMAT:
            return cls(**known, format=OLD)
        prompts = pd.DataFrame(document.get("prompts", []))
        return cls(
            **known, share=_number(document["share"]), shares=document["shares"], prompts=prompts,
            jacobian=document.get("jacobian", {}), response=str(document.get("response", "frozen")),
            errors=str(document.get("errors", "held")),
        )  # fmt: skip


def by_kind(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """All rows, and those of each class of edge."""
    return {"all": rows} | ({str(kind): part for kind, part in rows.groupby("kind")} if len(rows) else {})


def agreement_frame(table: Mapping[str, Agreement]) -> pd.DataFrame:
    """Agreements as rows, intervals as `_low` and `_high`."""
    records = []
    for name, found in table.items():
        record: dict[str, Any] = {"edges": name, "n": found.n}
        for figure in FIGURES:
            record[figure] = getattr(found, figure)
            if figure in found.intervals:
                record[f"{figure}_low"], record[f"{figure}_high"] = found.intervals[figure]
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


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)
