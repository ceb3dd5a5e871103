"""What was found of the edges of a graph in Neuronpedia's JSON, written into that JSON; everything else stays.

Of each edge under the key `circuitsae` of its link, of the whole under `metadata.circuitsae.tested`: keys that the
schema does not name, which Neuronpedia and circuit-tracer pass over and `read_graph` understands.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from circuitsae.graph.attribution_graph import AttributionGraph
from circuitsae.graph.checking import Limits, MalformedError, parse_json, read_bytes
from circuitsae.graph.exchange import extras, neuronpedia
from transcoders.errors import FileFormatError
from transcoders.files import write_file


def read_document(path: str | Path, *, limits: Limits | None = None) -> tuple[dict[str, Any], AttributionGraph]:
    """A file of Neuronpedia's form as it is, and as a graph. Raises `FileFormatError` for any other."""
    path, limits = Path(path).expanduser(), limits or Limits()
    try:
        document = parse_json(read_bytes(path, limits), limits)
        if not neuronpedia.recognises(document):
            raise MalformedError(f"it has no {neuronpedia.NAME} nodes and links")
        return document, neuronpedia.read(document, path.name, limits)
    except MalformedError as error:
        raise FileFormatError(
            f"{path} is no graph that verdicts can be written into: {error}; give JSON of Neuronpedia or "
            "circuit-tracer, with nodes and links."
        ) from error


def with_verdicts(
    document: Mapping[str, Any], graph: AttributionGraph, annotated: AttributionGraph, about: Mapping[str, Any]
) -> dict[str, Any]:
    """The document with the notes of `annotated`, which has nodes of `graph`, the document's own; earlier ones go.

    Notes that our own export wrote on links, where verdicts of another validation may be, go as well.
    """
    names = {node.id: record["node_id"] for node, record in zip(graph.nodes, document["nodes"], strict=True)}
    metadata = dict(document.get("metadata") or {})
    columns = set() if annotated.edge_notes is None else set(annotated.edge_notes.columns) - {"source", "target"}
    gone = {extras.OWN, *(columns if extras.OWN in metadata else ())}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for source, target, _, notes in extras.edges(annotated):
        ends = names[annotated.nodes[source].id], names[annotated.nodes[target].id]
        found[ends] = {key: value for key, value in notes.items() if key in columns}
    links = []
    for link in document["links"]:
        own = found.get((link["source"], link["target"]))
        kept = {key: value for key, value in link.items() if key not in gone}
        links.append(kept | ({extras.OWN: own} if own else {}))
    metadata[extras.OWN] = {**(metadata.get(extras.OWN) or {}), extras.TESTED: dict(about)}
    return {**document, "metadata": metadata, "links": links}


def write_document(document: Mapping[str, Any], path: str | Path) -> Path:
    """Write a document; returns the path."""
    path = Path(path).expanduser()
    write_file(path, json.dumps(document, allow_nan=False, ensure_ascii=False).encode())
    return path
