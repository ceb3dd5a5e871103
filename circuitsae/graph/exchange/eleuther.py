"""The graph JSON of EleutherAI/attribute, `{nodes, edges}`, each edge with a copy of its two nodes.

Read: what a transcoder's skip connection adds becomes a node beside the others (a bias named `skip`), which takes no
part in influence. The file numbers logits by rank and has no token ids: our index of a logit is its rank. Its logits
are not centred and so are no pre-activations of ours; they travel in the provenance.

Cannot hold: bias nodes other than `skip` (their edges are added to the target's `rest`). What the format does not name
(token ids, labels of features, pre-activations, influence, scores, provenance) is written under a key `circuitsae`, as
in `neuronpedia`.
"""

import re
from typing import Any

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
from circuitsae.graph.exchange.findings import Edge, Findings, assemble, check_counts
from circuitsae.graph.nodes import Node, NodeKind

NAME = "eleuther"
_SKIP = "skip"
_TYPES = {
    NodeKind.TOKEN: "InputNode",
    NodeKind.FEATURE: "IntermediateNode",
    NodeKind.ERROR: "ErrorNode",
    NodeKind.BIAS: "SkipNode",
    NodeKind.LOGIT: "OutputNode",
}
_KINDS = {name: kind for kind, name in _TYPES.items()}


def recognises(document: dict[str, Any]) -> bool:
    return "nodes" in document and "edges" in document


# reading


def read(document: dict[str, Any], file: str, limits: Limits) -> AttributionGraph:
    """The graph of a parsed document. Raises `MalformedError`."""
    raw = [mapping(node, f"node {i}") for i, node in enumerate(sequence(document.get("nodes"), "nodes"))]
    edges = sequence(document.get("edges"), "edges")
    check_counts(limits, len(raw), len(edges))
    own = mapping(document.get(extras.OWN, {}), extras.OWN)
    kinds = [_kind(node, f"node {i}") for i, node in enumerate(raw)]
    tokens, token_ids = _tokens(raw, kinds, own, limits)
    n_layers = _n_layers(raw, kinds, own, limits)
    figures = [extras.read_figures(node.get(extras.OWN), f"node {i}") for i, node in enumerate(raw)]
    nodes = [
        extras.with_reading(
            _node(record, f"node {i}", kind, tokens, token_ids, n_layers, figure), record.get(extras.OWN), f"node {i}"
        )
        for i, (record, kind, figure) in enumerate(zip(raw, kinds, figures, strict=True))
    ]
    missing = ["influence", "token ids", "pre-activations"]
    provenance = {"imported": extras.imported(NAME, file, "EleutherAI/attribute", missing)}
    if extras.OWN in document:
        provenance = plain(mapping(own.get("provenance", {}), "provenance"))
    found = Findings(
        nodes=nodes,
        names=[text(node.get("id"), f"id of node {i}") for i, node in enumerate(raw)],
        edges=[_edge(mapping(edge, f"edge {i}"), f"edge {i}") for i, edge in enumerate(edges)],
        tokens=tokens,
        token_ids=token_ids,
        n_layers=n_layers,
        figures=figures,
        scores=own.get("scores"),
        provenance=provenance,
    )
    return _with_carried(assemble(found, limits), document, raw)


def _kind(record: dict[str, Any], what: str) -> NodeKind:
    name = text(record.get("node_type"), f"node_type of {what}")
    if name not in _KINDS:
        raise MalformedError(f"node_type of {what} is {shown(name)}; expected one of {', '.join(_KINDS)}")
    return _KINDS[name]


def _tokens(
    raw: list[dict[str, Any]], kinds: list[NodeKind], own: dict[str, Any], limits: Limits
) -> tuple[list[str], list[int]]:
    most = limits.tokens - 1
    positions = [
        whole(node.get("token_position"), f"token_position of node {i}", most=most) for i, node in enumerate(raw)
    ]
    tokens = [""] * (max(positions, default=-1) + 1)
    for node, kind, pos in zip(raw, kinds, positions, strict=True):
        if kind is NodeKind.TOKEN:
            tokens[pos] = text(node.get("token_str", ""), "token_str")
    ids = own.get("token_ids")
    if isinstance(ids, list) and len(ids) == len(tokens):
        return tokens, [whole(token, "a token id", least=-1) for token in ids]
    return tokens, [-1] * len(tokens)


def _n_layers(raw: list[dict[str, Any]], kinds: list[NodeKind], own: dict[str, Any], limits: Limits) -> int:
    if "n_layers" in own:
        return whole(own["n_layers"], "n_layers", most=limits.layers)
    highest = 0
    for i, (record, kind) in enumerate(zip(raw, kinds, strict=True)):
        layer = whole(record.get("layer_index"), f"layer_index of node {i}", most=limits.layers)
        if kind is not NodeKind.TOKEN:
            highest = max(highest, layer + (kind is not NodeKind.LOGIT))
    return highest


