"""Inclusion frequencies against prunings one by one."""

import pytest

from circuitsae.graph import VIEWS, NodeKind
from tests.sample_graphs import whole_graph
from transcoders.errors import InputError

WORDS = [f"w{i}" for i in range(7)]


@pytest.fixture(scope="module")
def graph():
    return whole_graph(WORDS)


def one_by_one(graph, views):
    nodes, edges = dict.fromkeys(graph.ids, 0), {}
    for share_of_nodes, share_of_edges in views:
        pruned = graph.prune(nodes=share_of_nodes, edges=share_of_edges)
        for name in pruned.ids:
            nodes[name] += 1
        for row in pruned.edges_frame().itertuples():
            edges[row.source, row.target] = edges.get((row.source, row.target), 0) + 1
    return nodes, edges


@pytest.mark.parametrize("views", [VIEWS, ((0.3, 0.5),), ((1.0, 1.0), (0.5, 0.98), (0.5, 0.6))])
def test_a_frequency_is_the_share_of_prunings_that_keep_it(graph, views):
    nodes, edges = one_by_one(graph, views)
    found = graph.inclusion_in(views)
    assert found.nodes.tolist() == [nodes[name] / len(views) for name in graph.ids]
    frame = graph.edges_frame()
    expected = [edges.get(pair, 0) / len(views) for pair in zip(frame.source, frame.target, strict=True)]
    assert found.edges.tolist() == expected
    assert len(set(expected)) > 1


def test_the_strict_consensus_is_what_every_pruning_keeps(graph):
    views = [set(zip(*(graph.prune(nodes=n, edges=e).edges_frame()[["source", "target"]].T.to_numpy()), strict=True))
             for n, e in VIEWS]  # fmt: skip
    core, frame = graph.consensus(), graph.consensus().edges_frame()
    assert set(zip(frame.source, frame.target, strict=True)) == set.intersection(*views)
    assert 0 < core.weights.nnz < graph.consensus(at_least=0.5).weights.nnz < graph.weights.nnz
    assert core.mask(NodeKind.LOGIT).sum() == graph.mask(NodeKind.LOGIT).sum()


def test_frequencies_are_attributes_in_networkx(graph):
    made = graph.to_networkx()
    frame = graph.edges_frame()
    for row, share in zip(frame.itertuples(), graph.inclusion.edges, strict=True):
        assert made.edges[row.source, row.target]["inclusion"] == share
    assert [made.nodes[name]["inclusion"] for name in graph.ids] == graph.inclusion.nodes.tolist()


def test_impossible_shares_are_refused(graph):
    with pytest.raises(InputError, match="at_least=0.0 is no share"):
        graph.consensus(at_least=0.0)
    with pytest.raises(InputError, match="at least one pair"):
        graph.inclusion_in(())
    with pytest.raises(InputError, match="nodes=1.5 is not a share"):
        graph.inclusion_in(((1.5, 0.5),))
