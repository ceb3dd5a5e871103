"""plotly.js as our pages carry it: its own basic bundle, a quarter of the whole, which draws all that we draw.

`vendor/` holds the file as plotly publishes it (npm package `plotly.js-basic-dist-min`) and its licence, MIT.
"""

import html
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from transcoders.files import write_file

if TYPE_CHECKING:
    import plotly.graph_objects as go

BUNDLE_FILE = "plotly-basic-4.1.1.min.js"
BUNDLE_URL = f"https://cdn.plot.ly/{BUNDLE_FILE}"
"""Where plotly serves the same file."""
_DRAWS = {"scatter", "bar", "pie"}


@cache
def basic_bundle() -> str:
    """The source of plotly.js with the trace types scatter, bar and pie."""
    return resources.files("transcoders").joinpath("vendor", BUNDLE_FILE).read_text(encoding="utf-8")


def bundle_for(*figures: "go.Figure") -> str:
    """The source of a plotly.js that draws these figures: the whole one only for trace types that need it."""
    from plotly.offline import get_plotlyjs

    types = {trace.type for figure in figures for trace in figure.data}  # pyright: ignore[reportAttributeAccessIssue]
    return basic_bundle() if types <= _DRAWS else get_plotlyjs()


def write_figure(figure: "go.Figure", path: Path) -> None:
    """Write a figure as a page that opens without the network."""
    title = html.escape(str(figure.layout.title.text or "Figure"))
    drawn = figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False})
    head = f'<head><meta charset="utf-8"><title>{title}</title><script>{bundle_for(figure)}</script></head>'
    write_file(path, f'<!doctype html><html lang="en" data-ready>{head}<body>{drawn}</body></html>')
