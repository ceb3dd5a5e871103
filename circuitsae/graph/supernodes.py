"""Supernodes: features of one graph that do the same thing, put together.

Two features of one place are alike as far as three kinds of evidence say so, each a number up to 1:

    inputs     cos(A[i, ·] / Σ_s |A[i, s]| , A[j, ·] / Σ_s |A[j, s]|)           what writes into them, signs included
    outputs    cos(A[·, i] / Σ_s |A[·, s]| , A[·, j] / Σ_s |A[·, s]|)           what they write to
    examples   |T_i ∩ T_j| / |T_i ∪ T_j|, or their co-activation if larger      what they fire on; only with cards

Their similarity is the geometric mean of those that can be told, 0 where one of them is not above 0: features that
share their inputs only, as all do that read the same token in the first layer, are not alike. Features of one place are
clustered by 1 − similarity (average linkage, cut at `APART`). Groups are suggestions: a reader accepts, renames or
splits them. Supernodes made by hand: Ameisen et al. 2025, "Circuit Tracing", section on grouping features.

How alike features of one graph are, by what writes into them, what they write to, and what they fire on.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from circuitsae.graph.attribution_graph import AttributionGraph
from circuitsae.graph.grouping import Supernode
from circuitsae.graph.influence import reciprocal
from circuitsae.graph.nodes import Node, NodeKind
from transcoders.errors import InputError


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of some features; rows belong together."""

    rows: np.ndarray
    """[feature], their rows in the graph."""
    inputs: sparse.csr_array
    """[feature, source], sources of one kind, layer, feature and role together."""
    outputs: sparse.csr_array
    """[feature, target], the same."""
    cards: list[Mapping[str, Any] | None]
    tokens: list[Counter[str]]
    """What each fires on in the examples of its card."""

    @classmethod
    def of(
        cls,
        graph: AttributionGraph,
        rows: np.ndarray,
        roles: Mapping[int, str],
        cards: Mapping[str, Mapping[str, Any]],
    ) -> "Evidence":
        """What a graph and cards (by `"{layer}.{index}"`) say of the features in its `rows`.

        Nodes of one kind, layer, feature and role count as one source or target; a position without a role is its own.
        """
        classes, seen = np.zeros(len(graph.nodes), dtype=np.int64), {}
        for i, node in enumerate(graph.nodes):
            classes[i] = seen.setdefault(_identity(node, roles), len(seen))
        total = reciprocal(graph.inputs)
        into = sparse.diags_array(total[rows]) @ graph.weights[rows].astype(np.float64)
        out = sparse.diags_array(total) @ graph.weights[:, rows].astype(np.float64)
        # Biases write into every feature alike, and would make all of them similar.
        free = np.where(graph.mask(NodeKind.BIAS), 0.0, 1.0)
        merge = sparse.csr_array((free, (np.arange(len(classes)), classes)), shape=(len(classes), len(seen)))
        found = [cards.get(f"{graph.nodes[row].layer}.{graph.nodes[row].index}") for row in rows]
        return cls(
            rows,
            sparse.csr_array(into @ merge),
            sparse.csr_array(out.T @ merge),
            found,
            [_fires_on(card) for card in found],
        )

    def part(self, members: Sequence[int]) -> "Evidence":
        """The same of some of the features, by their place among these."""
        i = np.asarray(members, dtype=np.int64)
        chosen = [self.cards[j] for j in members], [self.tokens[j] for j in members]
        return Evidence(self.rows[i], self.inputs[i], self.outputs[i], *chosen)

    def channels(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Of each kind of evidence, the similarities [feature, feature], and of which pairs they can be told."""
        told: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name, profiles in (("inputs", self.inputs), ("outputs", self.outputs)):
            has = np.asarray(abs(profiles).sum(axis=1)).ravel() > 0
            told[name] = cosines(profiles), has[:, None] | has[None]
        if any(card is not None for card in self.cards):
            told["examples"] = self._examples()
        return told

    def similarity(self) -> np.ndarray:
        """[feature, feature], the geometric mean over the channels that can be told; 0 where none can."""
        channels = list(self.channels().values())
        known = np.sum([k for _, k in channels], axis=0)
        product = np.prod([np.where(k, np.maximum(s, 0.0), 1.0) for s, k in channels], axis=0)
        return np.where(known > 0, product ** (1 / np.maximum(known, 1)), 0.0)

    def cohesion(self) -> float:
        """The mean similarity of all pairs; NaN for a single feature."""
        return mean_of_pairs(self.similarity(), np.ones((len(self.rows),) * 2, dtype=bool))

    def _examples(self) -> tuple[np.ndarray, np.ndarray]:
        n = len(self.rows)
        together, known = np.zeros((n, n)), np.zeros((n, n), dtype=bool)
        keys = [None if card is None else (card.get("layer"), card.get("feature")) for card in self.cards]
        for i in range(n):
            for j in range(i):
                if keys[i] is None or keys[j] is None:
                    continue
                a, b = self.tokens[i].keys(), self.tokens[j].keys()
                jaccard = len(a & b) / len(a | b) if a or b else 0.0
                active = max(_coactivation(self.cards[i], keys[j]), _coactivation(self.cards[j], keys[i]))
                together[i, j] = together[j, i] = 1.0 if keys[i] == keys[j] else max(jaccard, active)
                known[i, j] = known[j, i] = True
        return together, known


def clusters(distance: np.ndarray, apart: float) -> list[list[int]]:
    """Groups of rows by average linkage of a [n, n] matrix of distances, cut at `apart`; every row is in one."""
    n = len(distance)
    if n < 2:
        return [[i] for i in range(n)]
    condensed = squareform(np.maximum((distance + distance.T) / 2, 0), checks=False)
    labels = fcluster(linkage(condensed, "average"), apart, "distance")
    return [np.flatnonzero(labels == label).tolist() for label in dict.fromkeys(labels.tolist())]


def cosines(profiles: sparse.csr_array | np.ndarray) -> np.ndarray:
    """[n, n] cosines of the rows; 0 where one of the two is all zeros."""
    squares = np.asarray((profiles * profiles).sum(axis=1)).ravel()
    unit = sparse.diags_array(reciprocal(np.sqrt(squares))) @ profiles
    product = unit @ unit.T
    dense = sparse.csr_array(product).toarray() if sparse.issparse(product) else np.asarray(product)
    return np.clip(dense, -1.0, 1.0)


def _identity(node: Node, roles: Mapping[int, str]) -> Hashable:
    name = node.text if node.kind is NodeKind.BIAS else ""
    place = roles.get(node.pos, node.pos)
    # Tokens of one role take the same part, whatever they are.
    index = -1 if node.kind is NodeKind.TOKEN and isinstance(place, str) else node.index
    return node.kind, node.layer, index, name, place


def _fires_on(card: Mapping[str, Any] | None) -> Counter[str]:
    """The tokens on which a feature is at least half as active as at the peak of the example, with how often."""
    seen: Counter[str] = Counter()
    for example in (card or {}).get("examples") or []:
        activations = [float(a or 0) for a in example.get("activations") or []]
        half = max(activations, default=0.0) / 2
        seen.update(
            token.strip().casefold() or token
            for token, a in zip(example.get("tokens") or [], activations, strict=False)
            if half > 0 and a >= half
        )
    return seen


def _coactivation(card: Mapping[str, Any] | None, key: tuple[Any, Any] | None) -> float:
    scores = (
        float(other.get("score") or 0)
        for other in (card or {}).get("neighbours") or []
        if (other.get("layer"), other.get("feature")) == key
    )
    return max(scores, default=0.0)


def mean_of_pairs(similarity: np.ndarray, known: np.ndarray) -> float:
    """The mean of `similarity` [n, n] over the pairs that are `known`, each once and none with itself; NaN of none."""
    pairs = np.triu(known, 1)
    return float(similarity[pairs].mean()) if pairs.any() else float("nan")


NO_RULE, TOO_RARE = "no rule fits", "too rare to label"
NAMELESS = (NO_RULE, TOO_RARE)
"""Labels of features that no label was found for."""
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


@runtime_checkable
class LedgerLike(Protocol):
    """Labels with their evidence: what pages ask of a `Ledger`."""

    def of(self, feature: str, /) -> Sequence[Any]: ...
    def display(self, feature: str, /) -> str: ...


def label_json(feature: str, ledger: LedgerLike) -> dict[str, Any] | None:
    """The labels of one feature as pages show them, None where it has none.

    `text`, `status` and, where no person here says so, `source` of its own label first, or of the smallest supernode's,
    or else of what rules say; `display` and `evidence` of all.
    """
    found = sorted(ledger.of(feature), key=lambda label: (label.source == "rules", len(label.features)))
    if not found:
        return None
    made = {
        "text": found[0].text,
        "status": str(found[0].status),
        "display": ledger.display(feature),
        "evidence": [line for label in found for line in label.evidence],
    }
    return made | ({"source": found[0].source} if found[0].source else {})


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


def name_features(
    graph: AttributionGraph,
    groups: Sequence[Sequence[str]],
    *,
    cards: CardsLike | Mapping[str, Mapping[str, Any]] | None = None,
) -> list[str]:
    """What the features of each group, by their ids, have in common, as `suggest_supernodes` names it; or nothing."""
    known = _cards_of(graph, cards)
    rows = [np.array([graph.position[name] for name in group], dtype=np.int64) for group in groups]
    return [_common(graph, Evidence.of(graph, members, {}, known)) for members in rows]


def _cards_of(
    graph: AttributionGraph, cards: CardsLike | Mapping[str, Mapping[str, Any]] | None
) -> Mapping[str, Mapping[str, Any]]:
    if cards is None:
        return {}
    return cards if isinstance(cards, Mapping) else cards.for_nodes(graph.nodes_frame())


# names and reasons


def _name(graph: AttributionGraph, evidence: Evidence) -> str:
    return _common(graph, evidence) or _place(graph, evidence)


def _common(graph: AttributionGraph, evidence: Evidence) -> str:
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
    return ""


def _labelled(label: Mapping[str, Any] | None) -> str:
    """What a label gives as a name: a hypothesis without a score is called one; what was contradicted names nothing."""
    if not label or not label.get("text") or label.get("status") == "contradicted" or label["text"] in NAMELESS:
        return ""
    untested = f"hypothesis: {label['text']}"
    shown = label.get("display", untested) if label.get("status") == "hypothesis" else ""
    return untested if shown.startswith(untested) else str(label["text"])


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
