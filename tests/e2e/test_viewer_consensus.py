"""In how many prunings nodes and edges are, on the page of a graph; and what all of them keep, alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from circuitsae.graph import VIEWS
from circuitsae.report import write_html
from tests.sample_graphs import sample_graph, whole_graph

OpenPage = Callable[..., Page]
WORDS = [f"w{i}" for i in range(7)]
DRAWN = """() => [viewer.nodes.id.filter((_, i) => viewer.nodeShown[i]),
    [...Array(viewer.edgeCount).keys()].filter(e => viewer.edgeShown[e]).map(viewer.endsOf)]"""


@pytest.fixture(scope="module")
def graph():
    return whole_graph(WORDS, bias=False)


def test_the_strict_consensus_is_drawn_alone_and_the_panel_says_how_often_the_rest_is_kept(
    graph, tmp_path: Path, open_page: OpenPage
):
    page = open_page(write_html(graph, tmp_path / "graph.html"))
    page.locator("#density").fill("0.1")
    page.get_by_label("Strict consensus").check()
    nodes, edges = page.evaluate(DRAWN)
    frame = graph.edges_frame()
    kept = frame[graph.inclusion.edges == 1]
    assert {tuple(ends) for ends in edges} == set(zip(kept["source"], kept["target"], strict=True))
    assert 0 < len(edges) < len(frame)
    assert set(nodes) == {name for name, share in zip(graph.ids, graph.inclusion.nodes, strict=True) if share == 1}
    assert len(nodes) < len(graph.ids)

    at = int(np.flatnonzero((graph.inclusion.edges > 0) & (graph.inclusion.edges < 1))[0])
    page.locator("#consensus").uncheck()
    page.evaluate("id => viewer.select(viewer.indexOf.get(id))", frame["target"][at])
    row = page.locator("#panel li", has=page.locator(f"[title='{frame['source'][at]} → {frame['target'][at]}']"))
    count = round(graph.inclusion.edges[at] * len(VIEWS))
    expect(row).to_contain_text(f"kept in {count} of 16 prunings")
    own = round(graph.inclusion.nodes[list(graph.ids).index(frame["target"][at])] * len(VIEWS))
    expect(page.locator("#panel .quantities")).to_contain_text(f"{own} of 16 prunings")

    page.locator("#consensus").check()
    page.wait_for_function("() => location.hash.includes('consensus=1')")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    expect(page.locator("#consensus")).to_be_checked()
    page.locator("#first-picture").click()
    expect(page.locator("#consensus")).not_to_be_checked()


def test_a_graph_without_prunings_has_no_such_filter(tmp_path: Path, open_page: OpenPage):
    page = open_page(write_html(sample_graph(n_edges=100), tmp_path / "graph.html"), "#consensus=1")
    expect(page.locator("#consensus-choice")).to_be_hidden()
    assert page.evaluate("viewer.state.consensus") is False
    page.evaluate("viewer.select(viewer.nodes.kind.indexOf('feature'))")
    expect(page.locator("#panel")).not_to_contain_text("prunings")
