"""How a graph takes small changes, in sentences: what its edges are, and how much its dictionaries pass on."""

from collections.abc import Mapping
from typing import Any

_MOST = 1e9
"""Figures of files are not trusted to be any."""


def answering(provenance: Mapping[str, Any]) -> str:
    """What answers a change in a graph of derivatives: `attention and norms live`."""
    live = provenance.get("response") == "linear"
    attention = "attention and norms " + ("live" if live else "held")
    return attention + (" and errors answering" if provenance.get("errors") == "linear" else "")


def of_response(provenance: Mapping[str, Any]) -> str:
    """What the edges of a graph are where they are no shares of what is read; empty where they are."""
    errors = provenance.get("errors") == "linear"
    if provenance.get("response") != "linear" and not errors:
        return ""
    how = answering(provenance)
    return (
        f"Edges are derivatives with {how}: how fast a target moves as its source is scaled up. They do not add up to "
        "what the target reads. Tests of the graph claim and of direct edges are at small doses, with the same."
        + (
            " Errors answer as their MLPs do, so that totals are the model's own at small doses whatever the "
            "dictionaries; what passed by errors is no feature's, and explains nothing."
            if errors
            else ""
        )
    )


def of_passing(provenance: Mapping[str, Any]) -> str:
    """What the dictionaries' Jacobian agreement means for a graph's totals; empty where none was measured.

    provenance: a graph's, whose `dictionaries` may have an `agreement` (`transcoders.evaluation.Agreement.summary`).
    """
    dictionaries = provenance.get("dictionaries")
    found = dictionaries.get("agreement") if isinstance(dictionaries, Mapping) else None
    found = found if isinstance(found, Mapping) else {}
    stated = [found.get(name) for name in ("cosine", "norm_ratio", "reach", "measured")] if found else []
    if provenance.get("errors") == "linear":
        return ""
    figures = [figure for figure in stated if isinstance(figure, int | float) and abs(figure) < _MOST]
    if len(figures) < 4:
        return ""
    cosine, ratio, reach, measured = figures
    share = f"This replacement passes on {100 * ratio:.0f} % of a small change (cosine {cosine:.2f})"
    if reach >= measured:
        return f"{share}; totals along all its paths keep a cosine of .9 with the model's."
    hops = "any MLP" if reach < 1 else "more than one MLP" if reach < 2 else f"more than {reach:.0f} MLPs"
    return f"{share}; totals along paths through {hops} are not to be trusted."
