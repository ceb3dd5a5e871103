"""Attribution graphs as NetworkX graphs whose attributes are all numbers and text: what GraphML and GEXF can hold.

Every text is written as a JSON string, in quotes: XML cannot hold control characters, and readers drop empty texts and
fold line ends. Node attributes: `kind`, `layer`, `pos`, `index`, `text`, and the figures that are there; edge
attributes: `weight` and what validation found. Missing figures are left out. `circuitsae`, an attribute of the graph,
has tokens, token ids, scores and provenance as JSON.

Read: also graphs of others. An attribute under a name of Neuronpedia's or EleutherAI's files counts; what is missing is
guessed from the shape (layer: steps from the first node; position 0) and said in the provenance.

XML of strangers: no entities, one encoding, and one sentence for whatever a reader trips over.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import networkx as nx
import numpy as np

from circuitsae.graph.attribution_graph import AttributionGraph
from circuitsae.graph.checking import (
    Limits,
    MalformedError,
    mapping,
    number,
    plain,
    present,
    sequence,
    share,
    shown,
    text,
    whole,
)
from circuitsae.graph.exchange import extras
from circuitsae.graph.exchange.findings import NODE_FIGURES, Edge, Findings, assemble, check_counts
from circuitsae.graph.nodes import Node, NodeKind
from circuitsae.graph.reading import read_reading, reading_of

NETWORKX_ERRORS = (
    nx.NetworkXException,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    RecursionError,
)
"""What NetworkX's readers raise on files that are not what they expect."""
_DECLARED = re.compile(rb"""<\?xml[^>]*?encoding\s*=\s*["']([^"']*)["']""")
_FIRST_TAG = re.compile(rb"<([A-Za-z_][\w.:-]*)")


def check_xml(content: bytes, limits: Limits) -> None:
    """Raises `MalformedError` for files with entities, with too many tags, or not in UTF-8."""
    limits.check("values", content.count(b"<") + content.count(b"="))
    declared = _DECLARED.search(content[:200])
    if declared and declared[1].lower() not in (b"utf-8", b"us-ascii", b"ascii"):
        raise MalformedError("its XML is not in UTF-8; save it as UTF-8")
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MalformedError(f"it is not text in UTF-8 (byte {error.start})") from error
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise MalformedError("its XML defines entities, which can grow without bounds; remove its DOCTYPE")


def first_tag(content: bytes) -> str:
    """The name of the first element, without its prefix; empty where there is none."""
    found = _FIRST_TAG.search(content[:10_000])
    return found[1].decode("utf-8", "replace").rsplit(":")[-1].lower() if found else ""


def require_simple(source: nx.Graph) -> None:
    if source.is_multigraph():
        raise MalformedError("it has several edges between the same two nodes; expected each edge once")


def xml_complaint(form: str, error: Exception) -> str:
    """What NetworkX or the XML parser said, as one short line."""
    said = " ".join(ascii(str(error) or type(error).__name__).strip("'\"").split())
    return f"it is not whole and correct {form} ({said[:120]})"


