"""GraphML, by NetworkX; attributes as in `attributed`.

Cannot hold: nothing of an attribution graph is lost; parallel edges, undirected edges and graphs inside nodes, which
GraphML has and attribution graphs do not, are refused.
"""

import io
from xml.etree.ElementTree import ParseError

import networkx as nx

from circuitsae.graph.attribution_graph import AttributionGraph
from circuitsae.graph.checking import Limits, MalformedError
from circuitsae.graph.exchange import extras
from circuitsae.graph.exchange.attributed import (
    NETWORKX_ERRORS,
    from_attributed,
    require_simple,
    to_attributed,
    xml_complaint,
)

NAME = "graphml"


def recognises(root: str) -> bool:
    """Whether a file whose first tag has this name is in this format."""
    return root == "graphml"


def read(content: bytes, file: str, limits: Limits) -> AttributionGraph:
    """The graph of a file's content. Raises `MalformedError`."""
    try:
        source = nx.read_graphml(io.BytesIO(content))
    except (ParseError, *NETWORKX_ERRORS) as error:
        raise MalformedError(xml_complaint("GraphML", error)) from error
    require_simple(source)
    own = source.graph.get(extras.OWN)
    return from_attributed(source, own if isinstance(own, str) else None, file, NAME, limits)


def write(graph: AttributionGraph) -> bytes:
    """The file of a graph."""
    attributed, own = to_attributed(graph)
    attributed.graph[extras.OWN] = own
    buffer = io.BytesIO()
    nx.write_graphml_xml(attributed, buffer, encoding="utf-8", prettyprint=True)
    return buffer.getvalue()
