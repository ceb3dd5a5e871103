"""Reproductions as a page of the documentation."""

from collections.abc import Sequence

import pandas as pd

from circuitsae.reproduce.page import shown
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
    parts += ["## Claims with a bar", table(claims_frame(barred))]
    seconds = {report.task: sum(report.seconds.values()) for report in found}
    parts.append("Seconds: " + ", ".join(f"{task} {s:.0f}" for task, s in seconds.items())
                 + f"; {sum(seconds.values()):.0f} in all.")  # fmt: skip
    for report in found:
        parts += [f"## {report.task}", table(claims_frame(report.claims))]
        for section in report.sections:
            parts += [f"### {report.task}: {section.title}", section.text]
            if section.table is not None:
                parts.append(table(section.table.head(16)))
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def table(frame: pd.DataFrame) -> str:
    """A Markdown table; columns that are empty throughout are left out."""
    kept = [column for column in frame.columns if any(shown(value) for value in frame[column].tolist())]
    lines = ["| " + " | ".join(map(str, kept)) + " |", "|" + "---|" * len(kept)]
    for row in frame.to_dict("records"):
        lines.append("| " + " | ".join(shown(row[column]).replace("|", "\\|") for column in kept) + " |")
    return "\n".join(lines)
