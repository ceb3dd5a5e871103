"""What the page reads: the graph as columns of plain numbers and strings, with the layout already computed.

Pinned nodes and supernodes that a file of Neuronpedia's format came with, by the ids of our nodes.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from circuitsae.graph.consensus import VIEWS, Inclusion
from circuitsae.graph.like import EDGE_COLUMNS, NODE_COLUMNS, GraphLike, require, scores_of
from circuitsae.graph.persistence import Persistence
from circuitsae.graph.supernodes import CardsLike
from circuitsae.graph.totals import explained_rows, total_effects
from circuitsae.report.cards import LedgerLike, cards_data, labels_data, rounded, suggestions_data
from circuitsae.report.claims import ValidationLike, tested_columns, tests_data, verdicts_shown, with_validation
from circuitsae.report.commands import commands_data
from circuitsae.report.passing import answering, of_passing, of_response
from circuitsae.report.selection import Selection, select
from circuitsae.report.text import printable, visible
from transcoders.errors import InputError

MOST_PINNED = 500
"""Nodes that a page opens with pinned outside of groups."""
MOST_CARRIED = 100_000
"""Edges that a page holds, about 2 MB of them; those that were tested are held beside."""


def opened_with(provenance: Mapping[str, Any], nodes: pd.DataFrame, n_layers: int) -> dict[str, Any] | None:
    """`pinned`, ids of nodes, and `groups`, each a name and ids of nodes; None where the file says nothing of either.

    Ids of nodes that the graph lacks are passed over, groups that are left without a node too. Of the nodes that are
    pinned alone, the first `MOST_PINNED` count, and the log says so.
    """
    carried = _at(provenance, "carried", "neuronpedia")
    parameters = _at(carried, "document", "qParams")
    if not parameters:
        return None
    ours = _ours(_at(carried, "nodes"), nodes, n_layers)
    pinned, rows = (
        value if isinstance(value, list) else [] for value in map(parameters.get, ("pinnedIds", "supernodes"))
    )
    groups = [[printable(row[0]), *_known(row[1:], ours)] for row in rows if _is_group(row)]
    members = {node for group in groups for node in group[1:]}
    alone = [node for node in _known(pinned, ours) if node not in members]
    if len(alone) > MOST_PINNED:
        logging.getLogger(__name__).warning(
            "The file pins %d nodes; the page opens with the first %d of them.", len(alone), MOST_PINNED
        )
    return {"pinned": alone[:MOST_PINNED], "groups": [group for group in groups if len(group) > 1]}


def opening(opened: Mapping[str, Any], ids: Sequence[str]) -> dict[str, Any]:
    """What a caller wants a page to open with, as `opened_with`, and its notes; `InputError` for an unknown node."""
    groups = [
        [printable(str(name)), *map(str, members)] for name, members in opened.get("groups", {}).items() if members
    ]
    pinned = [str(node) for node in opened.get("pinned", ())]
    notes = {str(node): str(note) for node, note in opened.get("notes", {}).items()}
    unknown = {node for members in (pinned, notes, *(group[1:] for group in groups)) for node in members} - set(ids)
    if unknown:
        raise InputError(f"The page cannot open with node {min(unknown)!r}, which is not among the {len(ids)} drawn.")
    found = {"pinned": pinned, "groups": groups, "note": str(opened.get("note", ""))}
    return found | ({"notes": notes} if notes else {})


def _at(value: Any, *keys: str) -> Mapping[str, Any]:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _is_group(row: Any) -> bool:
    return isinstance(row, list) and len(row) > 1 and all(isinstance(item, str) for item in row)


def _known(ids: list[Any], ours: Mapping[str, str]) -> list[str]:
    return list(dict.fromkeys(ours[node] for node in ids if isinstance(node, str) and node in ours))


def _ours(noted: Mapping[str, Any], nodes: pd.DataFrame, n_layers: int) -> dict[str, str]:
    """Our id of each id in the file: where that was not the usual one, the import noted it beside the node."""
    columns = zip(*(nodes[name].tolist() for name in ("id", "kind", "layer", "pos", "index")), strict=True)
    found: dict[str, str] = {}
    for ours, kind, layer, pos, index in columns:
        usual = {
            "feature": f"{layer}_{index}_{pos}",
            "error": f"{layer}_-1_{pos}",
            "token": f"E_{index}_{pos}",
            "logit": f"{n_layers + 1}_{index}_{pos}",
        }.get(str(kind))
        stated = _at(noted, ours).get("node_id", usual)
        if isinstance(stated, str):
            found[stated] = ours
    return found


PAST_COLUMNS = ("past", "past_share")
"""What edges have beside these where dictionaries have skip terms."""
CHANGEABLE = ("feature", "error", "token")
"""Kinds of nodes that an intervention can change."""
_DIGITS = 6


def page_data(
    graph: GraphLike,
    validation: ValidationLike | pd.DataFrame | None = None,
    *,
    cards: CardsLike | None = None,
    ledger: LedgerLike | None = None,
    supernodes: Sequence[Any] | None = None,
    folder: str | Path | None = None,
) -> dict[str, Any]:
    """The JSON document of one page. NaN becomes null, numbers keep six significant digits.

    Tokens and texts are made visible; `raw` keeps them as the model has them, for exports.
    """
    nodes = require(graph.nodes_frame(), NODE_COLUMNS, "nodes_frame()")
    edges = require(graph.edges_frame(), EDGE_COLUMNS, "edges_frame()")
    prunings, others = inclusion_data(graph, nodes, edges), persistence_data(graph, nodes, edges)
    edges = with_validation(edges, validation)
    tokens = [visible(token) for token in graph.tokens]
    columns = _node_columns(nodes)
    _check_ends(edges, columns["id"])
    selection = select(nodes, edges, verdicts_shown(edges)[1])
    held, foreseen = carried(edges, selection), foreseen_data(nodes, edges)
    n_edges, edges = len(edges), edges.iloc[held].reset_index(drop=True)
    return {
        "tokens": tokens,
        "n_layers": graph.n_layers,
        "scores": {name: number(value) for name, value in scores_of(graph).items()},
        "passing": of_passing(graph.provenance),
        "response": of_response(graph.provenance),
        "answering": answering(graph.provenance),
        "provenance": _plain({key: item for key, item in graph.provenance.items() if key != "carried"}),
        "nodes": columns,
        "edges": _edge_columns(edges, columns["id"]),
        "picture": _picture(selection, held, n_edges),
        "tests": tests_data(edges),
        "raw": _raw(graph.tokens, nodes["text"].fillna("").tolist(), columns),
        "opened": opened_with(graph.provenance, nodes, graph.n_layers),
        "cards": cards_data(cards, nodes),
        "labels": labels_data(ledger, nodes),
        "supernodes": suggestions_data(supernodes, nodes["id"].tolist()),
        "explained": np.flatnonzero(nodes["explained"]).tolist() if "explained" in nodes else [],
        "comparison": None,
        "commands": commands_data(graph, folder),
        "prunings": prunings,
        "others": others,
        "foreseen": foreseen,
    }


def inclusion_data(graph: GraphLike, nodes: pd.DataFrame, edges: pd.DataFrame) -> int:
    """How many prunings there are, 0 where the graph knows of none; tables get the number that keep each, `kept`."""
    found: Inclusion | None = getattr(graph, "inclusion", None)
    if found is None:
        return 0
    for frame, shares in ((nodes, found.nodes), (edges, found.edges)):
        frame["kept"] = np.rint(shares * len(VIEWS)).astype(int)
    return len(VIEWS)


def persistence_data(graph: GraphLike, nodes: pd.DataFrame, edges: pd.DataFrame) -> list[str]:
    """Names of the other dictionaries, none where the graph knows of none; tables get the number that have each,
    `found`.
    """
    found: Persistence | None = getattr(graph, "persistence", None)
    if found is None:
        return []
    for frame, shares in ((nodes, found.nodes), (edges, found.edges)):
        frame["found"] = np.rint(shares * len(found.dictionaries)).astype(int)
    return [printable(name) for name in found.dictionaries]


def foreseen_data(nodes: pd.DataFrame, edges: pd.DataFrame) -> dict[str, Any] | None:
    """What the graph foresees of its first target when a node is removed: the target's row, a number of each node."""
    targets = explained_rows(nodes)[:1]
    if not targets:
        return None
    removed = np.where(nodes["kind"].isin(CHANGEABLE), -total_effects(nodes, edges, targets)[0], np.nan)
    return {"target": targets[0], "removed": [rounded(value) for value in removed]}


