"""The graph JSON of Neuronpedia and circuit-tracer, `{metadata, qParams, nodes, links}`.

Written as in the schema of hijohnnylin/neuronpedia (`graph-schema.json`), with error ids `{layer}_-1_{pos}`. Older
forms are read: errors called `0_{layer}_{pos}`, no `schema_version`, layers as numbers, features numbered plainly
instead of by Cantor's pairing of layer and index.

A node's `influence` is the share of the total influence held by the nodes up to it, most influential first: our
`cumulative`. Cannot hold: bias nodes (their edges are added to the target's `rest`). What the schema does not name is
written under a key `circuitsae`, which other tools pass over: pre-activations, our influence, sums of inputs, token
ids, scores, provenance, how a contrast or a direction reads; on links, what `verdicts` found. Contrasts and directions
are logits there, of `token_prob` 1, with which influence starts. What a file holds and a graph has no place for
(settings, pinned nodes, supernodes, QK tracing) travels in the provenance and is written back.
"""

import re
from typing import Any

import numpy as np

from circuitsae.graph.attribution_graph import AttributionGraph
from circuitsae.graph.checking import Limits, mapping, number, plain, present, sequence, share, text, whole
from circuitsae.graph.exchange import extras
from circuitsae.graph.exchange.findings import Edge, Findings, assemble, check_counts
from circuitsae.graph.nodes import Node, NodeKind
from transcoders.token_text import join_tokens

NAME = "neuronpedia"
_FEATURE, _ERROR, _TOKEN, _LOGIT = "cross layer transcoder", "mlp reconstruction error", "embedding", "logit"
_TYPES = {NodeKind.FEATURE: _FEATURE, NodeKind.ERROR: _ERROR, NodeKind.TOKEN: _TOKEN, NodeKind.LOGIT: _LOGIT}
_Q_PARAMS = {"linkType": "both", "pinnedIds": [], "clickedId": "", "supernodes": [], "sg_pos": ""}
_OUTPUT = re.compile(r'Output "(.*)" \(p=[^()]*\)', re.DOTALL)
_EMBEDDING = re.compile(r'Emb: "(.*)"', re.DOTALL)
_GENERATOR = {"name": "circuitsae"}


def recognises(document: dict[str, Any]) -> bool:
    return "nodes" in document and "links" in document


# reading


def read(document: dict[str, Any], file: str, limits: Limits) -> AttributionGraph:
    """The graph of a parsed document. Raises `MalformedError`."""
    raw = [mapping(node, f"node {i}") for i, node in enumerate(sequence(document.get("nodes"), "nodes"))]
    links = sequence(document.get("links"), "links")
    check_counts(limits, len(raw), len(links))
    metadata = mapping(document.get("metadata", {}), "metadata")
    own = mapping(metadata.get(extras.OWN, {}), f"metadata.{extras.OWN}")
    tokens, missing = _tokens(metadata, raw, limits)
    n_layers = _n_layers(own, raw, limits)
    figures = [extras.read_figures(node.get(extras.OWN), f"node {i}") for i, node in enumerate(raw)]
    names: list[str] = []
    nodes: list[Node] = []
    taken: set[str] = set()
    for i, record in enumerate(raw):
        node = _node(record, f"node {i}", tokens, n_layers, figures[i])
        node = extras.with_reading(node, record.get(extras.OWN), f"node {i}")
        if node.kind is NodeKind.ERROR and node.id in taken:  # of attention, beside that of the MLP
            node = Node(NodeKind.BIAS, node.layer, node.pos, text=text(record["feature_type"], "feature_type"))
        taken.add(node.id)
        nodes.append(node)
        names.append(text(record.get("node_id"), f"node_id of node {i}"))
        if record.get("influence") is not None:
            figures[i]["cumulative"] = number(record["influence"], f"influence of node {i}")
    if not any("cumulative" in figure for figure in figures):
        missing.append("influence")
    found = Findings(
        nodes=nodes,
        names=names,
        edges=[_edge(mapping(link, f"link {i}"), f"link {i}") for i, link in enumerate(links)],
        tokens=tokens,
        token_ids=_token_ids(own, nodes, len(tokens)),
        n_layers=n_layers,
        figures=figures,
        scores=own.get("scores"),
        provenance=_provenance(metadata, own, file, missing),
    )
    graph = assemble(found, limits)
    return _with_carried(graph, document, raw)


