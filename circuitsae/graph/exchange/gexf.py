"""GEXF 1.2, the format of Gephi, by NetworkX; attributes as in `attributed`.

GEXF has no attributes of the graph: what is said of it as a whole is in `<meta><description>`. Cannot hold: of a graph
made by others, attributes of the whole graph; nothing of ours. Parallel and undirected edges are refused.
"""

import io
from typing import Any
from xml.etree import ElementTree

import networkx as nx
from networkx.readwrite.gexf import GEXFWriter

from circuitsae.graph.attribution_graph import AttributionGraph
from circuitsae.graph.checking import Limits, MalformedError
from circuitsae.graph.exchange.attributed import (
    NETWORKX_ERRORS,
    from_attributed,
    require_simple,
    to_attributed,
    xml_complaint,
)

NAME = "gexf"


def recognises(root: str) -> bool:
    """Whether a file whose first tag has this name is in this format."""
    return root == "gexf"


def read(content: bytes, file: str, limits: Limits) -> AttributionGraph:
    """The graph of a file's content. Raises `MalformedError`."""
    try:
        source = nx.read_gexf(io.BytesIO(content))
        description = ElementTree.fromstring(content).findtext("{*}meta/{*}description")
    except (ElementTree.ParseError, *NETWORKX_ERRORS) as error:
        raise MalformedError(xml_complaint("GEXF", error)) from error
    require_simple(source)
    ours = description and description.startswith('{"n_layers"')
    return from_attributed(source, description if ours else None, file, NAME, limits)


def write(graph: AttributionGraph) -> bytes:
    """The file of a graph."""
    attributed, own = to_attributed(graph)
    writer: Any = GEXFWriter(encoding="utf-8", prettyprint=True, version="1.2draft")
    writer.add_graph(nx.DiGraph(attributed))
    ElementTree.SubElement(writer.xml.find("meta"), "description").text = own
    return ('<?xml version="1.0" encoding="utf-8"?>\n' + str(writer)).encode()
