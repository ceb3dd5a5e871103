"""Which part of a graph is drawn first: what share it holds, against every path one by one; sizes, order, claims."""

import numpy as np
import pandas as pd
import pytest

from circuitsae.report.data import carried, page_data
from circuitsae.report.packing import packed
from circuitsae.report.selection import MOST_EDGES, MOST_NODES, Selection, select
from tests.sample_graphs import SampleGraph, column_of, sample_graph, whole_graph


def path_share(nodes: pd.DataFrame, edges: pd.DataFrame) -> float:
    """Σ over all paths from a token or an error to a logit of its shares' product times the logit's w, over Σ w."""
    kind = dict(zip(nodes["id"], nodes["kind"], strict=True))
    start = {row["id"]: row["probability"] for row in nodes.to_dict("records") if row["kind"] == "logit"}
    into: dict[str, list[tuple[str, float]]] = {}
    for source, target, share in edges[["source", "target", "share"]].itertuples(index=False):
        into.setdefault(target, []).append((source, share))

    def paths(node: str, product: float) -> float:
        if kind[node] in {"token", "error"}:
            return product
        return sum(paths(source, product * share) for source, share in into.get(node, []) if kind[source] != "bias")

    return sum(paths(node, w) for node, w in start.items()) / sum(start.values())


def drawn(graph: SampleGraph, selection: Selection, picture: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    nodes, edges = graph.nodes_frame(), graph.edges_frame()
    kept = np.flatnonzero(selection.nodes <= picture), np.flatnonzero(selection.edges <= picture)
    return nodes.iloc[kept[0]], edges.iloc[kept[1]]


@pytest.fixture(scope="module")
def graph() -> SampleGraph:
    return sample_graph(n_edges=900, validated=0)


def test_the_share_of_a_picture_is_that_of_its_paths(graph: SampleGraph):
    found = select(graph.nodes_frame(), graph.edges_frame())
    for picture in (0, found.first // 2, found.first, len(found.shares) - 1):
        assert found.shares[picture] == pytest.approx(path_share(*drawn(graph, found, picture)), rel=1e-9)
    assert found.shares == sorted(found.shares)
    assert 0.1 < found.shares[found.first] < found.shares[-1] < 1


def test_pictures_are_nested_whole_and_the_first_has_its_size(graph: SampleGraph):
    found = select(graph.nodes_frame(), graph.edges_frame())
    nodes, edges = drawn(graph, found, found.first)
    alone = nodes[nodes["kind"] != "bias"]
    assert MOST_NODES // 2 < len(alone) <= MOST_NODES
    assert MOST_EDGES // 2 < len(edges[edges["source"].isin(alone["id"].tolist())]) <= MOST_EDGES
    for picture in range(found.first + 1):
        nodes, edges = drawn(graph, found, picture)
        assert set(edges["source"]) | set(edges["target"]) <= set(nodes["id"])
        loose = nodes[~nodes["id"].isin(edges["source"]) & nodes["kind"].isin(["feature", "error", "token"])]
        assert loose.empty
        assert nodes[~nodes["id"].isin(edges["target"]) & (nodes["kind"] == "feature")].empty
    last = len(found.shares) - 1
    assert (found.nodes <= last).all()
    assert (found.edges <= last).all()


def test_a_picture_holds_more_than_random_ones_and_than_the_strongest_weights(graph: SampleGraph):
    nodes, edges = graph.nodes_frame(), graph.edges_frame()
    found = select(nodes, edges)
    n = int((found.edges <= found.first).sum())
    rng = np.random.default_rng(0)
    others = [edges.iloc[rng.choice(len(edges), n, replace=False)] for _ in range(20)]
    others.append(edges.iloc[np.argsort(-edges["weight"].abs().to_numpy())[:n]])
    assert found.shares[found.first] > 2 * max(path_share(nodes, some) for some in others)


def test_a_small_graph_is_drawn_whole_and_the_order_does_not_depend_on_that_of_the_rows():
    small = whole_graph([" a"] * 6)
    found = select(small.nodes_frame(), small.edges_frame())
    assert len(small.nodes) <= MOST_NODES
    assert small.weights.nnz <= MOST_EDGES
    assert found.first == len(found.shares) - 1
    graph = sample_graph(n_edges=900, validated=0)
    turned = graph.edges_frame().sample(frac=1, random_state=0)
    again, first = select(graph.nodes_frame(), turned), select(graph.nodes_frame(), graph.edges_frame())
    assert (again.edges[np.argsort(turned.index)] == first.edges).mean() > 0.99


def test_edges_that_did_not_hold_enter_later_and_the_share_says_nothing_of_it(graph: SampleGraph):
    nodes, edges = graph.nodes_frame(), graph.edges_frame()
    before = select(nodes, edges)
    refuted = np.flatnonzero(before.edges <= before.first)[::4]
    verdicts: list[str | None] = [None] * len(edges)
    for row in refuted:
        verdicts[row] = "null" if row % 2 else "reversed"
    after = select(nodes, edges, verdicts)
    assert (after.edges[refuted] <= after.first).mean() < 0.9
    assert after.shares[-1] == before.shares[-1]
    held = path_share(*drawn(graph, after, after.first))
    assert after.shares[after.first] == pytest.approx(held, rel=1e-9)
    assert select(nodes, edges, ["confirmed"] * len(edges)).edges.tolist() == before.edges.tolist()


def test_a_page_holds_the_strongest_edges_and_all_tested_ones():
    graph = sample_graph(n_edges=900, validated=30)
    edges = graph.edges_frame()
    selection = select(graph.nodes_frame(), edges)
    kept = carried(edges, selection, 200)
    tested = np.flatnonzero(edges["graph_verdict"].notna())
    assert set(tested) <= set(kept)
    assert 200 <= len(kept) <= 230
    rest = np.setdiff1d(np.arange(len(edges)), kept)
    assert selection.edges[np.setdiff1d(kept, tested)].max() <= selection.edges[rest].min()
    assert len(carried(edges, selection)) == len(edges)


def test_packed_columns_hold_what_the_document_says():
    data = page_data(sample_graph(n_edges=300))
    for name, column in packed(data)["edges"].items():
        assert column_of(column) == pytest.approx(np.array(data["edges"][name], dtype=float), rel=1e-6)
