"""Columns of edges as a page holds them: numbers as bytes in base64, a third of what JSON needs, read at once.

`{"u1": …}`, `u2`, `u4`: unsigned integers of so many bytes, `{"f4": …}`: float32 with NaN for null; little-endian.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def packed(data: Mapping[str, Any]) -> dict[str, Any]:
    """The document of a page with its columns of edges packed; that of two graphs, whose columns change, as it is."""
    if data.get("comparison"):
        return dict(data)
    edges = {name: _column(values) for name, values in data["edges"].items()}
    picture = data["picture"]
    return {**data, "edges": edges, "picture": {**picture, "edges": _column(picture["edges"])}}


def _column(values: Sequence[Any]) -> dict[str, str]:
    if all(isinstance(value, int) for value in values):
        most = max(values, default=0)
        size = next(size for size in (1, 2, 4) if most < 256**size)
        return _bytes(f"u{size}", np.array(values, dtype=np.uint64))
    return _bytes("f4", np.array([np.nan if value is None else value for value in values], dtype=np.float64))


def _bytes(kind: str, values: np.ndarray) -> dict[str, str]:
    return {kind: base64.b64encode(values.astype(f"<{kind}").tobytes()).decode("ascii")}
