"""How alike features of one graph are, by what writes into them, what they write to, and what they fire on."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from circuitsae.graph.attribution_graph import AttributionGraph
from circuitsae.graph.influence import reciprocal
from circuitsae.graph.nodes import Node, NodeKind


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
