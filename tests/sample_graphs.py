"""A seeded made-up graph: what the viewer is tested, timed and demonstrated on, without any model."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from circuitsae.graph import AttributionGraph, Node, NodeKind

SENTENCE = " When John and Mary went to the store, John gave a drink to"


@dataclass
class SampleGraph:
    """The members of an attribution graph that a report reads, filled with random numbers of plausible shape."""

    nodes: pd.DataFrame
    edges: pd.DataFrame
    tokens: Sequence[str]
    n_layers: int
    provenance: Mapping[str, Any]
    scores: Mapping[str, float]

    def nodes_frame(self) -> pd.DataFrame:
        return self.nodes

    def edges_frame(self) -> pd.DataFrame:
        return self.edges


def sample_graph(
    *,
    tokens: Sequence[str] | None = None,
    n_layers: int = 4,
    n_features: int = 90,
    n_edges: int = 1500,
    n_logits: int = 5,
    validated: int = 200,
    seed: int = 0,
) -> SampleGraph:
    """Features, an error per layer and position, tokens, biases and logits, joined by `n_edges` random edges."""
    rng = np.random.default_rng(seed)
    words = list(tokens) if tokens is not None else ["<bos>", *_words(SENTENCE)]
    nodes = _nodes(rng, words, n_layers, n_features, n_logits)
    edges = _edges(rng, nodes, n_edges)
    return SampleGraph(
        nodes=nodes,
        edges=_measured(rng, edges, min(validated, len(edges))),
        tokens=words,
        n_layers=n_layers,
        provenance={
            "model": "sample",
            "dictionaries": {"kind": "none: the numbers are made up", "seed": seed},
            "prompt": "".join(words),
            "settings": {"max_features": n_features, "targets": "TopLogits"},
        },
        scores={"replacement": 0.71, "completeness": 0.84},
    )


def sample_pair() -> tuple[SampleGraph, SampleGraph]:
    """A graph, and the same with another token, other activations and weights, and without some of its features.

    Each lacks features that the other has: five are only in the first, three only in the second.
    """
    words = ["<bos>", " The", " cat", " sat", " on"]
    a, b = (sample_graph(tokens=words, n_features=40, n_edges=300, n_logits=3, seed=3) for _ in range(2))
    b.tokens = [" dog" if word == " cat" else word for word in words]
    features = b.nodes.loc[b.nodes["kind"] == "feature", "id"].tolist()
    stronger = np.where(np.arange(len(b.nodes)) % 2, 1.0, 1.5)
    b.nodes = b.nodes.assign(text=b.nodes["text"].replace(" cat", " dog"), activation=b.nodes["activation"] * stronger)
    factor = np.random.default_rng(0).uniform(0.5, 2.0, len(b.edges))
    b.edges.loc[b.edges["graph_verdict"].notna() & (b.edges.index % 2 == 0), "graph_verdict"] = "null"
    b.edges["weight"] *= factor * np.where(np.arange(len(b.edges)) % 7, 1, -1)
    return _without(a, features[5:8]), _without(b, features[:5])


def _without(graph: SampleGraph, ids: list[str]) -> SampleGraph:
    edges = graph.edges[~graph.edges["source"].isin(ids) & ~graph.edges["target"].isin(ids)]
    return replace(graph, nodes=graph.nodes[~graph.nodes["id"].isin(ids)], edges=edges)


def small_graph() -> AttributionGraph:
    """A whole attribution graph with one node of each kind, four edges, and a note on one of them."""
    nodes = [
        Node(NodeKind.FEATURE, 0, 1, 7, activation=2.0, pre_activation=2.0),
        Node(NodeKind.ERROR, 0, 1),
        Node(NodeKind.TOKEN, -1, 0, 3, " a"),
        Node(NodeKind.BIAS, 1, -1, text="unembed.b"),
        Node(NodeKind.LOGIT, 1, 1, 5, " b", pre_activation=1.5, probability=0.75),
    ]
    weights = np.zeros((5, 5))
    weights[0, 2], weights[4, 0], weights[4, 1], weights[4, 3] = 2.0, 1.0, -0.5, 1.0
    graph = AttributionGraph.build(nodes, sparse.csr_array(weights), ("<s>", " a"), (1, 3), 1, {"prompt": " a"})
    note = {"source": "0.7@1", "target": "logit.5@1", "hops": 1, "influence": 0.5}
    note |= {"graph_predicted": -1.0, "graph_measured": -0.9, "graph_ratio": 0.9, "graph_low": 0.8, "graph_high": 1.1}
    note |= {"graph_controls": 40, "graph_p": 1 / 41, "graph_q": 0.03, "graph_verdict": "confirmed", "graph_reason": ""}
    note |= {"direct_predicted": -1.0, "direct_measured": 0.4, "direct_verdict": "attention", "direct_reason": ""}
    note |= {"model_predicted": -1.0, "model_measured": -0.2, "miss": "patterns"}
    return graph.annotate(pd.DataFrame([note]))


def whole_graph(tokens: Sequence[str], *, bias: bool = True) -> AttributionGraph:
    """A whole attribution graph with several nodes of each kind, of at least five tokens, which may be hostile.

    Features are at positions 1, 4 and the last; every token is also a logit. bias: whether to have bias nodes.
    """
    rng, last, n_layers = np.random.default_rng(0), len(tokens) - 1, 3
    nodes = [Node(NodeKind.TOKEN, -1, pos, 50 + pos, text) for pos, text in enumerate(tokens)]
    nodes += [
        Node(NodeKind.FEATURE, layer, pos, 70 * layer + pos, tokens[pos] * layer, rng.random(), rng.random(), 0.1)
        for layer in range(n_layers)
        for pos in (1, 4, last)
    ]
    nodes += [Node(NodeKind.ERROR, layer, last) for layer in range(n_layers)]
    if bias:
        nodes += [Node(NodeKind.BIAS, 1, -1, text="b_dec"), Node(NodeKind.BIAS, -1, 2, text="pos")]
    nodes += [
        Node(NodeKind.LOGIT, n_layers, last, 900 + i, text, pre_activation=rng.random(), probability=0.4 / (i + 1))
        for i, text in enumerate(tokens)
    ]
    n = len(nodes)
    weights = np.where(rng.random((n, n)) < 0.6, rng.normal(size=(n, n)), 0)
    for t, target in enumerate(nodes):
        for s, source in enumerate(nodes):
            if not (target.is_target and source.layer < target.layer and source.pos <= target.pos):
                weights[t, s] = 0
    made = {
        "model": "sample",
        "prompt": "".join(tokens),
        "settings": {"targets": [1, 2.5, None]},
        "pruned": [0.8, 0.9],
    }
    ids = range(50, 50 + len(tokens))
    rest = rng.normal(size=n)
    return AttributionGraph.build(nodes, sparse.csr_array(weights), tokens, ids, n_layers, made, rest=rest)


class SampleCards:
    """Made-up cards of the features of a sample graph, of plausible shape; some features have none."""

    def __init__(self, graph: SampleGraph, *, share: float = 0.9, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        features = graph.nodes.query("kind == 'feature'")[["layer", "index"]].drop_duplicates()
        pairs = [(int(layer), int(index)) for layer, index in features.itertuples(index=False)]
        self.cards = {
            f"{layer}.{index}": _card(rng, layer, index, pairs, graph.tokens)
            for layer, index in pairs
            if rng.random() < share
        }

    def for_nodes(self, nodes: pd.DataFrame, /) -> dict[str, dict[str, Any]]:
        """Cards by `"{layer}.{index}"`."""
        return self.cards


def _card(
    rng: np.random.Generator, layer: int, index: int, pairs: Sequence[tuple[int, int]], words: Sequence[str]
) -> dict[str, Any]:
    most = float(rng.gamma(6.0))
    others = [pairs[k] for k in rng.permutation(len(pairs))[:5]]
    logits = sorted(rng.normal(0, 0.3, 10).tolist(), reverse=True)
    strata = ["top"] * 6 + ["70-90 %", "50-70 %", "30-50 %", "10-30 %"]
    bins = np.linspace(0, most, 21)
    return {
        "layer": layer,
        "feature": index,
        "firing_rate": float(rng.beta(1, 60)),
        "tokens_seen": 1_000_000,
        "dead": False,
        "max_activation": most,
        "mean_activation": most / 4,
        "histogram": {"edges": bins.tolist(), "counts": (4000 * np.exp(-bins[:-1] / most * 5)).astype(int).tolist()},
        "examples": [_example(rng, words, most * (1 - 0.08 * k), stratum) for k, stratum in enumerate(strata)],
        "top_logits": [{"token": words[k % len(words)], "value": v} for k, v in enumerate(logits[:5])],
        "bottom_logits": [{"token": words[-k % len(words)], "value": v} for k, v in enumerate(logits[:4:-1])],
        "neighbours": [{"layer": a, "feature": b, "score": 0.9 - 0.1 * k} for k, (a, b) in enumerate(others)],
        "nearest": [{"layer": a, "feature": b + 1, "score": 0.8 - 0.1 * k} for k, (a, b) in enumerate(others)],
        "inputs": [
            {"layer": a, "feature": b, "twera": 0.5 - 0.2 * k, "weight": 1.5} for k, (a, b) in enumerate(others)
        ],
        "outputs": [{"layer": a, "feature": b + 1, "twera": 0.25, "weight": -0.5} for a, b in others[:2]],
        "label": None,
    }


def _example(rng: np.random.Generator, words: Sequence[str], peak: float, stratum: str) -> dict[str, Any]:
    tokens = [str(words[k]) for k in rng.integers(1 % len(words), len(words), 24)]
    activations = np.where(rng.random(24) < 0.15, rng.random(24) * peak, 0.0)
    at = int(rng.integers(10, 22))
    activations[at] = peak
    return {"tokens": tokens, "activations": activations.tolist(), "peak": at, "stratum": stratum}


def sample_suggestions(graph: SampleGraph, *, groups: int = 3, size: int = 4) -> list[dict[str, Any]]:
    """Suggested groups of the most influential features, a layer's together."""
    features = graph.nodes.query("kind == 'feature'").sort_values("influence", ascending=False)
    made = []
    for layer, members in list(features.groupby("layer"))[:groups]:
        ids = members["id"].tolist()[:size]
        made.append(
            {"name": f"layer {layer} group", "members": ids, "reason": "inputs and outputs alike", "score": 0.75}
        )
    return made


