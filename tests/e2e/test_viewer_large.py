"""Large graphs on the page: the first picture, what the slider adds, groups by place, bundles, filters, and speed."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from circuitsae.features.ledger import Label, Ledger
from circuitsae.report import write_html
from circuitsae.report.claims import verdicts_shown
from circuitsae.report.data import MOST_CARRIED
from circuitsae.report.selection import Selection, select
from tests.sample_graphs import SampleGraph, sample_graph, sample_suggestions

OpenPage = Callable[..., Page]
WORDS = ["<bos>", *(f" word{i}" for i in range(14))]
SHOWN = "[...viewer.nodeShown.keys()].filter(i => viewer.nodeShown[i])"
FRAME = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"


@pytest.fixture(scope="module")
def graph() -> SampleGraph:
    graph = sample_graph(tokens=WORDS, n_layers=12, n_features=370, n_edges=20_000, n_logits=8)
    assert (len(graph.nodes), len(graph.edges)) == (600, 20_000)
    return graph


@pytest.fixture(scope="module")
def selection(graph: SampleGraph) -> Selection:
    return select(graph.nodes, graph.edges, verdicts_shown(graph.edges)[1])


@pytest.fixture(scope="module")
def html(graph: SampleGraph, selection: Selection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    influence = graph.nodes["influence"].where((graph.nodes["kind"] == "feature").to_numpy(), 0.0).to_numpy(float)
    strongest = graph.nodes["id"].tolist()[int(np.argmax(influence * (selection.nodes <= selection.first)))]
    ledger = Ledger([Label("names of rivers", (strongest.partition("@")[0],))])
    folder = tmp_path_factory.mktemp("large")
    path = write_html(graph, folder / "large.html", ledger=ledger, supernodes=sample_suggestions(graph))
    assert path.stat().st_size < 3_000_000
    return path


def drawn(page: Page) -> int:
    return page.locator("#plot .scatterlayer path.point").count()


def draw(page: Page, density: float) -> None:
    page.locator("#density").fill(str(density))
    page.evaluate(FRAME)


def numbers(page: Page) -> tuple[int, int]:
    """Nodes and edges that are shown."""
    nodes, edges = page.evaluate("[viewer.nodeShown, viewer.edgeShown].map(all => all.reduce((a, b) => a + b))")
    return nodes, edges


def test_the_first_picture_is_small_and_says_what_share_of_influence_it_holds(
    page: Page, graph: SampleGraph, selection: Selection
):
    nodes, edges = numbers(page)
    assert 30 < nodes <= 60
    assert 75 < edges <= 150
    assert drawn(page) == nodes
    wanted = graph.nodes["id"][(selection.nodes <= selection.first) & (graph.nodes["kind"] != "bias").to_numpy()]
    assert page.evaluate(f"{SHOWN}.map(i => viewer.nodes.id[i])") == wanted.tolist()
    share = page.evaluate("viewer.shareOf(viewer.edgeShown)")
    assert share == pytest.approx(selection.shares[selection.first], rel=1e-4)
    held = page.evaluate("viewer.heldByPage")
    assert held == pytest.approx(selection.shares[-1], rel=1e-4)
    expect(page.locator("#density-count")).to_have_text(f"{nodes} of 600 nodes, {edges} of 20,000 edges")
    said = [page.evaluate("v => viewer.percent(v)", value) for value in (share, held)]
    expect(page.locator("#share")).to_have_text(f"{said[0]} of influence drawn, the page holds {said[1]}")


def test_the_slider_reaches_nothing_but_the_answer_and_everything(page: Page):
    seen = []
    for density in (0, 0.3, 0.6, 1):
        draw(page, density)
        seen.append((*numbers(page), page.evaluate("viewer.shareOf(viewer.edgeShown)")))
    assert seen == sorted(seen)
    assert seen[0][0] < 30
    everything = page.evaluate("viewer.nodes.kind.filter(kind => kind !== 'bias').length")
    assert seen[-1][0] == everything
    assert seen[-1][2] == pytest.approx(page.evaluate("viewer.heldByPage"))
    assert seen[2][2] >= 0.6 * seen[-1][2]
    page.locator("#first-picture").click()
    assert numbers(page)[0] <= 60
    expect(page.locator("#first-picture")).to_be_disabled()


def test_nodes_merge_by_place_until_they_fit_and_open_and_close(page: Page, html: Path, open_page: OpenPage):
    draw(page, 1)
    assert drawn(page) <= 200
    groups = page.locator("#node-list [data-group]")
    sums = page.evaluate(
        "viewer.itemsNow().map(({shown, influence, key}) => [key, shown.length, influence,"
        " shown.reduce((sum, i) => sum + (viewer.nodes.influence[i] ?? 0), 0)])"
    )
    assert sum(size for _, size, _, _ in sums) == numbers(page)[0]
    assert all(influence == pytest.approx(expected) for _, _, influence, expected in sums)
    assert groups.count() == sum(key is not None for key, *_ in sums) > 50
    total = page.evaluate("viewer.strandsLeftOut() + viewer.strands().length")
    assert page.evaluate("viewer.strands().length") == 1200 < total

    # A group's edges are the sums of those of its members.
    pair = page.evaluate(
        """() => {
            const {edges, itemOf, edgeShown} = viewer;
            const apart = e => itemOf[edges.source[e]] !== itemOf[edges.target[e]];
            const shown = [...edgeShown.keys()].filter(e => edgeShown[e] && apart(e));
            return viewer.strandsOf(shown).map(s => [s.weight, s.count, shown.filter(e =>
                s.source.members.includes(edges.source[e]) && s.target.members.includes(edges.target[e]))
                .reduce((sum, e) => sum + edges.weight[e], 0)]).slice(0, 40);
        }""".replace("            ", "")
    )
    assert max(count for _, count, _ in pair) > 1
    assert [weight for weight, _, _ in pair] == pytest.approx([expected for _, _, expected in pair])

    # By a click in the drawing, by the keyboard in the list.
    before = drawn(page)
    key = groups.first.get_attribute("data-group")
    size = next(size for name, size, *_ in sums if name == key)
    place = page.evaluate(
        """key => { const {x, y} = viewer.itemsNow().find(item => item.key === key);
            const {left, top} = document.getElementById('plot').getBoundingClientRect();
            return [left + viewer.drawnView().x(x), top + viewer.drawnView().y(y)]; }""",
        key,
    )
    page.mouse.click(*place)
    expect(page.locator("#live")).to_contain_text("opened")
    page.wait_for_function("n => document.querySelectorAll('#plot path.point').length === n", arg=before + size - 1)
    page.wait_for_function("() => location.hash.includes('open=')")
    assert drawn(open_page(html, page.evaluate("location.hash"))) == drawn(page)
    page.get_by_role("button", name="Close group").click()
    page.wait_for_function("n => document.querySelectorAll('#plot path.point').length === n", arg=before)
    groups.first.focus()
    page.keyboard.press("Enter")
    page.wait_for_function("n => document.querySelectorAll('#plot path.point').length === n", arg=before + size - 1)
    page.keyboard.press("c")
    page.wait_for_function("n => document.querySelectorAll('#plot path.point').length === n", arg=before)


def test_a_node_inside_a_group_that_is_chosen_stands_alone(page: Page):
    draw(page, 1)
    inside = page.evaluate("viewer.itemsNow().find(({key, members}) => key && members.length > 2).members[0]")
    page.evaluate("i => viewer.select(i)", inside)
    page.evaluate(FRAME)
    assert page.evaluate("i => viewer.itemsNow()[viewer.itemOf[i]].node", inside) == inside
    mine = page.evaluate("viewer.chosenLayers(viewer.state.selected).flatMap(({members}) => members.map(m => m.count))")
    assert sum(mine) == page.evaluate("viewer.edgesOf(viewer.state.selected).length") > 10


def test_many_edges_are_bundled_and_split_for_the_chosen_node(page: Page):
    draw(page, 0.5)
    shown = numbers(page)[1]
    counts = page.evaluate("viewer.strands().map(({count}) => count)")
    assert sum(counts) == shown > 400
    assert len(counts) < shown
    page.evaluate(f"viewer.select({SHOWN}.find(i => viewer.nodes.kind[i] === 'feature'))")
    assert page.evaluate("viewer.chosenLayers(viewer.state.selected).every(l => l.members.every(m => m.edge >= 0))")


def test_only_what_is_around_the_pins(page: Page):
    page.locator("#near").check()
    expect(page.locator("#live")).to_have_text("Choose or pin a node")
    pinned = page.evaluate(
        "[...viewer.nodeShown.keys()].find(i => !viewer.nodeShown[i] && viewer.inputs[i].length > 20)"
    )
    page.evaluate("i => viewer.togglePin(i)", pinned)
    ends = page.evaluate(
        "[...viewer.edgeShown.keys()].filter(e => viewer.edgeShown[e])"
        ".map(e => [viewer.edges.source[e], viewer.edges.target[e]])"
    )
    assert len(ends) > 20
    assert all(pinned in pair for pair in ends)
    assert numbers(page)[0] == len({i for pair in ends for i in pair}) <= 60
    strongest = page.evaluate("i => viewer.edges.source[viewer.inputs[i][0]]", pinned)
    assert strongest in {source for source, _ in ends}


def test_filters_leave_what_they_say_and_the_address_restores_them(page: Page, html: Path, open_page: OpenPage):
    draw(page, 0.9)
    page.locator("#filters summary").click()
    page.locator("#layers-from").select_option("3")
    page.locator("#layers-to").select_option("5")
    page.locator("#positions-from").select_option("8")
    page.locator("#show-tokens").uncheck()
    left = page.evaluate(f"{SHOWN}.map(i => [viewer.nodes.kind[i], viewer.nodes.layer[i], viewer.nodes.pos[i]])")
    assert {kind for kind, *_ in left} == {"feature", "error", "logit"}
    assert all(3 <= layer <= 5 and pos >= 8 for kind, layer, pos in left if kind != "logit")
    expect(page.locator("#filters-set")).to_have_text("(3)")
    page.wait_for_function("() => /positions=8-14.*tokens=0/.test(location.hash)")
    again = open_page(html, page.evaluate("location.hash"))
    assert again.evaluate(SHOWN) == page.evaluate(SHOWN)
    assert again.locator("#layers-to").input_value() == "5"
    page.locator("#filters-clear").click()
    page.get_by_label("Label has").fill("rivers names")
    features = page.evaluate(f"{SHOWN}.filter(i => viewer.nodes.kind[i] === 'feature').map(viewer.name)")
    assert features
    assert all("names of rivers" in name for name in features)


def test_all_logits_are_named_without_covering_one_another_and_labels_are_beside_nodes(page: Page):
    draw(page, 1)
    texts = page.evaluate("viewer.textMarks(viewer.drawnView())")
    logits = page.evaluate("viewer.tops.map(i => viewer.logitText(i).join(' '))")
    assert sorted(text["text"] for text in texts) == sorted(logits)
    heights = [text["y"] for text in texts]
    assert all(below - above >= 11.9 for above, below in pairwise(heights))
    page.locator("#first-picture").click()
    page.evaluate(FRAME)
    texts = page.evaluate("viewer.textMarks(viewer.drawnView()).map(t => ({...t, width: viewer.measureText(t.text)}))")
    assert "names of rivers" in {text["text"] for text in texts}
    assert len(texts) > 20
    boxes = []
    for text in texts:
        left = text["x"] - {"start": 0, "middle": 0.5, "end": 1}[text["anchor"]] * text["width"]
        boxes.append((left, left + text["width"], text["y"] - 5, text["y"] + 5))
    for k, (a, b, c, d) in enumerate(boxes):
        assert not [other for other in boxes[:k] if a < other[1] and other[0] < b and c < other[3] and other[2] < d]
    named = page.evaluate("viewer.svgText(viewer.graphPicture())")
    assert "names of rivers" in named


def test_axe_finds_nothing_serious_with_groups_and_filters(page: Page, serious: Callable[[Page], list[str]]):
    draw(page, 1)
    page.locator("#filters summary").click()
    page.locator("#node-list [data-group]").first.click()
    expect(page.locator("#open-groups button")).to_have_count(1)
    assert serious(page) == []


BUSY = "viewer.select([...viewer.inputs.keys()].sort((a, b) => viewer.inputs[b].length - viewer.inputs[a].length)[{k}])"
ACTIONS = {
    "slider": "viewer.setFilter({{density: 0.2 + 0.2 * {k}}})",
    "busiest nodes": BUSY,
    "group": "viewer.toggleOpen(viewer.itemsNow().find(item => item.key).key)",
    "filter": "viewer.setFilter({{layers: [{k}, 9]}})",
}


def test_600_nodes_open_in_two_seconds_and_answer_within_100_ms(
    html: Path, open_page: OpenPage, capsys: pytest.CaptureFixture[str]
):
    """Processor time of the page's thread, the median of three: the machine may be busy with other things."""
    page = open_page(html)
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def spent() -> float:
        metrics = session.send("Performance.getMetrics")["metrics"]
        return 1000 * next(one["value"] for one in metrics if one["name"] == "TaskDuration")

    page.reload()
    page.wait_for_selector("html[data-ready]")
    opening = spent()
    found = {}
    page.evaluate("viewer.setFilter({density: 1})")
    for name, action in ACTIONS.items():
        times = []
        for k in range(3):
            page.evaluate(FRAME)
            before = spent()
            page.evaluate(f"() => {{ {action.format(k=k + 1)}; return ({FRAME})(); }}")
            times.append(spent() - before)
        found[name] = sorted(times)[1]
    with capsys.disabled():
        print(f" [600 nodes: open {opening:.0f} ms, {json.dumps({k: round(v) for k, v in found.items()})}] ", end="")
    assert opening < 2000
    assert max(found.values()) < 100, found


def test_a_page_of_6000_nodes_is_bounded_and_says_what_it_lacks(tmp_path: Path, open_page: OpenPage):
    words = ["<bos>", *(f" word{i}" for i in range(39))]
    graph = sample_graph(tokens=words, n_layers=24, n_features=4926, n_edges=210_000, n_logits=10, validated=50)
    assert len(graph.nodes) == 6000
    path = write_html(graph, tmp_path / "huge.html")
    assert path.stat().st_size < 4_500_000
    page = open_page(path)
    assert MOST_CARRIED <= page.evaluate("viewer.edgeCount") <= MOST_CARRIED + 50
    assert page.evaluate("viewer.tests.edges.length") == 50
    expect(page.locator("#density-count")).to_contain_text("(the graph's folder has 210,000)")
    assert numbers(page)[0] <= 60
    draw(page, 1)
    assert drawn(page) <= 200
    assert page.locator("#node-list [role=option]").count() <= 500
    assert page.evaluate("viewer.itemsNow().some(({key}) => key && new Set(viewer.blockOf(key).layers).size > 1)")
