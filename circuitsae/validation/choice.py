"""Which edges are put to the test: a sample of every class and layer distance, by influence on the logits.

The strongest edges by |weight| lead from tokens to the first layer on real models, and say nothing of the answer.
Here a stratum is a class (`feature→logit`) at one layer distance, and all strata are covered alike: at each step the
one whose tested edges hold the least share of its influence gives its next edge, the most influential one left.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral, Real

import numpy as np
import pandas as pd

from circuitsae.graph import AttributionGraph, NodeKind
from circuitsae.graph.influence import EdgeScores, absolute_inputs, node_influence
from circuitsae.validation.measuring import ablatable
from transcoders.errors import InputError

_EXPECTED = "a count (100), a share of the influence (80% or 0.8), a class (feature→logit) or an edge (0.153@8 → 1.2@9)"
_KINDS = list(NodeKind)
_CLASSES = [f"{source}→{target}" for source in _KINDS for target in _KINDS]


@dataclass(frozen=True)
class EdgeChoice:
    """The edges to test, and how much of the influence of all that can be tested they hold."""

    rows: pd.DataFrame
    """One row per edge, in the order to test them: `s`, `t` (row numbers of nodes), `weight`, `kind` ("feature→logit"),
    `hops` (l_t − l_s, with tokens at layer −1 and logits at n_layers), `influence` (share of that of all testable)."""
    share: float
    """Of the influence of all edges that can be tested, what the chosen ones hold; in [0, 1]."""
    shares: Mapping[str, float]
    """The same within each class that the graph has; 0 for a class that carries none."""


def choose_edges(graph: AttributionGraph, edges: int | float | str | Sequence[str] | None = 100) -> EdgeChoice:
    """The edges of a graph to test, stratified by class and layer distance, drawn by influence.

        influence of s→t = Â[t, s]·(I+w)[t], with Â and I of this graph as it is: of a pruned one, renormalised

    An edge can be tested where its source can be removed: a feature, a token, an error node (not where it holds
    features that `max_features` left out). Within a stratum (class, `hops`) edges come by decreasing influence, then by
    row numbers; the next edge is that of the stratum whose chosen edges hold the least share of its own influence.
    Edges without influence come last. Where no edge has any, as in a graph without logits, |weight| stands for it.

    `edges`: so many (int); until they hold this share of all influence (float in (0, 1]; 1 is a count, 1.0 a share);
    a class "feature→logit", a share "80%" or an edge "0.153@8 → 1.2@9", or several of these texts, for all of them
    together; None: all. Arrows may be written "->".

    Of a graph without an edge that can be tested none is chosen. Raises `InputError` for a count below 1, a share
    outside (0, 1], and classes and edges that the graph does not have or that cannot be tested.
    """
    every = _in_order(_testable(graph))
    chosen = _chosen(graph, every, edges)
    code, influence = every["kind"].cat.codes.to_numpy(), every["influence"].to_numpy()
    held = np.where(chosen, influence, 0.0)
    of_class, held_of_class = (np.bincount(code, values, len(_CLASSES)) for values in (influence, held))
    return EdgeChoice(
        rows=every.take(np.flatnonzero(chosen)).reset_index(drop=True).astype({"kind": object}),
        share=float(held.sum() / influence.sum()) if len(influence) else np.nan,
        shares={_CLASSES[i]: float(held_of_class[i] / (of_class[i] or 1.0)) for i in np.unique(code)},
    )


def parse_edges(texts: Sequence[str]) -> int | float | list[str]:
    """What `--edges` was given, for `choose_edges`: one count or share as a number, anything else as it is.

    Raises `InputError` for a text that is neither a count, a share, a class nor an edge, and where there is none.
    """
    values = [_value(text) for text in texts]
    if not values:
        raise InputError(f"--edges was given nothing; give {_EXPECTED}.")
    return values[0] if len(values) == 1 and not isinstance(values[0], str) else list(texts)


def _testable(graph: AttributionGraph) -> pd.DataFrame:
    """Every edge whose source can be removed, by target and source, with its influence."""
    weights = graph.weights.sorted_indices()  # sums, and with them ties, depend on no order of storage
    bias, removable = graph.mask(NodeKind.BIAS), graph.mask(*ablatable(graph))
    targets, inputs = graph.mask(NodeKind.FEATURE, NodeKind.LOGIT), absolute_inputs(weights, bias)
    reached = node_influence(weights, inputs, graph.layers, targets, graph.start, bias)
    scores = EdgeScores(weights, inputs, np.nan_to_num(reached) + graph.start, removable)
    s, t = weights.indices, np.repeat(np.arange(len(graph.nodes)), np.diff(weights.indptr))
    usable = removable[s] & (weights.data != 0)
    influence = _rounded(np.concatenate([np.zeros(0), *scores])[usable])
    s, t, weight = s[usable], t[usable], weights.data[usable]
    if not influence.any():
        influence = np.abs(weight, dtype=np.float64)
    kind = np.array([_KINDS.index(node.kind) for node in graph.nodes], dtype=np.int8)
    return pd.DataFrame(
        {
            "s": s,
            "t": t,
            "weight": weight,
            "kind": pd.Categorical.from_codes(kind[s] * len(_KINDS) + kind[t], _CLASSES),
            "hops": graph.layers[t] - graph.layers[s],
            "influence": influence / influence.sum(),
        }
    )


def _in_order(edges: pd.DataFrame) -> pd.DataFrame:
    """The edges as they are to be tested: by the share of its stratum's influence that is held before each."""
    edges = edges.sort_values("influence", ascending=False, kind="stable", ignore_index=True)
    influence = edges["influence"].to_numpy()
    before = np.zeros(len(edges))
    for rows in edges.groupby(["kind", "hops"], observed=True).indices.values():
        held = np.cumsum(influence[rows])
        before[rows[1:]] = held[:-1] / (held[-1] or 1.0)
    before = np.where(influence > 0, _rounded(before), np.inf)
    return edges.iloc[np.argsort(before, kind="stable")].reset_index(drop=True)