def _tokens(metadata: dict[str, Any], raw: list[dict[str, Any]], limits: Limits) -> tuple[list[str], list[str]]:
    if "prompt_tokens" in metadata:
        tokens = sequence(metadata["prompt_tokens"], "prompt_tokens")
        limits.check("tokens", len(tokens))
        return [text(token, f"token {i}") for i, token in enumerate(tokens)], []
    positions = [
        whole(node.get("ctx_idx"), f"ctx_idx of node {i}", most=limits.tokens - 1) for i, node in enumerate(raw)
    ]
    found = [""] * (max(positions, default=-1) + 1)
    for node, pos in zip(raw, positions, strict=True):
        if node.get("feature_type") == _TOKEN:
            label = text(node.get("clerp", ""), "clerp")
            match = _EMBEDDING.fullmatch(label)
            found[pos] = match[1] if match else label
    return found, ["prompt_tokens"]


def _n_layers(own: dict[str, Any], raw: list[dict[str, Any]], limits: Limits) -> int:
    """Logits are written one above the layer after the last; where they are pruned to fewer layers, those count."""
    if "n_layers" in own:
        return whole(own["n_layers"], "n_layers", most=limits.layers)
    inner, above = [0], [0]
    for i, node in enumerate(raw):
        kind = _kind(node, f"node {i}")
        if kind is NodeKind.LOGIT and str(node.get("layer")).isdecimal():
            above.append(_layer(node, f"node {i}", limits.layers + 1) - 1)
        elif kind not in (NodeKind.LOGIT, NodeKind.TOKEN):
            inner.append(_layer(node, f"node {i}", limits.layers - 1) + 1)
    return max(*inner, *above)


def _kind(record: dict[str, Any], what: str) -> NodeKind:
    name = text(record.get("feature_type"), f"feature_type of {what}").lower()
    for part, kind in ((_TOKEN, NodeKind.TOKEN), (_LOGIT, NodeKind.LOGIT)):
        if name == part:
            return kind
    if "error" in name:
        return NodeKind.ERROR
    return NodeKind.BIAS if "bias" in name else NodeKind.FEATURE


def _layer(record: dict[str, Any], what: str, most: int = 2**31) -> int:
    return whole(record.get("layer"), f"layer of {what}", most=most)


def _node(record: dict[str, Any], what: str, tokens: list[str], n_layers: int, figures: dict[str, float]) -> Node:
    kind = _kind(record, what)
    pos = whole(record.get("ctx_idx"), f"ctx_idx of {what}", most=max(len(tokens) - 1, 0))
    label = text(record.get("clerp") or "", f"clerp of {what}")
    own: dict[str, Any] = {"pre_activation": figures.get("pre_activation", np.nan), "bias": figures.get("bias", 0.0)}
    match kind:
        case NodeKind.TOKEN:
            return Node(kind, -1, pos, _named_index(record, default=-1), tokens[pos] if tokens else "")
        case NodeKind.LOGIT:
            match = _OUTPUT.fullmatch(label)
            probability = share(record.get("token_prob", 0.0), f"token_prob of {what}")
            stated = record.get("feature")
            index = whole(_named_index(record, -1) if stated is None else stated, f"feature of {what}", least=-1)
            return Node(kind, n_layers, pos, index, match[1] if match else label, probability=probability, **own)
        case NodeKind.ERROR:
            return Node(kind, _layer(record, what), pos)
        case NodeKind.BIAS:
            return Node(kind, _layer(record, what), pos, text=text(record["feature_type"], "feature_type"))
    index = _named_index(record, default=None)
    if index is None:
        index = whole(record.get("feature"), f"feature of {what}")
    activation = number(record.get("activation"), f"activation of {what}")
    return Node(kind, _layer(record, what), pos, index, label, activation=activation, **own)