def _node_columns(nodes: pd.DataFrame) -> dict[str, list[Any]]:
    ids = [str(node) for node in nodes["id"].tolist()]
    if len(set(ids)) < len(ids):
        twice = next(node for node in ids if ids.count(node) > 1)
        raise InputError(f"node ids must be unique; {twice!r} occurs more than once.")
    texts = [
        visible(str(text)) if text or kind in {"token", "logit"} else ""
        for kind, text in zip(nodes["kind"].tolist(), nodes["text"].fillna("").tolist(), strict=True)
    ]
    return {
        "id": ids,
        "kind": [str(kind) for kind in nodes["kind"]],
        "text": texts,
        **{column: [int(v) for v in nodes[column]] for column in ("layer", "pos", "index")},
        **{column: [number(v) for v in nodes[column]] for column in NODE_COLUMNS[6:]},
        **{name: nodes[name].tolist() for name in ("kept", "found") if name in nodes},
    }


def _raw(tokens: Sequence[str], texts: Sequence[Any], columns: Mapping[str, list[Any]]) -> dict[str, Any]:
    """The tokens, and by row the texts of other nodes that the page shows in another form."""
    rows = enumerate(zip(columns["kind"], columns["text"], map(str, texts), strict=True))
    changed = {str(row): text for row, (kind, shown, text) in rows if kind != "token" and text != shown}
    return {"tokens": [str(token) for token in tokens], "texts": changed}


