"""A steering report as a figure and as one offline HTML page, from its JSON."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuitsae.report.beside import Way
from circuitsae.report.document import Document, Number

_BLUE, _ORANGE, _GREY, _RED = "#0072b2", "#d55e00", "#777777", "#cc0000"
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


def page(document: dict[str, Any], ways: Sequence[Way] = ()) -> str:
    """One HTML file that works offline; `ways`: links to pages beside it."""
    chosen, n, loss = document["recommended"], document["n"], document["clean_loss"]
    clean_loss = "" if loss is None else f" (clean loss {loss:.3f})"
    made = Document(f"Steering by {document['handle']}")
    made.paragraph(
        f"{document['model']}; {document['metric']}, wanted {document['want']}; {n['prompts']} prompts, "
        f"{n['held_out']} held out, {n['unrelated']} unrelated texts{clean_loss}, {n['controls']} controls."
    )
    verdict = f"Recommended strength: {chosen:g}" if chosen is not None else "No strength is recommended"
    made.paragraph(f": {document['reason']}.", lead=verdict)
    made.figure(figure(document))
    rows = document["table"]
    made.table(
        [*_COLUMNS.values(), "breaks the model"],
        [[*(_number(row[name], name) for name in _COLUMNS), row["broken"]] for row in rows],
        ["broken" if row["broken"] else "chosen" if row["strength"] == chosen else "" for row in rows],
    )
    made.heading("Continuations")
    written = document["generations"]
    clean = {row["prompt"]: row["text"] for row in written if row["strength"] is None}
    made.table(
        ["prompt", "strength", "before", "after"],
        [
            [row["prompt"], _number(row["strength"], "strength"), clean[row["prompt"]], row["text"]]
            for row in written
            if row["strength"] is not None
        ],
    )
    made.code(document["command"])
    return made.html(ways)


def _number(value: float | None, column: str) -> Number:
    if value is None:
        return Number("—")
    return Number(f"{value:g}" if column == "strength" else f"{value:.3f}")