def _words(sentence: str) -> list[str]:
    return [" " + word for word in sentence.replace(",", " ,").split()]


def _nodes(rng: np.random.Generator, words: list[str], n_layers: int, n_features: int, n_logits: int) -> pd.DataFrame:
    n, last = len(words), len(words) - 1
    rows: list[dict[str, Any]] = []
    late = np.sort(rng.beta(2.0, 1.2, n_features))  # the last positions are the busiest
    indices = rng.choice(max(4096, n_features), n_features, replace=False)
    for place, index in zip((late * n).astype(int), indices, strict=True):
        layer, pos = int(rng.integers(n_layers)), int(place)
        row = {"id": f"{layer}.{index}@{pos}", "kind": "feature", "layer": layer, "pos": pos, "index": int(index)}
        rows.append(row | {"text": f"{layer}.{index}", "activation": rng.gamma(2.0), "pre_activation": rng.gamma(2.0)})
    for layer in range(n_layers):
        for pos in range(1, n):
            rows.append({"id": f"{layer}.err@{pos}", "kind": "error", "layer": layer, "pos": pos, "text": "error"})
        for name in ("b_dec", "attn.b"):
            rows.append({"id": f"{layer}.{name}", "kind": "bias", "layer": layer, "pos": -1, "text": name})
    for pos, word in enumerate(words):
        rows.append({"id": f"tok@{pos}", "kind": "token", "layer": -1, "pos": pos, "index": pos, "text": word})
        rows.append({"id": f"pos@{pos}", "kind": "bias", "layer": -1, "pos": pos, "text": "position"})
    probabilities = np.sort(rng.dirichlet(np.full(n_logits + 1, 0.8))[:n_logits])[::-1]
    for index, probability in enumerate(probabilities):
        text = words[(index * 3 + 2) % n]
        row = {"id": f"logit.{index}@{last}", "kind": "logit", "layer": n_layers, "pos": last, "index": index}
        rows.append(row | {"text": text, "probability": probability, "pre_activation": 12.0 - index})
    return _with_influence(rng, pd.DataFrame(rows).fillna({"index": -1}).astype({"index": int}))


