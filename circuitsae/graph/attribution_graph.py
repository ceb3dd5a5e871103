"""AttributionGraph: what raised or lowered each feature and logit of a prompt, and by how much."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import networkx as nx
import numpy as np
import pandas as pd
from scipy import sparse

from circuitsae.graph import influence as _influence
from circuitsae.graph.checking import Limits
from circuitsae.graph.compact import magnitude_sums, row_sums, select_edges
from circuitsae.graph.consensus import VIEWS, Inclusion, View, inclusion
from circuitsae.graph.files import FIGURES, Header, read_files, write_files
from circuitsae.graph.grouping import Supernode, group_nodes
from circuitsae.graph.influence import Scores
from circuitsae.graph.nodes import Node, NodeKind, node_columns
from circuitsae.graph.past import of_edges, on_edges, past_share, row_shares
from circuitsae.graph.persistence import Persistence
from circuitsae.graph.pruning import check_shares, drop_dangling, strongest_edges, strongest_nodes
from transcoders._lazy import public
from transcoders.errors import InputError

"""The `response` of graphs whose edges are derivatives with attention and norms live."""

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """The linear attribution of one prompt, up to the position that is explained.

    `weights[t, s]` is what source `s` adds to the pre-activation of target `t` (a logit: to its centred logit), so
    that a full graph's row and its `rest` sum to `pre_activation − bias` of its target (`residual()` is the
    difference). Rows of errors, tokens and biases are empty. Sums over edges are in float64 whatever their precision.
    Where it has `derivatives`, `weights[t, s]` is how fast `t` moves as what `s` writes is scaled up, and no share.
    """

    nodes: tuple[Node, ...]
    weights: sparse.csr_array
    """[node, node], rows are targets, columns are sources; float32 or float64."""
    rest: np.ndarray
    """[node], Σweight of the edges into each node that were found and not stored; pruning adds nothing to it."""
    influence: np.ndarray
    """[node], computed on the full graph and kept by pruning; NaN for bias nodes."""
    inputs: np.ndarray
    """[node], Σ|weight| into each node over the full graph, bias nodes left out and edges that are not stored
    included; what shares are shares of."""
    cumulative: np.ndarray
    """[node], share of the full graph's influence held by the nodes up to this one, most influential first."""
    scores: Scores
    """Of the full graph."""
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    n_layers: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Model, dictionaries, prompt, versions and settings that made this graph; JSON values only."""
    past: sparse.csr_array | None = None
    """[node, node], the part of `weights` that passed by a skip term of the dictionaries, and so past the features:
    without skip terms the edge would be `weights − past`. None where no dictionary has one, or a file does not say."""
    edge_notes: pd.DataFrame | None = None
    """What validation found of some edges: one row per (source, target), other columns as in `Validation`."""
    persistence: Persistence | None = None
    """In which share of other dictionaries' graphs each node and edge is found again (`circuitsae.graph.persistence`);
    None where that was not asked."""

    @classmethod
    def build(
        cls,
        nodes: Sequence[Node],
        weights: sparse.csr_array,
        tokens: Sequence[str],
        token_ids: Sequence[int],
        n_layers: int,
        provenance: Mapping[str, Any],
        *,
        rest: np.ndarray | None = None,
        inputs: np.ndarray | None = None,
        past: sparse.csr_array | None = None,
    ) -> "AttributionGraph":
        """A full graph, with influence and scores computed from its weights.

        Where `weights` has only the strongest edges of a row, `rest` [node] is the signed sum of the others, `inputs`
        [node] Σ|weight| of all (`circuitsae.graph.keep_strongest` gives both); without them every edge is stored.
        `past`: the part of `weights` that passed by skip terms.
        """
        columns = node_columns(nodes)
        kinds, layers, start = columns["kind"], columns["layer"], columns["start"]
        bias, logit, token, error = (
            kinds == k for k in (NodeKind.BIAS, NodeKind.LOGIT, NodeKind.TOKEN, NodeKind.ERROR)
        )
        absolute = magnitude_sums(weights, np.stack([~bias, error], axis=1))
        inputs = absolute[:, 0] if inputs is None else np.asarray(inputs, dtype=np.float64)
        targets = logit | (kinds == NodeKind.FEATURE)
        influence = _influence.node_influence(weights, inputs, layers, targets, start, bias)
        error_share = absolute[:, 1] * _influence.reciprocal(inputs)
        bypassed = None if past is None else row_shares(weights, past, bias)
        return cls(
            nodes=tuple(nodes),
            weights=weights,
            rest=np.zeros(len(nodes)) if rest is None else np.asarray(rest, dtype=np.float64),
            influence=influence,
            inputs=inputs,
            cumulative=_influence.cumulative(influence, always=token | logit | bias),
            scores=_influence.scores(error_share, influence, start, token, error, bypassed),
            tokens=tuple(tokens),
            token_ids=tuple(int(t) for t in token_ids),
            n_layers=n_layers,
            provenance=dict(provenance),
            past=past,
        )

    def __repr__(self) -> str:
        counts = ", ".join(f"{int(self.mask(kind).sum())} {kind}" for kind in NodeKind)
        return f"AttributionGraph({len(self.tokens)} tokens; {counts}; {self.weights.nnz} edges)"

    @cached_property
    def ids(self) -> np.ndarray:
        """[node], the id of each."""
        return np.array([node.id for node in self.nodes], dtype=object)

    @cached_property
    def position(self) -> dict[str, int]:
        """Row of each node id in `weights`."""
        return {name: row for row, name in enumerate(self.ids)}

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        return node_columns(self.nodes)

    def mask(self, *kinds: NodeKind) -> np.ndarray:
        """Which nodes are of one of `kinds`; a feature that is explained counts as a logit."""
        return np.isin(self._columns["kind"], [str(kind) for kind in kinds])

    @property
    def layers(self) -> np.ndarray:
        """[node], the layer of each."""
        return self._columns["layer"]

    @property
    def start(self) -> np.ndarray:
        """w: the logits' probabilities, 1 of what else is explained, 0 elsewhere."""
        return self._columns["start"]

    @property
    def shares(self) -> sparse.csr_array:
        """Â[t, s]: |weight| over the sum of its row in the full graph (bias nodes beside)."""
        return _influence.shares(self.weights, self.inputs)

    @property
    def response(self) -> Literal["frozen", "linear"]:
        """How attention and norms take a change in this graph: `frozen` (held), or `linear` (as derivatives say)."""
        return "linear" if self.provenance.get("response") == "linear" else "frozen"

    @property
    def errors(self) -> Literal["held", "linear"]:
        """How the errors of this graph take a change: `held`, or `linear` (as their derivatives say)."""
        return "linear" if self.provenance.get("errors") == "linear" else "held"

    @property
    def derivatives(self) -> bool:
        """Whether edges are derivatives times what is written, and no shares of what is read."""
        return "linear" in (self.response, self.errors)

    def residual(self) -> np.ndarray:
        """What the edges into each target and its `rest` leave of its pre-activation without b_enc; 0 for others.

        NaN for the targets of a graph whose edges are `derivatives`, which sum up to nothing.
        """
        explained = np.nan if self.derivatives else row_sums(self.weights) + self.rest
        return np.where(self.mask(NodeKind.FEATURE, NodeKind.LOGIT), self._columns["wanted"] - explained, 0.0)

    def keep(self, nodes: np.ndarray, weights: sparse.csr_array) -> "AttributionGraph":
        """The part of this graph with the nodes of a mask, and `weights` (of all nodes) between them."""
        past = None if self.past is None else of_edges(self.past, weights)
        rows = np.flatnonzero(nodes)
        left = weights if nodes.all() else sparse.csr_array(weights[rows][:, rows])
        found = None if self.persistence is None else self.persistence.part(rows, self.weights, left)
        if nodes.all():
            return replace(self, weights=weights, past=past, persistence=found)
        return replace(
            self,
            nodes=tuple(self.nodes[row] for row in rows),
            weights=left,
            persistence=found,
            past=None if past is None else sparse.csr_array(past[rows][:, rows]),
            rest=self.rest[rows],
            influence=self.influence[rows],
            inputs=self.inputs[rows],
            cumulative=self.cumulative[rows],
        )

    def prune(self, *, nodes: float = 0.8, edges: float = 0.98) -> "AttributionGraph":
        """The nodes that hold the share `nodes` of the influence, and of the edges between them the share `edges`.

        Tokens and logits always stay. Edge score Â[t, s]·(I+w)[t], with Â and I of the graph of kept nodes; then
        features without an input or output and errors without an output are dropped, repeatedly. Bias nodes take no
        part in the sums; they stay where an edge of theirs scores as high as the weakest edge kept. Edges that are not
        stored (`rest`) count as edges from nodes that are not kept.
        Source: Ameisen et al. 2025, "Circuit Tracing", Appendix: Graph pruning.
        """
        check_shares(nodes=nodes, edges=edges)
        kept = strongest_nodes(self.influence, self._columns["kind"], nodes)
        return self.keep(kept, self.weights).prune_edges(edges)

    def prune_edges(self, share: float) -> "AttributionGraph":
        """The second half of `prune`: of a graph that has only the nodes to keep, and all edges between them."""
        return self.keep(*strongest_edges(self.weights, self._columns, share))

    @cached_property
    def inclusion(self) -> Inclusion:
        """In which share of the prunings `circuitsae.graph.VIEWS` of this graph each node and edge is kept.

        s(e) = (1 / B) Σ_b [e ∈ prune(nodes_b, edges_b)], for nodes and edges as they are here.
        Source: Parekh 2026, "CIRCUS" (arXiv 2603.00523).
        """
        return self.inclusion_in(VIEWS)

    def inclusion_in(self, views: Sequence[View]) -> Inclusion:
        """The same for other prunings: pairs of shares, as `prune` takes them; `InputError` for none."""
        return inclusion(self.weights, self.influence, self._columns, views)

    def consensus(self, at_least: float = 1.0) -> "AttributionGraph":
        """The edges that at least this share of the prunings of `inclusion` keep, and what they connect.

        At 1, the strict consensus. Tokens and logits stay; a node without an input or output is dropped as by `prune`.
        Raises `InputError` for a share that is none.
        """
        if not 0 < at_least <= 1:
            raise InputError(f"consensus: at_least={at_least} is no share; give a number above 0 and at most 1.")
        edges = select_edges(self.weights, self.inclusion.edges >= at_least - 1e-9)
        return self.keep(*drop_dangling(self._columns["kind"], edges))

    def annotate(self, notes: pd.DataFrame) -> "AttributionGraph":
        """This graph with what is known of some edges: `notes` has a row per (`source`, `target`)."""
        return replace(self, edge_notes=notes)

    # tables

    def nodes_frame(self) -> pd.DataFrame:
        """One row per node: its fields, `id`, `influence` and `cumulative`; where a contrast, a direction or a feature
        is explained, whether it is that, `explained`.
        """
        columns = ("kind", "layer", "pos", "index", "text", "activation", "pre_activation", "bias", "probability")
        table: dict[str, Any] = {"id": self.ids}
        table |= {name: [getattr(node, name) for node in self.nodes] for name in columns}
        table["kind"] = [str(kind) for kind in table["kind"]]
        if any(node.explained for node in self.nodes):
            table["explained"] = [node.explained for node in self.nodes]
        return pd.DataFrame(table | {"influence": self.influence, "cumulative": self.cumulative})

    def edges_frame(self) -> pd.DataFrame:
        """One row per edge: `source`, `target`, `weight`, `share`, and the columns of `edge_notes`.

        Of dictionaries with skip terms also `past`, the part of the weight that passed by one, and `past_share` =
        |past| / (|past| + |weight − past|).
        """
        target = np.repeat(np.arange(len(self.nodes)), np.diff(self.weights.indptr))
        frame = pd.DataFrame(
            {
                "source": self.ids[self.weights.indices],
                "target": self.ids[target],
                "weight": self.weights.data,
                "share": self.shares.data,
            }
        )
        if self.past is not None:
            frame["past"] = on_edges(self.past, self.weights)
            frame["past_share"] = past_share(frame["past"].to_numpy(), self.weights.data)
        if self.edge_notes is None:
            return frame
        extra = [c for c in self.edge_notes.columns if c not in frame.columns[2:]]
        notes = self.edge_notes[extra].astype({"source": object, "target": object})  # without a row: numbers
        return frame.merge(notes, on=["source", "target"], how="left")

    def top_logits(self) -> list[Node]:
        """What the graph explains: the logits, most probable first, or the one contrast, direction or feature."""
        return sorted((n for n in self.nodes if n.kind is NodeKind.LOGIT or n.explained), key=lambda n: -n.start)

    def to_networkx(self) -> nx.DiGraph:
        """The graph in NetworkX, edges from source to target.

        Node attributes: the columns of `nodes_frame`, `inclusion`, and `persistence` where that is known. Edge
        attributes: `weight`, `share`, the same two, with skip terms `past` and `past_share` (`edges_frame`), and of
        edges that were tested the columns of `Validation.edges`: claim by claim `graph_predicted`, `graph_measured`,
        `graph_ratio` with its interval `graph_low` to `graph_high`, `graph_q`, `graph_verdict`; the same of `direct`;
        `model_predicted`, `model_measured`; and the others. Graph attributes: `tokens`, `scores`, `provenance`. Values
        that are missing (NaN) are left out.
        """
        graph = nx.DiGraph(tokens=list(self.tokens), scores=self.scores.as_dict(), provenance=dict(self.provenance))
        found = (None, None) if self.persistence is None else (self.persistence.nodes, self.persistence.edges)
        nodes = self.nodes_frame().assign(inclusion=self.inclusion.nodes, persistence=found[0])
        edges = self.edges_frame().assign(inclusion=self.inclusion.edges, persistence=found[1])
        for row in nodes.to_dict("records"):
            graph.add_node(row["id"], **{str(k): v for k, v in row.items() if k != "id" and not _missing(v)})
        for row in edges.to_dict("records"):
            attributes = {str(k): v for k, v in row.items() if k not in ("source", "target") and not _missing(v)}
            graph.add_edge(row["source"], row["target"], **attributes)
        return graph

    def group(self, supernodes: Sequence[Supernode]) -> nx.DiGraph:
        """The graph with each supernode in place of its members, edges summed in float64 (`group_nodes`).

        Edges between members of one supernode are left out of the edges and kept in its `internal`, so that for every
        node Σ weight of its inputs + `internal` + `rest` = its `pre_activation` − `bias`, as in the graph. With skip
        terms an edge has `past` and `past_share` (`edges_frame`), of the summed parts. Other nodes
        stay as they are, under their ids. A supernode's node is its name, with `kind` "supernode", `members`,
        `reason`, `score`, and sums over its members of `influence`, `pre_activation`, `bias` and `rest`; `layer` and
        `pos` are those of its most influential member. Supernodes may form circles where they span layers.
        Raises `InputError` for a name given twice or that is a node's, members that are not in the graph, and nodes in
        two supernodes.
        """
        nodes = self.nodes_frame().assign(rest=self.rest, inputs=self.inputs, start=self.start)
        grouped = group_nodes(nodes, self.weights, supernodes, self.past)
        grouped.graph.update(tokens=list(self.tokens), scores=self.scores.as_dict(), provenance=dict(self.provenance))
        return grouped

    # pictures and files

    def to_figure(self, style: Literal["nodes", "circuit"] = "nodes", **options: Any) -> "go.Figure":
        """`circuitsae.report.to_figure` of this graph: its strongest edges, or its circuit, as one plotly figure."""
        return public("circuitsae.report.to_figure")(self, style, **options)

    def _repr_html_(self) -> str:
        return public("circuitsae.report.graph_html")(self)

    def show(self, **options: Any) -> Any:
        """The graph's page in a notebook's cell; options as in `circuitsae.report.show`."""
        return public("circuitsae.report.show")(self, **options)

    def interactive(self, **options: Any) -> Any:
        """The graph's page as a widget, a `circuitsae.report.widget.GraphWidget`: Python sees and sets what is chosen.

        Options as in `circuitsae.report.interactive`. Raises `InputError` where anywidget is not installed.
        """
        return public("circuitsae.report.interactive")(self, **options)

    def write_html(self, path: str | Path, **options: Any) -> Path:
        """Write the graph as one offline HTML page; options as in `circuitsae.report.write_html`."""
        return public("circuitsae.report.write_html")(self, path, **options)

    def save(self, folder: str | Path) -> Path:
        """Write the graph to a folder, `graph.json` and `edges.npz`, replacing an earlier one; returns the folder."""
        folder = Path(folder)
        head = Header(
            nodes=self.nodes,
            tokens=self.tokens,
            token_ids=self.token_ids,
            n_layers=self.n_layers,
            n_edges=self.weights.nnz,
            digest=None,
            scores=self.scores,
            provenance=self.provenance,
            edge_notes=self.edge_notes,
            persistence=self.persistence,
            figures={name: getattr(self, name) for name in FIGURES},
        )
        write_files(folder, head, self.weights, self.past)
        return folder

    @classmethod
    def load(cls, folder: str | Path, *, limits: Limits | None = None) -> "AttributionGraph":
        """The graph in a folder that `save` wrote.

        Raises `FileFormatError`, with one sentence, where there is none, or a file in it is cut off, malformed, or
        larger than `limits`.
        """
        head, weights, past = read_files(Path(folder), limits)
        return cls(
            nodes=head.nodes,
            weights=weights,
            scores=head.scores,
            tokens=head.tokens,
            token_ids=head.token_ids,
            n_layers=head.n_layers,
            provenance=head.provenance,
            edge_notes=head.edge_notes,
            persistence=head.persistence,
            past=past,
            **head.figures,
        )


def load_graph(folder: str | Path, *, limits: Limits | None = None) -> AttributionGraph:
    """`AttributionGraph.load`."""
    return AttributionGraph.load(folder, limits=limits)


def save_graph(graph: AttributionGraph, folder: str | Path) -> Path:
    """`graph.save(folder)`."""
    return graph.save(folder)


def prune(graph: AttributionGraph, *, nodes: float = 0.8, edges: float = 0.98) -> AttributionGraph:
    """`graph.prune(...)`."""
    return graph.prune(nodes=nodes, edges=edges)


def group(graph: AttributionGraph, supernodes: Sequence[Supernode]) -> nx.DiGraph:
    """`graph.group(supernodes)`."""
    return graph.group(supernodes)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)
