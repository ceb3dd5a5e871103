"""The folder that a graph is written to: its name, its files, and what must hold of it whatever the model does."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from circuitsae.commands.shared import write_page
from transcoders.errors import CheckFailedError
from transcoders.files import new_files, remove_folder

MEASURED = "measured"
"""In a graph's folder while its edges are tested: the effects that are measured already."""
IDENTITY_TOLERANCE = 1e-4
DERIVATIVE_TOLERANCE = 1e-2
"""Differences of two runs in float32 have two digits less."""
_FIRST_IDENTITY = (
    ("The frozen model differs from the graph (share of the largest effect)", IDENTITY_TOLERANCE),
    ("Effects of small changes differ from the graph (share of the largest effect)", DERIVATIVE_TOLERANCE),
)


def slug(prompt: str) -> str:
    """The folder's name of a prompt: its first words."""
    words = re.findall(r"\w+", prompt.lower())[:8]
    return "-".join(words)[:60] or "prompt"


def write_folder(
    graph: Any,
    check: Any,
    folder: Path,
    *,
    page: bool = True,
    edited: bool = False,
    more: dict[str, bytes] | None = None,
) -> Path:
    """Graph, validation, page and `more` files, all of them or none; of an earlier graph nothing is left.

    `edited`: it is the folder's own graph, whose labels, pins, groups and notes stay. Returns where the page is, or
    would be.
    """
    from circuitsae.serving.edits import FILES

    stale = ["validation.json", *([] if page else ["graph.html"]), *([] if edited else FILES)]
    with new_files(folder, without=stale) as temporary:
        graph.save(temporary)
        if check is not None:
            check.save(temporary / "validation.json")
        if page:
            edges = None if check is None else check.edges
            write_page(graph, temporary / "graph.html", validation=edges, folder=folder, edited=edited)
        for name, content in (more or {}).items():
            (temporary / name).write_bytes(content)
    return folder / "graph.html"


@contextmanager
def measuring(folder: Path) -> Iterator[Path]:
    """Where effects are kept while the edges of a graph are tested: gone in the end, unless Ctrl-C or a kill is it."""
    kept = folder / MEASURED
    try:
        yield kept
    except Exception:
        _forget(kept)
        raise
    _forget(kept)


def _forget(kept: Path) -> None:
    if kept.is_dir():
        remove_folder(kept)


def check_identities(check: Any, dtype: str) -> None:
    """Raises `CheckFailedError` where what must be equal whatever the model does is off by more than rounding."""
    if check is None or dtype == "bfloat16":
        return
    logit_error = 0.0 if math.isnan(check.logit_error) else check.logit_error  # cannot run layer by layer
    merged = check.errors == "linear" and math.isnan(check.frozen_error)  # features with the errors
    first = 0.0 if merged else check.frozen_error
    for what, tolerance, error in (
        (*_FIRST_IDENTITY[check.derivatives], first),
        ("The replacement model's logits with error nodes differ from the model's", IDENTITY_TOLERANCE, logit_error),
    ):
        if not error <= tolerance:
            raise CheckFailedError(
                f"{what} by {error:.1e}, more than {tolerance:.0e}; "
                "try --dtype float64, and report it if that does not help."
            )
