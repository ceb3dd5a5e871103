"""What every page keeps to, whoever writes it: hostile texts are inert, nothing is asked for, screens may be narrow and
paper may be the screen, and pages that lie beside one another lead to one another.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from circuitsae.audit.comparison import compare as compare_audits
from circuitsae.audit.page import comparison_page
from circuitsae.audit.page import page as audit_page
from circuitsae.features import FeatureCards, Label, Ledger
from circuitsae.interventions.steering.page import page as steering_page
from circuitsae.report import browser, compare_html, write_html, write_index
from circuitsae.report.browser import write_browser
from circuitsae.reproduce.page import page as reproduction_page
from circuitsae.reproduce.result import Reproduction
from tests.e2e.test_browser import sample_cards
from tests.sample_audits import sample_audit
from tests.sample_graphs import sample_graph, sample_suggestions, small_graph

OpenPage = Callable[..., Page]
MARKUP = "</script></title><u>x</u><img src=https://example.org/x.png onerror=window.pwned=1>"
HOSTILE = [
    "<script>window.pwned=1</script>",
    MARKUP,
    "\"'`&amp;{{7*7}}${7*7}<!--{data}-->",
    "a\u2028b\u2029c",
    "\u202e\u200fevil\u2066",
    "nul\x00\x1b[31m",
    "w" * 10_000,
    "javascript:alert(1)",
]
PAGES = ("graph", "comparison", "index", "list", "card", "contents", "reproduction", "steering", "audit", "audits")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind of page, everything in them hostile."""
    folder = tmp_path_factory.mktemp("pages")
    graph = sample_graph(tokens=HOSTILE, n_features=20, n_edges=120, validated=30)
    graph.provenance = {"model": MARKUP, "prompt": HOSTILE[3], HOSTILE[0]: HOSTILE}
    other = sample_graph(tokens=HOSTILE[::-1], n_features=20, n_edges=120, validated=30)
    feature = graph.nodes.query("kind == 'feature'").iloc[0]
    ledger = Ledger([Label(text, (f"{feature['layer']}.{feature['index']}",)) for text in (MARKUP, HOSTILE[4])])
    groups = [one | {"name": MARKUP, "reason": HOSTILE[5]} for one in sample_suggestions(graph)]
    opened = {"groups": {MARKUP: [feature["id"]]}, "note": "\n".join(HOSTILE)}
    options = {"ledger": ledger, "supernodes": groups, "opened": opened, "title": MARKUP}
    made = {"graph": write_html(graph, folder / "graph.html", **options)}
    names = (MARKUP, HOSTILE[4])
    made["comparison"] = compare_html(graph, other, folder / "pair.html", names, title=MARKUP, plotlyjs="directory")
    replace(small_graph(), tokens=tuple(HOSTILE[:2]), provenance={"model": MARKUP}).save(folder / "a<u>b")
    (small_graph().save(folder / "broken") / "graph.json").write_text(f'["{MARKUP}')
    made["index"] = write_index(folder, title=MARKUP)
    cards = sample_cards()
    cards = FeatureCards({**cards.manifest, "model": MARKUP, "corpus": MARKUP}, cards.arrays, {})
    labels = Ledger([Label(text, ("1.69",)) for text in (MARKUP,)])
    made["list"] = write_browser(cards.with_labels(labels), folder / "features")
    made["card"] = folder / "features" / "cards" / "1-1.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(browser, "LISTED_TOGETHER", 100)
        made["contents"] = write_browser(cards, folder / "layers", title=MARKUP)
    report = Reproduction(MARKUP, MARKUP, {}, seconds={HOSTILE[0]: 1.0})
    for text in HOSTILE:
        report.add(text, 0.1, at_least=1.0, note=text, source=text)
        report.section(text, text)
    made["reproduction"] = folder / "report.html"
    made["reproduction"].write_text(reproduction_page([report], MARKUP), encoding="utf-8")
    row = dict.fromkeys(("strength", "effect", "control", "held_out_effect", "held_out_control", "kl"), 0.5)
    row |= dict.fromkeys(("control_kl", "loss_rise", "control_loss_rise", "distinct"), 0.5) | {"broken": MARKUP}
    said = [{"prompt": text, "strength": strength, "text": text} for text in HOSTILE for strength in (None, 0.5)]
    document = dict.fromkeys(("handle", "model", "metric", "want", "reason", "command"), MARKUP)
    document |= {"recommended": 0.5, "clean_loss": 1.0, "table": [row], "generations": said, "effects": []}
    document |= {"n": {"prompts": 1, "held_out": 0, "unrelated": 1, "controls": 1}}
    made["steering"] = folder / "steering.html"
    made["steering"].write_text(steering_page(document), encoding="utf-8")
    audit = sample_audit(text="\n".join([MARKUP, *HOSTILE]), task=MARKUP)
    made["audit"], made["audits"] = folder / "audit.html", folder / "comparison.html"
    made["audit"].write_text(audit_page(audit, MARKUP), encoding="utf-8")
    both = compare_audits(audit, sample_audit(text=MARKUP, task=MARKUP, shift=0.5), (MARKUP, HOSTILE[0]))
    made["audits"].write_text(comparison_page(both, MARKUP), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def narrow(pages: dict[str, Path], open_shared: OpenPage) -> Callable[[str], Page]:
    """Each of them, opened once on a narrow screen, dark."""

    @cache
    def opened(kind: str) -> Page:
        window = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
        return open_shared(pages[kind], "#1.69" if kind == "card" else "", **window)

    return opened


@pytest.mark.parametrize("kind", PAGES)
def test_hostile_texts_are_inert_and_a_narrow_screen_is_wide_enough(kind: str, narrow: Callable[[str], Page]):
    page = narrow(kind)
    if kind in {"graph", "comparison"}:
        page.evaluate("for (let i = 0; i < viewer.count; i += 3) viewer.select(i)")
        for part in page.locator("details:not(#export)").all():
            part.evaluate("one => { one.open = true; }")
    page.wait_for_timeout(50)
    assert page.evaluate("window.pwned") is None
    assert page.locator("u, img, iframe, script[src]:not([src^=plotly])").count() == 0
    assert page.locator("a[href^=javascript]").count() == 0
    shown = page.evaluate("document.body.innerText")
    assert "<u>x</u>" in shown, "the text itself is there"
    assert not set(shown) & set("\u202e\u200f\x00\u2028\u2029"), "nothing reorders or ends a line"
    assert "<u>x</u>" in page.title() or kind == "card"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    policy = page.locator("meta[http-equiv=Content-Security-Policy]").get_attribute("content") or ""
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize("kind", PAGES)
def test_paper_has_no_controls_and_what_the_screen_shows(kind: str, narrow: Callable[[str], Page]):
    page = narrow(kind)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 27)"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")  # as a browser does before it lays out the paper
    page.emulate_media(media="print")
    controls = ":is(input, select, textarea, #theme, .tools, #controls, nav, canvas, #plot)"
    written = ":is(.group input[type=text], #graph-note textarea)"  # the reader's own words
    assert page.locator(f"{controls}:visible").count() == page.locator(f"{written}:visible").count()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    picture = page.locator("#print-picture")
    if kind in {"graph", "comparison"}:
        expect(picture).to_be_visible()
        assert picture.evaluate("one => one.outerHTML.length") > 10_000, "more than a frame"
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    expect(picture).to_have_count(0)
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")


