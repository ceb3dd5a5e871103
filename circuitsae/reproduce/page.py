"""Reproductions as a page of Markdown, and as one offline HTML page."""

from collections.abc import Hashable, Sequence
from typing import Any

import pandas as pd

from circuitsae.report.beside import Way
from circuitsae.report.document import Document, Number, Verdict
from circuitsae.reproduce.result import Claim, Reproduction, claims_frame

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
    parts += ["## Claims with a bar", markdown_table(claims_frame(_barred(found)))]
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
    """A Markdown table; columns that are empty throughout are left out."""
    kept = [column for column in frame.columns if any(shown(value) for value in frame[column].tolist())]
    lines = ["| " + " | ".join(map(str, kept)) + " |", "|" + "---|" * len(kept)]
    for row in frame.to_dict("records"):
        lines.append("| " + " | ".join(shown(row[column]).replace("|", "\\|") for column in kept) + " |")
    return "\n".join(lines)


def page(found: Sequence[Reproduction], command: str = "", *, ways: Sequence[Way] = ()) -> str:
    """What was met first, then each task's claims, tables and figures, as one offline HTML page.

    ways: Links to other pages, the graphs of tasks among them.
    """
    made = Document(f"Circuits of {', '.join(dict.fromkeys(report.model for report in found))}")
    made.heading("Claims with a bar, or published")
    failed = [claim for report in found for claim in report.failed]
    barred = sum(claim.has_bar for report in found for claim in report.claims)
    said = "; ".join(f"{claim.task}: {claim.name} {shown(claim.measured)}, wanted {claim.bar}" for claim in failed)
    made.paragraph(f" {said}." if failed else "", lead=f"{barred - len(failed)} of {barred} bars are met.")
    made.code(command)
    _table(made, claims_frame(_barred(found)))
    for report in found:
        made.heading(report.task, anchor=report.task)
        made.paragraph(", ".join(f"{name} {s:.0f} s" for name, s in report.seconds.items()))
        _table(made, claims_frame(report.claims).drop(columns="task", errors="ignore"))
        for section in report.sections:
            made.heading(section.title, level=3)
            made.paragraph(section.text)
            if section.figure is not None:
                made.figure(section.figure)
            if section.table is not None:
                _table(made, section.table)
    return made.html(ways)


def _barred(found: Sequence[Reproduction]) -> list[Claim]:
    """What has to hold, or can be compared with a paper."""
    return [claim for one in found for claim in one.claims if claim.has_bar or claim.published is not None]


def _table(document: Document, frame: pd.DataFrame) -> None:
    """A table of a page; a claim that was not met is marked."""
    records = frame.to_dict("records")
    rows = [[_shown(column, value) for column, value in row.items()] for row in records]
    marks = ["not-met" if row.get("verdict") == "not met" else "" for row in records]
    document.table([str(column) for column in frame.columns], rows, marks)


def _shown(column: Hashable, value: Any) -> str:
    if column == "verdict":
        return Verdict(shown(value))
    return Number(shown(value)) if isinstance(value, float | int) else shown(value)


def shown(value: Any) -> str:
    """A cell's text: numbers short, nothing for what is missing."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if value == round(value) and abs(value) >= 1 else f"{value:.3f}"
    return str(value)
