"""Two graphs side by side: which node of one is which of the other, and how they differ."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd

from circuitsae.graph.alignment import Alignment, align
from circuitsae.graph.like import EDGE_COLUMNS, NODE_COLUMNS, GraphLike, require
from transcoders._lazy import public
from transcoders.errors import InputError

NODE_VALUES = ("activation", "pre_activation", "influence", "probability")
EDGE_VALUES = ("weight", "share")
MARKS = ("A:", "B:")
"""What the ids of features start with where equal numbers are not the same feature."""
SIDES = ("a", "b")
_PLACE = ("kind", "layer", "pos", "index")


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two graphs as one. A difference is second minus first, and what one graph lacks counts as 0 there: it may be
    absent or have been pruned.
    """

    a: GraphLike
    b: GraphLike
    names: tuple[str, str]
    nodes: pd.DataFrame
    """A row per node of either: `id`, `id_a` and `id_b` (None where a graph lacks it), `in_a`, `in_b`; `matched`, how
    the two are one: "same" (the same feature, error, token, logit or bias at corresponding positions), "decoder"
    (features of other dictionaries that write alike) or "" (in one graph only), with `similarity`, the cosine of
    decoders, 1 for the same; `kind`, `layer`, `pos` (the place in `alignment`), `index`, of the first that has it;
    `text_a`, `text_b`; and `_a`, `_b` and `_difference` of `activation`, `pre_activation`, `influence` and
    `probability`."""
    edges: pd.DataFrame
    """A row per edge of either: `source` and `target` (ids of `nodes`), `in_a`, `in_b`, `weight_a`, `weight_b`,
    `difference`, `share_a`, `share_b`, `share` = |difference| over the larger of the two sums of |weight| into the
    target, so that it compares across targets; and `_a`, `_b` of what else the edges of either have."""
    alignment: Alignment
    """Which positions correspond."""
    same_features: bool
    """Whether equal numbers of features are the same feature; else those of A and of B are apart, but for pairs."""

    def __repr__(self) -> str:
        both = int(np.count_nonzero(self.nodes["in_a"] & self.nodes["in_b"]))
        return f"Comparison({' and '.join(self.names)}: {both} of {len(self.nodes)} nodes, {len(self.edges)} edges)"

    def strongest(self, n: int = 10, by: str = "influence") -> pd.DataFrame:
        """The `n` nodes whose `by` differs most, without biases."""
        nodes = self.nodes.iloc[np.flatnonzero((self.nodes["kind"] != "bias").to_numpy())]
        column = f"{by}_difference"
        return nodes.sort_values(column, key=abs, ascending=False, kind="stable").head(n)

    def to_networkx(self) -> nx.DiGraph:
        """Nodes and edges of both, with the columns of `nodes` and `edges` as attributes; missing values left out."""
        graph = nx.DiGraph(names=list(self.names), same_features=self.same_features)
        for row in self.nodes.to_dict("records"):
            graph.add_node(row["id"], **{str(k): v for k, v in row.items() if k != "id" and not _missing(v)})
        for row in self.edges.to_dict("records"):
            attributes = {str(k): v for k, v in row.items() if k not in ("source", "target") and not _missing(v)}
            graph.add_edge(row["source"], row["target"], **attributes)
        return graph

    def to_html(self, path: str | Path, **options: Any) -> Path:
        """Write the page on which one sees either graph or their difference; options of
        `circuitsae.report.compare.write_comparison`.
        """
        return public("circuitsae.report.compare.write_comparison")(self, path, **options)


def compare(
    a: GraphLike,
    b: GraphLike,
    *,
    names: tuple[str, str] = ("A", "B"),
    same_features: bool | None = None,
    positions: Mapping[int, int] | None = None,
    roles: tuple[Mapping[str, int], Mapping[str, int]] | None = None,
    dictionaries: tuple[Any, Any] | None = None,
    **similar: Any,
) -> Comparison:
    """What differs between two graphs of one model: two prompts, or one prompt with two sets of dictionaries.

    Nodes are the same where kind, layer, feature (or token of a logit) are, at positions that correspond: see
    `circuitsae.graph.alignment.align` for `positions`, `roles`, and prompts of unequal lengths.

    * `same_features`: whether equal numbers mean equal features; by default, where the graphs' provenance does not say
      that their models or dictionaries differ. Otherwise each feature is in one graph only, under an id that starts
      with "A:" or "B:",
    * unless `dictionaries`, those of the two graphs, are given: then features of corresponding positions that write
      alike are paired one to one, under the id of the first: see `circuitsae.features.match_features`, which takes the
      other settings (`above`, `layers_apart`, `by`).

    Raises `InputError` for models of other depths, names that are equal, and positions that are not there.
    """
    if similar and dictionaries is None:
        raise InputError(f"{', '.join(similar)} say how features are paired; give dictionaries=(…, …) as well.")
    _check(a, b, names)
    same = _same_dictionaries(a, b) if same_features is None else same_features
    alignment = align(a.tokens, b.tokens, positions=positions, roles=roles)
    (nodes_a, edges_a), (nodes_b, edges_b) = (
        _tables(graph, places, "" if same else mark)
        for graph, places, mark in zip((a, b), alignment[:2], MARKS, strict=True)
    )
    similarity: dict[str, float] = {}
    if dictionaries is not None and not same:
        pairs = public("circuitsae.features.match_features")(nodes_a, nodes_b, dictionaries, **similar)
        nodes_b, edges_b = _renamed(nodes_b, edges_b, dict(zip(pairs["id_b"], pairs["id_a"], strict=True)))
        similarity = dict(zip(pairs["id_a"], pairs["similarity"], strict=True))
    nodes = _nodes(nodes_a, nodes_b, similarity)
    return Comparison(a, b, names, nodes, _edges(edges_a, edges_b), alignment, same)


