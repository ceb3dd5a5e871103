"""A graph in one small table, for notebooks: escaped text, no script, nothing loaded."""

import html
import math
from collections import Counter
from collections.abc import Mapping

import numpy as np

from circuitsae.report.data import EDGE_COLUMNS, NODE_COLUMNS, GraphLike, require
from circuitsae.report.text import shorten, visible
from transcoders.token_text import join_tokens

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
    facts += [(f"{name} score", _number(value)) for name, value in scores.items()]
    logits = nodes.query("kind == 'logit'").sort_values("probability", ascending=False, kind="stable").head(_LOGITS)
    strongest = edges.iloc[np.argsort(-np.abs(edges["weight"].to_numpy(float)), kind="stable")[:_EDGES]]
    names = dict(zip(nodes["id"].tolist(), (_name(row) for row in nodes.to_dict("records")), strict=True))
    verdicts = strongest["verdict"].tolist() if "verdict" in strongest else [None] * len(strongest)
    parts = [
        _table("Attribution graph", (), facts),
        _table(
            "Top logits",
            ("token", "probability"),
            [
                (visible(str(text)), _number(p))
                for text, p in zip(logits["text"].tolist(), logits["probability"].tolist(), strict=True)
            ],
        ),
        _table(
            f"Strongest {len(strongest)} edges",
            ("source", "target", "weight", "verdict"),
            [
                (names.get(s, str(s)), names.get(t, str(t)), _number(w, "+"), v if isinstance(v, str) else "")
                for s, t, w, v in zip(
                    strongest["source"].tolist(),
                    strongest["target"].tolist(),
                    strongest["weight"].tolist(),
                    verdicts,
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