NAME = "networkx"
_OTHER_NAMES = {
    "kind": ("feature_type", "node_type"),
    "layer": ("layer_index",),
    "pos": ("ctx_idx", "token_position"),
    "index": ("feature", "feature_index"),
    "text": ("clerp", "token_str", "label"),
    "probability": ("token_prob",),
}
_KINDS = {
    **{str(kind): kind for kind in NodeKind},
    "embedding": NodeKind.TOKEN,
    "mlp reconstruction error": NodeKind.ERROR,
    "InputNode": NodeKind.TOKEN,
    "ErrorNode": NodeKind.ERROR,
    "SkipNode": NodeKind.BIAS,
    "OutputNode": NodeKind.LOGIT,
}
_FIGURES = ("activation", "pre_activation", "bias", "probability", *NODE_FIGURES)
_UNWRITABLE = re.compile("[\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


# writing


def to_attributed(graph: AttributionGraph) -> tuple[nx.DiGraph, str]:
    """A graph for an XML writer, and what is to be said of it as a whole, as JSON."""
    document, extra = extras.carried(graph, NAME)
    out = nx.DiGraph(**{key: _written(value) for key, value in document.items()})
    names: list[str] = []
    arrays = {name: getattr(graph, name) for name in NODE_FIGURES}
    for row, node in enumerate(graph.nodes):
        beside = dict(extra.get(node.id, {}))
        names.append(str(beside.pop("name", node.id)))
        figures = {name: float(getattr(node, name)) for name in _FIGURES if name not in arrays}
        figures |= {name: float(array[row]) for name, array in arrays.items()}
        attributes: dict[str, Any] = {
            "label": _label(node),
            **{key: _written(value) for key, value in beside.items()},
            "kind": str(node.kind),
            "layer": node.layer,
            "pos": node.pos,
            "index": node.index,
            "text": quoted(node.text),
            **{key: _written(value) for key, value in reading_of(node).items()},
        }
        out.add_node(names[-1], **attributes, **{k: v for k, v in figures.items() if np.isfinite(v)})
    for source, target, weight, notes in extras.edges(graph):
        out.add_edge(
            names[source], names[target], weight=weight, **{f"note_{k}": _written(v) for k, v in notes.items()}
        )
    own = extras.own_document(graph, NAME) | {"tokens": list(graph.tokens)}
    return out, json.dumps(own, ensure_ascii=True, allow_nan=False)


def quoted(value: str) -> str:
    """A JSON string without any character that XML cannot hold."""
    written = json.dumps(value, ensure_ascii=False)
    return _UNWRITABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", written)


def _written(value: Any) -> Any:
    """Numbers as they are (floats: an attribute must have one type), all else as JSON."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return quoted(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=True)


def _label(node: Node) -> str:
    return f"{node.id} {quoted(node.text)}" if node.text else node.id


# reading


def from_attributed(source: nx.Graph, own_json: str | None, file: str, form: str, limits: Limits) -> AttributionGraph:
    """The graph of what an XML reader found. Raises `MalformedError`."""
    if not source.is_directed():
        raise MalformedError("its edges have no direction; expected a directed graph, from source to target")
    check_counts(limits, source.number_of_nodes(), source.number_of_edges())
    own = _own(own_json, limits)
    records = {str(name): _record(data) for name, data in source.nodes(data=True)}
    missing = [
        name for name in ("kind", "layer", "pos") if any(record.get(name) is None for record in records.values())
    ]
    layers = _depths(source) if "layer" in missing else {}
    for number_, (name, record) in enumerate(records.items()):
        defaults = {"kind": "feature", "layer": layers.get(name, 0), "pos": 0, "index": number_, "text": ""}
        records[name] = record | {key: value for key, value in defaults.items() if record.get(key) is None}
    kinds = {name: _kind(record["kind"]) for name, record in records.items()}
    n_layers = _n_layers(own, records, kinds, limits)
    found = Findings(
        nodes=[_node(name, record, kinds[name], n_layers) for name, record in records.items()],
        names=list(records),
        edges=[_edge(str(s), str(t), data) for s, t, data in source.edges(data=True)],
        tokens=[],
        token_ids=[],
        n_layers=n_layers,
        figures=[_figures(name, record) for name, record in records.items()],
        scores=own.get("scores"),
        provenance={"imported": extras.imported(form, file, None, missing)},
    )
    _add_tokens(found, own, limits)
    if own:
        found.provenance = plain(mapping(own.get("provenance", {}), "provenance"))
    return _with_carried(assemble(found, limits), source, found.names)


def _own(own_json: str | None, limits: Limits) -> dict[str, Any]:
    if not own_json:
        return {}
    limits.check("values", own_json.count(",") + own_json.count("["))
    try:
        return mapping(json.loads(own_json), extras.OWN)
    except (json.JSONDecodeError, RecursionError) as error:
        raise MalformedError(f"its attribute {extras.OWN!r} is not JSON") from error


def _record(data: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes under our names, texts without their quotes."""
    record = {str(key): _read(value) for key, value in data.items()}
    for name, others in _OTHER_NAMES.items():
        for other in others:
            if record.get(name) is None and record.get(other) is not None:
                record[name] = record[other]
    return record


def _read(value: Any) -> Any:
    if isinstance(value, str) and value[:1] in ('"', "[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return {"null": None, "true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _depths(source: nx.Graph) -> dict[str, int]:
    """Steps from the first node to each, along the longest way."""
    if not nx.is_directed_acyclic_graph(source):
        raise MalformedError("its edges run in a circle; expected each to lead from a lower layer to a higher one")
    return {
        str(name): depth for depth, part in enumerate(nx.topological_generations(nx.DiGraph(source))) for name in part
    }


def _kind(value: Any) -> NodeKind:
    name = text(value, "the kind of a node")
    return _KINDS.get(name, NodeKind.ERROR if "error" in name.lower() else NodeKind.FEATURE)


def _layer(record: dict[str, Any], what: str) -> int:
    return -1 if record["layer"] == "E" else whole(record["layer"], f"the layer of {what}", least=-1)


def _n_layers(own: dict[str, Any], records: dict[str, Any], kinds: dict[str, NodeKind], limits: Limits) -> int:
    if "n_layers" in own:
        return whole(own["n_layers"], "n_layers", most=limits.layers)
    inner = [NodeKind.FEATURE, NodeKind.ERROR, NodeKind.BIAS]
    return max((_layer(record, name) + 1 for name, record in records.items() if kinds[name] in inner), default=0)


def _node(name: str, record: dict[str, Any], kind: NodeKind, n_layers: int) -> Node:
    what = f"node {shown(name)}"
    reading = read_reading({**record, "kind": kind}, what) if record.get("explained") is True else {}
    layer = {NodeKind.TOKEN: -1, NodeKind.LOGIT: None if reading.get("vector") else n_layers}.get(kind)
    layer = _layer(record, what) if layer is None else layer
    pos = whole(record["pos"], f"pos of {what}", least=-1)
    least = 0 if kind is NodeKind.FEATURE else -1
    index = -1 if kind in (NodeKind.ERROR, NodeKind.BIAS) else whole(record["index"], f"index of {what}", least)
    figures = {key: number(record.get(key), f"{key} of {what}") for key in ("activation", "pre_activation")}
    bias = number(record.get("bias", 0.0), f"bias of {what}")
    probability = share(record.get("probability"), f"probability of {what}", optional=True)
    if kind is NodeKind.LOGIT and not reading:
        probability = float(np.nan_to_num(probability))
    label = record["text"] if isinstance(record["text"], str) else ""
    label = "" if kind is NodeKind.ERROR else text(label, f"text of {what}")
    return Node(kind, layer, pos, index, label, bias=bias, probability=probability, **figures, **reading)


def _figures(name: str, record: dict[str, Any]) -> dict[str, float]:
    found = {key: number(record.get(key), f"{key} of node {shown(name)}") for key in NODE_FIGURES}
    return {key: value for key, value in found.items() if not np.isnan(value)}


def _edge(source: str, target: str, data: Mapping[str, Any]) -> Edge:
    what = f"the weight of the edge from {shown(source)} to {shown(target)}"
    notes = {str(key).removeprefix("note_"): plain(_read(v)) for key, v in data.items() if key not in ("weight", "id")}
    return Edge(source, target, present(_read(data.get("weight", 1.0)), what), notes)


def _add_tokens(found: Findings, own: dict[str, Any], limits: Limits) -> None:
    stated = own.get("tokens")
    last = max((node.pos for node in found.nodes), default=-1)
    limits.check("tokens", max(last + 1, len(stated) if isinstance(stated, list) else 0))
    if stated is not None:
        found.tokens = [text(token, "a token") for token in sequence(stated, "tokens")]
        ids = sequence(own.get("token_ids"), "token_ids")
        found.token_ids = [whole(token, "a token id", least=-1) for token in ids]
        return
    found.tokens, found.token_ids = [""] * (last + 1), [-1] * (last + 1)
    for node in found.nodes:
        if node.kind is NodeKind.TOKEN and node.pos >= 0:
            found.tokens[node.pos], found.token_ids[node.pos] = node.text, node.index


def _with_carried(graph: AttributionGraph, source: nx.Graph, names: list[str]) -> AttributionGraph:
    known = {"kind", "layer", "pos", "index", "text", "label", *_FIGURES}
    nodes: dict[str, Any] = {}
    for node, name in zip(graph.nodes, names, strict=True):
        ours = known | set(reading_of(node))
        extra = {str(k): plain(_read(v)) for k, v in source.nodes[name].items() if k not in ours}
        label = _read(source.nodes[name].get("label"))
        if isinstance(label, str) and label not in (_label(node), node.text):
            extra["label"] = text(label, "label")
        if name != node.id:
            extra["name"] = text(name, "a node id")
        if extra:
            nodes[node.id] = extra
    written = {extras.OWN, "node_default", "edge_default", "mode"}
    aside = {str(k): plain(_read(v)) for k, v in source.graph.items() if k not in written}
    return extras.with_provenance(graph, extras.carry(graph.provenance, NAME, aside, nodes))
