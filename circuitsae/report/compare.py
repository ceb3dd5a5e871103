"""Two graphs of a prompt pair on one page: one layout, their difference drawn, each of the two a key press away."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from circuitsae.graph.comparison import EDGE_VALUES, MARKS, NODE_VALUES, Comparison, compare
from circuitsae.graph.like import GraphLike, scores_of
from circuitsae.graph.supernodes import CardsLike
from circuitsae.report.beside import pages_there
from circuitsae.report.cards import LedgerLike, cards_data, labels_data
from circuitsae.report.claims import ValidationLike, tested_columns, tests_data, with_validation
from circuitsae.report.data import MOST_CARRIED, carried, number, page_data
from circuitsae.report.page import PlotlyJS, prompt_title, write_page
from circuitsae.report.selection import select
from circuitsae.report.text import visible
from transcoders.errors import InputError


@dataclass
class Union:
    """What a page needs of a graph, of two graphs together; the tables are those of `Comparison`, with plain columns.

    Plain `weight` is the difference, plain `share` that of it; a plain value of a node is the larger of the two.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    tokens: Sequence[str]
    """By place; a token that differs is written as both."""
    differing: list[int]
    """Places at which the two prompts have other tokens, or one has none."""
    n_layers: int
    provenance: Mapping[str, Any]
    scores: Mapping[str, float]
    same_features: bool

    def nodes_frame(self) -> pd.DataFrame:
        return self.nodes

    def edges_frame(self) -> pd.DataFrame:
        return self.edges


def unite(both: Comparison) -> Union:
    """The two graphs of a comparison as one that can be drawn."""
    names, graphs = _names(both), (both.a, both.b)
    words = _words(both)
    pairs = list(zip(*words, strict=True))
    nodes, scores = both.nodes, [scores_of(graph) for graph in graphs]
    plain = {name: np.fmax(nodes[f"{name}_a"], nodes[f"{name}_b"]) for name in NODE_VALUES}
    # The slider shows a node as long as either graph does.
    plain["cumulative"] = np.fmin(nodes["cumulative_a"], nodes["cumulative_b"])
    plain["text"] = [_both_texts(*texts) for texts in nodes[["text_a", "text_b"]].itertuples(index=False)]
    return Union(
        nodes=nodes.assign(**plain),
        edges=both.edges.assign(weight=both.edges["difference"]),
        tokens=[_both_tokens(one, other) for one, other in pairs],
        differing=[place for place, (one, other) in enumerate(pairs) if one != other],
        n_layers=both.a.n_layers,
        provenance={name: dict(graph.provenance) for name, graph in zip(names, graphs, strict=True)},
        scores={
            f"{score}, {name}": found[score]
            for score in dict.fromkeys([*scores[0], *scores[1]])
            for name, found in zip(names, scores, strict=True)
            if score in found
        },
        same_features=both.same_features,
    )


def _names(both: Comparison) -> list[str]:
    """What the two are called, as it is shown."""
    return [visible(name) for name in both.names]


def _words(both: Comparison) -> list[list[str | None]]:
    """Of either prompt, by place, the token as it is shown; None where the prompt has none there."""
    found = [both.alignment.tokens(side, graph.tokens) for side, graph in enumerate((both.a, both.b))]
    return [[None if token is None else visible(token) for token in tokens] for tokens in found]


def _both_tokens(one: str | None, other: str | None) -> str:
    return (one or "") if one == other else f"{one or _NONE} ⇄ {other or _NONE}"


def _both_texts(one: Any, other: Any) -> str:
    texts = [text for text in (one, other) if isinstance(text, str)]
    return texts[0] if len(set(texts)) == 1 else " ⇄ ".join(map(visible, texts))


_NONE = "—"
"""In the place of a token that one of the prompts lacks."""
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
    plotlyjs: PlotlyJS = "inline",
    title: str | None = None,
    **how: Any,
) -> Path:
    """Write the page that compares two graphs, and return its path.

    A clean and a corrupt prompt, or one prompt with two dictionaries. Nodes stand at the same place in both graphs and
    in their difference, B − A. Equal numbers of features mean the same feature only where both graphs come from the
    same dictionaries.

    Args:
        names: What the page calls the two.
        validation: What was measured on the edges of each, if the graphs do not hold it.
        cards: The feature cards of each. Where equal numbers are the same feature, the card of the first counts, and
            that of the second where the first has none; else each feature has the card of its own dictionaries.
        ledger: The labels of each, with their evidence; taken as the cards are.
        how: Which nodes are the same: `same_features`, `positions`, `roles`, `dictionaries` and others, as in
            `circuitsae.graph.compare`.

    Raises:
        InputError: models of other depths, names that are equal, or tables without the columns a report needs.
    """
    checked = [_Checked(graph, found) for graph, found in zip((a, b), validation, strict=True)]
    both = compare(checked[0], checked[1], names=_two(names), **how)
    return write_comparison(both, path, cards=cards, ledger=ledger, plotlyjs=plotlyjs, title=title)


def write_comparison(
    comparison: Comparison,
    path: str | Path,
    *,
    cards: tuple[CardsLike | None, CardsLike | None] = (None, None),
    ledger: tuple[LedgerLike | None, LedgerLike | None] = (None, None),
    plotlyjs: PlotlyJS = "inline",
    title: str | None = None,
    pages: tuple[Path | None, Path | None] = (None, None),
) -> Path:
    """`compare_html` of two graphs that were compared already; `pages`: their own, linked to where they are there."""
    whole, names = unite(comparison), _names(comparison)
    both = bounded(whole)
    data = page_data(both)
    data["picture"]["n_edges"] = len(whole.edges)
    data["title"] = title or f"{names[0]} ⇄ {names[1]}: {prompt_title(comparison.a.tokens)}"
    data["ways"] = pages_there(zip(names, pages, strict=True), path)
    data["cards"] = _of_each(both, [cards_data(one, nodes) for one, nodes in zip(cards, _sides(both), strict=True)])
    data["labels"] = _of_each(both, [labels_data(one, nodes) for one, nodes in zip(ledger, _sides(both), strict=True)])
    data |= {"comparison": comparison_data(comparison, both), "commands": None, "foreseen": None}
    counts = _summary(whole, _changes(whole.nodes))
    data["comparison"]["summary"] |= {name: counts[name] for name in ("edges", "flipped", "shared")}
    return write_page(data, path, plotlyjs)


def bounded(both: Union, most: int = MOST_CARRIED) -> Union:
    """With the `most` edges that matter most for the difference and all that were tested in either graph."""
    if len(both.edges) <= most:
        return both
    tested = [tested_columns(_of_side(both.edges, side)) for side in ("a", "b")]
    columns = [f"{name}_{side}" for side, names in zip(("a", "b"), tested, strict=True) for name in names]
    rows = carried(both.edges, select(both.nodes, both.edges), most, columns)
    return replace(both, edges=both.edges.iloc[rows].reset_index(drop=True))


def comparison_data(comparison: Comparison, both: Union) -> dict[str, Any]:
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
        "names": _names(comparison),
        "sides": sides,
        "tokens": [[token or _NONE for token in words] for words in _words(comparison)],
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
    """The nodes of either graph; all of them where both have the same features. A pair is shown as the first's."""
    nodes = both.nodes
    if both.same_features:
        return [nodes, nodes]
    only_b = (nodes["in_b"] & (nodes["matched"] != "decoder")).to_numpy()
    return [nodes.iloc[np.flatnonzero(there)] for there in (nodes["in_a"].to_numpy(), only_b)]


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
