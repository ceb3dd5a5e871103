"""What the page hands over as files: pictures, the view, the graph for Neuronpedia; all without a request."""

import json
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from playwright.sync_api import Page, expect

from circuitsae.graph import AttributionGraph, NodeKind
from circuitsae.graph.exchange import neuronpedia, read_graph
from circuitsae.report import write_html
from tests.sample_graphs import whole_graph

OpenPage = Callable[..., Page]
TOKENS = [" Mary", "</script><b>", '"q" & \\', "\u202eabc", "🙂", "", "\x00\n\t", " to"]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def graph() -> AttributionGraph:
    return whole_graph(TOKENS)


@pytest.fixture(scope="module")
def page(graph: AttributionGraph, tmp_path_factory: pytest.TempPathFactory, open_shared: OpenPage) -> Page:
    page = open_shared(write_html(graph, tmp_path_factory.mktemp("export") / "graph.html", title="A </title> graph"))
    page.evaluate(
        "viewer.makeGroup(['0.1@1', '1.71@1'].map(id => viewer.indexOf.get(id)), '<b>two</b>');"
        "viewer.togglePin(viewer.indexOf.get('logit.900@7')); viewer.state.graphNote = 'a note';"
        "viewer.state.notes.set(0, '\"quoted\" </script>'); viewer.select(viewer.indexOf.get('2.147@7'));"
    )
    return page


def download(page: Page, kind: str, folder: Path) -> Path:
    page.locator("#export > summary").click()
    with page.expect_download() as waiting:
        page.locator(f"[data-export={kind}]").click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    assert not page.locator("#export").evaluate("menu => menu.open")
    return path


def test_svg_is_a_vector_of_every_shown_node_and_edge(page: Page, tmp_path: Path):
    path = download(page, "svg", tmp_path)
    assert path.name == "a-title-graph.svg"
    root = ElementTree.parse(path).getroot()
    edges, chosen = root.findall(f".//{SVG}g[@class='edges']")
    shown = page.evaluate("[...viewer.edgeShown].reduce((a, b) => a + b)")
    assert len(edges.findall(f".//{SVG}path")) == shown > 100
    assert len(chosen.findall(f".//{SVG}path")) == page.evaluate("viewer.edgesOf(viewer.state.selected).length") > 5
    marks = [mark for mark in root.iter(f"{SVG}path") if mark.find(f"{SVG}title") is not None]
    assert len(marks) == page.evaluate("[...viewer.nodeShown].reduce((a, b) => a + b)")
    assert not list(root.iter(f"{SVG}image"))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert "A </title> graph" in texts
    assert "</script><b>" in texts
    assert len(root.findall(f".//{SVG}circle")) >= 4  # the chosen node and three pins


def test_png_is_twice_as_large_as_the_screen_and_not_blank(page: Page, tmp_path: Path):
    data = download(page, "png", tmp_path).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    size = page.evaluate("[viewer.drawnView().width, viewer.drawnView().height]")
    assert list(struct.unpack(">II", data[16:24])) == [2 * side for side in size]
    assert len(data) > 50_000


def test_supernode_graph_as_svg(page: Page, tmp_path: Path):
    path = download(page, "groups", tmp_path)
    root = ElementTree.parse(path).getroot()
    assert [text.text for text in root.iter(f"{SVG}text") if text.text and "two" in text.text] == ["<b>two</b>"]


def test_the_view_as_json(page: Page, graph: AttributionGraph, tmp_path: Path):
    view = json.loads(download(page, "json", tmp_path).read_text(encoding="utf-8"))
    assert view["format"] == "circuitsae-view/1"
    assert view["tokens"] == TOKENS
    assert view["groups"] == [{"name": "<b>two</b>", "members": ["0.1@1", "1.71@1"]}]
    assert sorted(view["pins"]) == ["0.1@1", "1.71@1", "logit.900@7"]
    assert view["note"] == "a note"
    assert view["notes"] == {"tok@0": '"quoted" </script>'}
    assert view["view"]["selected"] == "2.147@7"
    assert view["comparison"] is None
    nodes = {node["id"] for node in view["nodes"]}
    assert nodes == {node.id for node in graph.nodes if node.kind is not NodeKind.BIAS}
    edges = graph.edges_frame()
    rows = zip(edges["source"].tolist(), edges["target"].tolist(), edges["weight"].tolist(), strict=True)
    expected = {(s, t): pytest.approx(weight, rel=1e-5) for s, t, weight in rows if s in nodes and t in nodes}
    assert {(edge["source"], edge["target"]): edge["weight"] for edge in view["edges"]} == expected


