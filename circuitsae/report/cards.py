"""Feature cards, labels and suggested groups as a page embeds them: bounded, rounded, and with every token visible."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from circuitsae.graph.supernodes import NAMELESS, CardsLike, LedgerLike, label_json
from circuitsae.report.text import cut, printable, visible
from transcoders.errors import InputError
from transcoders.token_text import with_characters

MOST_EXAMPLES = 10
MOST_TOKENS = 48
"""Of one example, around its peak."""
MOST_ROWS = 10
"""Of a list of logits or of similar features."""
MOST_BINS = 60
MOST_EVIDENCE = 12
_DIGITS = 4


def cards_data(cards: CardsLike | None, nodes: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """The cards of the features among `nodes`, and of no others."""
    if cards is None:
        return {}
    wanted = set(feature_keys(nodes))
    found = cards.for_nodes(nodes)
    return {key: card_data(card) for key, card in sorted(found.items()) if key in wanted}


def feature_keys(nodes: pd.DataFrame) -> list[str]:
    """`"{layer}.{index}"` of each feature among the nodes, once."""
    features = nodes[nodes["kind"] == "feature"]
    pairs = zip(features["layer"].tolist(), features["index"].tolist(), strict=True)
    return list(dict.fromkeys(f"{int(layer)}.{int(index)}" for layer, index in pairs))


def card_data(card: Mapping[str, Any]) -> dict[str, Any]:
    """One card with at most `MOST_EXAMPLES` examples of `MOST_TOKENS` tokens, four digits, and no key that is empty."""
    made: dict[str, Any] = {"layer": int(card["layer"]), "feature": int(card["feature"])}
    for name in ("firing_rate", "max_activation", "mean_activation"):
        made[name] = rounded(card.get(name))
    made["tokens_seen"] = None if card.get("tokens_seen") is None else int(card["tokens_seen"])
    made["dead"] = bool(card.get("dead")) or None
    made["histogram"] = _histogram(card.get("histogram"))
    made["examples"] = [_example(example) for example in list(card.get("examples") or [])[:MOST_EXAMPLES]]
    for name in ("top_logits", "bottom_logits"):
        rows = list(card.get(name) or [])[:MOST_ROWS]
        made[name] = [{"token": visible(str(row["token"])), "value": rounded(row["value"])} for row in rows]
    for name in ("neighbours", "nearest"):
        rows = list(card.get(name) or [])[:MOST_ROWS]
        made[name] = [
            {"layer": int(row["layer"]), "feature": int(row["feature"]), "score": rounded(row["score"])} for row in rows
        ]
    for name in ("inputs", "outputs"):
        made[name] = [_connection(row) for row in list(card.get(name) or [])[:MOST_ROWS]]
    made["label"] = _plain_label(card.get("label"))
    return {name: value for name, value in made.items() if value is not None and value != []}


def labels_data(ledger: LedgerLike | None, nodes: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """What the ledger says about each feature among the nodes: text, status, display, a line per row of evidence."""
    if ledger is None:
        return {}
    found = {key: label_json(key, ledger) for key in feature_keys(nodes)}
    return {key: _plain_label(label) or {} for key, label in found.items() if label is not None}


def suggestions_data(supernodes: Sequence[Any] | None, ids: Sequence[str]) -> list[dict[str, Any]]:
    """Suggested groups: mappings or objects with `name`, `members` (node ids), and optionally `reason` and `score`."""
    known = set(ids)
    made = []
    for suggestion in supernodes or ():
        record = suggestion if isinstance(suggestion, Mapping) else _attributes(suggestion)
        members = [str(member) for member in record["members"]]
        if unknown := [member for member in members if member not in known]:
            raise InputError(
                f"the suggested group {record['name']!r} has the member {unknown[0]!r}, which is not among the "
                f"{len(known)} nodes of the graph; suggest groups for the graph that is drawn."
            )
        if not members:
            continue
        made.append(
            {
                "name": printable(str(record["name"])),
                "members": members,
                "reason": printable(str(record.get("reason") or "")),
                "score": rounded(record.get("score")),
            }
        )
    return made


def rounded(value: Any) -> float | None:
    """Four significant digits; what is missing or not finite is null."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.{_DIGITS}g}")


def _attributes(suggestion: Any) -> dict[str, Any]:
    return {name: getattr(suggestion, name, None) for name in ("name", "members", "reason", "score")}


def _example(example: Mapping[str, Any]) -> dict[str, Any]:
    """A window around the peak."""
    tokens, activations = list(example["tokens"]), list(example["activations"])
    if len(tokens) != len(activations):
        raise InputError(f"an example has {len(tokens)} tokens and {len(activations)} activations; give one of each.")
    strongest = max(range(len(tokens)), key=lambda t: activations[t] or 0, default=0)
    peak = example.get("peak")
    peak = strongest if peak is None else min(max(int(peak), 0), max(len(tokens) - 1, 0))
    start = max(0, min(peak - (2 * MOST_TOKENS) // 3, len(tokens) - MOST_TOKENS))
    window = slice(start, start + MOST_TOKENS)
    return {
        "tokens": [printable(cut(token)) or "∅" for token in with_characters(list(map(str, tokens[window])))],
        "activations": [rounded(value) or 0 for value in activations[window]],
        "peak": peak - start,
        "stratum": str(example.get("stratum") or "top"),
    }


def _connection(row: Mapping[str, Any]) -> dict[str, Any]:
    place = {"layer": int(row["layer"]), "feature": int(row["feature"])}
    return place | {"twera": rounded(row["twera"]), "weight": rounded(row["weight"])}


def _histogram(histogram: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not histogram or not histogram["counts"]:
        return None
    edges, counts = list(histogram["edges"]), list(histogram["counts"])
    if len(edges) != len(counts) + 1 or len(counts) > MOST_BINS:
        raise InputError(
            f"a histogram has {len(edges)} edges and {len(counts)} counts; give one more edge than counts, "
            f"and {MOST_BINS} counts at most."
        )
    return {"edges": [rounded(edge) for edge in edges], "counts": [int(count) for count in counts]}


def _plain_label(label: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not label:
        return None
    text = printable(str(label.get("text") or ""))
    made = {
        "text": text,
        "status": str(label.get("status") or "hypothesis"),
        "display": printable(str(label.get("display") or text)),
        "evidence": [printable(str(row)) for row in list(label.get("evidence") or [])[:MOST_EVIDENCE]],
    }
    return made | ({"nameless": True} if text in NAMELESS else {})
