"""The page of two graphs, in a real browser with nothing but files."""

import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from circuitsae.cli import main
from circuitsae.features.ledger import Label, Ledger
from circuitsae.report import compare_html
from tests.sample_graphs import SampleCards, sample_graph, sample_pair

NAMES = ("clean", "corrupt")
SVG = "{http://www.w3.org/2000/svg}"
OpenPage = Callable[..., Page]


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compare_html(*sample_pair(), tmp_path_factory.mktemp("compare") / "page.html", NAMES)


@pytest.fixture
def page(page: Page) -> Page:
    """All of the two graphs drawn."""
    page.evaluate(
        "() => { viewer.setFilter({density: 1});"
        " return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done))); }"
    )
    return page


def shown(page: Page) -> list[str]:
    return page.evaluate("viewer.nodes.id.filter((_, i) => viewer.nodeShown[i])")


def drawing(page: Page) -> str:
    return page.evaluate("document.getElementById('all-edges').toDataURL()")


def test_difference_comes_first_with_marks_and_a_summary(page: Page):
    assert page.locator("#view-switch input:checked").input_value() == "difference"
    panel = page.locator("#panel")
    expect(panel.locator("h2")).to_have_text("clean against corrupt")
    for caption in ("How much is shared", "Top logits", "Nodes whose influence changes most", "Edges that change most"):
        expect(panel.locator("caption", has_text=caption)).to_have_count(1)
    expect(page.locator("#prompt .differs")).to_have_text("·cat ⇄ ·dog")
    expect(page.locator("#controls .key")).to_contain_text("more in corrupt")
    expect(page.locator("#verdict-filter")).to_be_hidden()
    expect(page.locator(".two-lists h3")).to_have_text(["clean", "corrupt"])

    # Marks tell presence and change by their shape.
    symbols = page.evaluate(
        """() => Object.fromEntries(document.getElementById("plot").data.flatMap(
            ({customdata, marker}) => customdata.map((i, k) => [viewer.nodes.id[i], marker.symbol[k]])))"""
    )
    data = page.evaluate("({ids: viewer.nodes.id, kind: viewer.nodes.kind, ...viewer.page.comparison})")
    for node, kind, presence, change in zip(data["ids"], data["kind"], data["presence"], data["change"], strict=True):
        if kind == "feature":
            expected = {"a": "triangle-left", "b": "triangle-right"}.get(presence)
            assert symbols[node] == (expected or ["circle", "triangle-up", "triangle-down"][change])
    assert symbols["tok@2"] == "square-x-open"
    assert symbols["tok@1"] == "square"

    page.locator("#panel table.comparison", has_text="Edges that change most").locator("button").first.click()
    assert page.evaluate("viewer.state.selected") >= 0
    expect(page.locator("#panel h3", has_text="Inputs")).to_be_visible()


def test_switching_shows_either_graph_on_the_same_layout(page: Page):
    a, b = sample_pair()
    place = "viewer.nodes.x.concat(viewer.nodes.y)"
    page.locator("#show-biases").check()
    before, pictures = page.evaluate(place), [drawing(page)]
    for key, graph, view in (("a", a, "a"), ("b", b, "b")):
        page.keyboard.press("Escape")
        page.keyboard.press(key)
        assert page.locator("#view-switch input:checked").input_value() == view
        assert set(shown(page)) == set(graph.nodes["id"])
        weights = page.evaluate("viewer.edges.weight.filter(w => w !== null)")
        assert sorted(weights) == pytest.approx(sorted(float(f"{w:.6g}") for w in graph.edges["weight"]))
        page.wait_for_timeout(60)
        pictures.append(drawing(page))
        assert page.evaluate(place) == before
        expect(page.locator("#controls .key")).to_contain_text("lowers its target")
    assert len(set(pictures)) == 3
    page.locator("#view-switch input[value=difference]").check()
    assert len(shown(page)) == page.evaluate("viewer.count")


