"""Pinned nodes and supernodes that a file of Neuronpedia's format came with, by the ids of our nodes."""

import logging
from collections.abc import Mapping
from typing import Any

import pandas as pd

from circuitsae.report.text import printable

MOST_PINNED = 500
"""Nodes that a page opens with pinned outside of groups."""


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