def test_the_graph_for_neuronpedia_agrees_with_the_python_writer(page: Page, graph: AttributionGraph, tmp_path: Path):
    path = download(page, "neuronpedia", tmp_path)
    made, expected = json.loads(path.read_text(encoding="utf-8")), neuronpedia.write(graph)

    def without_own(records: list[dict]) -> list[dict]:
        return [{key: value for key, value in record.items() if key != "circuitsae"} for record in records]

    def rounded(value: Any) -> Any:
        match value:
            case dict():
                return {key: rounded(item) for key, item in value.items()}
            case list():
                return [rounded(item) for item in value]
            case float():
                return pytest.approx(value, rel=1e-5)
        return value

    assert without_own(made["nodes"]) == rounded(without_own(expected["nodes"]))
    order = {(link["source"], link["target"]): link for link in made["links"]}
    assert len(order) == len(expected["links"])
    for link in expected["links"]:
        assert order[link["source"], link["target"]] == rounded(link)
    same = without_own([made["metadata"]])[0]
    assert same.pop("info") == {"generator": {"name": "circuitsae"}, "description": "a note"}
    own = without_own([expected["metadata"]])[0]
    own.pop("info")
    assert same == own
    assert made["qParams"] == {
        "linkType": "both",
        "pinnedIds": ["0_1_1", "1_71_1", "4_900_7"],
        "clickedId": "2_147_7",
        "supernodes": [["<b>two</b>", "0_1_1", "1_71_1"]],
        "sg_pos": "",
    }


def test_an_exported_graph_opens_again_with_its_pins_and_groups(page: Page, tmp_path: Path, open_page: OpenPage):
    graph = read_graph(download(page, "neuronpedia", tmp_path))
    assert list(graph.tokens) == TOKENS
    again = open_page(write_html(graph, tmp_path / "again.html"))
    groups = "viewer.state.groups.map(g => [g.name, [...g.members].map(i => viewer.nodes.id[i])])"
    assert again.evaluate(groups) == [["<b>two</b>", ["0.1@1", "1.71@1"]]]
    assert again.evaluate("viewer.state.pins.size") == 3
    again.evaluate("viewer.clearPins()")
    again.wait_for_function("() => location.hash.includes('pin=')")
    again.reload()
    again.wait_for_selector("html[data-ready]")
    assert again.evaluate("viewer.state.pins.size") == 0


def test_control_characters_in_the_name_of_a_group_make_no_malformed_picture(page: Page, tmp_path: Path):
    page.evaluate("viewer.rename(viewer.state.groups[0], 'a\\u0001b')")
    root = ElementTree.parse(download(page, "groups", tmp_path)).getroot()
    page.evaluate("viewer.rename(viewer.state.groups[0], '<b>two</b>')")
    assert "a\ufffdb" in [text.text for text in root.iter(f"{SVG}text")]


def test_an_export_that_fails_says_so(page: Page):
    page.evaluate("() => { [window.kept, viewer.png] = [viewer.png, () => Promise.reject(new Error('no memory'))]; }")
    page.locator("#export > summary").click()
    page.locator("[data-export=png]").click()
    expect(page.get_by_role("alert")).to_have_text("Picture (PNG) could not be saved: no memory")
    page.evaluate("() => { viewer.png = window.kept; }")


SECONDS_EACH = ("3plus5-plt", "eleuther_attribution_graph", "hiss-clt-hp", "puppy-clt-hp")
"""Up to 23,416 nodes; tests/contracts/test_exchange.py imports and exports all of them without a browser."""


@pytest.mark.parametrize(
    "name", ["bee-insect-clt", "dallas-austin", *(pytest.param(name, marks=pytest.mark.slow) for name in SECONDS_EACH)]
)
def test_graphs_of_other_tools_open_and_export(name: str, shared: Path, tmp_path: Path, open_page: OpenPage):
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
    exported = page.evaluate("viewer.neuronpedia()")
    jsonschema.validate(exported, json.loads((file.parent / "neuronpedia-graph-schema.json").read_text("utf-8")))
    biases = sum(node.kind is NodeKind.BIAS for node in graph.nodes)
    assert len(exported["nodes"]) == len(graph.nodes) - biases
    assert page.evaluate("viewer.svgText(viewer.graphPicture()).length") > 5_000
