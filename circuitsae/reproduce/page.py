"""Reproductions as one offline HTML page. What models and files say is untrusted text and escaped.

Reproductions as a page of the documentation.
"""

import html
from collections.abc import Sequence
from typing import Any

import pandas as pd

from circuitsae.reproduce.result import Reproduction, claims_frame

_INTRODUCTION = """\
Each task goes from behaviour to heads and MLPs to features. The circuit of heads and MLPs is the fewest best edges that
reach the target on other prompts than those that they were scored on (integrated gradients; the best and the doubtful
patched exactly), or, where a tenth of the edges does not reach it, the pruned circuit of `find_circuit`. It is judged
on a third set of prompts, everything outside resampled from the corrupt prompts. Roles of heads are found by behaviour:
where they look, what they write. The feature circuit takes features and error nodes, positions as roles, and everything
outside is zero. Supernodes are removed, or set as on the corrupt prompt, in the real model.
"""


def markdown(found: Sequence[Reproduction], command: str) -> str:
    """The page: claims with a bar first, then each task with all its claims and the first rows of its tables."""
    model = ", ".join(dict.fromkeys(report.model for report in found))
    parts = [
        "# Circuits",
        f"This page is written by `{command}`; do not edit it by hand. Model: `{model}`.",
        _INTRODUCTION,
    ]
    barred = [claim for report in found for claim in report.claims if claim.has_bar or claim.published is not None]
    parts += ["## Claims with a bar", markdown_table(claims_frame(barred))]
    seconds = {report.task: sum(report.seconds.values()) for report in found}
    parts.append("Seconds: " + ", ".join(f"{task} {s:.0f}" for task, s in seconds.items())
                 + f"; {sum(seconds.values()):.0f} in all.")  # fmt: skip
    for report in found:
        parts += [f"## {report.task}", markdown_table(claims_frame(report.claims))]
        for section in report.sections:
            parts += [f"### {report.task}: {section.title}", section.text]
            if section.table is not None:
                parts.append(markdown_table(section.table.head(16)))
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def markdown_table(frame: pd.DataFrame) -> str:
    """A Markdown markdown_table; columns that are empty throughout are left out."""
    kept = [column for column in frame.columns if any(shown(value) for value in frame[column].tolist())]
    lines = ["| " + " | ".join(map(str, kept)) + " |", "|" + "---|" * len(kept)]
    for row in frame.to_dict("records"):
        lines.append("| " + " | ".join(shown(row[column]).replace("|", "\\|") for column in kept) + " |")
    return "\n".join(lines)


_STYLE = (
    "body{font:15px system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#111;background:#fff}"
    "table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}td,th{padding:.25em .6em;"
    "border-bottom:1px solid #ccc;text-align:left;vertical-align:top}td.number{text-align:right;"
    "font-variant-numeric:tabular-nums}tr.not-met td{background:#fde8e4}nav a{margin-right:1em}"
)


def page(found: Sequence[Reproduction], command: str = "") -> str:
    """Claims of all tasks first, then each task's tables and figures."""
    claims = claims_frame([claim for report in found for claim in report.claims if claim.has_bar or claim.published])
    title = f"Circuits of {', '.join(dict.fromkeys(report.model for report in found))}"
    links = "".join(f'<a href="#{_safe(report.task)}">{_safe(report.task)}</a>' for report in found)
    parts = [f"<h1>{_safe(title)}</h1><nav>{links}</nav>", "<h2>Claims with a bar, or published</h2>", table(claims)]
    first = True
    for report in found:
        seconds = ", ".join(f"{name} {s:.0f} s" for name, s in report.seconds.items())
        parts.append(f'<h2 id="{_safe(report.task)}">{_safe(report.task)}</h2><p>{_safe(seconds)}</p>')
        parts.append(table(claims_frame(report.claims)))
        for section in report.sections:
            parts.append(f"<h3>{_safe(section.title)}</h3><p>{_safe(section.text)}</p>")
            if section.figure is not None:
                parts.append(section.figure.to_html(full_html=False, include_plotlyjs=first))
                first = False
            if section.table is not None:
                parts.append(table(section.table))
    if command:
        parts.append(f"<p><code>{_safe(command)}</code></p>")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_safe(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def table(frame: pd.DataFrame) -> str:
    """A table of a page; a claim that was not met is marked."""
    head = "".join(f"<th>{_safe(column)}</th>" for column in frame.columns)
    lines = []
    for row in frame.to_dict("records"):
        kind = ' class="not-met"' if row.get("verdict") == "not met" else ""
        cells = "".join(
            f'<td class="number">{_safe(shown(value))}</td>'
            if isinstance(value, float | int)
            else f"<td>{_safe(shown(value))}</td>"
            for value in row.values()
        )
        lines.append(f"<tr{kind}>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def shown(value: Any) -> str:
    """A cell's text: numbers short, nothing for what is missing."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if value == round(value) and abs(value) >= 1 else f"{value:.3f}"
    return str(value)


def _safe(text: Any) -> str:
    return html.escape(str(text))
