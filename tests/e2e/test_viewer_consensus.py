"""In how many prunings, or other dictionaries, nodes and edges are, on the page of a graph."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from circuitsae.graph import VIEWS, Persistence
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


def test_opacity_says_in_how_many_dictionaries_something_is_found_again(graph, tmp_path: Path, open_page: OpenPage):
    rng = np.random.default_rng(0)
    nodes, edges = (rng.integers(0, 5, n) / 4 for n in (len(graph.ids), graph.weights.nnz))
    names = ("one", "two", "three", "<b>four</b>")
    found = replace(graph, persistence=Persistence(names, nodes, edges, nodes * 0, edges * 0))
    page = open_page(write_html(found, tmp_path / "graph.html"))
    assert set(page.evaluate("viewer.opacities()")) == {1}
    plain = page.evaluate("viewer.allLayers().map(({ alpha, members }) => [alpha, members.length])")
    page.get_by_label("Fade what other dictionaries lack").check()
    alone = "viewer.itemsNow().filter(item => item.node >= 0 && item.shown.length)"
    drawn = page.evaluate(f"{alone}.map(item => [item.node, viewer.itemFade(item)])")
    assert len(drawn) > 10
    assert [value for _, value in drawn] == pytest.approx([0.12 + 0.88 * nodes[i] for i, _ in drawn])
    marks = "[...document.querySelectorAll('.scatterlayer path.point')].map(p => +p.style.opacity)"
    page.wait_for_function(f"() => {marks}.every((mark, i) => Math.abs(mark - viewer.opacities()[i]) < 1e-4)")
    assert min(page.evaluate(marks)) < 0.5
    faint = page.evaluate("viewer.allLayers().map(({ alpha, members }) => [alpha, members.length])")
    assert sum(n for _, n in faint) == sum(n for _, n in plain)
    assert sum(a * n for a, n in faint) < 0.9 * sum(a * n for a, n in plain)

    at = int(np.flatnonzero(edges == 0.75)[0])
    source, target = graph.edges_frame().loc[at, ["source", "target"]]
    page.evaluate("id => viewer.select(viewer.indexOf.get(id))", target)
    row = page.locator("#panel li", has=page.locator(f"[title='{source} → {target}']"))
    expect(row).to_contain_text("found again in 3 of 4 dictionaries")
    own = round(nodes[list(graph.ids).index(target)] * 4)
    expect(page.locator("#panel .quantities")).to_contain_text(f"{own} of 4 dictionaries")
    page.wait_for_function("() => location.hash.includes('persistence=1')")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    expect(page.locator("#persistence")).to_be_checked()
    page = open_page(write_html(graph, tmp_path / "without.html"), "#persistence=1")
    expect(page.locator("#persistence-choice")).to_be_hidden()
    assert page.evaluate("viewer.state.persistence") is False
