"""A graph as one pure plotly figure, for notebooks and static export."""

from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from circuitsae.report.circuit_of_graph import circuit_picture
from circuitsae.report.data import EDGE_COLUMNS, NODE_COLUMNS, GraphLike, require
from circuitsae.report.layout import Layout, arrange
from circuitsae.report.text import plotly_text, shorten, visible
from transcoders.errors import InputError

MAX_EDGES = 1000
_WIDTHS = (0.6, 1.4, 2.8)
_SIGNS = (("positive", 1, "#0072B2", "solid"), ("negative", -1, "#D55E00", "dash"))
_SYMBOLS = {"feature": "circle", "error": "diamond-open", "token": "square", "logit": "triangle-up"}


def to_figure(graph: GraphLike, style: Literal["nodes", "circuit"] = "nodes", **options: Any) -> go.Figure:
    """A graph as a plotly figure.

    `circuit`: its groups and strongest nodes, see `circuit_picture`, which takes the `options`.
    `nodes`: the `MAX_EDGES` strongest edges (by |weight|) and every node but the biases.
    Edges share a trace by sign and width, so the figure has a few traces however many edges it draws. Sign is shown by
    colour and dash. Bias nodes and their edges are left out; the page of `write_html` has them.
    """
    if style == "circuit":
        return circuit_picture(graph, **options).to_figure()
    if style != "nodes" or options:
        raise InputError(
            f"style={style!r} with {sorted(options)} is no figure; use 'nodes', or 'circuit' with options."
        )
    nodes = require(graph.nodes_frame(), NODE_COLUMNS, "nodes_frame()")
    edges = require(graph.edges_frame(), EDGE_COLUMNS, "edges_frame()")
    layout = arrange(nodes, [visible(token) for token in graph.tokens], graph.n_layers)
    shown = nodes.assign(x=layout.x, y=layout.y).query("kind != 'bias'")
    figure = go.Figure([*_edge_traces(_strongest(edges, shown)), *_node_traces(shown)])
    _set_axes(figure, layout)
    return figure


def _strongest(edges: pd.DataFrame, nodes: pd.DataFrame) -> pd.DataFrame:
    """The edges to draw, with both ends' coordinates."""
    drawn = edges.assign(size=np.abs(edges["weight"].to_numpy(float)))
    for end in ("source", "target"):
        places = nodes[["id", "x", "y"]].set_axis([end, f"{end}_x", f"{end}_y"], axis=1)
        drawn = drawn.merge(places, on=end, how="inner")
    return drawn.sort_values("size", ascending=False, kind="stable").head(MAX_EDGES)


def _edge_traces(edges: pd.DataFrame) -> list[go.Scatter]:
    size, signs = edges["size"].to_numpy(), np.sign(edges["weight"].to_numpy(float))
    thresholds = np.quantile(size, (0.7, 0.95)) if len(size) else np.zeros(2)
    bucket = np.searchsorted(thresholds, size, side="right")
    traces: list[go.Scatter] = []
    for level, width in enumerate(_WIDTHS):
        for name, sign, color, dash in _SIGNS:
            chosen = edges.iloc[np.flatnonzero((bucket == level) & (signs == sign))]
            if chosen.empty:
                continue
            traces.append(
                go.Scatter(
                    x=_segments(chosen, "x"),
                    y=_segments(chosen, "y"),
                    mode="lines",
                    line={"color": color, "width": width, "dash": dash},
                    opacity=0.25 + 0.25 * level,
                    hoverinfo="skip",
                    name=name,
                    legendgroup=name,
                    showlegend=not any(trace.legendgroup == name for trace in traces),
                )
            )
    return traces


def _segments(edges: pd.DataFrame, axis: str) -> list[float | None]:
    pairs = zip(edges[f"source_{axis}"].tolist(), edges[f"target_{axis}"].tolist(), strict=True)
    return [value for source, target in pairs for value in (source, target, None)]


def _node_traces(nodes: pd.DataFrame) -> list[go.Scatter]:
    traces: list[go.Scatter] = []
    for kind, symbol in _SYMBOLS.items():
        members = nodes.query("kind == @kind")
        if members.empty:
            continue
        texts = [visible(text) if kind in {"token", "logit"} else text for text in members["text"].astype(str)]
        labels = [plotly_text(f"{node} {text}") for node, text in zip(members["id"].tolist(), texts, strict=True)]
        traces.append(
            go.Scatter(
                x=members["x"].tolist(),
                y=members["y"].tolist(),
                mode="markers",
                marker={"symbol": symbol, "size": 8, "color": "#44475a"},
                hovertext=labels,
                hoverinfo="text",
                name=kind,
            )
        )
    return traces


def _set_axes(figure: go.Figure, layout: Layout) -> None:
    axis = {"showgrid": False, "zeroline": False, "automargin": True, "tickmode": "array"}
    figure.update_layout(
        template="plotly_white",
        height=640,
        xaxis=axis
        | {
            "tickvals": [column.centre for column in layout.columns],
            "ticktext": [plotly_text(shorten(column.label)) for column in layout.columns],
        },
        yaxis=axis
        | {
            "tickvals": [row.centre for row in layout.rows],
            "ticktext": [row.label for row in layout.rows],
        },
    )
