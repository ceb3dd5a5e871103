"""Graphs of many prompts as one, against sums made by hand."""

import numpy as np
import pytest
from scipy import sparse

from circuitsae.graph import AttributionGraph, Node, NodeKind
from circuitsae.graph.aggregate import aggregate
from transcoders.errors import InputError


def graph(pos: int, length: int, token: int, weights: tuple[float, float], feature: int = 7) -> AttributionGraph:
    """token@pos → feature@pos → logit, and token@pos → logit."""
    nodes = [
        Node(NodeKind.TOKEN, -1, pos, 3, text="a"),
        Node(NodeKind.FEATURE, 0, pos, feature, activation=1.0, pre_activation=1.0),
        Node(NodeKind.LOGIT, 1, length - 1, token, text="b", pre_activation=sum(weights), probability=0.5),
    ]
    table = np.zeros((3, 3))
    table[1, 0], table[2, 1], table[2, 0] = 1.0, *weights
    return AttributionGraph.build(nodes, sparse.csr_array(table), ["x"] * length, [0] * length, 1, {"model": "m"})


def test_nodes_at_different_positions_are_one_by_role():
    graphs = [graph(1, 3, 5, (2.0, 1.0)), graph(2, 4, 6, (4.0, -3.0))]
    found = aggregate(graphs, [{"S": 1, "END": 2}, {"S": 2, "END": 3}], logits=[{5: "answer"}, {6: "answer"}])
    assert set(found.nodes["id"]) == {"tok@S", "0.7@S", "logit.answer@END"}
    edges = found.edges.set_index(["source", "target"])
    assert edges.loc[("0.7@S", "logit.answer@END"), "mean"] == pytest.approx(3.0)
    assert edges.loc[("tok@S", "logit.answer@END"), "mean"] == pytest.approx(-1.0)
    assert edges.loc[("tok@S", "0.7@S"), ["frequency", "low", "high"]].tolist() == [1.0, 1.0, 1.0]
    low, high = edges.loc[("tok@S", "logit.answer@END"), ["low", "high"]]
    assert low == -3.0
    assert high == 1.0
    assert found.places == ("S", "END")


def test_what_is_rare_is_left_out_and_absence_counts_as_zero():
    graphs = [graph(1, 3, 5, (2.0, 1.0), feature) for feature in (7, 7, 7, 8)]
    found = aggregate(graphs, [{"S": 1}] * 4, min_frequency=0.5)
    assert "0.8@S" not in set(found.nodes["id"])
    edges = found.edges.set_index(["source", "target"])
    assert edges.loc[("0.7@S", "logit.5@-1"), "mean"] == pytest.approx(1.5)
    assert edges.loc[("0.7@S", "logit.5@-1"), "frequency"] == pytest.approx(0.75)


def test_it_is_drawn_as_a_graph(tmp_path):
    found = aggregate([graph(1, 3, 5, (2.0, 1.0))], [{"S": 1}])
    assert "0.7@S" in found.write_html(tmp_path / "g.html", plotlyjs="cdn").read_text(encoding="utf-8")
    assert found.to_networkx().edges["tok@S", "0.7@S"]["weight"] == 1.0


def test_graphs_and_roles_must_match():
    with pytest.raises(InputError, match="no graph"):
        aggregate([], [])
    with pytest.raises(InputError, match="1 graphs, 2 tables"):
        aggregate([graph(1, 3, 5, (2.0, 1.0))], [{}, {}])
