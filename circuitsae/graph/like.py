"""What reading a graph needs of it: tables, tokens and where it comes from, whoever made them."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import pandas as pd

from transcoders.errors import InputError

NODE_COLUMNS = (
    "id",
    "kind",
    "layer",
    "pos",
    "index",
    "text",
    "activation",
    "pre_activation",
    "influence",
    "cumulative",
    "probability",
)
EDGE_COLUMNS = ("source", "target", "weight", "share")


@runtime_checkable
class ScoresLike(Protocol):
    def as_dict(self) -> dict[str, float]: ...


@runtime_checkable
class GraphLike(Protocol):
    """What a report needs of an attribution graph."""

    @property
    def provenance(self) -> Mapping[str, Any]: ...
    @property
    def tokens(self) -> Sequence[str]: ...
    @property
    def scores(self) -> Mapping[str, float] | ScoresLike: ...
    @property
    def n_layers(self) -> int: ...
    def nodes_frame(self) -> pd.DataFrame: ...
    def edges_frame(self) -> pd.DataFrame: ...


def scores_of(graph: GraphLike) -> Mapping[str, float]:
    """Its scores by name."""
    return graph.scores if isinstance(graph.scores, Mapping) else graph.scores.as_dict()


def require(frame: pd.DataFrame, columns: Sequence[str], origin: str) -> pd.DataFrame:
    """`frame` with rows numbered from 0, or an error that names the columns it lacks."""
    missing = [column for column in columns if column not in frame]
    if missing:
        raise InputError(
            f"{origin} lacks the columns {missing}; it has {list(frame.columns)}. A report needs {list(columns)}."
        )
    return frame.reset_index(drop=True)
