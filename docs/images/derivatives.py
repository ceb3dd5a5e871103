"""The picture of docs/derivatives.md, from what `circuitsae refine` wrote: `docs/images/derivatives.py refine.json`.

Needs playwright, a Chromium and pillow.
"""

import json
import sys
from pathlib import Path

import plotly.graph_objects as go
from drawing import save_figure

WIDTH, HEIGHT = 1000, 420
LINES = (
    ("before", "cosine", "as published", "#b45309"),
    ("after", "cosine", "with a skip term in closed form", "#1d4ed8"),
)


def figure(record: dict[str, list[dict]]) -> go.Figure:
    """The natural cosine of every layer, before and after."""
    drawn = go.Figure()
    for when, what, name, colour in LINES:
        values = [layer[when][what] for layer in record["layers"]]
        layers = [layer["layer"] for layer in record["layers"]]
        drawn.add_scatter(x=layers, y=values, name=name, mode="lines+markers", line_color=colour)
    drawn.update_layout(
        template="plotly_white", width=WIDTH, height=HEIGHT, margin={"l": 60, "r": 20, "t": 20, "b": 50},
        legend={"x": 0.02, "y": 0.98}, xaxis_title="layer", yaxis={"title": "cos(Ĵ v, J v)", "range": [0, 1]},
    )  # fmt: skip
    return drawn


if __name__ == "__main__":
    save_figure(figure(json.loads(Path(sys.argv[1]).read_text())), "derivatives")
