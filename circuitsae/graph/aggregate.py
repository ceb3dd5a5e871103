"""Attribution graphs of many prompts as one: positions become roles, and every edge gets a frequency and an interval.

A node or edge of the sum is the same on two prompts where kind, layer, feature and role are the same. With w_i its
weight on prompt i (0 where it is absent), it has `frequency` (share of prompts on which it is present), `mean`
(Σ w_i / n) and the 95 % percentile interval of the mean when prompts are drawn with replacement.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
from scipy import sparse

from circuitsae.graph.attribution_graph import AttributionGraph
from circuitsae.graph.nodes import Node, NodeKind
from circuitsae.graph.past import past_share
from transcoders._lazy import public
from transcoders.errors import InputError

_RESAMPLES = 500
_BLOCK = 4096


@dataclass(frozen=True, eq=False)
class AggregateGraph:
    """The graph of a task; `write_html` draws it as it draws one prompt's."""

    nodes: pd.DataFrame
    """`id`, `kind`, `layer`, `place`, `index`, `text`, `frequency`, and of its influence `mean`, `low`, `high`."""
    edges: pd.DataFrame
    """`source`, `target`, `frequency`, and of its weight `mean`, `low`, `high`; where all graphs are of dictionaries
    with skip terms, also `past`, the mean of what passed by these."""
    places: tuple[str, ...]
    """Roles, and positions counted from the end where there is none, in the order of the prompts."""
    n_layers: int
    n_prompts: int
    scores: Mapping[str, float]
    """Means of the graphs' scores."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"AggregateGraph({self.n_prompts} prompts; {len(self.nodes)} nodes; {len(self.edges)} edges)"

    @property
    def tokens(self) -> tuple[str, ...]:
        """The places, which stand where a prompt's tokens stand."""
        return self.places

    def nodes_frame(self) -> pd.DataFrame:
        """The table of nodes as reports read it: `pos` is the number of the place, `influence` the mean influence."""
        number = {place: i for i, place in enumerate(self.places)}
        frame = self.nodes.assign(pos=[number.get(place, -1) for place in self.nodes["place"]])
        order = frame["mean"].fillna(0).to_numpy().argsort(kind="stable")[::-1]
        running = np.cumsum(frame["mean"].fillna(0).to_numpy()[order])
        cumulative = np.empty(len(frame))
        cumulative[order] = running / running[-1] if len(running) and running[-1] > 0 else 0.0
        logit = (frame["kind"] == NodeKind.LOGIT).to_numpy()
        missing = np.full(len(frame), np.nan)
        return frame.assign(
            influence=frame["mean"],
            cumulative=cumulative,
            activation=missing,
            pre_activation=missing,
            probability=np.where(logit, 1.0, np.nan),
        )

    def edges_frame(self) -> pd.DataFrame:
        """The table of edges as reports read it: `weight` is the mean, `share` its part of what enters the target."""
        size, targets = np.abs(self.edges["mean"].to_numpy(float)), self.edges["target"].tolist()
        total: dict[str, float] = defaultdict(float)
        for target, value in zip(targets, size.tolist(), strict=True):
            total[target] += value
        share = size / np.array([total[target] or 1.0 for target in targets])
        found = self.edges.assign(weight=self.edges["mean"], share=share)
        if "past" in found:
            found["past_share"] = past_share(found["past"].to_numpy(), found["weight"].to_numpy())
        return found

    def to_networkx(self) -> nx.DiGraph:
        """Nodes and edges with their columns as attributes."""
        graph = nx.DiGraph(places=list(self.places), prompts=self.n_prompts, provenance=dict(self.provenance))
        for row in self.nodes.to_dict("records"):
            graph.add_node(row["id"], **{str(k): v for k, v in row.items() if k != "id"})
        for row in self.edges.to_dict("records"):
            graph.add_edge(row["source"], row["target"], weight=row["mean"],
                           **{str(k): v for k, v in row.items() if k not in ("source", "target")})  # fmt: skip
        return graph

    def write_html(self, path: str | Path, **options: Any) -> Path:
        """Write the graph as one offline HTML page; options as in `circuitsae.report.write_html`."""
        return public("circuitsae.report.write_html")(self, path, **options)


def aggregate(
    graphs: Sequence[AttributionGraph],
    roles: Sequence[Mapping[str, int]],
    *,
    logits: Sequence[Mapping[int, str]] | None = None,
    min_frequency: float = 0.2,
    seed: int = 0,
) -> AggregateGraph:
    """One graph of the (pruned) graphs of many prompts.

    `roles` gives the position of each role in each prompt, `logits` the name under which each prompt's target tokens
    are put together (`{token: "answer"}`). Nodes present on a share of less than `min_frequency` of the prompts are
    left out, and edges between nodes that stay are kept from that frequency on.
    Raises `InputError` for no graphs, or tables of another length.
    """
    if not graphs:
        raise InputError("There is no graph to put together; give at least one.")
    names: Sequence[Mapping[int, str]] = [{} for _ in graphs] if logits is None else logits
    if not len(graphs) == len(roles) == len(names):
        raise InputError(f"{len(graphs)} graphs, {len(roles)} tables of roles, {len(names)} of logits; give one each.")
    table = _Table()
    for number, (graph, role, name) in enumerate(zip(graphs, roles, names, strict=True)):
        table.add(number, graph, role, name)
    nodes = table.node_frame(len(graphs), min_frequency, seed)
    edges = table.edge_frame(set(nodes["id"]), len(graphs), min_frequency, seed)
    scores = pd.DataFrame([graph.scores.as_dict() for graph in graphs]).mean().to_dict()
    return AggregateGraph(
        nodes, edges, table.places_in_order(set(nodes["place"])), graphs[0].n_layers, len(graphs),
        {str(k): float(v) for k, v in scores.items()}, {**graphs[0].provenance, "prompts": len(graphs)},
    )  # fmt: skip