def _rounded(values: np.ndarray) -> np.ndarray:
    """To 40 bits, so that the edges of a chain without branches, equal by their formula, are equal."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(np.ldexp(mantissa, 40)), exponent - 40)


def _chosen(graph: AttributionGraph, every: pd.DataFrame, edges: object) -> np.ndarray:
    """[edge], which of all edges are asked for."""
    match edges:
        case None:
            return np.ones(len(every), dtype=bool)
        case str():
            value = _value(edges)
            return _named(graph, every, value) if isinstance(value, str) else _first(every, value)
        case Real() if not isinstance(edges, bool):
            return _first(every, int(edges) if isinstance(edges, Integral) else float(edges))
        case Sequence() if edges and all(isinstance(part, str) for part in edges):
            return np.logical_or.reduce([_chosen(graph, every, part) for part in edges])
    raise InputError(f"edges={edges!r:.80} does not say which edges to test; give {_EXPECTED}, or several texts.")


def _first(every: pd.DataFrame, number: int | float) -> np.ndarray:
    """[edge], a count of edges from the first on, or as many as hold a share."""
    number = _checked(number)
    if isinstance(number, float):
        held = np.cumsum(every["influence"].to_numpy())
        number = int(np.searchsorted(held, number * held[-1:].sum())) + 1
    return np.arange(len(every)) < number


def _checked(number: int | float) -> int | float:
    if isinstance(number, int) and number < 1:
        raise InputError(f"edges={number} leaves nothing to validate; give at least 1.")
    if not (isinstance(number, int) or 0 < number <= 1):
        raise InputError(
            f"edges={number} is no share of the influence; give a number above 0 and at most 1 (or a count, whole)."
        )
    return number


def _value(text: str) -> int | float | str:
    """A count or a share as a number; a class or an edge as it is written."""
    number = _number(text)
    if number is not None:
        return _checked(number)
    if len(_ends(text)) != 2:
        raise InputError(f"edges={text!r:.80} does not say which edges to test; give {_EXPECTED}.")
    return text


def _number(text: str) -> int | float | None:
    for read in (int, float, lambda percentage: float(percentage.strip().removesuffix("%")) / 100):
        try:
            return read(text)
        except ValueError:
            continue
    return None


def _ends(text: str) -> list[str]:
    return [end.strip() for end in re.split("→|->", text)]


def _named(graph: AttributionGraph, every: pd.DataFrame, text: str) -> np.ndarray:
    """[edge], those of the class, or the one with the ids, of a text."""
    source, target = _ends(text)
    if {source, target} <= set(_KINDS):
        found = (every["kind"] == f"{source}→{target}").to_numpy()
        if not found.any():
            there = ", ".join(every["kind"].cat.remove_unused_categories().cat.categories)
            raise InputError(f"The graph has no edge of class {text!r} that can be tested; it has: {there}.")
        return found
    s, t = _row(graph, source, text), _row(graph, target, text)
    found = (every["s"].to_numpy() == s) & (every["t"].to_numpy() == t)
    if not found.any():
        raise InputError(_why_not(graph, every, s, t))
    return found


def _row(graph: AttributionGraph, name: str, text: str) -> int:
    if name not in graph.position:
        near = get_close_matches(name, [other for other in (*_KINDS, *graph.position) if other != name], 3)
        raise InputError(
            f"The graph has no node {name!r} for an end of {text!r}; give a class (feature→logit) or two nodes"
            + (f"; close to it are: {', '.join(near)}." if near else f" such as {graph.nodes[0].id}.")
        )
    return graph.position[name]


def _why_not(graph: AttributionGraph, every: pd.DataFrame, s: int, t: int) -> str:
    """Why the edge from `s` to `t` is none that can be tested, and which ones can."""
    source, target = graph.nodes[s], graph.nodes[t]
    if source.kind not in ablatable(graph):
        return (
            f"The edge {source.id} → {target.id} cannot be tested, for its source cannot be removed; "
            f"give one from a {' or '.join(ablatable(graph))}."
        )
    into = every.loc[every["t"] == t].nlargest(3, "influence")["s"]
    if into.empty:
        return f"The graph has no edge {source.id} → {target.id}, nor any other into {target.id} that can be tested."
    near = ", ".join(f"{graph.ids[other]} → {target.id}" for other in into)
    return f"The graph has no edge {source.id} → {target.id}; the most influential into {target.id}: {near}."
