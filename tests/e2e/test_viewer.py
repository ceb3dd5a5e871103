"""The page of a graph, used as a reader uses it, in a real browser with nothing but files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, ViewportSize, expect

from circuitsae.report import write_html
from tests.sample_graphs import SampleCards, older_validation, sample_graph, sample_suggestions

OpenPage = Callable[..., Page]
HOSTILE = [
    "</script><b>bold</b>",
    "<img src=x onerror=alert(1)>",
    "\"quoted' &amp;",
    "שלום عالم",
    "👩‍🔬🧪",
    "",
    "\u202eevil",
    "\n",
]


# The median time from the choice of a busy node to the next frame.
HIGHLIGHT = """async () => {
    const degree = i => viewer.inputs[i].length + viewer.outputs[i].length;
    const busiest = [...Array(viewer.count).keys()].sort((a, b) => degree(b) - degree(a)).slice(0, 7);
    const times = [];
    for (const i of busiest) {
        const start = performance.now();
        viewer.select(i);
        await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
        times.push(performance.now() - start);
    }
    return times.sort((a, b) => a - b)[3];
}"""


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_html(sample_graph(), tmp_path_factory.mktemp("viewer") / "graph.html")


def shown(page: Page) -> int:
    return page.locator("#plot .scatterlayer path.point").count()


def chosen(page: Page) -> str:
    return page.locator("#panel h2").inner_text()


def select(page: Page, node: str) -> None:
    page.evaluate("id => viewer.select(viewer.indexOf.get(id))", node)


def test_header_shows_prompt_logits_scores_and_verdicts(page: Page):
    expect(page.locator("#prompt")).to_contain_text("·Mary")
    assert page.locator("#top-logits li").count() == 5
    expect(page.locator("#scores")).to_contain_text("completeness")
    expect(page.locator("#verdict-counts")).to_contain_text("confirmed")
    page.locator("#provenance summary").click()
    expect(page.locator("#provenance")).to_contain_text("settings.max_features")


def test_click_on_a_node_lists_its_edges_and_an_entry_leads_on(page: Page):
    node = page.evaluate("viewer.nodes.kind.indexOf('feature')")
    box = page.locator("#plot .scatterlayer path.point").first.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(page.locator("#panel h2")).to_have_text(page.evaluate("i => viewer.name(i)", node))
    expect(page.locator("#live")).to_contain_text("inputs")
    before = chosen(page)
    page.locator("#panel .edges button").first.click()
    assert chosen(page) != before
    page.keyboard.press("Escape")
    expect(page.locator("#panel h2")).to_have_text("No node chosen")


def test_inputs_are_ranked_and_carry_their_verdicts(page: Page):
    select(page, "logit.0@14")
    shares = page.evaluate("viewer.inputs[viewer.state.selected].map(e => viewer.edges.share[e])")
    assert shares == sorted(shares, reverse=True)
    test = page.locator("#panel .test").first
    expect(test).to_contain_text("predicted")
    expect(test).to_contain_text("measured")


def edge_with(page: Page, claim: str, verdict: str) -> int:
    """The strongest edge of a verdict into a node that has more of them."""
    return page.evaluate(
        "([claim, verdict]) => viewer.tests.edges.filter(e => viewer.tests.verdict(claim, e) === verdict)"
        ".sort((a, b) => viewer.strength(b) - viewer.strength(a))[0]",
        [claim, verdict],
    )


def test_an_edge_shows_its_claims_side_by_side_and_what_they_are_made_of(page: Page):
    edge = edge_with(page, "graph", "undecided")
    found = page.evaluate(
        "e => Object.fromEntries(viewer.tests.claims.map(c => [c, viewer.tests.found(c, e)]).concat("
        "['direct', 'miss'].map(w => [`parts ${w}`, viewer.tests.parts(w, e)])))",
        edge,
    )
    page.evaluate("e => viewer.select(viewer.edges.target[e])", edge)
    mine = page.locator("#panel li", has=page.locator(f"[title='{' → '.join(page.evaluate('viewer.endsOf', edge))}']"))
    expect(mine.locator("table.claims")).to_have_count(0)
    summary = mine.locator(".test > summary")
    summary.focus()
    page.keyboard.press("Enter")  # as a reader without a mouse opens it
    expect(mine.locator("table.claims thead th")).to_have_text(["Graph", "Direct edge", "Model effect"])

    def written(value: float) -> str:
        return page.evaluate("v => viewer.number(v)", value)

    claims = [found[claim] for claim in ("graph", "direct", "model")]
    for row in ("predicted", "measured", "ratio", "q"):
        cells = mine.locator("table.claims tr", has=page.get_by_role("rowheader", name=row, exact=True)).locator("td")
        expect(cells).to_have_text([written(one.get(row)) for one in claims])
    bounds = mine.locator("table.claims tr", has_text="95 %").locator("td")
    expect(bounds).to_have_text([f"{written(one['low'])} to {written(one['high'])}" for one in claims])
    verdicts = mine.locator("td.verdict")
    expect(verdicts.first).to_contain_text("undecided")
    expect(verdicts.first.locator(".reason")).to_have_text(found["graph"]["reason"])
    assert page.evaluate("e => viewer.tests.verdict('model', e)", edge) in {"within", "same", "other"}

    direct, miss = mine.locator(".split").all()
    expected = [found["direct"]["predicted"], *(found["parts direct"][name] for name in ("patterns", "norms"))]
    expect(direct.locator(".number")).to_have_text([written(value) for value in expected])
    assert sum(expected) == pytest.approx(found["direct"]["measured"], abs=2e-3 * max(map(abs, expected)))
    names = ("dictionary", "curvature", "first", "patterns", "norms")
    expect(miss.locator(".number")).to_have_text([written(found["parts miss"][name]) for name in names])
    beyond = found["model"]["measured"] - found["model"]["predicted"]
    assert sum(found["parts miss"].values()) == pytest.approx(beyond, abs=2e-3 * max(map(abs, expected)))

    page.wait_for_function("() => location.hash.includes('test=')")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    expect(page.locator("#panel table.claims")).to_have_count(1)
    expect(page.locator("#panel details[open] .reason").first).to_have_text(found["graph"]["reason"])


def test_axe_finds_nothing_in_the_claims(page: Page, flaws: Callable[[Page], list[str]]):
    assert flaws(page) == []  # with the scatter
    page.locator("#help-button").click()
    page.locator("#claim").select_option("direct")
    page.evaluate("e => viewer.showEdge(e)", edge_with(page, "direct", "norms"))
    expect(page.locator("#panel details[open] .split")).to_have_count(2)
    assert flaws(page) == []
    page.locator("#help-button").click()


def test_the_chosen_claim_tells_which_verdicts_there_are_and_which_edges_are_drawn(page: Page):
    claim, boxes = page.locator("#claim"), page.locator("#verdict-filter input")
    expect(claim).to_have_value("graph")
    expect(claim.locator("option")).to_have_text(["Graph", "Direct edge", "Model effect"])
    counts = "claim => Object.fromEntries(Object.entries(viewer.tests.counts(claim)).filter(([, n]) => n))"
    drawn = "[...viewer.edgeShown].reduce((a, b) => a + b)"
    everything = page.evaluate(drawn)
    for name in ("direct", "model", "graph"):
        claim.select_option(name)
        expected = page.evaluate(counts, name)
        assert sum(expected.values()) == page.evaluate("viewer.edgeCount")
        shown = {box.input_value() for box in boxes.all() if box.is_visible()}
        assert shown == set(expected)
        for verdict, number in expected.items():
            expect(page.locator(f"#verdict-filter label.{verdict} .number")).to_have_text(str(number))
    assert {"attention", "norms"} <= set(page.evaluate(counts, "direct"))
    claim.select_option("direct")
    page.locator("#verdict-filter input[value=attention]").uncheck()
    hidden = page.evaluate("viewer.tests.edges.filter(e => viewer.tests.verdict('direct', e) === 'attention')")
    assert page.evaluate("list => list.every(e => !viewer.edgeShown[e])", hidden)
    assert everything - page.evaluate(drawn) <= len(hidden)
    assert everything > page.evaluate(drawn)
    page.wait_for_function("() => location.hash.includes('claim=direct') && location.hash.includes('edges=')")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    expect(claim).to_have_value("direct")
    assert not page.locator("#verdict-filter input[value=attention]").is_checked()


def test_edges_take_the_colour_of_what_was_found_and_keep_the_dash_of_their_sign(page: Page):
    layers = (
        "viewer.allLayers().map(({color, dash, members}) =>"
        " ({color, dash: dash.length > 0, members: members.map(({edge}) => edge)}))"
    )
    assert {layer["color"] for layer in page.evaluate(layers)} == {"positive", "negative"}
    pictures = [page.evaluate("document.getElementById('all-edges').toDataURL()")]
    page.locator("#paint").check()
    page.wait_for_function("() => location.hash.includes('paint=1')")
    for claim in ("graph", "direct"):
        page.locator("#claim").select_option(claim)
        page.wait_for_function(
            "before => document.getElementById('all-edges').toDataURL() !== before", arg=pictures[-1]
        )  # drawn in a frame that a busy machine gives late
        pictures.append(page.evaluate("document.getElementById('all-edges').toDataURL()"))
        seen = 0
        for layer in page.evaluate(layers):
            verdicts = page.evaluate("list => list.map(e => viewer.verdict(e))", layer["members"])
            assert set(verdicts) == {layer["color"]}
            negative = page.evaluate("list => list.map(e => viewer.edges.weight[e] < 0)", layer["members"])
            assert set(negative) == {layer["dash"]}
            seen += len(layer["members"])
        assert seen == page.evaluate("[...viewer.edgeShown].reduce((a, b) => a + b)")
    assert len(set(pictures)) == 3


def test_the_scatter_has_every_tested_edge_of_the_claim_and_leads_to_it(page: Page):
    dots = page.locator("#panel .scatter circle")
    for claim, name in (("graph", "Graph"), ("model", "Model effect")):
        page.locator("#claim").select_option(claim)
        expect(page.get_by_role("img", name=f"{name}: predicted against measured")).to_be_visible()
        shown = page.evaluate("viewer.tests.edges.filter(e => viewer.edgeShown[e]).length")
        expect(dots).to_have_count(shown)
    places = dots.evaluate_all("all => all.map(c => [150 - c.cx.baseVal.value, c.cy.baseVal.value - 150])")
    values = page.evaluate(
        "viewer.tests.edges.filter(e => viewer.edgeShown[e]).map(e => viewer.tests.found('model', e))"
        ".map(({predicted, measured}) => [predicted, measured])"
    )
    for (x, y), (predicted, measured) in zip(places, values, strict=True):  # same quadrant, same order of size
        assert (x < 0) == (predicted > 0) or abs(x) < 1
        assert (y < 0) == (measured > 0) or abs(y) < 1
        assert abs(x) < abs(y) or abs(predicted) >= 0.98 * abs(measured) or abs(abs(x) - abs(y)) < 1
    dots.first.dispatch_event("click")
    expect(page.locator("#panel details.test[open] table.claims")).to_have_count(1)


def test_the_exported_view_holds_the_claims_of_its_edges(page: Page):
    page.locator("#claim").select_option("direct")
    edges = sample_graph().edges_frame().set_index(["source", "target"])
    page.evaluate("viewer.setFilter({density: 1})")
    view = page.evaluate("viewer.viewDocument()")
    assert view["view"]["claim"] == "direct"
    tested = [edge for edge in view["edges"] if "claims" in edge]
    assert len(tested) == page.evaluate("viewer.tests.edges.filter(e => viewer.edgeShown[e]).length") > 100
    for edge in tested:
        row = edges.loc[edge["source"], edge["target"]]
        for claim in ("graph", "direct", "model"):
            assert edge["claims"][claim]["ratio"] == pytest.approx(row[f"{claim}_ratio"], rel=1e-3)
        assert edge["claims"]["direct"]["verdict"] == row["direct_verdict"]
        assert edge["parts"]["miss"]["curvature"] == pytest.approx(row["miss_curvature"], rel=1e-3)


def test_no_head_is_above_all_where_two_carry_as_many_edges(tmp_path: Path, open_page: OpenPage):
    graph = sample_graph(validated=2)
    row = [i for i, verdict in enumerate(graph.edges["graph_verdict"]) if isinstance(verdict, str)]
    graph.edges.loc[row, "direct_verdict"] = "attention"
    graph.edges.loc[row, "direct_head"] = ["2.3", "0.1"]
    page = open_page(write_html(graph, tmp_path / "g.html"))
    expect(page.locator("#verdict-counts")).to_contain_text("2 carried by attention")
    expect(page.locator("#verdict-counts")).not_to_contain_text("above all")


def test_heads_and_other_prompts_are_told_where_they_were_measured(tmp_path: Path, open_page: OpenPage):
    graph = sample_graph(validated=1)
    row = [i for i, verdict in enumerate(graph.edges["graph_verdict"]) if isinstance(verdict, str)]
    figures = {"prompts": 20, "stability": 0.9, "stability_low": 0.68, "stability_high": 0.99, "pooled": 0.97}
    graph.edges.loc[row, [*figures, "direct_head", "direct_verdict"]] = [*figures.values(), "2.3", "attention"]
    page = open_page(write_html(graph, tmp_path / "g.html"))
    expect(page.locator("#verdict-counts")).to_contain_text("1 carried by attention, head 2.3 above all")
    page.evaluate("viewer.showEdge(viewer.tests.edges[0])")
    about = page.locator("#panel details[open] .hint")
    for words in ("of the heads, 2.3 carries most", "confirmed on 90 % (68 % to 99 %) of 20 other prompts", "0.97"):
        expect(about).to_contain_text(words)


def test_a_graph_with_an_older_validation_says_of_what_kind_it_is(tmp_path: Path, open_page: OpenPage):
    graph = sample_graph(validated=0)
    page = open_page(write_html(graph, tmp_path / "g.html", validation=older_validation(graph.edges_frame(), 30)))
    expect(page.locator("#verdict-counts")).to_contain_text("One verdict of another question")
    expect(page.locator("#claim option")).to_have_text(["Older validation"])
    page.evaluate("viewer.showEdge(0)")
    expect(page.locator("#panel details[open]")).to_contain_text("Older validation")
    expect(page.locator("#panel table.claims tr", has_text="control").locator("td.number")).to_have_text("0.1")


@pytest.mark.parametrize(
    ("answering", "says"),
    [
        ({"response": "frozen"}, "attention patterns and norms are held"),
        ({"response": "linear"}, "attention and norms live"),
        ({"response": "frozen", "errors": "linear"}, "attention and norms held and errors answering"),
    ],
)
def test_the_claim_says_what_answers(tmp_path: Path, open_page: OpenPage, answering: dict[str, str], says: str):
    graph = sample_graph()
    graph.provenance = dict(graph.provenance) | answering
    page = open_page(write_html(graph, tmp_path / "graph.html"))
    expect(page.locator("#panel .hint").nth(1)).to_contain_text(says)


def test_a_graph_that_was_not_tested_asks_for_no_claim(tmp_path: Path, open_page: OpenPage):
    page = open_page(write_html(sample_graph(validated=0), tmp_path / "g.html"))
    for control in ("#claim-choice", "#verdict-filter", "#paint-choice", "#verdict-fact"):
        expect(page.locator(control)).to_be_hidden()
    assert page.evaluate("[...viewer.edgeShown].some(Boolean)")
    select(page, "logit.0@14")
    expect(page.locator("#panel .test")).to_have_count(0)


def test_choosing_a_node_draws_its_edges(page: Page):
    drawing = "document.getElementById('chosen-edges').toDataURL()"
    empty = page.evaluate(drawing)
    select(page, "logit.0@14")
    assert page.evaluate(drawing) != empty
    page.keyboard.press("Escape")
    assert page.evaluate(drawing) == empty


def test_slider_and_switches_hide_nodes_and_the_address_restores_them(page: Page):
    everything = shown(page)
    page.locator("#show-errors").uncheck()
    page.wait_for_function("n => document.querySelectorAll('#plot path.point').length < n", arg=everything)
    without_errors = shown(page)
    page.locator("#density").fill("0.5")
    page.wait_for_function("n => document.querySelectorAll('#plot path.point').length < n", arg=without_errors)
    page.locator("#verdict-filter input[value=untested]").uncheck()
    select(page, "logit.1@14")
    page.wait_for_function("() => location.hash.includes('logit.1')")
    left, name, fragment = shown(page), chosen(page), page.evaluate("location.hash")

    for way in ("reload", "address"):
        if way == "reload":
            page.reload()
            page.wait_for_selector("html[data-ready]")
        else:
            page.evaluate("location.hash = ''")
            page.wait_for_function("n => document.querySelectorAll('#plot path.point').length === n", arg=everything)
            page.evaluate("text => { location.hash = text; }", fragment)
            page.wait_for_function("n => document.querySelectorAll('#plot path.point').length === n", arg=left)
        assert shown(page) == left
        assert chosen(page) == name
        assert page.locator("#density").input_value() == "0.5"
        assert not page.locator("#show-errors").is_checked()
        assert not page.locator("#verdict-filter input[value=untested]").is_checked()


def test_biases_are_hidden_until_asked_for(page: Page):
    before = shown(page)
    page.locator("#show-biases").check()
    page.wait_for_function("n => document.querySelectorAll('#plot path.point').length > n", arg=before)
    expect(page.locator("#plot .xtick").first).to_contain_text("biases")


def test_keyboard_walks_edges_and_searches(page: Page):
    select(page, "logit.0@14")
    strongest = page.evaluate(
        "viewer.inputs[viewer.state.selected].filter(e => viewer.edgeShown[e]).slice(0, 2)"
        ".map(e => viewer.name(viewer.edges.source[e]))"
    )
    page.keyboard.press("ArrowDown")
    assert chosen(page) == strongest[0]
    page.keyboard.press("ArrowRight")
    assert chosen(page) == strongest[1]
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_hidden()
    page.keyboard.press("/")
    page.keyboard.type("mary tok@")
    assert page.locator("#node-list [role=option]:not([hidden])").count() == 1
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert chosen(page) == "·Mary"


def test_zoom_moves_the_axes_and_a_double_click_brings_them_back(page: Page):
    extent = "() => viewer.drawnRanges().x.map(v => Math.round(100 * v))"
    home = page.evaluate(extent)
    page.mouse.move(500, 420)
    tools = page.locator("#plot .modebar-btn").evaluate_all("all => all.map(b => b.dataset.title)")
    assert tools == ["Zoom", "Pan", "Zoom in", "Zoom out", "Reset"]  # none that sends the data to a server
    page.mouse.wheel(0, -400)
    page.wait_for_function(f"home => JSON.stringify(({extent})()) !== JSON.stringify(home)", arg=home)
    page.wait_for_function("() => viewer.state.zoom")
    page.mouse.dblclick(500, 420)
    page.wait_for_function(f"home => JSON.stringify(({extent})()) === JSON.stringify(home)", arg=home)


def test_hostile_tokens_are_shown_as_text(tmp_path: Path, open_page: OpenPage):
    graph = sample_graph(tokens=HOSTILE, n_features=20, n_edges=200)
    graph.provenance = {"prompt": "".join(HOSTILE), "<u>key</u>": "<i>value</i>"}
    page = open_page(write_html(graph, tmp_path / "hostile.html"))
    for node in ("tok@0", "tok@1", "logit.0@7", "logit.3@7"):
        select(page, node)
    assert page.locator("img, #prompt b, #panel b, #plot b, u, i").count() == 0
    for token in (
        "</script><b>bold</b>",
        "<img src=x onerror=alert(1)>",
        "\"quoted' &amp;",
        "שלום عالم",
        "∅",
        "\\u202eevil",
        "↵",
    ):
        expect(page.locator("#prompt bdi").get_by_text(token, exact=True)).to_be_visible()
    assert "\u2068<img src=x on…\u2069" in page.locator("#plot .xtick text").all_text_contents()

    select(page, "tok@1")
    assert chosen(page) == "<img src=x onerror=alert(1)>"
    page.keyboard.press("Escape")
    box = page.locator("#plot .trace").nth(2).locator("path.point").nth(1).bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(page.locator("#plot .hoverlayer")).to_contain_text("<img src=x onerror=alert(1)>")


def test_edges_say_what_of_them_came_past_the_features(tmp_path: Path, open_page: OpenPage):
    graph = sample_graph(validated=0)
    busiest: Any = graph.edges["target"].mode()[0]
    past = graph.edges["weight"].where(graph.edges["source"].str.contains(".err@", regex=False), 0.0) * 0.25
    graph.edges = graph.edges.assign(past=past, past_share=past.ne(0) * 0.25)
    graph.scores = {**graph.scores, "past": 0.071}
    page = open_page(write_html(graph, tmp_path / "g.html"))
    expect(page.locator("#scores")).to_contain_text("past the features")
    expect(page.locator("#scores dd").last).to_have_text("7.1 %")
    select(page, busiest)
    entries = page.locator("#panel [aria-label=Inputs] li")
    of_errors = entries.filter(has=page.locator("button[title*='.err@']"))
    said = entries.filter(has_text="25 % of it past the features")
    assert 0 < of_errors.count() == said.count() < entries.count()
    of_errors.first.locator("button").first.click()
    page.evaluate("id => [viewer.indexOf.get(id), viewer.state.selected].forEach(viewer.togglePin)", busiest)
    (edge,) = page.evaluate("viewer.unitEdges(viewer.units())")
    assert edge["past"] == pytest.approx(0.25 * edge["weight"], rel=1e-4)


def test_plotly_in_the_directory(tmp_path: Path, open_page: OpenPage):
    path = write_html(sample_graph(), tmp_path / "graph.html", plotlyjs="directory")
    assert path.stat().st_size < 1_000_000
    assert shown(open_page(path)) > 50


def test_dark_mode_follows_the_system_and_the_button(page: Page):
    page.emulate_media(color_scheme="dark", reduced_motion="reduce")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.locator("#theme").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "light")
    moving = "getComputedStyle(document.getElementById('all-edges')).transitionDuration"
    assert page.evaluate(moving) == "0s"
    page.emulate_media(color_scheme=None, reduced_motion="no-preference")
    assert page.evaluate(moving) != "0s"


@pytest.mark.parametrize("viewport", [{"width": 700, "height": 900}, {"width": 1100, "height": 600}])
def test_small_windows_do_not_scroll_sideways(page: Page, viewport: ViewportSize):
    before = page.viewport_size
    assert before is not None
    page.set_viewport_size(viewport)
    fits = "document.documentElement.scrollWidth <= innerWidth && document.getElementById('plot').clientHeight >= 300"
    page.wait_for_function(f"() => document.getElementById('plot').layout.width <= innerWidth && {fits}")
    page.set_viewport_size(before)


def test_ten_thousand_edges(tmp_path: Path, open_page: OpenPage, capsys: pytest.CaptureFixture[str]):
    """Best of three, so that a busy machine does not fail: under 3 s until drawn, under 100 ms until the next frame."""
    tokens = ["<bos>", *(f" word{i}" for i in range(14))]
    graph = sample_graph(tokens=tokens, n_layers=12, n_features=270, n_edges=10_000, n_logits=8)
    assert len(graph.nodes_frame()) == 500
    assert len(graph.edges_frame()) == 10_000
    path = write_html(graph, tmp_path / "large.html", cards=SampleCards(graph), supernodes=sample_suggestions(graph))
    assert path.stat().st_size < 3_000_000
    loads, highlights = [], []
    page = open_page(path)
    for attempt in range(3):
        if attempt:
            page.reload()
            page.wait_for_selector("html[data-ready]")
        loads.append(page.evaluate("performance.measure('load', {start: 0, end: 'ready'}).duration"))
        highlights.append(page.evaluate(HIGHLIGHT))
        if loads[-1] < 3000 and highlights[-1] < 100:
            break
    with capsys.disabled():
        print(f" [10,000 edges: drawn after {min(loads):.0f} ms, highlight {min(highlights):.0f} ms] ", end="")
    assert min(loads) < 3000, loads
    assert min(highlights) < 100, highlights
