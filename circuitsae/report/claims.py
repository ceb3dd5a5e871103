"""What tests found of a graph's edges: the columns of a validation, claim by claim, as a page holds them.

The columns are those of `circuitsae.validation.Validation.edges`. Graphs that were validated before the three claims
have one verdict, of another question; that is read as the claim `older`.
"""

import math
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from circuitsae.graph.notes import CLAIMS, VERDICTS
from circuitsae.report.text import cut, printable
from transcoders.errors import InputError

OLDER = "older"
PARTS = {
    "direct": ("patterns", "norms"),
    "miss": ("dictionary", "curvature", "first", "patterns", "norms"),
}
"""What a measurement is split into: columns such as `direct_patterns`."""
_OF_CLAIM = ("predicted", "measured", "ratio", "low", "high", "q", "verdict", "reason")
_OF_OLDER = ("predicted", "frozen", "replacement", "measured", "control", "verdict")
_OF_PROMPTS = tuple(f"{name}{end}" for name in ("stability", "pooled") for end in ("", "_low", "_high"))
_OF_EDGE = ("hops", "influence", "direct_head", "prompts", *_OF_PROMPTS)
_TEXTS = ("reason", "direct_head")
_DIGITS = 4


@runtime_checkable
class ValidationLike(Protocol):
    """A validation: the table of its edges has `source`, `target`, and columns of claims."""

    @property
    def edges(self) -> pd.DataFrame: ...


def with_validation(edges: pd.DataFrame, validation: ValidationLike | pd.DataFrame | None) -> pd.DataFrame:
    """The edges with what was measured on them; a validation given here replaces columns the graph already had.

    Raises `InputError` for a table that lacks `source` or `target`, or names an edge twice.
    """
    if validation is None:
        return edges
    ends = ["source", "target"]
    measured = validation if isinstance(validation, pd.DataFrame) else validation.edges
    if missing := [end for end in ends if end not in measured]:
        raise InputError(
            f"the validation's table of edges lacks the columns {missing}; it has {list(measured.columns)}. "
            f"A report needs {ends} and the columns of a claim, such as graph_measured."
        )
    repeated = measured.duplicated(ends).tolist()
    if any(repeated):
        source, target = (measured[end].tolist()[repeated.index(True)] for end in ends)
        raise InputError(f"the validation names the edge {source} → {target} twice; give each edge once.")
    kept = edges.drop(columns=tested_columns(edges))
    found = measured[[*ends, *tested_columns(measured)]].astype(dict.fromkeys(ends, object))
    return kept.merge(found, on=ends, how="left")


def tested_columns(edges: pd.DataFrame) -> list[str]:
    """The columns that a test wrote."""
    return [name for name in _ALL if name in edges]


def tests_data(edges: pd.DataFrame) -> dict[str, Any] | None:
    """What the page holds of the tests: a list per column, with a value per tested edge; None where none was tested.

    `edges`: rows of the tested ones; `claims`: by claim `predicted`, `measured` and what else there is; `parts`: what
    `direct` and `miss` are split into; other columns as they are. Numbers keep four significant digits; a verdict that
    is not known is null.
    """
    claims = _claims(edges)
    known = edges[[name for names in claims.values() for name in names.values()]].notna()
    rows = np.flatnonzero(known.any(axis=1))
    if not len(rows):
        return None
    tested = edges.iloc[rows]
    parts = {
        whole: {
            part: _values(part, tested[f"{whole}_{part}"].tolist()) for part in names if f"{whole}_{part}" in tested
        }
        for whole, names in PARTS.items()
    }
    return {
        "edges": [int(row) for row in rows],
        "claims": {
            claim: {short: _values(short, tested[name].tolist()) for short, name in names.items()}
            for claim, names in claims.items()
        },
        "parts": {whole: values for whole, values in parts.items() if values},
        **{name: _values(name, tested[name].tolist()) for name in _OF_EDGE if name in tested},
    }


def verdicts_shown(edges: pd.DataFrame | None) -> tuple[str, list[str | None]]:
    """The first claim that has verdicts, and the verdict of each edge; "" and nothing where there are none."""
    if edges is None:
        return "", []
    judged = {claim: names["verdict"] for claim, names in _claims(edges).items() if "verdict" in names}
    for claim, name in judged.items():
        return claim, [_verdict(value) for value in edges[name].tolist()]
    return "", []


def _claims(edges: pd.DataFrame) -> dict[str, dict[str, str]]:
    """By claim its columns: names within the claim, and in the table. The older kind only where there is no other."""
    claims = {claim: {short: f"{claim}_{short}" for short in _OF_CLAIM} for claim in CLAIMS}
    found = {claim: {s: name for s, name in names.items() if name in edges} for claim, names in claims.items()}
    found = {claim: names for claim, names in found.items() if names}
    older = {name: name for name in _OF_OLDER if name in edges}
    return found or ({OLDER: older} if older else {})


_ALL = (
    *(f"{claim}_{short}" for claim in CLAIMS for short in _OF_CLAIM),
    *_OF_OLDER,
    *(f"{whole}_{part}" for whole, names in PARTS.items() for part in names),
    *_OF_EDGE,
)


def _values(name: str, column: list[Any]) -> list[Any]:
    if name == "verdict":
        return [_verdict(value) for value in column]
    if name in _TEXTS:
        return [printable(cut(value)) if isinstance(value, str) and value else None for value in column]
    return [_number(value) for value in column]


def _verdict(value: Any) -> str | None:
    return value if value in VERDICTS else None


def _number(value: Any) -> float | int | None:
    """Rounded, a whole number without its point; null for what is not a finite number."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{_DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 10**_DIGITS else rounded
