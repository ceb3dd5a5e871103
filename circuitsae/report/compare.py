"""Two graphs of a prompt pair on one page: one layout, their difference drawn, each of the two a key press away.

Two graphs of one pair as one graph: the nodes and edges of both, with what each of the two says of them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from circuitsae.graph.supernodes import CardsLike
from circuitsae.report.cards import LedgerLike, cards_data, labels_data
from circuitsae.report.claims import ValidationLike, tested_columns, tests_data, with_validation
from circuitsae.report.data import EDGE_COLUMNS, NODE_COLUMNS, GraphLike, number, page_data, require
from circuitsae.report.page import PlotlyJS, write_page
from circuitsae.report.text import shorten, visible
from transcoders.errors import InputError
from transcoders.token_text import join_tokens

NODE_VALUES = ("activation", "pre_activation", "influence", "probability")
EDGE_VALUES = ("weight", "share")
MARKS = ("A:", "B:")
"""What the ids of features start with where equal numbers are not the same feature."""
_SIDES = ("a", "b")
_PLACE = ("kind", "layer", "pos", "index")


@dataclass
class Union:
    """What a page needs of a graph, of two graphs together.

    `nodes` and `edges` are the tables of both, joined by id, with `…_a` and `…_b` of each value (NaN where a graph
    lacks the node or edge), and `in_a`, `in_b`. Plain `weight` is b − a, an absent edge counting as 0. Plain `share` is
    |b − a| over the larger of the two sums of |weight| into the target, so that it compares across targets.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    tokens: Sequence[str]
    """A token that differs is written as both."""
    differing: list[int]
    """Positions at which the two prompts have other tokens."""
    n_layers: int
    provenance: Mapping[str, Any]
    scores: Mapping[str, float]
    same_features: bool
    """Whether equal numbers of features are the same feature; else those of A and of B are apart."""

    def nodes_frame(self) -> pd.DataFrame:
        return self.nodes

    def edges_frame(self) -> pd.DataFrame:
        return self.edges


def unite(a: GraphLike, b: GraphLike, names: tuple[str, str], same_features: bool | None = None) -> Union:
    """The union of two graphs whose prompts have equally many tokens and whose models equally many layers.

    Nodes are the same where kind, layer, feature (or token of a logit) and position are. same_features: whether equal
    numbers mean equal features in both; by default, where the graphs' provenance does not say that their models or
    dictionaries differ. Otherwise each feature is in one graph only, under an id that starts with "A:" or "B:".
    Raises `InputError` for prompts or models that cannot be put side by side.
    """
    _check(a, b, names)
    same = _same_dictionaries(a, b) if same_features is None else same_features
    marks = ("", "") if same else MARKS
    tables = [_tables(graph, mark) for graph, mark in zip((a, b), marks, strict=True)]
    words = [[visible(token) for token in graph.tokens] for graph in (a, b)]
    differing = [pos for pos, (one, other) in enumerate(zip(*words, strict=True)) if one != other]
    tokens = [one if one == other else f"{one} ⇄ {other}" for one, other in zip(*words, strict=True)]
    nodes = _nodes(tables[0][0], tables[1][0])
    edges = _edges(tables[0][1], tables[1][1])
    scores = [graph.scores if isinstance(graph.scores, Mapping) else graph.scores.as_dict() for graph in (a, b)]
    return Union(
        nodes=nodes,
        edges=edges,
        tokens=tokens,
        differing=differing,
        n_layers=a.n_layers,
        provenance={name: dict(graph.provenance) for name, graph in zip(names, (a, b), strict=True)},
        scores={
            f"{score}, {name}": found[score]
            for score in dict.fromkeys([*scores[0], *scores[1]])
            for name, found in zip(names, scores, strict=True)
            if score in found
        },
        same_features=same,
    )


def _check(a: GraphLike, b: GraphLike, names: tuple[str, str]) -> None:
    if len(set(names)) < 2 or not all(name.strip() for name in names):
        raise InputError(f"names={names!r} do not tell two graphs apart; give two different names.")
    if len(a.tokens) != len(b.tokens):
        raise InputError(
            f"The prompt of {names[0]} has {len(a.tokens)} tokens and that of {names[1]} {len(b.tokens)}, so their "
            "positions do not correspond; compare prompts of equally many tokens, such as a clean and a corrupt one."
        )
    if a.n_layers != b.n_layers:
        raise InputError(
            f"{names[0]} has {a.n_layers} layers and {names[1]} {b.n_layers}; compare graphs of one model."
        )


