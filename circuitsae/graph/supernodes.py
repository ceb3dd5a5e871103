"""Supernodes: features of one graph that do the same thing, put together.

Two features of one place are alike as far as three kinds of evidence say so, each a number up to 1:

    inputs     cos(A[i, ·] / Σ_s |A[i, s]| , A[j, ·] / Σ_s |A[j, s]|)           what writes into them, signs included
    outputs    cos(A[·, i] / Σ_s |A[·, s]| , A[·, j] / Σ_s |A[·, s]|)           what they write to
    examples   |T_i ∩ T_j| / |T_i ∪ T_j|, or their co-activation if larger      what they fire on; only with cards

Their similarity is the geometric mean of those that can be told, 0 where one of them is not above 0: features that
share their inputs only, as all do that read the same token in the first layer, are not alike. Features of one place are
clustered by 1 − similarity (average linkage, cut at `APART`). Groups are suggestions: a reader accepts, renames or
splits them. Supernodes made by hand: Ameisen et al. 2025, "Circuit Tracing", section on grouping features.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from scipy import sparse

from circuitsae.graph.attribution_graph import AttributionGraph
from circuitsae.graph.grouping import Supernode
from circuitsae.graph.likeness import Evidence, clusters, mean_of_pairs
from circuitsae.graph.nodes import Node, NodeKind
from transcoders.errors import InputError

APART = 0.5
"""Features are put together up to this mean distance."""
_NAMED_TOKENS = 2
_TELLING = 0.15
"""How much more of what enters or leaves a group than of all features' a token or logit needs to give it its name."""


@runtime_checkable
class CardsLike(Protocol):
    """A collection of feature cards, such as `circuitsae.features.cards.FeatureCards`."""

    def for_nodes(self, nodes: pd.DataFrame, /) -> Mapping[str, Mapping[str, Any]]:
        """The cards, as JSON, of the features among the nodes, by "{layer}.{index}"."""
        ...


def suggest_supernodes(
    graph: AttributionGraph,
    *,
    cards: CardsLike | Mapping[str, Mapping[str, Any]] | None = None,
    roles: Mapping[int, str] | None = None,
    apart: float = APART,
    least: int = 2,
    most_features: int = 2000,
) -> list[Supernode]:
    """Groups of features that share inputs, outputs and examples, the most influential first.

    Only features at one position are put together, of whatever layers. Positions to which `roles` gives the same name
    count as one: what writes into a feature is then compared by role, so that two names' features can be alike.
    cards: what features fire on, see `CardsLike`; without, or for features that have none, examples say nothing.
    apart: in (0, 1]; a lower one gives smaller and tighter groups. least: the smallest group. most_features: only so
    many are looked at, the most influential.
    The same graph and cards always give the same groups. Raises `InputError` for settings outside of these ranges.
    """
    if not 0 < apart <= 1:
        raise InputError(f"apart={apart} is no distance; give a number above 0 and at most 1 (default {APART}).")
    if least < 2:
        raise InputError(f"least={least} would call single features supernodes; give at least 2.")
    rows = np.flatnonzero(graph.mask(NodeKind.FEATURE))
    weight = np.nan_to_num(graph.influence)
    rows = np.sort(rows[np.argsort(-weight[rows], kind="stable")[:most_features]])
    role = roles or {}
    found: list[tuple[float, list[int], Evidence]] = []
    everything = Evidence.of(graph, rows, role, _cards_of(graph, cards))
    places = [role.get(graph.nodes[row].pos, graph.nodes[row].pos) for row in rows]
    for place in dict.fromkeys(places):
        here = everything.part([i for i, other in enumerate(places) if other == place])
        for members in clusters(1 - here.similarity(), apart):
            if len(members) >= least:
                chosen = here.part(members)
                found.append((float(weight[chosen.rows].sum()), members, chosen))
    found.sort(key=lambda group: (-group[0], str(graph.ids[group[2].rows[0]])))
    names = _distinct([_name(graph, evidence) for _, _, evidence in found])
    return [
        Supernode(name, tuple(graph.ids[evidence.rows]), _reason(graph, evidence), evidence.cohesion())
        for name, (_, _, evidence) in zip(names, found, strict=True)
    ]


