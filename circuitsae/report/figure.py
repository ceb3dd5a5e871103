"""A graph as one pure plotly figure, for notebooks and static export.

A graph in one small table, for notebooks: escaped text, no script, nothing loaded.
"""

import html
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from circuitsae.report.circuit_of_graph import circuit_picture
from circuitsae.report.claims import verdicts_shown
from circuitsae.report.data import EDGE_COLUMNS, NODE_COLUMNS, GraphLike, require
from circuitsae.report.layout import Layout, arrange
from circuitsae.report.text import plotly_text, shorten, visible
from transcoders.errors import InputError
from transcoders.token_text import join_tokens

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


_SCORE_NAMES = {"past": "share past the features"}
_LOGITS = 5
_EDGES = 8
_WIDTH = 60


def summary_html(graph: GraphLike) -> str:
    """Prompt, counts, scores, top logits and strongest edges as a piece of HTML; the text in it is untrusted."""
    nodes = require(graph.nodes_frame(), NODE_COLUMNS, "nodes_frame()")
    edges = require(graph.edges_frame(), EDGE_COLUMNS, "edges_frame()")
    scores = graph.scores if isinstance(graph.scores, Mapping) else graph.scores.as_dict()
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(nodes["kind"].tolist()).items())
    prompt = shorten(visible(join_tokens(graph.tokens), most=None), 400)
    facts = [("prompt", prompt), ("nodes", f"{len(nodes)} ({counts})"), ("edges", str(len(edges)))]
    if model := graph.provenance.get("model"):
        facts.insert(1, ("model", shorten(str(model), _WIDTH)))
    facts += [(_SCORE_NAMES.get(name, f"{name} score"), _number(value)) for name, value in scores.items()]
    top = nodes.query("explained" if "explained" in nodes else "kind == 'logit'")
    logits = top.sort_values("probability", ascending=False, kind="stable").head(_LOGITS)
    strongest = edges.iloc[np.argsort(-np.abs(edges["weight"].to_numpy(float)), kind="stable")[:_EDGES]]
    names = dict(zip(nodes["id"].tolist(), (_name(row) for row in nodes.to_dict("records")), strict=True))
    claim, verdicts = verdicts_shown(strongest)
    parts = [
        _table("Attribution graph", (), facts),
        _table(
            "What is explained" if "explained" in nodes else "Top logits",
            ("what", "value") if "explained" in nodes else ("token", "probability"),
            [
                (
                    visible(str(row["text"])) if row["kind"] == "logit" else row["id"],
                    _number(row["pre_activation" if row.get("explained") else "probability"]),
                )
                for row in logits.to_dict("records")
            ],
        ),
        _table(
            f"Strongest {len(strongest)} edges",
            ("source", "target", "weight", f"verdict ({claim})" if claim else "verdict"),
            [
                (names.get(s, str(s)), names.get(t, str(t)), _number(w, "+"), v or "")
                for s, t, w, v in zip(
                    strongest["source"].tolist(),
                    strongest["target"].tolist(),
                    strongest["weight"].tolist(),
                    verdicts or [None] * len(strongest),
                    strict=True,
                )
            ],
        ),
    ]
    return f'<div class="circuitsae-graph">{"".join(parts)}</div>'


def _name(row: dict) -> str:
    text = visible(str(row["text"])) if row["kind"] in ("token", "logit") else ""
    return f"{row['id']} {shorten(text, 24)}".strip()


def _table(caption: str, head: tuple[str, ...], rows: list) -> str:
    columns = "".join(f'<th scope="col" style="text-align:left">{html.escape(name)}</th>' for name in head)
    first = f"<thead><tr>{columns}</tr></thead>" if head else ""
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align:left"><bdi>{html.escape(str(c))}</bdi></td>' for c in row) + "</tr>"
        for row in rows
    )
    return (
        f'<table><caption style="text-align:left;font-weight:600">{html.escape(caption)}</caption>'
        f"{first}<tbody>{body}</tbody></table>"
    )


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None or math.isnan(value) else f"{value:{sign}.3g}"