def _same_dictionaries(a: GraphLike, b: GraphLike) -> bool:
    """By their fingerprints where both graphs have them, else by what is said of where they come from."""
    keys = ["model", "fingerprint", "frame", "dictionary_fingerprint"]
    if any(graph.provenance.get("dictionary_fingerprint") is None for graph in (a, b)):
        keys[-1] = "dictionaries"
    return all(a.provenance.get(key) == b.provenance.get(key) for key in keys)


def _tables(graph: GraphLike, mark: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    nodes = require(graph.nodes_frame(), NODE_COLUMNS, "nodes_frame()")
    edges = require(graph.edges_frame(), EDGE_COLUMNS, "edges_frame()")
    if mark:
        feature = nodes["kind"] == "feature"
        renamed = {name: f"{mark}{name}" for name in nodes.loc[feature, "id"]}
        nodes = nodes.assign(id=nodes["id"].replace(renamed))
        edges = edges.assign(**{end: edges[end].replace(renamed) for end in ("source", "target")})
    if (repeated := Counter(nodes["id"].tolist()).most_common(1)) and repeated[0][1] > 1:
        raise InputError(f"node ids must be unique; {repeated[0][0]!r} occurs more than once.")
    explained = nodes["explained"].astype(bool) if "explained" in nodes else False
    return nodes.assign(text=nodes["text"].fillna("").astype(str), explained=explained), edges


def _nodes(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    columns = [*_PLACE, "text", "cumulative", "explained", *NODE_VALUES]
    both = (
        a[["id", *columns]]
        .assign(there=1.0)
        .merge(b[["id", *columns]].assign(there=1.0), on="id", how="outer", suffixes=("_a", "_b"), sort=False)
    )
    first = both["there_a"].notna()
    table: dict[str, Any] = {"id": both["id"], "in_a": first, "in_b": both["there_b"].notna()}
    for name in _PLACE:
        table[name] = both[f"{name}_a"].where(first, both[f"{name}_b"])
    table["text"] = [_both_texts(one, other) for one, other in both[["text_a", "text_b"]].itertuples(index=False)]
    for name in NODE_VALUES:
        table |= {f"{name}_{side}": both[f"{name}_{side}"].astype(float) for side in _SIDES}
        table[name] = np.fmax(table[f"{name}_a"], table[f"{name}_b"])
    explained = np.logical_or(*(both[f"explained_{side}"].eq(True).to_numpy(bool) for side in _SIDES))
    if explained.any():
        table["explained"] = explained
    # The slider shows a node as long as either graph does.
    table["cumulative"] = np.fmin(both["cumulative_a"].astype(float), both["cumulative_b"].astype(float))
    return pd.DataFrame(table).astype({"layer": int, "pos": int, "index": int})


def _both_texts(one: Any, other: Any) -> str:
    texts = [text for text in (one, other) if isinstance(text, str)]
    return texts[0] if len(set(texts)) == 1 else " ⇄ ".join(map(visible, texts))


def _edges(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    ends = ["source", "target"]
    noted = [
        frame[[*ends, *EDGE_VALUES, *tested_columns(frame)]].set_index(ends).add_suffix(f"_{side}").reset_index()
        for side, frame in zip(_SIDES, (a, b), strict=True)
    ]
    both = noted[0].merge(noted[1], on=ends, how="outer", sort=False)
    weights = {side: both[f"weight_{side}"].astype(float) for side in _SIDES}
    difference = weights["b"].fillna(0.0) - weights["a"].fillna(0.0)
    inputs = np.fmax(*(_inputs(both, side) for side in _SIDES))
    share = np.divide(np.abs(difference), inputs, out=np.zeros(len(both)), where=inputs > 0)
    return both.assign(weight=difference, share=share, in_a=weights["a"].notna(), in_b=weights["b"].notna())


def _inputs(edges: pd.DataFrame, side: str) -> np.ndarray:
    """Of each edge, Σ|weight| into its target in one graph, from the weights and shares of the edges there."""
    weight, share = np.abs(edges[f"weight_{side}"].to_numpy(float)), edges[f"share_{side}"].to_numpy(float)
    total = np.divide(weight, share, out=np.zeros(len(edges)), where=share > 0)
    return pd.Series(total).groupby(edges["target"].to_numpy()).transform("max").to_numpy()


_TOP = 12
_SAME = 0.05
"""Up to this share of the larger value, a node's value counts as the same in both."""

Validated = ValidationLike | pd.DataFrame | None


def compare_html(
    a: GraphLike,
    b: GraphLike,
    path: str | Path,
    names: tuple[str, str] = ("A", "B"),
    *,
    validation: tuple[Validated, Validated] = (None, None),
    cards: tuple[CardsLike | None, CardsLike | None] = (None, None),
    ledger: tuple[LedgerLike | None, LedgerLike | None] = (None, None),
    same_features: bool | None = None,
    plotlyjs: PlotlyJS = "inline",
    title: str | None = None,
) -> Path:
    """Write the page that compares two graphs, and return its path.

    The two prompts need equally many tokens: a clean and a corrupt one, or one prompt with two dictionaries. Nodes
    stand at the same place in both graphs and in their difference, B − A. Equal numbers of features mean the same
    feature only where both graphs come from the same dictionaries, see `circuitsae.report.compare.unite`.

    Args:
        names: What the page calls the two.
        validation: What was measured on the edges of each, if the graphs do not hold it.
        cards: The feature cards of each. Where equal numbers are the same feature, the card of the first counts, and
            that of the second where the first has none; else each feature has the card of its own dictionaries.
        ledger: The labels of each, with their evidence; taken as the cards are.
        same_features: Whether equal numbers mean equal features; by default as the graphs' provenance says.

    Raises:
        InputError: prompts of other lengths, models of other depths, names that are equal, or tables without the
            columns a report needs.
    """
    names = _two(names)
    checked = [_Checked(graph, found) for graph, found in zip((a, b), validation, strict=True)]
    both = unite(checked[0], checked[1], names, same_features)
    data = page_data(both)
    prompt = shorten(join_tokens(both.tokens), 60)
    data["title"] = title or f"{names[0]} ⇄ {names[1]}: {prompt}"
    data["cards"] = _of_each(both, [cards_data(one, nodes) for one, nodes in zip(cards, _sides(both), strict=True)])
    data["labels"] = _of_each(both, [labels_data(one, nodes) for one, nodes in zip(ledger, _sides(both), strict=True)])
    data["comparison"] = comparison_data(both, (a, b), names)
    return write_page(data, path, plotlyjs)


def comparison_data(both: Union, graphs: tuple[GraphLike, GraphLike], names: tuple[str, str]) -> dict[str, Any]:
    """What the page's `comparison` holds: of each node and edge the values in A and in B, and a summary."""
    nodes, edges = both.nodes, both.edges
    sides: list[dict[str, Any]] = []
    for side in ("a", "b"):
        sides.append(
            {
                "nodes": {
                    "there": nodes[f"in_{side}"].astype(int).tolist(),
                    **{name: _column(nodes, f"{name}_{side}") for name in NODE_VALUES},
                },
                "edges": {name: _column(edges, f"{name}_{side}") for name in EDGE_VALUES},
                "tests": tests_data(_of_side(edges, side)),
            }
        )
    change = _changes(nodes)
    return {
        "names": list(names),
        "sides": sides,
        "tokens": [[visible(token) for token in graph.tokens] for graph in graphs],
        "differing": both.differing,
        "same_features": both.same_features,
        "presence": np.select([nodes["in_a"] & nodes["in_b"], nodes["in_a"]], ["both", "a"], "b").tolist(),
        "change": change.tolist(),
        "summary": _summary(both, change),
    }


def _of_side(edges: pd.DataFrame, side: str) -> pd.DataFrame:
    """The columns that one of the two graphs has, under their own names."""
    own = [name for name in edges.columns if name.endswith(f"_{side}")]
    return pd.DataFrame(edges[own]).set_axis([name.removesuffix(f"_{side}") for name in own], axis=1)


def _sides(both: Union) -> list[pd.DataFrame]:
    """The nodes of either graph; all of them where both have the same features."""
    nodes = both.nodes
    return [nodes if both.same_features else nodes.iloc[np.flatnonzero(nodes[f"in_{side}"])] for side in ("a", "b")]


def _of_each(both: Union, tables: list[dict[str, Any]]) -> dict[str, Any]:
    """What is known of features, by feature; where the two have other features, by "A:" or "B:" and feature."""
    if both.same_features:
        return tables[1] | tables[0]
    return {f"{side}{key}": value for side, table in zip(MARKS, tables, strict=True) for key, value in table.items()}


class _Checked:
    """A graph with a validation's columns joined to its edges."""

    def __init__(self, graph: GraphLike, validation: Validated) -> None:
        self.provenance, self.tokens, self.scores = graph.provenance, graph.tokens, graph.scores
        self.n_layers = graph.n_layers
        self._nodes, self._edges = graph.nodes_frame(), with_validation(graph.edges_frame(), validation)

    def nodes_frame(self) -> pd.DataFrame:
        return self._nodes

    def edges_frame(self) -> pd.DataFrame:
        return self._edges


def _two(names: Sequence[str]) -> tuple[str, str]:
    if len(names) != 2:
        raise InputError(f"names={tuple(names)!r} has {len(names)} names for two graphs; give two.")
    return str(names[0]), str(names[1])


def _changes(nodes: pd.DataFrame) -> np.ndarray:
    """[node], 1 where a node is stronger in B, -1 where it is stronger in A, 0 where about the same.

    Of features the activation, of logits the probability; errors, tokens and biases have no such value: for them it is
    their influence. A node that one graph lacks is stronger in the other.
    """
    values = {}
    for side in ("a", "b"):
        kind = nodes["kind"]
        value = nodes[f"activation_{side}"].where(kind == "feature", nodes[f"influence_{side}"])
        read = nodes[f"probability_{side}"].fillna(nodes[f"pre_activation_{side}"])
        value = value.where(kind != "logit", read)
        values[side] = value.fillna(nodes[f"influence_{side}"]).fillna(0.0).to_numpy(float)
    difference = values["b"] - values["a"]
    tolerance = _SAME * np.maximum(np.abs(values["a"]), np.abs(values["b"]))
    change = np.sign(np.where(np.abs(difference) > tolerance, difference, 0.0)).astype(int)
    return np.where(~nodes["in_a"], 1, np.where(~nodes["in_b"], -1, change))


def _summary(both: Union, change: np.ndarray) -> dict[str, Any]:
    """Counts, and the rows of the nodes whose influence changes most and of the edges that matter most for that."""
    nodes, edges = both.nodes, both.edges
    moved = (nodes["influence_b"].fillna(0.0) - nodes["influence_a"].fillna(0.0)).abs()
    moved = moved.where(nodes["kind"] != "bias", 0.0).to_numpy(float)
    features = (nodes["kind"] == "feature").to_numpy()
    weights = [edges[f"weight_{side}"].fillna(0.0).to_numpy(float) for side in ("a", "b")]
    sizes = [np.abs(w) for w in weights]
    total = np.maximum(*sizes).sum()
    shared = np.minimum(*sizes)[weights[0] * weights[1] > 0].sum()
    return {
        "features": _counts(nodes.iloc[np.flatnonzero(features)]),
        "changed": int(np.count_nonzero(change[features & (nodes["in_a"] & nodes["in_b"]).to_numpy()])),
        "edges": _counts(edges),
        "flipped": int(np.count_nonzero(weights[0] * weights[1] < 0)),
        "shared": number(shared / total if total else 1.0),
        "top_nodes": _top(moved),
        "top_edges": _top(_weight_of_change(nodes, edges)),
    }


def _weight_of_change(nodes: pd.DataFrame, edges: pd.DataFrame) -> np.ndarray:
    """[edge], by how much of its target's inputs the edge changes, times the target's influence; 0 from a bias."""
    start = nodes["probability"].where(nodes["kind"] == "logit", 0.0).fillna(0.0)
    if "explained" in nodes:
        start = start.mask(nodes["explained"], 1.0)
    matter = nodes["influence"].fillna(0.0) + start
    of = dict(zip(nodes["id"].tolist(), matter.tolist(), strict=True))
    bias = set(nodes.loc[nodes["kind"] == "bias", "id"])
    target = np.array([0.0 if s in bias else of[t] for s, t in zip(edges["source"], edges["target"], strict=True)])
    return edges["share"].to_numpy(float) * target


def _counts(table: pd.DataFrame) -> dict[str, int]:
    in_a, in_b = table["in_a"].to_numpy(bool), table["in_b"].to_numpy(bool)
    return {"a": int((in_a & ~in_b).sum()), "both": int((in_a & in_b).sum()), "b": int((in_b & ~in_a).sum())}


def _top(size: np.ndarray) -> list[int]:
    order = np.argsort(-size, kind="stable")[:_TOP]
    return [int(row) for row in order if size[row] > 0]


def _column(table: pd.DataFrame, name: str) -> list[float | None]:
    return [number(value) for value in table[name].tolist()]
