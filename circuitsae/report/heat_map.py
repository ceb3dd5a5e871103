"""A table of numbers as a heat map: layers upwards, positions or tokens across."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from circuitsae.report.text import plotly_text, shorten

_LOWERS, _NOTHING, _RAISES = "#D55E00", "#f7f7f7", "#0072B2"
_UNIT = 34
"""Pixels of a row."""
_CELL = 9
"""Characters of a text that are shown in a cell."""


def heat_map(
    values: Float[np.ndarray, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    unit: str,
    texts: Sequence[Sequence[str]] | None = None,
    hover: Sequence[Sequence[str]] | None = None,
) -> go.Figure:
    """A plotly heat map of `values`, the first row lowest; NaN is left blank.

    Where a value is below zero, colours run from orange through white at zero to blue, else from white to blue.
    `texts` are written into the cells, `hover` is shown of one that is pointed at; by default its value.
    """
    signed = bool((values < 0).any())
    finite = np.abs(values[np.isfinite(values)])
    most = float(finite.max(initial=0.0)) or 1.0
    said = hover or [[f"{value:.4g}" for value in row] for row in values]
    places = [
        [
            f"{plotly_text(row)}, {plotly_text(column)}<br>{plotly_text(cell)}"
            for column, cell in zip(columns, line, strict=True)
        ]
        for row, line in zip(rows, said, strict=True)
    ]
    drawn = go.Heatmap(
        z=values.tolist(),
        x=list(range(len(columns))),
        y=list(range(len(rows))),
        zmin=-most if signed else 0.0,
        zmax=most,
        colorscale=[[0, _LOWERS], [0.5, _NOTHING], [1, _RAISES]] if signed else [[0, _NOTHING], [1, _RAISES]],
        colorbar={"title": {"text": plotly_text(unit)}},
        text=None if texts is None else [[plotly_text(shorten(cell, _CELL)) for cell in line] for line in texts],
        texttemplate=None if texts is None else "%{text}",
        customdata=places,
        hovertemplate="%{customdata}<extra></extra>",
        xgap=1,
        ygap=1,
    )
    figure = go.Figure(drawn)
    axis = {"showgrid": False, "zeroline": False, "automargin": True, "tickmode": "array"}
    figure.update_layout(
        template="plotly_white",
        title=plotly_text(title),
        height=160 + _UNIT * len(rows),
        xaxis=axis | {"tickvals": list(range(len(columns))), "ticktext": [plotly_text(shorten(c)) for c in columns]},
        yaxis=axis | {"tickvals": list(range(len(rows))), "ticktext": [plotly_text(row) for row in rows]},
    )
    return figure
