"""What is said of tested edges, counted by hand."""

import re

import numpy as np
import pandas as pd
import pytest

from circuitsae.graph import load_graph
from circuitsae.sentences import of_graph, of_verdicts
from tests.sample_graphs import small_graph

NOTES = pd.DataFrame(
    {
        "graph_predicted": [1.0, -1.0, 2.0, -2.0, 1.0, 0.5],
        "graph_measured": [0.5, -2.0, 0.9, 2.0, np.nan, 0.4],
        "graph_verdict": ["confirmed", "confirmed", "undecided", "reversed", "undecided", "null"],
        "direct_verdict": ["attention", "attention", "norms", "attention", "confirmed", "null"],
        "direct_head": ["2.3", "1.0", "0.0", "2.3", "1.0", None],
        "model_predicted": [1.0, -1.0, 2.0, -2.0, 1.0, 0.5],
        "model_measured": [0.1, 1.0, 2.0, -0.1, np.nan, 0.0],
        "influence": [0.3, 0.2, 0.1, 0.1, 0.06, 0.04],
    }
)


def test_every_claim_is_counted_on_its_own():
    assert of_verdicts(NOTES) == (
        "3 of 6 graph claims hold within a factor of two (2 confirmed, 1 reversed, 1 null, 2 undecided); 1 of 6 direct "
        "edges are confirmed, 3 mostly carried by attention, head 2.3 above all, and 1 mostly carried by norms; in the "
        "live model 3 of 6 point the right way. The tested edges hold 80 % of the influence."
    )


@pytest.mark.parametrize(
    ("without", "says"),
    [
        (["direct_head"], "3 mostly carried by attention, and 1 mostly carried by norms;"),
        (["direct_verdict"], r"2 undecided\); in the live model"),
        (["graph_verdict", "direct_verdict"], r"^in the live model 3 of 6 point the right way\. The"),
        (["influence"], r"point the right way\.$"),
        (["graph_verdict", "direct_verdict", "model_predicted"], "^$"),
    ],
)
def test_nothing_is_said_of_what_was_not_tested(without, says):
    assert re.search(says, of_verdicts(NOTES.drop(columns=without)))


def test_edges_without_a_verdict_do_not_count():
    untested = pd.DataFrame({"graph_verdict": [None, None]})
    assert of_verdicts(pd.concat([NOTES, untested])) == of_verdicts(NOTES)


def test_no_head_is_named_where_no_edge_is_carried_by_attention():
    assert "head" not in of_verdicts(NOTES.assign(direct_verdict="norms"))
    assert "head" not in of_verdicts(NOTES.assign(direct_head=None))


def test_no_head_is_named_where_several_carry_as_many_edges():
    assert "head" not in of_verdicts(NOTES.assign(direct_head=["2.3", "1.0", "1.0", "0.4", "1.0", None]))


def test_a_graph_says_the_same_from_disk(tmp_path):
    graph = small_graph()
    ends = pd.DataFrame({"source": ["0.7@1"] * 6, "target": ["logit.5@1"] * 6})
    graph = graph.annotate(pd.concat([ends, NOTES], axis=1))
    said = of_graph(load_graph(graph.save(tmp_path / "graph")))
    assert said == of_graph(graph)
    assert said.endswith(of_verdicts(NOTES))


def test_an_older_validation_is_called_one():
    old = pd.DataFrame({"measured": [0.1, 0.2, np.nan], "verdict": ["confirmed", "reversed", None]})
    said = of_verdicts(old)
    assert said.startswith("An older validation gave 2 edges one verdict of another question")
    assert "circuitsae validate" in said
    assert "older" not in of_verdicts(NOTES.assign(verdict="confirmed"))