def carried(
    edges: pd.DataFrame, selection: Selection, most: int = MOST_CARRIED, columns: list[str] | None = None
) -> np.ndarray:
    """Rows of the edges that a page holds, ascending: the `most` that enter the picture first, and all tested ones,
    which have something in one of the `columns`, those of tests by default.
    """
    if len(edges) <= most:
        return np.arange(len(edges))
    tested = np.flatnonzero(edges[tested_columns(edges) if columns is None else columns].notna().any(axis=1))
    return np.union1d(selection.strongest(most), tested)


def _picture(selection: Selection, held: np.ndarray, n_edges: int) -> dict[str, Any]:
    """Since which picture each node and edge is drawn, what the pictures hold, which is the first, and of how many
    edges in the graph the page has its own.
    """
    return {
        "nodes": selection.nodes.tolist(),
        "edges": selection.edges[held].tolist(),
        "shares": [number(share) for share in selection.shares],
        "first": selection.first,
        "n_edges": n_edges,
    }


def _check_ends(edges: pd.DataFrame, ids: list[str]) -> None:
    known = set(ids)
    for end in ("source", "target"):
        if unknown := [node for node in edges[end].tolist() if node not in known]:
            raise InputError(f"an edge has {end} {unknown[0]!r}, which is not among the {len(ids)} nodes of the graph.")


def _edge_columns(edges: pd.DataFrame, ids: list[str]) -> dict[str, list[Any]]:
    row_of = {node: row for row, node in enumerate(ids)}
    columns: dict[str, list[Any]] = {
        end: [row_of[node] for node in edges[end].tolist()] for end in ("source", "target")
    }
    names = ["weight", "share", *(name for name in PAST_COLUMNS if name in edges)]
    columns |= {name: [number(value) for value in edges[name].tolist()] for name in names}
    return columns | {name: edges[name].tolist() for name in ("kept", "found") if name in edges}


def number(value: Any) -> float | None:
    """Six significant digits, as JSON; what is missing or not finite is null."""
    if value is None or value is pd.NA or not math.isfinite(value):
        return None
    return float(f"{float(value):.{_DIGITS}g}")


def _plain(value: Any) -> Any:
    """Provenance as JSON: mappings and sequences kept, numbers kept, everything else as its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [_plain(item) for item in value]
        return sorted(items, key=str) if isinstance(value, set | frozenset) else items
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)
