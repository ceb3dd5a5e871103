"""What a reader sees: one offline HTML page per attribution graph, and a plain plotly figure for notebooks.

Nothing here knows a model or imports torch: a saved graph draws on a machine without weights. `data` turns a graph into
the numbers the page needs, `cards` does so for feature cards, labels and suggested groups, `layout` places the nodes,
`page` assembles `static/` into one file, `figure` draws the strongest edges with plotly alone, and `sample` makes up a
seeded graph to try them on.
"""

from circuitsae.report.cards import CardsLike, LedgerLike
from circuitsae.report.data import GraphLike, ValidationLike
from circuitsae.report.figure import to_figure
from circuitsae.report.page import PlotlyJS, write_html

__all__ = ["CardsLike", "GraphLike", "LedgerLike", "PlotlyJS", "ValidationLike", "to_figure", "write_html"]