def _with_influence(rng: np.random.Generator, nodes: pd.DataFrame) -> pd.DataFrame:
    influence = pd.Series(rng.pareto(1.5, len(nodes)) + 0.01)
    influence[nodes["kind"] == "bias"] = np.nan
    influence /= influence.sum()
    ranked = influence.sort_values(ascending=False, kind="stable")
    cumulative = (ranked.cumsum() / ranked.sum()).sort_index()
    cumulative[nodes["kind"].isin(["token", "logit"])] = 0.0
    return nodes.assign(influence=influence, cumulative=cumulative.fillna(0.0))


def _edges(rng: np.random.Generator, nodes: pd.DataFrame, n_edges: int) -> pd.DataFrame:
    layer, pos = nodes["layer"].to_numpy(), nodes["pos"].to_numpy()
    target_ok = nodes["kind"].isin(["feature", "logit"]).to_numpy()
    source_ok = (nodes["kind"] != "logit").to_numpy()
    allowed = source_ok[:, None] & target_ok[None] & (layer[:, None] < layer[None]) & (pos[:, None] <= pos[None])
    sources, targets = np.nonzero(allowed)
    chosen = np.sort(rng.choice(len(sources), min(n_edges, len(sources)), replace=False))
    weight = rng.laplace(0.05, 0.3, len(chosen)) * rng.pareto(3.0, len(chosen))
    ids = nodes["id"].to_numpy()
    size, into = np.abs(weight), targets[chosen]
    share = size / np.bincount(into, size, minlength=len(ids))[into]
    return pd.DataFrame({"source": ids[sources[chosen]], "target": ids[into], "weight": weight, "share": share})


