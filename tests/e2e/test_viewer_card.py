"""Feature cards and labels in the panel, hostile texts in them, and accessibility, in a real browser."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from circuitsae.features.ledger import Evidence, Label, Ledger, Verdict
from circuitsae.report import write_html
from tests.sample_graphs import SampleCards, SampleGraph, sample_graph, sample_suggestions

OpenPage = Callable[..., Page]
HOSTILE = ["</script>", "<img src=x onerror=alert(1)>", " \"q' &amp;", " שלום عالم", "👩‍🔬", "", "\u202eevil", "\n"]


def features(graph: SampleGraph) -> list[tuple[str, str]]:
    """Node id and feature of the most influential features."""
    nodes = graph.nodes_frame().query("kind == 'feature'").sort_values("influence", ascending=False)
    return [(node, node.split("@")[0]) for node in nodes["id"].tolist()]


@pytest.fixture(scope="module")
def graph() -> SampleGraph:
    return sample_graph(tokens=["<bos>", " When", " John", " gave", " Mary", " a"], n_features=30, n_edges=300)


@pytest.fixture(scope="module")
def cards(graph: SampleGraph) -> SampleCards:
    made = SampleCards(graph, share=1.0)
    first, second, third = (feature for _, feature in features(graph)[:3])
    layer, index = third.split(".")
    made.cards[first]["neighbours"][0] |= {"layer": int(layer), "feature": int(index)}
    made.cards[second] = {"layer": 9, "feature": 9, "dead": True, "examples": None, "top_logits": []}
    hostile = {"tokens": HOSTILE, "activations": [1, 2, 3, 4, 5, 6, 7, 8], "peak": 1, "stratum": "<b>top</b>"}
    made.cards[third] |= {"examples": [hostile], "top_logits": [{"token": HOSTILE[1], "value": 0.5}]}
    return made


@pytest.fixture(scope="module")
def html(graph: SampleGraph, cards: SampleCards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    first, second, third = (feature for _, feature in features(graph)[:3])
    measured = Evidence("target ablation", Verdict.SUPPORTED, {"effect": -1.23456}, "circuitsae features test")
    ledger = Ledger([Label("names of people", (first,)).with_rows(measured), Label("giving", (second,))])
    ledger.add(Label("<img src=x onerror=alert(2)>", (third,)))
    path = tmp_path_factory.mktemp("cards") / "graph.html"
    return write_html(graph, path, cards=cards, ledger=ledger, supernodes=sample_suggestions(graph))


def select(page: Page, node: str) -> None:
    page.evaluate("id => viewer.select(viewer.indexOf.get(id))", node)


def test_a_card_shows_what_it_has(page: Page, graph: SampleGraph, cards: SampleCards):
    node, feature = features(graph)[0]
    card = cards.cards[feature]
    select(page, node)
    expect(page.locator("#panel .edges").first).to_be_visible()
    page.get_by_role("tab", name="Feature card").click()
    shown = page.locator("#panel .card")
    expect(shown).to_contain_text("of 1,000,000 tokens")
    expect(shown.locator(".examples > li")).to_have_count(4)
    peak = card["examples"][0]["tokens"][card["examples"][0]["peak"]].strip()
    expect(shown.locator("mark.peak").first).to_have_text(peak)
    heats = (
        shown.locator(".examples > li")
        .first.locator("mark")
        .evaluate_all("all => all.map(m => [parseFloat(m.style.getPropertyValue('--heat')), parseFloat(m.title)])")
    )
    assert max(heats, key=lambda pair: pair[1])[0] == max(h for h, _ in heats)
    shown.get_by_role("button", name="Show all 10").click()
    expect(shown.locator(".examples > li")).to_have_count(10 + 4)  # with a line above each range
    picture = shown.get_by_role("img")
    total = sum(card["histogram"]["counts"])
    assert f"{total:,} non-zero activations" in (picture.get_attribute("aria-label") or "")
    assert picture.locator("rect").count() == 20
    expect(shown.locator(".logits").first.locator("li")).to_have_count(5)
    expect(shown.locator(".similar").first.locator("li")).to_have_count(5)
    inputs, outputs = shown.locator(".card-part").last.locator(".similar").all()
    expect(inputs.locator(".number")).to_have_text([f"{row['twera']:.3g}".replace("-", "−") for row in card["inputs"]])
    expect(inputs.locator(".number > span").first).to_have_attribute("title", "virtual weight 1.5")
    names = [f"{row['layer']}.{row['feature']}" for row in card["outputs"]]
    assert [text.split("\n")[0] for text in outputs.locator("li").all_inner_texts()] == names


def test_similar_features_lead_on_and_the_tab_stays(page: Page, graph: SampleGraph):
    (first, _), _, (third, name) = features(graph)[:3]
    select(page, first)
    page.get_by_role("tab", name="Edges").press("ArrowRight")
    expect(page.get_by_role("tab", name="Feature card")).to_be_focused()
    page.locator("#panel .similar").first.get_by_role("button", name=name).click()
    assert page.evaluate("viewer.nodes.id[viewer.state.selected]") == third
    expect(page.get_by_role("tab", name="Feature card")).to_have_attribute("aria-selected", "true")
    page.wait_for_function("() => location.hash.includes('tab=card')")
    absent = page.locator("#panel .similar").nth(1).locator("li span:not(.number)").first
    expect(absent).to_be_visible()  # not in this graph: no link


def test_a_label_carries_its_status_and_its_evidence(page: Page, graph: SampleGraph):
    (first, _), (second, _), _ = features(graph)[:3]
    select(page, first)
    label = page.locator("#panel .label")
    expect(label).to_contain_text("supported")
    expect(label).to_contain_text("names of people")
    label.locator("summary").click()
    expect(label.locator("li")).to_have_text(["target ablation: supported · effect -1.23 · circuitsae features test"])
    select(page, second)
    expect(label).to_have_text("hypothesisgiving")
    page.get_by_role("searchbox").fill("names people")
    expect(page.locator("#node-list [role=option]:not([hidden])")).to_have_count(1)
    page.get_by_role("tab", name="Feature card").click()
    expect(page.locator("#panel .card")).to_have_text("Dead: it never fired")


def test_hostile_examples_and_labels_are_shown_as_text(page: Page, graph: SampleGraph):
    (third, _) = features(graph)[2]
    select(page, third)
    page.get_by_role("tab", name="Feature card").click()
    example = page.locator("#panel .examples p")
    for token in ("</script>", "<img src=x onerror=alert(1)>", "שלום عالم", "👩‍🔬", "∅", "\\u202eevil", "↵"):
        expect(example.get_by_text(token, exact=True)).to_be_visible()
    expect(page.locator("#panel .stratum")).to_have_text("<b>top</b> of the strongest")
    expect(page.locator("#panel .label")).to_contain_text("<img src=x onerror=alert(2)>")
    assert page.locator("img, #panel b").count() == 0


def open_everything(page: Page, graph: SampleGraph) -> None:
    """Panel with card and note, groups with members, a suggestion, the table of sums, the export menu, the help."""
    nodes = [node for node, _ in features(graph)]
    page.evaluate(
        "ids => { const at = ids.map(id => viewer.indexOf.get(id)); viewer.makeGroup(at.slice(0, 3), 'first');"
        " viewer.makeGroup(at.slice(3, 6), 'second'); at.slice(6, 8).forEach(viewer.togglePin); }",
        [*nodes[:7], "logit.0@5"],
    )
    select(page, nodes[0])
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    page.evaluate("document.getElementById('help').hidden = false")


def test_axe_finds_nothing(page: Page, graph: SampleGraph, flaws: Callable[[Page], list[str]]):
    assert flaws(page) == []
    open_everything(page, graph)
    assert flaws(page) == []
    page.get_by_role("tab", name="Feature card").click()
    assert flaws(page) == []