def test_panel_has_both_values_and_their_difference(page: Page):
    both = page.evaluate(
        "viewer.nodes.kind.findIndex((k, i) => k === 'feature' && viewer.page.comparison.presence[i] === 'both'"
        " && viewer.page.comparison.change[i] && viewer.inputs[i].length > 2)"
    )
    page.evaluate("i => viewer.select(i)", both)
    row = page.locator("#panel table.comparison tbody tr").first
    values = row.locator("td").all_inner_texts()
    a, b, change = (float(v.replace("−", "-")) for v in values)
    assert change == pytest.approx(b - a, abs=0.02 * abs(b))
    entry = page.locator("#panel .edges .test").first
    expect(entry).to_contain_text("clean")
    expect(entry).to_contain_text("corrupt")
    order = page.evaluate("i => viewer.inputs[i].map(e => viewer.edges.share[e])", both)
    assert order == sorted(order, reverse=True)
    page.keyboard.press("a")
    expect(page.locator("#panel .edges .test").first).to_contain_text("difference")


def test_the_tests_of_both_graphs_are_behind_an_edge(page: Page):
    edge = page.evaluate(
        "viewer.sideTests[0].edges.find(e => viewer.sideTests[1].has(e) && viewer.edgeShown[e]"
        " && viewer.sideTests[0].verdict('graph', e) !== viewer.sideTests[1].verdict('graph', e))"
    )
    expect(page.locator("#claim option")).to_have_text(["Graph", "Direct edge", "Model effect"])
    page.evaluate("e => viewer.select(viewer.edges.target[e])", edge)
    entry = page.locator("#panel li", has=page.locator(f"[title='{' → '.join(page.evaluate('viewer.endsOf', edge))}']"))
    word = "([claim, side, e]) => viewer.VERDICTS[viewer.sideTests[side].verdict(claim, e)].word"
    for claim in ("direct", "graph"):
        page.locator("#claim").select_option(claim)
        for side in (0, 1):
            expect(entry.locator("summary")).to_contain_text(page.evaluate(word, [claim, side, edge]))
    entry.locator("summary").click()
    expect(entry.locator("table.claims caption")).to_have_text(list(NAMES))
    for side, table in enumerate(entry.locator("table.claims").all()):
        expect(table.locator("td.verdict").first).to_contain_text(page.evaluate(word, ["graph", side, edge]))


def test_the_address_restores_the_view(page: Page):
    page.keyboard.press("b")
    page.evaluate("viewer.select(viewer.indexOf.get('tok@2'))")
    page.wait_for_function("() => location.hash.includes('view=b') && location.hash.includes('tok')")
    page.wait_for_timeout(60)
    before = shown(page), page.evaluate("viewer.edges.weight"), drawing(page)
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.locator("#view-switch input:checked").input_value() == "b"
    assert (shown(page), page.evaluate("viewer.edges.weight"), drawing(page)) == before


def test_a_picture_has_the_marks_and_colours_of_the_screen(page: Page):
    drawn = page.evaluate(
        """() => Object.fromEntries(document.getElementById("plot").data.flatMap(({customdata, marker}) =>
            customdata.map((i, k) => [i, [marker.symbol[k], marker.color[k]]])))"""
    )
    wanted = Counter(tuple(mark) for mark in drawn.values())
    assert len({symbol for symbol, _ in wanted}) > 6
    assert len({color for _, color in wanted}) == 4
    root = ElementTree.fromstring(page.evaluate("viewer.svgText(viewer.graphPicture())"))
    marks = [path for path in root.iter(f"{SVG}path") if path.find(f"{SVG}title") is not None]
    found = Counter((m.get("class"), m.get("stroke" if m.get("fill") == "none" else "fill")) for m in marks)
    assert found == wanted
    titles = [root.findtext(f"{SVG}title")]
    page.keyboard.press("a")
    titles.append(page.evaluate("viewer.graphPicture().querySelector('title').textContent"))
    assert [title.partition(" · ")[0] for title in titles if title] == ["Difference", "clean"]
    assert page.evaluate("viewer.viewDocument().comparison") == {"view": "a", "names": list(NAMES)}