class _Table:
    """Weights by edge and influence by node, of every prompt."""

    def __init__(self) -> None:
        self.place_at: dict[str, list[float]] = defaultdict(list)
        self.about: dict[str, tuple[str, int, str, int]] = {}
        self.texts: dict[str, Counter[str]] = defaultdict(Counter)
        self.influence: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        self.weight: dict[tuple[str, str], dict[int, float]] = defaultdict(lambda: defaultdict(float))
        self.past: dict[tuple[str, str], float] = defaultdict(float)
        self.has_past = True

    def add(self, number: int, graph: AttributionGraph, roles: Mapping[str, int], logits: Mapping[int, str]) -> None:
        length = len(graph.tokens)
        role_at = {pos % length: role for role, pos in roles.items()}
        places = [role_at.get(pos, str(pos - length)) for pos in range(length)]
        for pos, place in enumerate(places):
            self.place_at[place].append(pos / length)
        ids = [self._node(node, places, logits) for node in graph.nodes]
        for name, value in zip(ids, np.nan_to_num(graph.influence).tolist(), strict=True):
            self.influence[name][number] += value
        edges = sparse.coo_array(graph.weights)
        for t, s, w in zip(edges.row.tolist(), edges.col.tolist(), edges.data.tolist(), strict=True):
            self.weight[ids[s], ids[t]][number] += w
        self.has_past &= graph.past is not None
        past = sparse.coo_array(graph.weights.shape if graph.past is None else graph.past)
        for t, s, w in zip(past.row.tolist(), past.col.tolist(), past.data.tolist(), strict=True):
            self.past[ids[s], ids[t]] += w

    def _node(self, node: Node, places: Sequence[str], logits: Mapping[int, str]) -> str:
        place = places[node.pos] if node.pos >= 0 else ""
        name, index = node.id.split("@")[0], node.index
        if node.kind is NodeKind.LOGIT and node.index in logits:
            name, index = f"logit.{logits[node.index]}", -1
        if node.kind is NodeKind.TOKEN:
            index = -1
        made = f"{name}@{place}" if place else name
        self.about[made] = (str(node.kind), node.layer, place, index)
        self.texts[made][logits.get(node.index, node.text) if node.kind is NodeKind.LOGIT else node.text] += 1
        return made

    def node_frame(self, n: int, least: float, seed: int) -> pd.DataFrame:
        kept = [name for name, found in self.influence.items() if len(found) >= least * n]
        rows = [dict(zip(("kind", "layer", "place", "index"), self.about[name], strict=True)) for name in kept]
        frame = pd.DataFrame(rows, columns=["kind", "layer", "place", "index"])
        frame.insert(0, "id", kept)
        frame["text"] = [_common(self.texts[name]) for name in kept]
        return pd.concat([frame, _summary([self.influence[name] for name in kept], n, seed)], axis=1)

    def edge_frame(self, nodes: set[str], n: int, least: float, seed: int) -> pd.DataFrame:
        kept = [
            (source, target)
            for (source, target), found in self.weight.items()
            if source in nodes and target in nodes and len(found) >= least * n
        ]
        frame = pd.DataFrame(kept, columns=["source", "target"])
        past = {"past": [self.past[key] / n for key in kept]} if self.has_past else {}
        return pd.concat([frame, _summary([self.weight[key] for key in kept], n, seed)], axis=1).assign(**past)

    def places_in_order(self, used: set[str]) -> tuple[str, ...]:
        mean = {place: float(np.mean(at)) for place, at in self.place_at.items() if place in used}
        return tuple(sorted(mean, key=mean.__getitem__))


def _common(texts: Counter[str]) -> str:
    """The text that most prompts have there; with a mark where others have another."""
    text, count = texts.most_common(1)[0]
    return text if count == texts.total() else f"{text} …"


def _summary(values: Sequence[Mapping[int, float]], n: int, seed: int) -> pd.DataFrame:
    """`frequency`, `mean`, `low`, `high` of each row of values by prompt."""
    columns = [column for found in values for column in found]
    pointer = np.cumsum([0, *(len(found) for found in values)])
    data = [value for found in values for value in found.values()]
    table = sparse.csr_array(
        (np.array(data, dtype=float), np.array(columns, dtype=np.int64), pointer), (len(values), n)
    )
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), _RESAMPLES) / n
    low, high = np.zeros(len(values)), np.zeros(len(values))
    for start in range(0, len(values), _BLOCK):
        means = table[start : start + _BLOCK] @ drawn.T
        low[start : start + _BLOCK], high[start : start + _BLOCK] = np.quantile(means, (0.025, 0.975), axis=1)
    frequency = np.diff(pointer) / n
    return pd.DataFrame({"frequency": frequency, "mean": table.sum(axis=1) / n, "low": low, "high": high})
