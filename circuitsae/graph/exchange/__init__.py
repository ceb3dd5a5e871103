"""Graphs that travel: reading and writing the files of other tools, each format in a module of its own.

`registry` finds out the format of a file and calls its reader; `checking` reads within limits and says in one sentence
what is wrong with a value; `findings` turns what a reader found into an `AttributionGraph`. What a format has no
place for in our graph is carried along (`extras`) and written back. What each format cannot hold is in the docstring
of its module.
"""

from circuitsae.graph.checking import Limits
from circuitsae.graph.exchange.registry import FORMATS, FormatName, read_graph, write_graph

__all__ = ["FORMATS", "FormatName", "Limits", "read_graph", "write_graph"]
