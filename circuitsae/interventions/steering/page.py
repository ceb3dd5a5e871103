"""A steering report as a figure and as one offline HTML page, from its JSON."""

import html
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

_BLUE, _ORANGE, _GREY, _RED = "#0072b2", "#d55e00", "#777777", "#cc0000"
_STYLE = (
    "body{font:15px system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#111;background:#fff}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .6em;border-bottom:1px solid #ccc;"
    "text-align:right;vertical-align:top}td.text,th.text{text-align:left}tr.broken{color:#a00}tr.chosen{font-weight:bold}"
    ".written{white-space:pre-wrap}"
)
_COLUMNS = {
    "strength": "strength", "effect": "effect", "control": "largest control", "held_out_effect": "held-out effect",
    "held_out_control": "largest control", "kl": "KL, unrelated", "control_kl": "controls",
    "loss_rise": "loss, unrelated", "control_loss_rise": "controls", "distinct": "distinct trigrams",
}  # fmt: skip


def figure(document: dict[str, Any]) -> go.Figure:
    """Effect on the metric (prompts, held-out prompts, every control) over side effects on unrelated text."""
    made = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for name, dash, opacity in (("prompts", "solid", 0.5), ("held_out", "dash", 0.25)):
        for control in range(document["n"]["controls"]):
            x, y = _means(document, name, control)
            line = {"color": _GREY, "dash": dash, "width": 1}
            first = control == 0
            made.add_scatter(x=x, y=y, mode="lines", line=line, opacity=opacity, name=f"controls, {_words(name)}",
                             legendgroup=f"control {name}", showlegend=first, row=1, col=1)  # fmt: skip
        x, y = _means(document, name, -1)
        made.add_scatter(x=x, y=y, mode="lines+markers", line={"color": _BLUE, "dash": dash}, name=_words(name),
                         row=1, col=1)  # fmt: skip
    rows = document["table"]
    for column, colour, dash, label in (
        ("kl", _ORANGE, "solid", "KL, unrelated text"), ("control_kl", _ORANGE, "dot", "KL, controls"),
        ("loss_rise", _RED, "solid", "loss rise, unrelated text"), ("control_loss_rise", _RED, "dot", "loss, controls"),
    ):  # fmt: skip
        made.add_scatter(x=[r["strength"] for r in rows], y=[r[column] for r in rows], mode="lines+markers",
                         line={"color": colour, "dash": dash}, name=label, row=2, col=1)  # fmt: skip
    broken = [r["strength"] for r in rows if r["broken"]]
    made.add_scatter(x=broken, y=[0] * len(broken), mode="markers", name="breaks the model",
                     marker={"symbol": "x", "size": 10, "color": _RED}, row=2, col=1)  # fmt: skip
    if document["recommended"] is not None:
        made.add_vline(x=document["recommended"], line_dash="dash", line_color=_BLUE)
    made.update_yaxes(title_text=f"change of {document['metric']}", row=1, col=1)
    made.update_yaxes(title_text="nats per token", row=2, col=1)
    made.update_xaxes(title_text="strength", row=2, col=1)
    made.update_layout(template="plotly_white", height=640, title=f"{document['handle']} in {document['model']}")
    return made


def _words(name: str) -> str:
    return name.replace("_", "-")


def _means(document: dict[str, Any], name: str, control: int) -> tuple[list[float], list[float]]:
    sums: dict[float, list[float]] = {}
    for row in document["effects"]:
        if row["set"] == name and row["control"] == control and row["effect"] is not None:
            sums.setdefault(row["strength"], []).append(row["effect"])
    strengths = sorted(sums)
    return strengths, [sum(sums[s]) / len(sums[s]) for s in strengths]


def page(document: dict[str, Any]) -> str:
    """One HTML file that works offline. What models and prompts say is untrusted text and escaped."""
    plot = figure(document).to_html(full_html=False, include_plotlyjs=True)
    chosen = document["recommended"]
    verdict = f"Recommended strength: {chosen:g}" if chosen is not None else "No strength is recommended"
    n, loss = document["n"], document["clean_loss"]
    clean_loss = "" if loss is None else f" (clean loss {loss:.3f})"
    parts = [
        f"<h1>Steering by {_safe(document['handle'])}</h1>",
        f"<p>{_safe(document['model'])}; {_safe(document['metric'])}, wanted {_safe(document['want'])}; "
        f"{n['prompts']} prompts, {n['held_out']} held out, {n['unrelated']} unrelated texts"
        f"{clean_loss}, {n['controls']} controls.</p>",
        f"<p><b>{verdict}</b>: {_safe(document['reason'])}.</p>",
        plot,
        _table(document["table"], chosen),
        _written(document["generations"]),
        f"<p><code>{_safe(document['command'])}</code></p>" if document["command"] else "",
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Steering by {_safe(document["handle"])}'
        f"</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def _safe(text: Any) -> str:
    return html.escape(str(text))


def _table(rows: list[dict[str, Any]], chosen: float | None) -> str:
    head = "".join(f"<th>{label}</th>" for label in _COLUMNS.values()) + '<th class="text">breaks the model</th>'
    lines = []
    for row in rows:
        kind = "broken" if row["broken"] else "chosen" if row["strength"] == chosen else ""
        cells = "".join(f"<td>{_number(row[name], name)}</td>" for name in _COLUMNS)
        lines.append(f'<tr class="{kind}">{cells}<td class="text">{_safe(row["broken"])}</td></tr>')
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _number(value: float | None, column: str) -> str:
    if value is None:
        return "—"
    return f"{value:g}" if column == "strength" else f"{value:.3f}"


def _written(rows: list[dict[str, Any]]) -> str:
    clean = {row["prompt"]: row["text"] for row in rows if row["strength"] is None}
    lines = [
        f'<tr><td class="text">{_safe(row["prompt"])}</td><td>{row["strength"]:g}</td>'
        f'<td class="text written">{_safe(clean[row["prompt"]])}</td>'
        f'<td class="text written">{_safe(row["text"])}</td></tr>'
        for row in rows
        if row["strength"] is not None
    ]
    head = '<th class="text">prompt</th><th>strength</th><th class="text">before</th><th class="text">after</th>'
    return f"<h2>Continuations</h2><table><tr>{head}</tr>{''.join(lines)}</table>"
