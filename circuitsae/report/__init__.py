"""What a reader sees: one offline HTML page per attribution graph, and a plain plotly figure for notebooks.

Nothing here knows a model or imports torch: a saved graph draws on a machine without weights. `data` turns a graph into
the numbers the page needs, `claims` what tests found of its edges, `cards` feature cards, labels and suggested groups;
`layout` places the nodes, `page` assembles `static/` into one file, `compare` puts two graphs on one page, `index`
lists a folder of graphs, `browser` makes pages of feature cards, `figure` draws a graph's strongest edges or a small
table for notebooks. `circuit_picture` draws a circuit for a paper: of a graph (`circuit_of_graph`), or of heads.
"""

from circuitsae.graph.supernodes import CardsLike
from circuitsae.report.browser import write_browser
from circuitsae.report.cards import LedgerLike
from circuitsae.report.circuit_drawing import CircuitPicture
from circuitsae.report.circuit_of_graph import circuit_picture
from circuitsae.report.claims import ValidationLike
from circuitsae.report.compare import compare_html
from circuitsae.report.data import GraphLike
from circuitsae.report.figure import summary_html, to_figure
from circuitsae.report.index import write_index
from circuitsae.report.page import PlotlyJS, write_html

__all__ = [
    "CardsLike",
    "CircuitPicture",
    "GraphLike",
    "LedgerLike",
    "PlotlyJS",
    "ValidationLike",
    "circuit_picture",
    "compare_html",
    "summary_html",
    "to_figure",
    "write_browser",
    "write_html",
    "write_index",
]
