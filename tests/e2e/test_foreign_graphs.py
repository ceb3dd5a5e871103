"""Every published graph opens in the viewer: imported, drawn, chosen from, without a word on the console."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from circuitsae.graph.exchange import read_graph
from circuitsae.report import write_html

OpenPage = Callable[..., Page]
PUBLISHED = (
    "3plus5-plt",
    "bee-insect-clt",
    "dallas-austin",
    "eleuther_attribution_graph",
    "hiss-clt-hp",
    "puppy-clt-hp",
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_graphs_open_in_the_viewer(name: str, shared: Path, tmp_path: Path, open_page: OpenPage):
    file = shared / "data" / "graphs" / f"{name}.json"
    if not file.is_file():
        pytest.skip(f"needs {file}, which is absent")
    graph = read_graph(file)
    page = open_page(write_html(graph, tmp_path / "graph.html"))
    assert page.evaluate("[viewer.count, viewer.edgeCount]") == [len(graph.nodes), graph.weights.nnz]
    best = graph.top_logits()[0]
    page.evaluate("id => viewer.select(viewer.indexOf.get(id))", best.id)
    expect(page.locator("#panel h2")).to_contain_text(best.text.strip() or "→")
    assert page.locator("#panel section[aria-label=Inputs] li").count() > 0
    assert page.locator("#plot .scatterlayer path.point").count() > 10
