"""What travels with a graph: what a file held beside the graph, and what of a graph a format has no place for."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from circuitsae.graph.attribution_graph import AttributionGraph
from circuitsae.graph.checking import mapping, number, plain, text, whole
from circuitsae.graph.exchange.findings import NODE_FIGURES
from circuitsae.graph.nodes import Node
from circuitsae.graph.notes import written
from circuitsae.graph.past import on_edges
from circuitsae.graph.reading import read_reading, reading_of

OWN = "circuitsae"
"""The key under which our files keep what a format has no place for; other tools pass over it."""
TESTED = "tested"
"""The key, there and in a graph's provenance, of what was tested of a graph in its own file (`verdicts`)."""
CARRIED = "carried"
"""The key of a graph's provenance with what imported files held beside the graph, by format."""
OWN_FIGURES = ("pre_activation", "bias", *NODE_FIGURES)


def carried(graph: AttributionGraph, form: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What a file of this format held beside the graph: of the whole document, and of each node by our id."""
    kept = _object(_object(graph.provenance.get(CARRIED)).get(form))
    return _object(kept.get("document")), {name: _object(item) for name, item in _object(kept.get("nodes")).items()}


def carry(
    provenance: Mapping[str, Any], form: str, document: Mapping[str, Any], nodes: Mapping[str, Any]
) -> dict[str, Any]:
    """`provenance` with what a file held beside the graph."""
    kept = {name: item for name, item in (("document", dict(document)), ("nodes", dict(nodes))) if item}
    others = {name: item for name, item in _object(provenance.get(CARRIED)).items() if name != form}
    both = others | ({form: kept} if kept else {})
    rest = {key: value for key, value in provenance.items() if key != CARRIED}
    return rest | ({CARRIED: both} if both else {})


def beside(raw: Mapping[str, Any], rebuilt: Mapping[str, Any]) -> dict[str, Any]:
    """What of `raw` is not in what we would write ourselves."""
    return {
        key: plain(value)
        for key, value in raw.items()
        if key != OWN and not (key in rebuilt and _same(value, rebuilt[key]))
    }


def with_provenance(graph: AttributionGraph, provenance: Mapping[str, Any]) -> AttributionGraph:
    return replace(graph, provenance=dict(provenance))


def edges(graph: AttributionGraph) -> Iterator[tuple[int, int, float, dict[str, Any]]]:
    """Source, target, weight and notes of each edge, by target; among the notes `past`, where it is not 0."""
    noted: dict[tuple[str, str], dict[str, Any]] = {}
    if graph.edge_notes is not None:
        for record in graph.edge_notes.to_dict("records"):
            ends = str(record.pop("source")), str(record.pop("target"))
            noted[ends] = {str(k): plain(written(v)) for k, v in record.items() if k not in ("weight", "share")}
            noted[ends] = {key: value for key, value in noted[ends].items() if value is not None}
    ids: list[str] = graph.ids.tolist()
    matrix = graph.weights.tocoo()
    past = np.zeros(len(matrix.data)) if graph.past is None else on_edges(graph.past, graph.weights)
    columns = (matrix.row.tolist(), matrix.col.tolist(), matrix.data.tolist(), past.tolist())
    for target, source, weight, bypassed in zip(*columns, strict=True):
        notes = noted.get((ids[source], ids[target]), {}) if noted else {}
        notes = notes | {"past": bypassed} if bypassed else notes
        yield source, target, float(weight), notes


def own_document(graph: AttributionGraph, form: str) -> dict[str, Any]:
    """Of the whole graph: what the formats have no place for."""
    return {
        "n_layers": graph.n_layers,
        "token_ids": list(graph.token_ids),
        "scores": graph.scores.as_dict(),
        "provenance": plain(carry(graph.provenance, form, {}, {})),
    }


def own_figures(graph: AttributionGraph, kept: np.ndarray, without: Iterable[str] = ()) -> list[dict[str, float]]:
    """Of each node: the figures the formats have no place for, as far as they are not missing or 0.

    kept: [node], those that are written; edges from the others count in `rest`.
    """
    skipped = set(without)
    arrays = {name: getattr(graph, name) for name in ("inputs", "influence", "cumulative")}
    arrays["rest"] = graph.rest + graph.weights.astype(np.float64) @ (~kept).astype(np.float64)
    rows: list[dict[str, float]] = []
    for row, node in enumerate(graph.nodes):
        values = {"pre_activation": node.pre_activation, "bias": node.bias}
        values |= {name: float(array[row]) for name, array in arrays.items()}
        optional = ("bias", "rest")
        rows.append(
            {
                name: value
                for name, value in values.items()
                if name not in skipped and math.isfinite(value) and not (name in optional and value == 0)
            }
        )
    return rows


def own_reading(node: Node) -> dict[str, Any]:
    """Of what is explained and is no token's logit: how it reads, and where, which the formats have no place for."""
    place = {"layer": node.layer, "index": node.index, "text": node.text}
    return reading_of(node) | place if node.explained else {}


def with_reading(node: Node, value: Any, what: str) -> Node:
    """The node as `own_reading` says it."""
    stated = mapping({} if value is None else value, what)
    if not stated.get("explained"):
        return node
    return replace(
        node,
        layer=whole(stated.get("layer", node.layer), f"layer of {what}"),
        index=whole(stated.get("index", node.index), f"index of {what}", -1),
        text=text(stated.get("text", node.text), f"text of {what}"),
        probability=math.nan,
        **read_reading({**stated, "kind": node.kind}, what),
    )


def read_figures(value: Any, what: str) -> dict[str, float]:
    """The figures of `own_figures` that a node in a file has."""
    stated = mapping({} if value is None else value, what)
    found = {name: number(stated.get(name), f"{name} of {what}") for name in OWN_FIGURES if name in stated}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def imported(form: str, file: str, by: str | None, missing: list[str]) -> dict[str, Any]:
    """The entry of a graph's provenance that says where it came from."""
    record: dict[str, Any] = {"format": form, "file": file}
    if by:
        record["made_by"] = text(by, "the generator")
    if missing:
        record["not_in_the_file"] = missing
    return record


def _object(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _same(value: Any, other: Any) -> bool:
    """Equal as JSON, where 1 and 1.0 are one number and `true` is none."""
    numbers = [isinstance(v, int | float) and not isinstance(v, bool) for v in (value, other)]
    return value == other and (type(value) is type(other) or all(numbers))
