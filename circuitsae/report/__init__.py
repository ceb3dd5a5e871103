"""What a reader sees: one offline HTML page per attribution graph, and a plain plotly figure for notebooks.

Nothing here knows a model or imports torch: a saved graph draws on a machine without weights. `data` turns a graph into
the numbers the page needs, `claims` what tests found of its edges, `cards` feature cards, labels and suggested groups;
`layout` places the nodes, `page` assembles `static/` into one file, `compare` puts two graphs on one page, `index`
lists a folder of graphs, `browser` makes pages of feature cards, `figure` draws a graph's strongest edges,
`circuit_picture` a circuit for a paper: of a graph (`circuit_of_graph`), or of heads. `notebook` puts a page into a
notebook's cell, `widget` in step with Python, `cells` makes tables for one.
"""

from circuitsae.graph.supernodes import CardsLike
from circuitsae.report.browser import write_browser
from circuitsae.report.cards import LedgerLike
from circuitsae.report.cells import (
    card_html,
    cards_html,
    continuations_html,
    outcome_html,
    summary_html,
    validation_html,
)
from circuitsae.report.circuit_drawing import CircuitPicture
from circuitsae.report.circuit_of_graph import circuit_picture
from circuitsae.report.claims import ValidationLike
from circuitsae.report.compare import compare_html
from circuitsae.report.data import GraphLike
from circuitsae.report.figure import to_figure
from circuitsae.report.index import write_index
from circuitsae.report.notebook import Shown, graph_html, interactive, show
from circuitsae.report.page import PlotlyJS, write_html

__all__ = [
    "CardsLike",
    "CircuitPicture",
    "GraphLike",
    "LedgerLike",
    "PlotlyJS",
    "Shown",
    "ValidationLike",
    "card_html",
    "cards_html",
    "circuit_picture",
    "compare_html",
    "continuations_html",
    "graph_html",
    "interactive",
    "outcome_html",
    "show",
    "summary_html",
    "to_figure",
    "validation_html",
    "write_browser",
    "write_html",
    "write_index",
]