def _node(
    record: dict[str, Any],
    what: str,
    kind: NodeKind,
    tokens: list[str],
    token_ids: list[int],
    n_layers: int,
    figures: dict[str, float],
) -> Node:
    layer, pos = whole(record.get("layer_index"), f"layer_index of {what}"), int(record["token_position"])
    own: dict[str, Any] = {"pre_activation": figures.get("pre_activation", np.nan), "bias": figures.get("bias", 0.0)}
    match kind:
        case NodeKind.TOKEN:
            return Node(kind, -1, pos, token_ids[pos], tokens[pos])
        case NodeKind.ERROR:
            return Node(kind, layer, pos)
        case NodeKind.BIAS:
            return Node(kind, layer, pos, text=_SKIP)
        case NodeKind.LOGIT:
            token = text(record.get("token_str", ""), f"token_str of {what}")
            probability = share(record.get("probability", 0.0), f"probability of {what}")
            own_index = _own_fields(record, what).get("index")
            rank = re.fullmatch(r"output_\d+_(\d{1,15})", str(record.get("id")))
            stated = own_index if own_index is not None else rank and rank[1]
            index = whole(stated, f"the rank in the id of {what}", least=-1)
            return Node(kind, n_layers, pos, index, token, probability=probability, **own)
    index = whole(record.get("feature_index"), f"feature_index of {what}")
    activation = number(record.get("activation"), f"activation of {what}")
    label = text(_own_fields(record, what).get("text", ""), f"text of {what}")
    return Node(kind, layer, pos, index, label, activation=activation, **own)


def _own_fields(record: dict[str, Any], what: str) -> dict[str, Any]:
    return mapping(record.get(extras.OWN) or {}, f"{extras.OWN} of {what}")


def _edge(record: dict[str, Any], what: str) -> Edge:
    """Either end is a copy of a node, or its id."""
    ends = [record.get(end) for end in ("source", "target")]
    names = [text(end.get("id") if isinstance(end, dict) else end, f"an end of {what}") for end in ends]
    notes = {text(k, "a key"): plain(v) for k, v in record.items() if k not in ("source", "target", "weight")}
    return Edge(names[0], names[1], present(record.get("weight"), f"the weight of {what}"), notes)


def _with_carried(graph: AttributionGraph, document: dict[str, Any], raw: list[dict[str, Any]]) -> AttributionGraph:
    aside = {k: plain(v) for k, v in document.items() if k not in ("nodes", "edges", extras.OWN)}
    nodes: dict[str, Any] = {}
    ranks = _ranks(graph)
    for row, (node, record) in enumerate(zip(graph.nodes, raw, strict=True)):
        if extra := extras.beside(record, _record(graph, row, ranks)):
            nodes[node.id] = extra
    return extras.with_provenance(graph, extras.carry(graph.provenance, NAME, aside, nodes))


# writing


def write(graph: AttributionGraph) -> dict[str, Any]:
    """The document of a graph."""
    document, extra = extras.carried(graph, NAME)
    kept = np.array([n.kind is not NodeKind.BIAS or (n.text == _SKIP and n.pos >= 0) for n in graph.nodes], dtype=bool)
    own, ranks = extras.own_figures(graph, kept), _ranks(graph)
    records: dict[int, dict[str, Any]] = {}
    for row in np.flatnonzero(kept).tolist():
        node = graph.nodes[row]
        records[row] = _record(graph, row, ranks) | extra.get(node.id, {})
    edges = [
        {"source": records[s], "target": records[t], "weight": weight, **notes}
        for s, t, weight, notes in extras.edges(graph)
        if kept[s] and kept[t]
    ]
    nodes = [record | {extras.OWN: _own(graph.nodes[row], own[row])} for row, record in records.items()]
    return {**document, "nodes": nodes, "edges": edges, extras.OWN: extras.own_document(graph, NAME)}


def _own(node: Node, figures: dict[str, float]) -> dict[str, Any]:
    """What the format has no place for: also a logit's token id, how other targets read, and a feature's label."""
    if node.explained:
        return {**figures, **extras.own_reading(node)}
    if node.kind is NodeKind.LOGIT:
        return {**figures, "index": node.index}
    return {**figures, "text": node.text} if node.kind is NodeKind.FEATURE and node.text else figures


def _ranks(graph: AttributionGraph) -> dict[str, int]:
    """The rank of each logit among those of its position, most probable first."""
    order: dict[int, int] = {}
    ranks: dict[str, int] = {}
    for node in graph.top_logits():
        ranks[node.id] = order.get(node.pos, 0)
        order[node.pos] = ranks[node.id] + 1
    return ranks


def _record(graph: AttributionGraph, row: int, ranks: dict[str, int]) -> dict[str, Any]:
    """A node as EleutherAI's tool would write it."""
    node = graph.nodes[row]
    names = {
        NodeKind.TOKEN: f"input_{node.pos}",
        NodeKind.FEATURE: f"intermediate_{node.pos}_{node.layer}_{node.index}",
        NodeKind.LOGIT: f"output_{node.pos}_{ranks.get(node.id, 0)}",
        NodeKind.ERROR: f"error_{node.pos}_{node.layer}",
        NodeKind.BIAS: f"skip_{node.pos}_{node.layer}",
    }
    record: dict[str, Any] = {
        "id": names[node.kind],
        "layer_index": max(node.layer, 0),
        "token_position": node.pos,
        "node_type": _TYPES[node.kind],
    }
    if node.kind in (NodeKind.TOKEN, NodeKind.LOGIT):
        record["token_str"] = node.text
    figures = {
        NodeKind.FEATURE: {"feature_index": node.index, "activation": node.activation},
        NodeKind.LOGIT: {"probability": node.probability, "logit": node.pre_activation},
    }.get(node.kind, {})
    return record | {name: value for name, value in figures.items() if np.isfinite(value)}
