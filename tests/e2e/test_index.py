"""The index page of a folder of twenty graphs, used with mouse and keyboard in a real browser."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from circuitsae.cli import main
from circuitsae.report import write_index
from tests.sample_graphs import small_graph

OpenPage = Callable[..., Page]
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    for number in range(20):
        day = 1_700_000_000 + 86400 * number
        graph = small_graph()
        tokens = ("<s>", HOSTILE if number == 7 else f" word{number}")
        nodes = tuple(
            replace(n, text=tokens[0], probability=(number + 1) / 21) if n.kind == "logit" else n for n in graph.nodes
        )
        made = replace(
            graph, tokens=tokens, nodes=nodes, provenance={"model": "gpt2" if number % 2 else "<b>pocket</b>"}
        )
        saved = made.save(folder / f"graph-{number:02}")
        if number != 3:  # the pages of all but one are there
            (saved / "graph.html").write_text(f"<!doctype html><html data-ready><title>page {number}</title>")
        os.utime(saved / "graph.json", (day, day))
    (small_graph().save(folder / "zz-broken") / "graph.json").write_text("[")
    os.utime(folder / "zz-broken" / "graph.json", (1_600_000_000, 1_600_000_000))
    main(["show", str(folder)])
    return folder / "index.html"


def column(page: Page, number: int) -> list[str]:
    return page.locator(f"tbody tr :nth-child({number})").all_inner_texts()


def test_twenty_graphs_the_newest_first(index: Path, open_page: OpenPage):
    page = open_page(index)
    expect(page.locator("#count")).to_have_text("21 graphs")
    assert page.locator("tbody tr").count() == 21
    assert page.locator("tbody tr").first.locator("td").last.inner_text() == "2023-12-03 22:13"
    first = page.locator("tbody tr").first
    for text in ("·word19", "graph-19", "gpt2", "95 %", "✓ 1", "graph claim"):
        expect(first).to_contain_text(text)
    expect(page.locator("tbody tr").last).to_contain_text("cannot be read")
    assert (index.parent / "graph-03" / "graph.html").stat().st_size > 1_000_000


def test_sorting_by_every_column_and_back(index: Path, open_page: OpenPage):
    page = open_page(index)
    heads = page.locator("thead button")
    assert heads.count() == 9
    heads.filter(has_text="Top logit").click()
    expect(page.locator("th[data-key=logit]")).to_have_attribute("aria-sort", "descending")
    assert "95 %" in page.locator("tbody tr").first.inner_text()
    heads.filter(has_text="Top logit").click()
    expect(page.locator("th[data-key=logit]")).to_have_attribute("aria-sort", "ascending")
    assert "4.8 %" in page.locator("tbody tr").first.inner_text()
    expect(page.locator("tbody tr").last).to_contain_text("cannot be read")
    for number in range(9):
        heads.nth(number).click()
        assert page.locator("tbody tr").count() == 21
        assert page.locator("thead th:not([aria-sort=none])").count() == 1
    again = open_page(index, page.evaluate("location.hash"))
    assert again.locator("tbody").inner_text() == page.locator("tbody").inner_text()


def test_searching_with_the_keyboard_and_opening_a_graph(index: Path, open_page: OpenPage):
    page = open_page(index)
    page.keyboard.press("/")
    page.keyboard.type("gpt2 word1")
    expect(page.locator("#count")).to_have_text("6 of 21 graphs")
    assert open_page(index, page.evaluate("location.hash")).locator("tbody tr").count() == 6
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    page.wait_for_url("**/graph-19/graph.html#up=1")
    assert page.title() == "page 19"
    page.go_back()
    page.wait_for_selector("html[data-ready]")
    page.locator("#search").fill("nothing at all")
    expect(page.locator("#none")).to_be_visible()
    page.locator("#search").press("Escape")
    expect(page.locator("tbody tr")).to_have_count(21)


def test_the_theme_is_in_the_address_and_in_the_links(index: Path, open_page: OpenPage):
    page = open_page(index)
    before = page.locator("html").get_attribute("data-theme")
    page.locator("#theme").click()
    theme = page.locator("html").get_attribute("data-theme")
    assert {before, theme} == {"light", "dark"}
    assert page.evaluate("location.hash") == f"#theme={theme}"
    for opened in (page, open_page(index, f"#theme={theme}")):
        assert opened.locator("html").get_attribute("data-theme") == theme
        link = opened.locator("tbody a").first.get_attribute("href") or ""
        assert link.endswith(f"/graph.html#up=1&theme={theme}")
    assert open_page(index, "#theme=pink").locator("html").get_attribute("data-theme") == before


def test_hostile_prompts_are_text(index: Path, open_page: OpenPage):
    page = open_page(index)
    assert page.locator("img, b").count() == 0
    expect(page.locator("tbody a", has_text=HOSTILE)).to_be_visible()
    expect(page.locator("tbody tr").last).to_be_visible()


def test_headings_labels_and_small_windows(index: Path, open_page: OpenPage):
    page = open_page(index, viewport={"width": 600, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("label[for=search]").count() == 1
    assert page.locator("thead th[scope=col]").count() == 9
    assert page.locator("tbody th[scope=row]").count() == 21
    expect(page.locator("table caption")).to_have_count(1)


def test_axe_finds_nothing(index: Path, open_page: OpenPage, flaws: Callable[[Page], list[str]]):
    assert flaws(open_page(index)) == []


def test_a_graph_without_a_page_is_listed_without_a_link(tmp_path: Path, open_page: OpenPage):
    for name in ("drawn", "bare"):
        small_graph().save(tmp_path / name)
    (tmp_path / "drawn" / "graph.html").write_text("<!doctype html>")
    page = open_page(write_index(tmp_path, write_page=None))
    rows = {name: page.locator("tbody tr", has_text=name) for name in ("drawn", "bare")}
    assert [rows[name].locator("a").count() for name in rows] == [1, 0]
    for row in rows.values():
        expect(row).to_contain_text("·a")
    page.locator("#search").fill("bare")
    expect(page.locator("#count")).to_have_text("1 of 2 graphs")