def _named_index(record: dict[str, Any], default: Any) -> Any:
    """The middle of a node id: `E_2_0`, `4_1234_7`. `feature` is Cantor's pairing in one form, the index in another."""
    match = re.fullmatch(r"\w+?_(\d{1,15})_\d+", str(record.get("node_id")))
    return int(match[1]) if match else default


def _edge(link: dict[str, Any], what: str) -> Edge:
    ends = [text(link.get(end), f"the {end} of {what}") for end in ("source", "target")]
    own = mapping(link.get(extras.OWN, {}), f"{extras.OWN} of {what}")
    said = {k: v for k, v in link.items() if k not in ("source", "target", "weight", extras.OWN)} | own
    notes = {text(k, "a key"): plain(v) for k, v in said.items()}
    return Edge(ends[0], ends[1], present(link.get("weight"), f"the weight of {what}"), notes)


def _token_ids(own: dict[str, Any], nodes: list[Node], count: int) -> list[int]:
    ids = [-1] * count
    for node in nodes:
        if node.kind is NodeKind.TOKEN and node.pos < count:
            ids[node.pos] = node.index
    stated = own.get("token_ids")
    if isinstance(stated, list) and len(stated) == count:
        return [whole(token, "a token id", least=-1) for token in stated]
    return ids


def _provenance(metadata: dict[str, Any], own: dict[str, Any], file: str, missing: list[str]) -> dict[str, Any]:
    tested = {extras.TESTED: plain(own[extras.TESTED])} if extras.TESTED in own else {}
    if own.keys() - tested.keys():
        return plain(mapping(own.get("provenance", {}), "provenance")) | tested
    generator = metadata.get("info") and mapping(metadata["info"], "info").get("generator")
    words = [generator.get("name"), generator.get("version")] if isinstance(generator, dict) else []
    return {
        "model": text(metadata.get("scan") or "unknown", "scan"),
        "prompt": text(metadata.get("prompt") or "", "prompt"),
        "imported": extras.imported(NAME, file, " ".join(str(word) for word in words if word), missing),
        **tested,
    }


def _with_carried(graph: AttributionGraph, document: dict[str, Any], raw: list[dict[str, Any]]) -> AttributionGraph:
    """The graph with what the file holds and it has no place for in its provenance."""
    rebuilt = _metadata(graph)
    aside = {key: plain(value) for key, value in document.items() if key not in ("nodes", "links", "metadata")}
    if aside.get("qParams") == _Q_PARAMS:
        del aside["qParams"]
    if metadata := extras.beside(document.get("metadata", {}), rebuilt):
        aside["metadata"] = metadata
    nodes: dict[str, Any] = {}
    for row, (node, record) in enumerate(zip(graph.nodes, raw, strict=True)):
        if extra := extras.beside(record, _record(graph, row)):
            nodes[node.id] = extra
    return extras.with_provenance(graph, extras.carry(graph.provenance, NAME, aside, nodes))


# writing


def write(graph: AttributionGraph) -> dict[str, Any]:
    """The document of a graph, valid under Neuronpedia's schema."""
    document, extra = extras.carried(graph, NAME)
    kept = np.array([node.kind is not NodeKind.BIAS or node.id in extra for node in graph.nodes], dtype=bool)
    records: dict[int, dict[str, Any]] = {}
    renamed: dict[str, str] = {}
    own = extras.own_figures(graph, kept, without=("cumulative",))
    for row in np.flatnonzero(kept).tolist():
        node, default = graph.nodes[row], _record(graph, row)
        beside = extra.get(node.id, {})
        record = default | beside
        if node.kind is NodeKind.ERROR and beside.get("feature_type", _ERROR) == _ERROR:
            record["node_id"] = default["node_id"]
        if "node_id" in beside and beside["node_id"] != record["node_id"]:
            renamed[beside["node_id"]] = record["node_id"]
        aside = own[row] | extras.own_reading(node)
        records[row] = record | ({extras.OWN: aside} if aside else {})
    links = [
        {"source": records[s]["node_id"], "target": records[t]["node_id"], "weight": weight, **notes}
        for s, t, weight, notes in extras.edges(graph)
        if kept[s] and kept[t]
    ]
    metadata = _metadata(graph) | document.get("metadata", {})
    metadata[extras.OWN] = extras.own_document(graph, NAME)
    others = {key: value for key, value in document.items() if key not in ("metadata", "nodes", "links")}
    nodes = [
        {key: _rename(item, renamed) if key == "qk_tracing_results" else item for key, item in record.items()}
        for record in records.values()
    ]
    return {"metadata": metadata, "qParams": _Q_PARAMS} | _rename(others, renamed) | {"nodes": nodes, "links": links}