def _cards_of(
    graph: AttributionGraph, cards: CardsLike | Mapping[str, Mapping[str, Any]] | None
) -> Mapping[str, Mapping[str, Any]]:
    if cards is None:
        return {}
    return cards if isinstance(cards, Mapping) else cards.for_nodes(graph.nodes_frame())


# names and reasons


def _name(graph: AttributionGraph, evidence: Evidence) -> str:
    """What most members have in common: a label, the tokens they fire on, the logit or token they stand next to."""
    n = len(evidence.rows)
    labels = Counter(name for card in evidence.cards if card and (name := _labelled(card.get("label"))))
    if labels and labels.most_common(1)[0][1] * 2 >= n:
        return min(labels.items(), key=lambda item: (-item[1], item[0]))[0]
    members = Counter(token for tokens in evidence.tokens for token in tokens)
    often = sum(evidence.tokens, Counter())
    shared = sorted((t for t, m in members.items() if m * 2 >= n and m > 1), key=lambda t: (-members[t], -often[t], t))
    if shared:
        return " / ".join(shared[:_NAMED_TOKENS])
    features = np.flatnonzero(graph.mask(NodeKind.FEATURE))
    for all_edges, form in ((graph.weights.T.tocsr(), "→ {}"), (graph.weights, "{}")):
        if (best := _telling(graph, all_edges[evidence.rows], all_edges[features])) is not None:
            return form.format(_readable(best.text))
    return _place(graph, evidence)


def _labelled(label: Mapping[str, Any] | None) -> str:
    """What a label gives as a name: a hypothesis is called one, and what was contradicted names nothing."""
    if not label or not label.get("text") or label.get("status") == "contradicted":
        return ""
    return f"hypothesis: {label['text']}" if label.get("status") == "hypothesis" else str(label["text"])


def _telling(graph: AttributionGraph, profiles: sparse.csr_array, others: sparse.csr_array) -> Node | None:
    """The token or logit that has more of what the members take in, or write to, than it has of all features'."""
    counted = np.where(graph.mask(NodeKind.BIAS), 0.0, 1.0)
    own, usual = (np.abs(np.asarray(p.astype(np.float64).sum(axis=0)).ravel()) * counted for p in (profiles, others))
    if not own.any():
        return None
    more = np.where(graph.mask(NodeKind.TOKEN, NodeKind.LOGIT), own / own.sum() - usual / max(usual.sum(), 1e-300), 0)
    best = int(more.argmax())
    return graph.nodes[best] if more[best] >= _TELLING and graph.nodes[best].text else None


def _readable(text: str) -> str:
    return text.strip() or repr(text)


def _place(graph: AttributionGraph, evidence: Evidence) -> str:
    """Positions and layers in words."""
    positions = dict.fromkeys(graph.nodes[row].pos for row in evidence.rows)
    layers = sorted({graph.nodes[row].layer for row in evidence.rows})
    where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
    return f"{', '.join(f'{_readable(graph.tokens[pos])} ({pos})' for pos in positions)}, {where}"


def _reason(graph: AttributionGraph, evidence: Evidence) -> str:
    parts = []
    for name, (similarity, known) in evidence.channels().items():
        value = mean_of_pairs(similarity, known)
        if not np.isnan(value):
            parts.append(f"{name} {value:.2f}")
    return f"{len(evidence.rows)} features at {_place(graph, evidence)}; mean similarity of {', '.join(parts)}"


def _distinct(names: Sequence[str]) -> list[str]:
    seen: Counter[str] = Counter()
    taken = set(names)
    distinct: list[str] = []
    for name in names:
        seen[name] += 1
        made = name
        while seen[name] > 1 and (made := f"{name} ({seen[name]})") in taken:
            seen[name] += 1
        taken.add(made)
        distinct.append(made)
    return distinct
