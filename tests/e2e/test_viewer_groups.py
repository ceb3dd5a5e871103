"""Pins, groups, suggestions, notes and the address that restores them, in a real browser."""

import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Page, expect

from circuitsae.report import write_html
from tests.sample_graphs import SampleGraph, sample_graph, sample_suggestions

OpenPage = Callable[..., Page]
EVIL = '</script><img src=x onerror=alert(1)> "q" \u202e🧪 שלום'


@pytest.fixture(scope="module")
def graph() -> SampleGraph:
    return sample_graph(validated=1000)


@pytest.fixture(scope="module")
def leading(graph: SampleGraph) -> list[str]:
    """The most influential features."""
    nodes = graph.nodes_frame().query("kind == 'feature'").sort_values("influence", ascending=False)
    return nodes["id"].tolist()[:8]


@pytest.fixture(scope="module")
def html(graph: SampleGraph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    suggestions = sample_suggestions(graph)
    suggestions[0]["name"] = EVIL
    return write_html(graph, tmp_path_factory.mktemp("groups") / "graph.html", supernodes=suggestions)


def select(page: Page, node: str) -> None:
    page.evaluate("id => viewer.select(viewer.indexOf.get(id))", node)


def pin(page: Page, *nodes: str) -> None:
    for node in nodes:
        select(page, node)
        page.keyboard.press("p")


def groups_of(page: Page) -> list[tuple[str, list[str]]]:
    groups = page.evaluate("viewer.state.groups.map(g => [g.name, [...g.members].map(i => viewer.nodes.id[i])])")
    return [(name, members) for name, members in groups]


def hash_of(page: Page) -> str:
    """The address, once the last change was written into it."""
    # A timer of the page that begins later than its own ends later, however busy the machine is.
    return page.evaluate("new Promise(done => setTimeout(() => done(location.hash), 130))")


def test_p_pins_and_unpins_and_g_groups(page: Page, leading: list[str]):
    expect(page.locator("#bench-body")).to_be_hidden()
    pin(page, *leading[:3])
    expect(page.locator("#tray .chip")).to_have_count(3)
    expect(page.locator("#panel .pin")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#live")).to_contain_text("3 nodes pinned")
    select(page, leading[1])
    page.keyboard.press("p")
    expect(page.locator("#tray .chip")).to_have_count(2)
    page.keyboard.press("g")
    assert [members for _, members in groups_of(page)] == [[leading[0], leading[2]]]
    name = page.get_by_label("Name of group 1")
    expect(name).to_be_focused()
    page.keyboard.type("say p and g")  # letters, not keys
    page.keyboard.press("Enter")
    assert groups_of(page)[0][0] == "say p and g"
    expect(page.locator("#node-list .badge-number")).to_have_count(2)
    expect(page.locator("#live")).to_contain_text("renamed")


def test_groups_are_split_shrunk_and_dissolved(page: Page, leading: list[str]):
    pin(page, *leading[:5])
    page.get_by_label(f"Include in the next group: {leading[4].split('@')[0]}").uncheck()
    page.get_by_role("button", name="Group 4 ticked").click()
    page.locator(".group summary").click()
    page.locator(".group input[type=checkbox]").nth(0).check()
    page.locator(".group input[type=checkbox]").nth(1).check()
    page.get_by_role("button", name="Split off ticked").click()
    assert [members for _, members in groups_of(page)] == [leading[2:4], leading[:2]]
    page.locator(".group .remove").first.click()
    assert groups_of(page)[0][1] == [leading[3]]
    expect(page.locator("#tray .chip")).to_have_count(2)
    page.get_by_role("button", name="Add ticked pins").first.click()  # the one left out stays out
    assert groups_of(page)[0][1] == [leading[3], leading[2]]
    page.get_by_role("button", name="Dissolve").first.click()
    assert [members for _, members in groups_of(page)] == [leading[:2]]
    assert page.evaluate("viewer.state.pins.size") == 5
    page.get_by_role("button", name="Clear all").click()
    expect(page.locator("#bench-body")).to_be_hidden()


def test_the_supernode_graph_sums_the_shown_edges(page: Page, graph: SampleGraph, leading: list[str]):
    pin(page, "logit.0@14", "tok@4", "tok@10")
    page.evaluate(
        "ids => { for (const k of [0, 4]) viewer.makeGroup(ids.slice(k, k + 4).map(id => viewer.indexOf.get(id)),"
        " `group ${k}`); }",
        leading,
    )

    def check(edges):
        units = {f"group {k}": set(leading[k : k + 4]) for k in (0, 4)}
        units |= {"→ ·John": {"logit.0@14"}, "·Mary": {"tok@4"}, "·John": {"tok@10"}}
        expected = {}
        for a, sources in units.items():
            for b, targets in units.items():
                found = edges[edges["source"].isin(sources) & edges["target"].isin(targets)] if a != b else edges[:0]
                if len(found):
                    expected[a, b] = (found["weight"].sum(), len(found))
        shown = page.evaluate(
            "(() => { const u = viewer.units(); return viewer.unitEdges(u).map("
            "s => [u[s.source].name, u[s.target].name, s.weight, s.count]); })()"
        )
        assert {(a, b): (pytest.approx(w, rel=1e-5), n) for a, b, w, n in shown} == expected
        assert len(expected) >= 2
        assert page.locator("#supergraph .unit").count() == 5
        rows = page.locator("#supergraph-sums tbody tr")
        expect(rows).to_have_count(len(expected))
        titles = page.locator("#supergraph svg > g > title").all_text_contents()
        for (a, b), (weight, n) in expected.items():
            number = page.evaluate("w => viewer.number(w)", float(f"{weight:.10g}"))
            assert any(t.startswith(f"{a} → {b}: {number}, the sum of {n} edge") for t in titles), (a, b, weight)

    check(graph.edges_frame())
    page.locator("#verdict-filter input[value=untested]").uncheck()
    page.wait_for_timeout(100)
    check(graph.edges_frame().query("graph_verdict.notna()"))
    page.locator("#supergraph .unit").first.press("Enter")
    assert page.evaluate("viewer.state.selected") >= 0


def test_suggestions_are_accepted_or_dismissed(page: Page):
    expect(page.locator("#bench-toggle")).to_contain_text("3 suggested")
    page.locator("#bench-toggle").click()
    expect(page.locator(".suggestion")).to_have_count(3)
    expect(page.locator(".suggestion .name").first).to_have_text(EVIL.replace("\u202e", "\\u202e"))
    page.locator(".suggestion").first.get_by_role("button", name="Accept").click()
    assert len(groups_of(page)[0][1]) == 4
    expect(page.get_by_label("Name of group 1")).to_have_value(EVIL.replace("\u202e", "\\u202e"))
    page.locator(".suggestion").first.get_by_role("button", name="Dismiss").click()
    expect(page.locator(".suggestion")).to_have_count(1)
    assert page.locator("img").count() == 0


def test_the_address_restores_everything(page: Page, html: Path, leading: list[str], open_page: OpenPage):
    pin(page, *leading[:3])
    page.keyboard.press("g")
    page.keyboard.type(EVIL)
    page.keyboard.press("Enter")
    pin(page, leading[5], "logit.1@14")
    page.locator("#panel .note summary").click()
    page.get_by_label("Note on → ·").fill(EVIL)
    page.locator("#graph-note summary").click()
    page.get_by_label("Note on this graph").fill("the whole")
    page.get_by_role("searchbox").fill("john")
    page.locator("#theme").click()
    page.locator("#density").fill("0.8")
    page.mouse.move(500, 420)
    page.mouse.wheel(0, -300)
    page.wait_for_function("() => viewer.state.zoom")
    page.wait_for_timeout(200)
    fragment = hash_of(page)
    state = (
        "JSON.stringify({...viewer.state, verdicts: [...viewer.state.verdicts], pins: [...viewer.state.pins].sort(),"
        " handled: [...viewer.state.handled], notes: [...viewer.state.notes],"
        " zoom: [...viewer.state.zoom.x, ...viewer.state.zoom.y].map(v => v.toFixed(1)),"
        " groups: viewer.state.groups.map(g => [g.name, [...g.members]])})"
    )
    wanted = json.loads(page.evaluate(state))
    assert wanted["groups"][0][0] == EVIL
    assert wanted["graphNote"] == "the whole"
    again = open_page(html, fragment)
    assert json.loads(again.evaluate(state)) == wanted
    assert again.get_by_role("searchbox").input_value() == "john"
    assert again.get_by_label("Note on this graph").input_value() == "the whole"
    assert again.get_by_label("Note on → ·").input_value() == EVIL
    expect(again.locator("#supergraph .unit")).to_have_count(3)
    ranges = again.evaluate("viewer.drawnRanges().x")
    assert ranges == pytest.approx(page.evaluate("viewer.drawnRanges().x"), abs=0.02)
    assert again.locator("img").count() == 0
    again.evaluate("location.hash = ''")  # typed by hand: everything goes back
    expect(again.locator("#bench-body")).to_be_hidden()
    assert again.get_by_label("Note on this graph").input_value() == ""


def test_fields_of_the_address_that_cannot_be_read_are_passed_over(page: Page, leading: list[str]):
    fields = [
        ("node", "nowhere"),
        ("density", "abc"),
        ("zoom", "1_2_3"),
        ("tab", "<b>"),
        ("theme", "pink"),
        ("handled", "7.-1.x"),
        ("group", "[1, 2"),
        ("group", '{"a": 1}'),
        ("group", json.dumps(["none of these", "nowhere"])),
        ("group", json.dumps(["", leading[0], leading[0], leading[1]])),
        ("group", json.dumps(["taken", leading[0]])),
        ("nodenote", '["nowhere", "x"]'),
        ("nodenote", json.dumps([leading[3], "n" * 5000])),
        ("pin", leading[2]),
        ("pin", ""),
        ("errors", "0"),
    ]
    page.evaluate("text => { location.hash = text; }", urlencode(fields))
    expect(page.locator("#show-errors")).not_to_be_checked()
    assert [members for _, members in groups_of(page)] == [leading[:2]]
    assert page.evaluate("viewer.state.pins.size") == 3
    assert page.evaluate("[...viewer.state.notes.values()].map(n => n.length)") == [2000]
    assert page.evaluate("[viewer.state.selected, viewer.state.zoom, viewer.state.handled.size]") == [-1, None, 0]
    page.evaluate("text => { location.hash = text; }", "%E0%A4%A&density=0.5&&=&zoom=NaN_1_0_1")
    page.wait_for_function("() => viewer.state.density === 0.5")


def test_search_finds_notes_and_groups(page: Page, leading: list[str]):
    page.evaluate("i => viewer.makeGroup([viewer.indexOf.get(i)], 'Zebra herd')", leading[0])
    select(page, leading[1])
    page.locator("#panel .note summary").click()
    page.locator("#panel textarea").fill("a zebra as well")
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    page.keyboard.type("ZEBRA")
    expect(page.locator("#node-list [role=option]:not([hidden])")).to_have_count(2)
    expect(page.locator("#search-count")).to_have_text("2 found")
    page.keyboard.press("ArrowDown")
    entry = page.evaluate("Number(document.activeElement.dataset.node)")
    select(page, leading[2])
    pinned = "[...viewer.state.pins]"
    before = set(page.evaluate(pinned))
    page.keyboard.press("p")  # about the entry in focus, not about the chosen node
    assert set(page.evaluate(pinned)) ^ before == {entry}


def test_split_twice_after_a_rename(page: Page, leading: list[str]):
    page.evaluate("ids => viewer.makeGroup(ids.map(id => viewer.indexOf.get(id)), 'first')", leading[:5])
    name = page.get_by_label("Name of group 1")
    name.fill("renamed")
    name.press("Enter")
    page.locator(".group summary").first.click()
    split = page.get_by_role("button", name="Split off ticked").first
    for _ in range(2):
        expect(split).to_be_disabled()
        page.locator(".group").first.locator("input[type=checkbox]").first.check()
        split.click()
    assert groups_of(page) == [
        ("renamed", leading[2:5]),
        ("renamed (2)", leading[:1]),
        ("renamed (2)", leading[1:2]),
    ]


def test_a_node_that_was_unpinned_is_ticked_when_it_is_pinned_again(page: Page, leading: list[str]):
    pin(page, *leading[:2])
    box = page.locator("#tray .chip input").first
    box.uncheck()
    pin(page, leading[0], leading[0])
    expect(page.locator("#tray .chip input:checked")).to_have_count(2)


def test_back_restores_what_the_address_said_before(page: Page, leading: list[str]):
    select(page, leading[0])
    written = hash_of(page)
    assert leading[0] in page.evaluate("decodeURIComponent(location.hash)")
    page.evaluate("id => { location.hash = new URLSearchParams({node: id}); }", leading[1])
    page.wait_for_function("id => viewer.nodes.id[viewer.state.selected] === id", arg=leading[1])
    page.go_back()
    page.wait_for_function("id => viewer.nodes.id[viewer.state.selected] === id", arg=leading[0])
    assert hash_of(page) == written


def test_more_groups_than_there_is_room_for_are_refused_in_sight(page: Page, leading: list[str]):
    page.evaluate("for (let k = 0; k < viewer.MOST_GROUPS; k++) viewer.makeGroup([100 + k])")
    suggestion = page.locator(".suggestion").first
    suggestion.get_by_role("button", name="Accept").click()
    expect(page.get_by_role("alert")).to_have_text("No more than 60 groups")
    expect(page.locator(".suggestion")).to_have_count(3)
    page.evaluate("viewer.dissolve(viewer.state.groups[0])")
    suggestion.get_by_role("button", name="Accept").click()
    expect(page.locator(".suggestion")).to_have_count(2)
    page.evaluate("viewer.split(viewer.state.groups.at(-1), [...viewer.state.groups.at(-1).members].slice(0, 1))")
    assert page.evaluate("viewer.state.groups.at(-1).members.size") == 4


def test_a_page_opens_with_the_note_it_was_written_with_until_the_address_has_another(
    graph: SampleGraph, leading: list[str], tmp_path: Path, open_page: OpenPage
):
    note = "\n".join(f"line {n} {EVIL}" for n in range(5))
    opened = {"pinned": leading[:1], "groups": {"two": leading[1:3]}, "note": note}
    path = write_html(graph, tmp_path / "told.html", opened=opened)
    page = open_page(path)
    box = page.get_by_label("Note on this graph")
    expect(box).to_have_value(note)
    assert box.evaluate("box => box.scrollHeight <= box.clientHeight + 1"), "all lines are seen"
    assert groups_of(page) == [("two", leading[1:3])]
    assert "note" not in hash_of(page)
    box.fill("")
    expect(open_page(path, hash_of(page)).get_by_label("Note on this graph")).to_have_value("")