def test_cards_and_labels_of_each_side(tmp_path: Path, open_page: OpenPage):
    a, b = sample_pair()
    features = a.nodes.query("kind == 'feature'")
    node = next(node for node in features["id"].tolist() if node in set(b.nodes["id"]))
    feature = node.partition("@")[0]
    cards = SampleCards(a, share=1.0), SampleCards(b, share=1.0, seed=1)
    ledger = Ledger([Label("a claim of A", (feature,))]), Ledger([Label("a claim of B", (feature,))])
    path = compare_html(a, b, tmp_path / "page.html", NAMES, cards=cards, ledger=ledger, same_features=False)
    page = open_page(path)
    for side, claim, k in (("A:", "a claim of A", 0), ("B:", "a claim of B", 1)):
        page.evaluate("id => viewer.select(viewer.indexOf.get(id))", f"{side}{node}")
        expect(page.locator("#panel .label")).to_contain_text(claim)
        page.get_by_role("tab", name="Feature card").click()
        strongest = page.evaluate("v => viewer.number(v)", cards[k].cards[feature]["max_activation"])
        expect(page.locator("#panel .card")).to_contain_text(f"strongest {strongest}")
        other = page.locator("#panel .similar").first.get_by_role("button").first
        name = other.inner_text()
        other.click()
        assert page.evaluate("viewer.nodes.id[viewer.state.selected]").startswith(f"{side}{name}@")


def test_axe_finds_nothing(page: Page, flaws: Callable[[Page], list[str]]):
    assert flaws(page) == []
    page.evaluate("viewer.select(viewer.nodes.kind.indexOf('feature'))")
    assert flaws(page) == []


def test_hostile_names_and_tokens_are_shown_as_text(tmp_path: Path, open_page: OpenPage):
    names = ("<img src=x onerror=alert(1)>", "</script><b>b</b>")
    a = sample_graph(tokens=["<i>x</i>", "", "\u202e"], n_features=6, n_edges=30)
    b = sample_graph(tokens=["<u>y</u>", "", "\u202e"], n_features=6, n_edges=30, seed=1)
    page = open_page(compare_html(a, b, tmp_path / "page.html", names))
    for key in "abd":
        page.keyboard.press(key)
    page.evaluate("viewer.select(viewer.indexOf.get('tok@0'))")
    assert page.locator("img, u, i, b").count() == 0
    expect(page.locator("#view-switch")).to_contain_text(names[0])
    expect(page.locator("#panel h2")).to_have_text("<i>x</i> ⇄ <u>y</u>")


def test_the_command_compares_files_of_other_tools(shared: Path, tmp_path: Path, open_page: OpenPage, capsys):
    folder = shared / "data" / "graphs"
    if not folder.is_dir():
        pytest.skip(f"needs the published graphs in {folder}, which are absent")
    hiss, puppy, out = folder / "hiss-clt-hp.json", folder / "puppy-clt-hp.json", tmp_path / "pair.html"
    main(["compare", str(hiss), str(puppy), "--out", str(out), "--names", "hiss", "puppy"])
    assert "edges that change most" in capsys.readouterr().out
    page = open_page(out)
    assert page.evaluate("viewer.page.comparison.differing") == [5, 8, 10]
    expect(page.locator("#panel h2")).to_have_text("hiss against puppy")
    page.keyboard.press("a")
    assert "logit" in " ".join(shown(page))
    main(["compare", str(hiss), str(folder / "dallas-austin.json"), "--out", str(out)])  # 13 tokens and 10
    page = open_page(out)
    of_each = page.evaluate("viewer.page.comparison.tokens")
    assert [len(tokens) - tokens.count("—") for tokens in of_each] == [13, 10]
    expect(page.locator("#prompt .differs").first).to_contain_text("⇄")
