"""Pages in cells and the widget, in a real browser: what is chosen there is known in Python, and the other way round.

The cell's page stands for JupyterLab: it runs the widget's module with a model as anywidget hands one out, and what
the model saves is given to the Python widget as the kernel would.
"""

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Frame, Page, expect

from circuitsae.report import interactive, show
from circuitsae.report.widget import GraphWidget
from tests.sample_graphs import SampleGraph, sample_graph

OpenPage = Callable[..., Page]
EVIL = '</script><img src=x onerror=alert(1)> "q" \u202e'
TRAITS = ("chosen", "pinned", "groups")

MODEL = """
const widget = (await import("data:text/javascript;base64,MODULE")).default;
const state = STATE;
const listeners = {};
let changed = {};
window.saved = [];
window.model = {
  get: (name) => state[name],
  set(name, value) {
    if (JSON.stringify(state[name]) === JSON.stringify(value)) return;
    changed[name] = state[name] = value;
    for (const listener of listeners[`change:${name}`] ?? []) listener();
  },
  on: (event, listener) => (listeners[event] ??= []).push(listener),
  off: (event, listener) => (listeners[event] = listeners[event].filter((other) => other !== listener)),
  save_changes() { saved.push(changed); changed = {}; },
};
window.removed = widget.render({ model, el: document.getElementById("cell") });
document.documentElement.dataset.ready = "true";
"""


@pytest.fixture(scope="module")
def graph() -> SampleGraph:
    made = sample_graph(n_features=20, n_edges=120, validated=40)
    made.nodes.loc[made.nodes["kind"] == "token", "text"] = EVIL
    made.tokens = [EVIL] * len(made.tokens)
    return made


@pytest.fixture(scope="module")
def widget(graph: SampleGraph) -> GraphWidget:
    return interactive(graph, height=700)


@pytest.fixture(scope="module")
def html(widget: GraphWidget, graph: SampleGraph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with the widget in one cell, and the plain display in another."""
    state = {name: getattr(widget, name) for name in (*TRAITS, "_page", "_title", "_height")}
    module = base64.b64encode(str(widget._esm).encode()).decode()
    script = MODEL.replace("MODULE", module).replace("STATE", json.dumps(state).replace("<", "\\u003c"))
    path = tmp_path_factory.mktemp("cells") / "cells.html"
    shown = show(graph, height=500)._repr_html_()
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><div id="cell"></div>'
        f'<div id="plain">{shown}</div><script type="module">{script}</script>',
        "utf-8",
    )
    return path


@pytest.fixture(scope="module")
def cell(opened: Page) -> Frame:
    """The widget's frame, drawn."""
    frame = opened.query_selector("#cell iframe")
    content = frame.content_frame() if frame else None
    assert content
    content.wait_for_selector("html[data-ready]")
    return content


@pytest.fixture
def python(opened: Page, widget: GraphWidget, cell: Frame) -> Iterator[Callable[[], GraphWidget]]:
    """The widget, once it has been given what the page saved."""

    def heard() -> GraphWidget:
        opened.wait_for_function("saved.length > 0")
        for state in json.loads(opened.evaluate("JSON.stringify(saved.splice(0))")):
            widget.set_state(state)
        return widget

    def tell(change: dict) -> None:
        opened.evaluate(
            "([name, value]) => model.set(name, JSON.parse(value))", [change["name"], json.dumps(change["new"])]
        )

    widget.observe(tell, TRAITS)
    yield heard
    widget.unobserve(tell, TRAITS)


def ids(graph: SampleGraph) -> list[str]:
    return graph.nodes.query("kind == 'feature'")["id"].tolist()


def test_what_is_chosen_pinned_and_grouped_comes_to_python(cell, python, graph):
    first, second, third = ids(graph)[:3]
    cell.evaluate("id => viewer.select(viewer.indexOf.get(id))", first)
    assert python().chosen == first
    cell.locator("#panel .pin").click()
    assert python().pinned == [first]
    cell.evaluate("ids => viewer.makeGroup(ids.map((id) => viewer.indexOf.get(id)), '__proto__')", [second, third])
    assert python().groups == {"__proto__": [second, third]}
    cell.evaluate("id => viewer.makeGroup([viewer.indexOf.get(id)], '__proto__')", first)
    found = python()
    assert found.groups == {"__proto__": [second, third], "__proto__ (2)": [first]}
    assert found.pinned == []
    assert [s.name for s in found.supernodes] == ["__proto__", "__proto__ (2)"]


def test_what_python_sets_is_drawn(cell, python, opened, widget, graph):
    first, second, third = ids(graph)[3:6]
    widget.chosen = first
    expect(cell.locator("#panel")).to_contain_text(first.partition("@")[0])
    widget.pinned = [second]
    widget.groups = {"two": [first, third]}
    cell.wait_for_function("viewer.state.groups.length === 1")
    drawn = cell.evaluate("viewer.state.groups.map(g => [g.name, [...g.members].map(i => viewer.nodes.id[i])])")
    assert drawn == [["two", [first, third]]]
    assert cell.evaluate("viewer.loosePins().map(i => viewer.nodes.id[i])") == [second]
    assert cell.evaluate("viewer.nodes.id[viewer.state.selected]") == first
    widget.groups, widget.pinned, widget.chosen = {}, [], None
    cell.wait_for_function("viewer.state.selected < 0 && !viewer.state.pins.size")
    assert opened.evaluate("saved.length") == 0  # what Python set is not told back


def test_what_cannot_be_drawn_as_it_was_set_comes_back_as_it_is_drawn(python, widget, graph):
    node = ids(graph)[0]
    widget.groups = {"x" * 100: [node, node]}
    assert python().groups == {"x" * 80: [node]}
    widget.groups = {}


def test_only_the_widgets_own_frame_is_heard(opened, cell, python, widget, graph):
    node = ids(graph)[1]
    state = {"circuitsae": {"chosen": node, "pinned": [], "groups": {}}}
    opened.evaluate("state => window.postMessage(state, '*')", state)  # the page to itself, not from the frame
    opened.evaluate("() => new Promise(done => setTimeout(done, 50))")
    assert opened.evaluate("[model.get('chosen'), saved.length]") == [None, 0]
    cell.evaluate("state => window.postMessage(state, '*')", state)  # the frame to itself, not from around it
    cell.evaluate("() => new Promise(done => setTimeout(done, 50))")
    assert cell.evaluate("viewer.state.selected") == -1


def test_a_cell_has_no_origin_shows_hostile_tokens_as_text_and_keeps_no_address(opened, cell, graph):
    plain = opened.query_selector("#plain iframe")
    frame = plain.content_frame() if plain else None
    assert frame
    frame.wait_for_selector("html[data-ready]")
    for one in (cell, frame):
        assert one.evaluate("window.origin") == "null"
        assert one.locator("img").count() == 0
        assert "</script><img src=x" in one.locator("#prompt").inner_text()
    frame.evaluate("id => viewer.select(viewer.indexOf.get(id))", ids(graph)[0])
    frame.wait_for_timeout(200)  # by then a page of its own would have written its address
    assert frame.evaluate("location.href") == "about:srcdoc"
    assert opened.evaluate("saved.length") == 0  # a plain display tells nothing


def test_a_widget_that_is_removed_hears_nothing(opened, cell, graph):
    opened.evaluate("removed()")
    cell.evaluate("id => viewer.select(viewer.indexOf.get(id))", ids(graph)[0])
    cell.evaluate("() => new Promise(done => setTimeout(done, 50))")
    assert opened.evaluate("[model.get('chosen'), saved.length]") == [None, 0]
