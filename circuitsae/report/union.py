"""Two graphs of one pair as one graph: the nodes and edges of both, with what each of the two says of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from circuitsae.report.data import EDGE_COLUMNS, NODE_COLUMNS, GraphLike, require
from circuitsae.report.text import visible
from transcoders.errors import InputError

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
            for score in scores[0]
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
    return nodes.assign(text=nodes["text"].fillna("").astype(str)), edges


def _nodes(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    columns = [*_PLACE, "text", "cumulative", *NODE_VALUES]
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
    # The slider shows a node as long as either graph does.
    table["cumulative"] = np.fmin(both["cumulative_a"].astype(float), both["cumulative_b"].astype(float))
    return pd.DataFrame(table).astype({"layer": int, "pos": int, "index": int})


def _both_texts(one: Any, other: Any) -> str:
    texts = [text for text in (one, other) if isinstance(text, str)]
    return texts[0] if len(set(texts)) == 1 else " ⇄ ".join(map(visible, texts))


def _edges(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    ends, noted = ["source", "target"], [a, b]
    for side, frame in enumerate(noted):
        verdict = frame.get("verdict")
        noted[side] = frame[[*ends, *EDGE_VALUES]].assign(verdict=verdict)
    both = noted[0].merge(noted[1], on=ends, how="outer", suffixes=("_a", "_b"), sort=False)
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