def _check(a: GraphLike, b: GraphLike, names: tuple[str, str]) -> None:
    if len(set(names)) < 2 or not all(name.strip() for name in names):
        raise InputError(f"names={names!r} do not tell two graphs apart; give two different names.")
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


def _tables(graph: GraphLike, places: tuple[int, ...], mark: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Nodes at their places, under the ids that both graphs share, and edges between these."""
    nodes = require(graph.nodes_frame(), NODE_COLUMNS, "nodes_frame()")
    edges = require(graph.edges_frame(), EDGE_COLUMNS, "edges_frame()")
    _refuse_twice(nodes)
    moved = {pos: place for pos, place in enumerate(places) if pos != place}
    renamed = {}
    for name, kind, pos in nodes[["id", "kind", "pos"]].itertuples(index=False):
        new = f"{name.rpartition('@')[0]}@{moved[pos]}" if pos in moved else name
        renamed[name] = f"{mark}{new}" if kind == "feature" else new
    own = nodes.assign(own=nodes["id"], pos=nodes["pos"].replace(moved), text=nodes["text"].fillna("").astype(str))
    own["explained"] = nodes["explained"].astype(bool) if "explained" in nodes else False
    own, edges = _renamed(own, edges, renamed)
    _refuse_twice(own)
    return own, edges


def _refuse_twice(nodes: pd.DataFrame) -> None:
    if (repeated := Counter(nodes["id"].tolist()).most_common(1)) and repeated[0][1] > 1:
        raise InputError(f"node ids must be unique; {repeated[0][0]!r} occurs more than once.")


def _renamed(nodes: pd.DataFrame, edges: pd.DataFrame, names: Mapping[str, str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    found = {column: [names.get(name, name) for name in edges[column]] for column in ("source", "target")}
    return nodes.assign(id=[names.get(name, name) for name in nodes["id"]]), edges.assign(**found)


def _nodes(a: pd.DataFrame, b: pd.DataFrame, similarity: Mapping[str, float]) -> pd.DataFrame:
    columns = ["id", "own", *_PLACE, "text", "cumulative", "explained", *NODE_VALUES]
    both = a[columns].merge(b[columns], on="id", how="outer", suffixes=("_a", "_b"), sort=False)
    in_a, in_b = (both[f"own_{side}"].notna() for side in SIDES)
    table: dict[str, Any] = {"id": both["id"]}
    table |= {
        f"id_{side}": both[f"own_{side}"].astype(object).where(both[f"own_{side}"].notna(), None) for side in SIDES
    }
    table |= {"in_a": in_a, "in_b": in_b}
    similar = both["id"].isin(list(similarity))
    table["matched"] = np.select([similar, in_a & in_b], ["decoder", "same"], "")
    cosine = [similarity.get(name, math.nan) for name in both["id"].tolist()]
    table["similarity"] = np.select([similar, in_a & in_b], [cosine, 1.0], math.nan)
    table |= {name: both[f"{name}_a"].where(in_a, both[f"{name}_b"]) for name in _PLACE}
    table |= {f"text_{side}": both[f"text_{side}"] for side in SIDES}
    for name in (*NODE_VALUES, "cumulative"):
        values = [both[f"{name}_{side}"].astype(float) for side in SIDES]
        table |= dict(zip((f"{name}_a", f"{name}_b"), values, strict=True))
        if name != "cumulative":
            known = values[0].notna() | values[1].notna()
            table[f"{name}_difference"] = (values[1].fillna(0.0) - values[0].fillna(0.0)).where(known)
    explained = np.logical_or(*(both[f"explained_{side}"].eq(True).to_numpy(bool) for side in SIDES))
    if explained.any():
        table["explained"] = explained
    return pd.DataFrame(table).astype({"layer": int, "pos": int, "index": int})


def _edges(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    ends = ["source", "target"]
    sides = [
        frame.set_index(ends).add_suffix(f"_{side}").reset_index() for side, frame in zip(SIDES, (a, b), strict=True)
    ]
    both = sides[0].merge(sides[1], on=ends, how="outer", sort=False)
    weights = {side: both[f"weight_{side}"].astype(float) for side in SIDES}
    difference = weights["b"].fillna(0.0) - weights["a"].fillna(0.0)
    inputs = np.fmax(*(_inputs(both, side) for side in SIDES))
    share = np.divide(np.abs(difference), inputs, out=np.zeros(len(both)), where=inputs > 0)
    return both.assign(difference=difference, share=share, in_a=weights["a"].notna(), in_b=weights["b"].notna())


def _inputs(edges: pd.DataFrame, side: str) -> np.ndarray:
    """Of each edge, Σ|weight| into its target in one graph, from the weights and shares of the edges there."""
    weight, share = np.abs(edges[f"weight_{side}"].to_numpy(float)), edges[f"share_{side}"].to_numpy(float)
    total = np.divide(weight, share, out=np.zeros(len(edges)), where=share > 0)
    return pd.Series(total).groupby(edges["target"].to_numpy()).transform("max").to_numpy()


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)
