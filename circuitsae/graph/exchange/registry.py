"""Which format a file is in, and the way to each format's reader and writer."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from circuitsae.graph.attribution_graph import AttributionGraph
from circuitsae.graph.checking import Limits, MalformedError, parse_json, read_bytes
from circuitsae.graph.exchange import eleuther, gexf, graphml, neuronpedia
from circuitsae.graph.exchange.attributed import check_xml, first_tag
from transcoders.errors import FileFormatError, InputError
from transcoders.files import write_file

FormatName = Literal["neuronpedia", "eleuther", "graphml", "gexf"]


@dataclass(frozen=True)
class Format:
    """One way to store a graph in a file."""

    syntax: Literal["json", "xml"]
    suffix: str
    recognises: Callable[[Any], bool]
    """Whether a JSON document, or a file whose first XML tag has this name, claims to be in this format."""
    marker: str
    """What it is recognised by, for messages."""
    read: Callable[[Any, str, Limits], AttributionGraph]
    """From a JSON document or the bytes of an XML file."""
    write: Callable[[AttributionGraph], Any]


FORMATS: dict[FormatName, Format] = {
    "neuronpedia": Format(
        "json",
        ".json",
        neuronpedia.recognises,
        "JSON with nodes and links",
        neuronpedia.read,
        neuronpedia.write,
    ),
    "eleuther": Format(
        "json", ".json", eleuther.recognises, "JSON with nodes and edges", eleuther.read, eleuther.write
    ),
    "graphml": Format("xml", ".graphml", graphml.recognises, "XML <graphml>", graphml.read, graphml.write),
    "gexf": Format("xml", ".gexf", gexf.recognises, "XML <gexf>", gexf.read, gexf.write),
}


def read_graph(path: str | Path, *, limits: Limits | None = None) -> AttributionGraph:
    """The attribution graph in a file of another tool, whatever of it the file has.

    What the file does not say is NaN or computed from the edges that are there; `provenance["imported"]` says where the
    graph is from and what was missing. What a graph has no place for is kept in `provenance["carried"]`.
    Raises `FileFormatError`, with one sentence, for a file that is in no known format, cut off, malformed, or larger
    than `limits`.
    """
    path, limits = Path(path).expanduser(), limits or Limits()
    try:
        return _read(path, limits)
    except MalformedError as error:
        raise FileFormatError(f"{path} holds no graph that can be read: {error}.") from error


def write_graph(graph: AttributionGraph, path: str | Path, *, format: FormatName | None = None) -> Path:
    """Write a graph to a file for another tool; returns the path.

    format: by default what the file's suffix says: `.graphml`, `.gexf`, `.json` (Neuronpedia's). What a format cannot
    hold is in the docstring of its module.
    """
    path = Path(path).expanduser()
    name = format or _format_of_suffix(path)
    if name not in FORMATS:
        raise InputError(f"Unknown format {name!r}; graphs are written as {', '.join(map(repr, FORMATS))}.")
    written = FORMATS[name].write(graph)
    content = written if isinstance(written, bytes) else json.dumps(written, allow_nan=False).encode()
    write_file(path, content)
    return path


def _read(path: Path, limits: Limits) -> AttributionGraph:
    content = read_bytes(path, limits)
    start = content[:1000].removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    source: Any
    claim: Any
    if start == b"<":
        check_xml(content, limits)
        syntax, source, claim = "xml", content, first_tag(content)
    elif start in (b"{", b"["):
        syntax = "json"
        source = claim = parse_json(content, limits)
    else:
        raise MalformedError(
            f"{'it is empty' if not content else 'it is neither JSON nor XML'}; expected {_expected()}"
        )
    for form in FORMATS.values():
        if form.syntax == syntax and form.recognises(claim):
            return form.read(source, path.name, limits)
    found = f"the tag <{claim[:40]}>" if syntax == "xml" else f"the keys {', '.join(sorted(claim)[:6])[:80]!a}"
    raise MalformedError(f"it has {found}; expected {_expected()}")


def _expected() -> str:
    return "one of (" + "; ".join(f"{name}: {form.marker}" for name, form in FORMATS.items()) + ")"


def _format_of_suffix(path: Path) -> FormatName:
    for name, form in FORMATS.items():
        if form.suffix == path.suffix.lower():
            return name
    known = ", ".join(dict.fromkeys(form.suffix for form in FORMATS.values()))
    raise InputError(f"{path.name!r} has no suffix that says its format; end it in one of {known}, or name a format.")