def test_axe_finds_nothing_in_the_document_and_in_what_opens(
    narrow: Callable[[str], Page], flaws: Callable[[Page], list[str]]
):
    page = narrow("graph")
    page.evaluate("for (const id of ['export', 'figures', 'provenance']) document.getElementById(id).open = true")
    for kind in ("graph", "reproduction", "contents", "audit", "audits"):
        page = narrow(kind)
        assert flaws(page) == [], kind


def test_the_keyboard_reaches_everything_in_the_order_of_the_page_and_is_not_trapped(
    narrow: Callable[[str], Page],
):
    page = narrow("graph")
    page.evaluate(
        """() => {
            location.hash = "";
            document.activeElement.blur();
            for (const one of document.querySelectorAll("details")) one.open = false;
        }"""
    )
    seen: list[str] = []
    for _ in range(80):
        page.keyboard.press("Tab")
        where = page.evaluate(
            """() => {
                const [one, style] = [document.activeElement, getComputedStyle(document.activeElement)];
                const seen = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) > 0;
                return one === document.body ? 'out' : seen ? String(one.id || one.tagName) : 'unseen ' + one.outerHTML;
            }"""
        )
        if where == "out":
            break
        seen.append(where)
    assert not [one for one in seen if one.startswith("unseen")]
    landmarks = ["help-button", "theme", "density", "plot", "bench-toggle", "panel", "search"]
    assert [one for one in seen if one in landmarks] == landmarks
    assert len(seen) < 80, "it leaves the page at the end"


def test_pages_beside_one_another_lead_to_one_another(tmp_path: Path, open_page: OpenPage):
    a = small_graph().save(tmp_path / "deep" / "a")
    write_html(small_graph(), a / "graph.html")
    alone = open_page(a / "graph.html")
    expect(alone.locator("#ways")).to_be_hidden()
    compare_html(small_graph(), small_graph(), tmp_path / "pair.html", ("x", "y"), title="x & y")
    write_browser(sample_cards(), tmp_path / "features")
    page = open_page(write_index(tmp_path))
    expect(page.locator("#ways a")).to_have_text(["x & y", "All features"])
    page.locator("tbody a").click()
    page.wait_for_selector("html[data-ready] #plot")
    page.evaluate("viewer.select(0)")
    page.wait_for_function("() => location.hash.includes('node=') && location.hash.includes('up=2')")
    page.locator("#ways a", has_text="All graphs").click()
    page.wait_for_selector("html[data-ready] #graphs")
    assert page.url.split("#")[0] == (tmp_path / "index.html").as_uri()
    page.locator("#ways a", has_text="All features").click()
    page.wait_for_selector("html[data-ready] #rows")
    write_html(small_graph(), a / "graph.html")  # drawn again: now they are there
    again = open_page(a / "graph.html", "#theme=dark")
    assert [one.get_attribute("href") for one in again.locator("#ways a").all()] == [
        "../../index.html#theme=dark",
        "../../features/index.html#theme=dark",
    ]
    again.goto((a / "graph.html").as_uri() + "#up=../../../etc")
    again.reload()
    expect(again.locator("#ways a").first).to_have_attribute("href", "../../index.html")
