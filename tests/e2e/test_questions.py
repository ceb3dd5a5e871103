"""What a reader asks first, answered in at most three clicks, timed, and held against the graph's own tables."""

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from circuitsae.report import compare_html, write_html
from tests.sample_graphs import SampleGraph, sample_graph, sample_pair

OpenPage = Callable[..., Page]
MOST = 1_000
"""Milliseconds from a click to the frame in which its answer is seen, on a machine that others use too."""
FAILED = ("null", "reversed", "undecided", "attention", "norms")
CLICKED = """async selector => {
    const start = performance.now();
    document.querySelector(selector).click();
    await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
    return performance.now() - start;
}"""


@pytest.fixture(scope="module")
def graph() -> SampleGraph:
    return sample_graph()


@pytest.fixture(scope="module")
def html(graph: SampleGraph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_html(graph, tmp_path_factory.mktemp("questions") / "graph.html")


def click(page: Page, selector: str) -> None:
    assert page.evaluate(CLICKED, selector) < MOST


def said(page: Page, question: str) -> str:
    """The words of an element, without what keeps the direction of each name apart."""
    return " ".join(page.locator(question).inner_text().split())


def test_which_token_matters_most(page: Page, graph: SampleGraph):
    tokens = graph.nodes.query("kind == 'token'").sort_values("influence", ascending=False)
    page.evaluate("viewer.select(0)")
    click(page, "#said .see button:last-child")
    expect(page.locator("#by-token")).to_be_focused()
    found = page.locator("#by-token + ol li")
    ids = [page.evaluate("i => viewer.nodes.id[i]", int(i.get_attribute("data-node") or -1)) for i in found.all()]
    assert ids == tokens["id"].tolist()[: len(ids)]
    first = found.first.locator(".number").inner_text()
    assert first == f"{100 * tokens['influence'].iloc[0]:.1f} %"
    darkest = page.locator("#prompt button").evaluate_all(
        """all => all.map(b => [parseInt(b.style.getPropertyValue('--heat')), b.dataset.node])
            .sort((a, b) => b[0] - a[0])[0][1]"""
    )
    assert page.evaluate("i => viewer.nodes.id[i]", int(darkest)) == ids[0]
    assert f"{100 * tokens['influence'].iloc[0]:.1f} % of the influence" in (
        page.locator(f"#prompt [data-node='{darkest}']").get_attribute("title") or ""
    )


def edges_by_share(graph: SampleGraph) -> list[dict[Hashable, Any]]:
    return sorted(graph.edges.to_dict("records"), key=lambda edge: -edge["share"])


def failing(graph: SampleGraph, claim: str) -> list[dict[Hashable, Any]]:
    """Tested edges whose verdict of a claim is another than that it holds."""
    return [edge for edge in edges_by_share(graph) if edge[f"{claim}_verdict"] in FAILED]


def influences(graph: SampleGraph) -> dict[str, float]:
    nodes = graph.nodes.query("kind != 'bias'")
    return dict(zip(nodes["id"].tolist(), nodes["influence"].tolist(), strict=True))


def along_all_paths(graph: SampleGraph, node: str) -> dict[str, float]:
    """Of each node the share of what `node` reads that comes by it: (1 − A)⁻¹, the long way."""
    ids = graph.nodes["id"].tolist()
    row = {one: i for i, one in enumerate(ids)}
    shares = np.zeros((len(ids), len(ids)))
    for source, target, share in graph.edges[["source", "target", "share"]].itertuples(index=False):
        shares[row[target], row[source]] = share
    return dict(zip(ids, np.linalg.inv(np.eye(len(ids)) - shares)[row[node]], strict=True))


def test_why_a_feature_is_on(page: Page, graph: SampleGraph):
    best = "#panel > ol.leading li button"
    click(page, best)
    node = page.evaluate("viewer.nodes.id[viewer.state.selected]")
    bias = set(graph.nodes.query("kind == 'bias'")["id"])
    into = [edge for edge in edges_by_share(graph) if edge["target"] == node and edge["source"] not in bias]
    named = into[:3]
    words = said(page, "#panel .why")
    assert words.startswith("Why is it on?")
    held = 100 * sum(edge["share"] for edge in named)
    assert f"{held:.0f} % of what it reads" in words or f"{held:.1f} % of what it reads" in words
    links = page.locator("#panel .why .link")
    titles = [link.get_attribute("title") for link in links.all()]
    assert titles[: len(named)] == [edge["source"] for edge in named]
    for edge in named:
        written = page.evaluate("v => viewer.percent(v)", edge["share"])
        assert f"({'lowers' if edge['weight'] < 0 else 'raises'} it, {written})" in words
    through = along_all_paths(graph, node)
    traced = page.evaluate("viewer.traced(viewer.state.selected)")
    for i, one in enumerate(graph.nodes["id"]):
        assert traced[i] == pytest.approx(through[one], rel=1e-4, abs=1e-9), one
    tokens = sorted((one for one in through if one.startswith("tok@")), key=lambda one: -through[one])[:3]
    assert titles[len(named) :] == [one for one in tokens if through[one] > 0]
    click(page, "#panel .why .link")
    assert page.evaluate("viewer.nodes.id[viewer.state.selected]") == titles[0]


def test_which_edges_did_not_hold_and_why(page: Page, graph: SampleGraph):
    failed = failing(graph, "graph")
    assert f"which {len(failed)} did not hold" in said(page, "#said")
    click(page, "#said .see button")
    expect(page.locator("#missed")).to_be_focused()
    rows = page.locator("#missed + .missed li")
    assert rows.count() < len(failed)
    click(page, "#missed ~ .more")
    expect(rows).to_have_count(len(failed))
    edges = page.evaluate(
        "[...document.querySelectorAll('.missed details')].map(d => viewer.endsOf(Number(d.dataset.edge)))"
    )
    assert edges == [[edge["source"], edge["target"]] for edge in failed]
    reasons = page.locator(".missed .reason").all_inner_texts()
    known = {"null": "nothing to speak of", "reversed": "the other way"}
    for edge, why in zip(failed, reasons, strict=True):
        assert (edge["graph_reason"] or known[edge["graph_verdict"]]) in why
    click(page, ".missed summary")
    opened = page.locator(".missed details[open]")
    expect(opened.locator("table.claims")).to_have_count(1)
    click(page, ".missed details[open] button")
    assert page.evaluate("viewer.nodes.id[viewer.state.selected]") == failed[0]["target"]


def test_each_claim_has_its_own_list_with_what_carries_the_edge(page: Page, graph: SampleGraph):
    page.locator("#claim").select_option("direct")
    failed = failing(graph, "direct")
    expect(page.locator("#missed")).to_have_text(f"Direct edge: edges that did not hold ({len(failed)})")
    carried = page.evaluate(
        "viewer.missed('direct').filter(e => viewer.tests.verdict('direct', e) === 'attention').length"
    )
    assert carried == sum(edge["direct_verdict"] == "attention" for edge in failed) > 0


def test_how_this_graph_differs_from_that_one(tmp_path: Path, open_page: OpenPage):
    a, b = sample_pair()
    page = open_page(compare_html(a, b, tmp_path / "pair.html", ("clean", "corrupt")))
    words = said(page, "#said")
    assert "The prompts differ in ·cat ⇄ ·dog" in words
    features = [set(graph.nodes.query("kind == 'feature'")["id"]) for graph in (a, b)]
    assert f"{len(features[0] & features[1])} of {len(features[0] | features[1])} features are in both" in words
    clean, corrupt = (influences(graph) for graph in (a, b))
    moved = sorted(clean | corrupt, key=lambda node: -abs(corrupt.get(node, 0.0) - clean.get(node, 0.0)))
    for node in moved[:2]:
        before, after = (page.evaluate("v => viewer.percent(v)", one.get(node)) for one in (clean, corrupt))
        assert f"from {before} to {after}" in words
    click(page, "#said button")
    expect(page.locator("#panel table.comparison").first).to_be_visible()


def test_a_graph_without_tests_says_so_and_names_its_tokens(tmp_path: Path, open_page: OpenPage):
    page = open_page(write_html(sample_graph(validated=0), tmp_path / "g.html"))
    assert said(page, "#said") == "No edge of this graph was tested in the model. See tokens by influence."
    assert page.locator("#missed").count() == 0
