"""What validation found of edges, as graphs carry it and files hold it: the columns of `edge_notes`.

The columns are those of `circuitsae.validation.Validation.edges`; others travel as they are. Before the three claims
an edge had one `verdict`, with `predicted`, `frozen`, `replacement`, `measured` and `control`; such notes are of the
old kind, and are kept.
"""

import math
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from circuitsae.graph.checking import LARGEST_NUMBER, MalformedError, number, plain, share, shown, text, whole

Claim = Literal["graph", "direct", "model"]
CLAIMS: tuple[Claim, ...] = get_args(Claim)
Verdict = Literal["confirmed", "attention", "norms", "reversed", "null", "undecided"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
OLD = ("predicted", "frozen", "replacement", "measured", "control")
"""Numbers of the old kind."""


def _of_claims(*names: str) -> set[str]:
    return {f"{claim}_{name}" for claim in CLAIMS for name in names}


_EFFECTS = {*OLD, *_of_claims("predicted", "measured", "ratio", "low", "high"), "direct_patterns", "direct_norms"}
_EFFECTS |= {f"miss_{part}" for part in ("dictionary", "curvature", "first", "patterns", "norms")}
_SHARES = {"influence", *_of_claims("p", "q")}
_COUNTS = {"hops", *_of_claims("controls")}
_VERDICTS = {"verdict", *_of_claims("verdict")}
_TEXTS = {"miss", "direct_head", *_of_claims("reason")}


def is_old(notes: pd.DataFrame) -> bool:
    """Whether notes are of the old kind: one verdict of each edge."""
    return "verdict" in notes and not any(f"{claim}_measured" in notes for claim in CLAIMS)


def checked(name: str, value: Any, of: str) -> Any:
    """A value of one of the columns as it can be used and written again; numbers that are missing are NaN.

    Raises `MalformedError` for what the column cannot hold.
    """
    what = f"{name} of {of}"
    if name in _EFFECTS:
        return number(value, what)
    if name in _SHARES:
        return share(value, what, optional=True)
    if name in _COUNTS:
        return math.nan if value is None else whole(value, what)
    if name in _VERDICTS:
        return None if value is None else _verdict(value, what)
    if name in _TEXTS:
        return None if value is None else text(value, what)
    return plain(value)


def written(value: Any) -> Any:
    """A value of a note for a file: None for what is no number, and for those that no reader takes."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not abs(value) <= LARGEST_NUMBER else value


def _verdict(value: Any, what: str) -> str:
    if (found := text(value, what)) not in VERDICTS:
        raise MalformedError(f"{what} is {shown(value)}; expected one of {', '.join(VERDICTS)}")
    return found
