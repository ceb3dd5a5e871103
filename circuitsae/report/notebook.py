"""Pages in a notebook's cell: in a frame of their own, without a server, a file or a request.

The frame has no origin: its page can neither read the notebook nor run anything in it.
"""

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from circuitsae.report.cells import summary_html
from circuitsae.report.data import GraphLike
from circuitsae.report.page import PlotlyJS, assemble, document
from transcoders.errors import InputError

if TYPE_CHECKING:
    from circuitsae.report.widget import GraphWidget

MOST_BYTES = 5_000_000
"""Of a page that a graph shows by itself: a notebook keeps its outputs."""
MOST_EDGES = 50_000
"""Of a graph that is drawn unasked, which takes a second."""
HEIGHT = 780


@dataclass(frozen=True)
class Shown:
    """A piece of HTML that a notebook shows as the value of a cell."""

    html: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"Shown({len(self.html):,} characters of HTML, which a notebook draws)"


def framed(page: str, *, height: int = HEIGHT, title: str) -> str:
    """A whole page as an element that holds it: it can run its own scripts, save files, and nothing else."""
    source = page.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    style = f"width:100%;height:{int(height)}px;border:1px solid #8884;border-radius:4px"
    return (
        f'<iframe title="{html.escape(title)}" sandbox="allow-scripts allow-downloads" allow="clipboard-write" '
        f'style="{style}" srcdoc="{source}"></iframe>'
    )


def show(graph: GraphLike, *, height: int = HEIGHT, plotlyjs: PlotlyJS = "inline", **options: Any) -> Shown:
    """The page of `graph` in a notebook's cell; the other options are those of `write_html`.

    `plotlyjs="cdn"` makes the output a megabyte smaller, and needs the network to be seen. Raises what `write_html`
    raises, and `InputError` for a `plotlyjs` that a cell cannot use.
    """
    check_source(plotlyjs)
    data = document(graph, **options)
    return Shown(framed(assemble(data, plotlyjs), height=height, title=data["title"]))


def graph_html(graph: GraphLike) -> str:
    """What a graph shows as the value of a cell: its page, or where that would be too large its `summary_html`."""
    edges = len(graph.edges_frame())
    if edges <= MOST_EDGES and len(made := show(graph).html) <= MOST_BYTES:
        return made
    hint = (
        f"With {edges:,} edges its page is too large to be drawn unasked: graph.prune() keeps what carries the answer, "
        "graph.show() draws it here, graph.write_html(path) writes it to a file."
    )
    return f"{summary_html(graph)}<p>{hint}</p>"


def interactive(
    graph: GraphLike, *, height: int = HEIGHT, plotlyjs: PlotlyJS = "inline", **options: Any
) -> "GraphWidget":
    """The page of `graph` as a widget whose choices Python sees and sets; see `circuitsae.report.widget.GraphWidget`.

    Options as in `show`. Raises `InputError` where anywidget is not installed.
    """
    check_source(plotlyjs)
    try:
        from circuitsae.report.widget import GraphWidget
    except ImportError as error:
        raise InputError(
            f"graph.interactive() needs a package that is not installed ({error}): pip install 'circuitsae[notebook]'; "
            "graph.show() draws the same page without it."
        ) from error
    return GraphWidget(graph, document(graph, **options), height=height, plotlyjs=plotlyjs)


def check_source(plotlyjs: PlotlyJS) -> None:
    """Raises `InputError` for the one place that a page in a cell cannot load from."""
    if plotlyjs == "directory":
        raise InputError(
            "plotlyjs='directory' is not for a notebook's cell, which has no folder; use 'inline' or 'cdn'."
        )