def _record(graph: AttributionGraph, row: int) -> dict[str, Any]:
    """A node as circuit-tracer would write it."""
    node = graph.nodes[row]
    token = graph.tokens[node.pos] if 0 <= node.pos < len(graph.tokens) else ""
    finite = {name: value if np.isfinite(value) else None for name, value in _figures(graph, row).items()}
    match node.kind:
        case NodeKind.FEATURE:
            pair = node.layer + node.index
            names = (node.index, str(node.layer), f"{node.layer}_{node.index}-0", node.text)
            feature = pair * (pair + 1) // 2 + node.index
        case NodeKind.ERROR:
            names = (-1, str(node.layer), f"{node.layer}_{node.pos}-0", f'Err: {_site(graph, node.layer)} "{token}"')
            feature = -1
        case NodeKind.TOKEN:
            names = (node.index, "E", f"E_{node.index}-{node.pos}", f'Emb: "{node.text}"')
            feature = node.pos
        case NodeKind.LOGIT:
            label = node.text if node.explained else f'Output "{node.text}" (p={node.probability:.3f})'
            names = (node.index, str(graph.n_layers + 1), f"L_{node.index}-{node.pos}", label)
            feature = node.index
        case _:
            names = (node.text, str(node.layer), f"{node.layer}_{node.text}-{node.pos}", "")
            feature = None
    index, layer, js_id, label = names
    target = node.kind is NodeKind.LOGIT or node.explained
    return {
        "node_id": f"{layer}_{index}_{node.pos}",
        "feature": feature,
        "layer": layer,
        "ctx_idx": node.pos,
        "feature_type": _TYPES.get(node.kind, node.text),
        "token_prob": node.start if np.isfinite(node.start) else 0.0,
        "is_target_logit": target,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": js_id,
        "clerp": label,
        **finite,
    }


def _site(graph: AttributionGraph, layer: int) -> str:
    """What the dictionary of a layer stands for: an autoencoder's site, as the graph names it, or the MLP."""
    sites = graph.provenance.get("sites")
    named = sites[layer] if isinstance(sites, list) and 0 <= layer < len(sites) else None
    return named if isinstance(named, str) else "mlp"


def _figures(graph: AttributionGraph, row: int) -> dict[str, float]:
    node = graph.nodes[row]
    ranked = node.kind in (NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN)
    return {"influence": float(graph.cumulative[row]) if ranked else np.nan, "activation": node.activation}


def _metadata(graph: AttributionGraph) -> dict[str, Any]:
    made, prompt = graph.provenance, join_tokens(graph.tokens)
    pruned = made.get("pruned")
    metadata: dict[str, Any] = {
        "slug": "-".join(re.findall(r"[a-z0-9]+", prompt.lower())[:8]) or "graph",
        "scan": str(made.get("model") or "unknown"),
        "prompt_tokens": list(graph.tokens),
        "prompt": str(made.get("prompt") or prompt),
        "schema_version": 1,
    }
    if "imported" not in made:
        metadata["info"] = {"generator": _GENERATOR}
    if isinstance(pruned, list | tuple) and len(pruned) == 2 and all(isinstance(v, int | float) for v in pruned):
        metadata["node_threshold"] = pruned[0]
        metadata["pruning_settings"] = {"node_threshold": pruned[0], "edge_threshold": pruned[1]}
    return metadata


def _rename(value: Any, names: dict[str, str]) -> Any:
    """JSON in which every text that is an old node id is the new one."""
    match value:
        case str():
            return names.get(value, value)
        case list():
            return [_rename(item, names) for item in value]
        case dict():
            return {names.get(key, key): _rename(item, names) for key, item in value.items()}
    return value
