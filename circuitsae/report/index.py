"""A folder of graphs as one page: a table to search and sort, with a link to the page of each graph."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from circuitsae.graph import AttributionGraph
from circuitsae.graph.attribution_graph import load_graph
from circuitsae.graph.files import Header, load_header
from circuitsae.graph.nodes import NodeKind
from circuitsae.report.beside import pages_of
from circuitsae.report.claims import VERDICTS, verdicts_shown
from circuitsae.report.data import number
from circuitsae.report.page import (
    fill_template,
    hash_source,
    json_for_script,
    page_head,
    policy,
    read_static,
    read_styles,
    write_html,
)
from circuitsae.report.text import visible
from transcoders.errors import CircuitsaeError, InputError
from transcoders.files import write_file

INDEX = "index.html"
PAGE = "graph.html"
_SCRIPTS = ("js/format.js", "js/dom.js", "js/theme.js", "js/ways.js", "js/verdicts.js", "index.js")
_DEPTH = 3
MOST = 10_000
"""Graphs that one page lists."""


def find_graphs(folder: str | Path) -> list[Path]:
    """The folders below `folder`, up to three levels deep, in which a graph was saved, by name."""
    folder = Path(folder)
    return sorted(path.parent for depth in range(1, _DEPTH + 1) for path in folder.glob("*/" * depth + "graph.json"))


def write_index(
    folder: str | Path,
    *,
    title: str | None = None,
    write_page: Callable[[AttributionGraph, Path], Path] | None = write_html,
) -> Path:
    """Write `index.html` in a folder of graphs, and return its path; needs no model.

    One offline page with a row per graph: prompt, model, most probable token, scores, verdicts, sizes, date, and a link
    to the graph's own page, which is written where there is none or the graph was saved since. A graph that cannot be
    read or drawn is listed with the reason. Comparisons, reports and pages of features beside it are linked to.

    Args:
        folder: Where the graphs are, up to three levels deep.
        title: Of the page.
        write_page: What writes a graph's own page; None: no page is written, and graphs without one have no link.

    Raises:
        InputError: no graph in the folder, or more than 10,000.
    """
    folder = Path(folder)
    graphs = find_graphs(folder)
    if not graphs:
        raise InputError(f"There is no graph in {folder}; give a folder with folders that `trace` or `import` wrote.")
    if len(graphs) > MOST:
        raise InputError(f"{folder} has {len(graphs):,} graphs, more than {MOST:,}; give a folder with fewer.")
    data = {
        "title": title or f"Graphs in {folder.resolve().name}",
        "rows": list(_rows(folder, graphs, write_page)),
        "pages": pages_of(folder),
    }
    write_file(folder / INDEX, _page(data))
    return folder / INDEX


def _rows(
    folder: Path, graphs: list[Path], write_page: Callable[[AttributionGraph, Path], Path] | None
) -> Iterator[dict[str, Any]]:
    for graph in graphs:
        name = graph.relative_to(folder).as_posix()
        row = {"name": visible(name), "date": _saved(graph).strftime("%Y-%m-%d %H:%M")}
        try:
            head = load_header(graph)
            page = _own_page(graph, write_page)
        except (CircuitsaeError, OSError) as error:
            yield row | {"problem": visible(str(error), most=None)}
        else:
            below = len(graph.relative_to(folder).parts)
            link = {} if page is None else {"href": f"./{quote(page.relative_to(folder).as_posix())}", "below": below}
            yield row | summary(head) | link


def summary(head: Header) -> dict[str, Any]:
    """What the index says of one graph: texts with everything visible, numbers, null where there is none."""
    tops = [node for node in head.nodes if node.start == node.start and (node.kind is NodeKind.LOGIT or node.explained)]
    best = max(tops, key=lambda node: node.start, default=None)
    claim, verdicts = verdicts_shown(head.edge_notes)
    return {
        "prompt": [visible(token) for token in head.tokens],
        "model": visible(str(head.provenance.get("model") or "")) if head.provenance.get("model") else "",
        "logit": None if best is None else visible(best.text) if best.kind is NodeKind.LOGIT else best.id,
        "probability": None if best is None else number(best.probability),
        "replacement": number(head.scores.replacement),
        "completeness": number(head.scores.completeness),
        "claim": claim,
        "verdicts": {verdict: verdicts.count(verdict) for verdict in VERDICTS if verdict in verdicts},
        "nodes": len(head.nodes),
        "edges": head.n_edges,
    }


def _own_page(graph: Path, write_page: Callable[[AttributionGraph, Path], Path] | None) -> Path | None:
    page = graph / PAGE
    if not page.is_file() or page.stat().st_mtime < (graph / "graph.json").stat().st_mtime:
        if write_page is None:
            return None
        write_page(load_graph(graph), page)
    return page


def _saved(graph: Path) -> datetime:
    return datetime.fromtimestamp((graph / "graph.json").stat().st_mtime, tz=UTC)


def _page(data: dict[str, Any]) -> str:
    script, style = "\n".join(map(read_static, _SCRIPTS)), read_styles("base", "paper") + read_static("index.css")
    head = page_head(data["title"], policy(hash_source(script), styles=hash_source(style)), style, "graphs")
    return fill_template("index.html", {"head": head, "data": json_for_script(data), "script": script})