def older_validation(edges: pd.DataFrame, n: int) -> pd.DataFrame:
    """What a validation from before the three claims said of the first n edges."""
    weight = edges["weight"].to_numpy(float)[:n]
    verdict = np.array(["confirmed", "null", "reversed"])[np.arange(n) % 3]
    found = edges[["source", "target"]].iloc[:n]
    return found.assign(predicted=-weight, frozen=-weight, measured=-weight / 2, control=0.1, verdict=verdict)


def _measured(rng: np.random.Generator, edges: pd.DataFrame, n: int) -> pd.DataFrame:
    """The n strongest edges tested: all three claims, and what measurements are split into."""
    if not n:
        return edges
    weight = edges["weight"].to_numpy(float)
    tested = edges.iloc[np.argsort(-np.abs(weight), kind="stable")[:n]][["source", "target", "weight"]]
    predicted = {"graph": rng.normal(1.0, 0.1, n), "direct": np.ones(n), "model": None}
    table: dict[str, Any] = {"hops": rng.integers(1, 4, n), "influence": rng.dirichlet(np.ones(n)) * 0.8}
    direct = -tested["weight"].to_numpy(float)
    for claim, spread in {"graph": 0.3, "direct": 0.5, "model": 0.9}.items():
        factor = predicted[claim] if predicted[claim] is not None else predicted["graph"]
        ratio = rng.normal(0.9, spread, n)
        columns = {"predicted": direct * factor, "measured": direct * factor * ratio, "ratio": ratio}
        columns |= {"low": ratio - 0.1, "high": ratio + 0.1}
        table |= {f"{claim}_{name}": values for name, values in columns.items()}
        if claim != "model":
            table |= {f"{claim}_{name}": values for name, values in _judged(rng, ratio, claim).items()}
    for whole, names in (("direct", ("norms", "patterns")), ("miss", MISSES)):
        claim = "direct" if whole == "direct" else "model"
        parts = rng.dirichlet(np.ones(len(names)), n).T * (table[f"{claim}_measured"] - table[f"{claim}_predicted"])
        table |= {f"{whole}_{name}": values for name, values in zip(names, parts, strict=True)}
    found = pd.DataFrame(table, index=tested.index)
    return edges.join(found)


MISSES = ("dictionary", "curvature", "first", "patterns", "norms")


def _judged(rng: np.random.Generator, ratio: np.ndarray, claim: str) -> dict[str, Any]:
    cases = [(ratio > 0.6) & (ratio < 1.9), ratio < -0.1, np.abs(ratio) < 0.15]
    verdict = np.select(cases, ["confirmed", "reversed", "null"], "undecided").astype(object)
    if claim == "direct":
        verdict[np.abs(ratio - 1) > 0.8] = "attention"
        verdict[np.abs(ratio - 1) > 1.1] = "norms"
    reason = np.where(verdict == "undecided", "less than half of what is predicted", "")
    return {"q": rng.uniform(0, 0.05, len(ratio)), "verdict": verdict, "reason": reason}


def column_of(packed: dict[str, str]) -> np.ndarray:
    """A column of edges as a page holds it, read again (`circuitsae.report.packing`)."""
    ((kind, text),) = packed.items()
    return np.frombuffer(base64.b64decode(text), dtype=f"<{kind}")
