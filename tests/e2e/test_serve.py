"""`circuitsae serve` in a real browser: what would change the answer, what the graph foresees of it, what is kept."""

import io
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect
from rich.console import Console

import circuitsae as cs
from circuitsae.cli import main
from circuitsae.commands.graph_folders import write_folder
from circuitsae.features.ledger import Ledger
from circuitsae.graph import AttributionGraph
from circuitsae.interventions import Outcome, for_node
from circuitsae.replacement import ReplacementModel

OpenPage = Callable[..., Page]
WRONG = ("error", "warning")
PROMPT = "The capital of the state containing Dallas is"
EVIL = '</script><img src=x onerror=alert(1)> "q" \u2028\u202e🧪'


def ran(page: Page) -> None:
    """Press Run, and wait for the end: the machine may be busy."""
    page.evaluate("document.documentElement.dataset.before = viewer.runs")
    page.get_by_role("button", name="Run", exact=True).click()
    until(lambda: page.evaluate("viewer.runs > Number(document.documentElement.dataset.before)"), 60)


@pytest.fixture(scope="module")
def model() -> ReplacementModel:
    return ReplacementModel(cs.load_model("pocket", device="cpu"), cs.load_dictionaries("pocket", device="cpu"))


@pytest.fixture(scope="module")
def graph(model: ReplacementModel) -> AttributionGraph:
    return cs.attribute(model, PROMPT).prune(nodes=0.7)


@pytest.fixture(scope="module")
def folder(graph: AttributionGraph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served") / "dallas"
    write_folder(graph, None, made)
    return made


@dataclass
class Command:
    """`circuitsae serve` in a thread, and what it has printed."""

    arguments: list[str]
    printed: io.StringIO = field(default_factory=io.StringIO)
    servers: list[uvicorn.Server] = field(default_factory=list)

    def run(self) -> None:
        main(["serve", *self.arguments])


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Where `circuitsae serve` says that the page is."""
    command = Command([str(folder), "--no-open"])
    begin = uvicorn.Server.run

    def noted(server: uvicorn.Server, *arguments: object, **named: object) -> None:
        command.servers.append(server)
        begin(server, *arguments, **named)  # pyright: ignore[reportArgumentType]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(uvicorn.Server, "run", noted)
        patched.setattr("circuitsae.commands.serve.open_console", lambda _: Console(file=command.printed, width=300))
        thread = threading.Thread(target=command.run, daemon=True)
        thread.start()
        until(lambda: command.servers and command.servers[0].started)
        found = re.search(r"http://127\.0\.0\.1:\d+/[\w-]{32}/", command.printed.getvalue())
        assert found, command.printed.getvalue()
        yield found[0]
        command.servers[0].should_exit = True
        thread.join(20)
    assert not thread.is_alive()
    assert f"circuitsae show {folder}" in command.printed.getvalue()


def until(met: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def page(chromium: Browser, address: str) -> Iterator[Page]:
    """The served page; it asks nobody but its server, and complains of nothing."""
    complaints: list[str] = []
    made = chromium.new_page(viewport={"width": 1400, "height": 1000})
    made.set_default_timeout(30_000)
    made.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else complaints.append(r.url))
    refused = "the server responded with a status of 422"  # as one test means it to be
    made.on("console", lambda m: complaints.append(m.text) if m.type in WRONG and refused not in m.text else None)
    made.on("pageerror", lambda error: complaints.append(str(error)))
    made.on("dialog", lambda dialog: complaints.append(dialog.message))
    opened(made, address)
    yield made
    made.close()
    assert not complaints, complaints


def opened(page: Page, address: str) -> None:
    page.goto(address)
    page.wait_for_selector("html[data-ready]")


def select(page: Page, node: str) -> None:
    page.evaluate("id => viewer.select(viewer.indexOf.get(id))", node)


def feature(graph: AttributionGraph, rank: int = 0) -> str:
    nodes = graph.nodes_frame().query("kind == 'feature'").sort_values("influence", ascending=False)
    return nodes["id"].tolist()[rank]


def test_what_would_change_the_answer(page: Page, graph: AttributionGraph, model: ReplacementModel):
    select(page, "tok@7")
    began = time.monotonic()
    ran(page)
    outcome = page.locator(".outcome")
    expect(outcome.locator(".answer")).to_contain_text("The answer changes from ·Austin")
    first = time.monotonic() - began
    began = time.monotonic()
    ran(page)
    print(f"answered in {first:.1f} s with the model to load, in {time.monotonic() - began:.1f} s without")
    assert first < 60
    direct = cs.intervene(model, PROMPT, [for_node(graph.nodes[graph.position["tok@7"]])])
    top = direct.top(5)
    expect(outcome.locator(".answer")).to_contain_text(top["text"].iloc[0].replace(" ", "·"))
    moved = direct.changed[0, 0, -1] - direct.clean[0, -1]
    token = graph.top_logits()[0].index

    def written(value: float) -> str:
        return page.evaluate("v => viewer.number(v)", value)

    expect(outcome.locator("dd.measured .number")).to_have_text(written(float(moved[token] - moved.mean())))
    foreseen = page.evaluate("viewer.page.foreseen.removed[viewer.state.selected]")
    expect(outcome.locator("dd.foreseen .number")).to_have_text(written(foreseen))
    expect(page.locator(".in-model .foreseen strong")).to_have_text(written(foreseen))
    assert outcome.locator("tbody tr").count() == len(top)


def test_the_commands_that_are_shown_measure_the_same(
    page: Page, graph: AttributionGraph, folder: Path, capsys: pytest.CaptureFixture[str]
):
    select(page, feature(graph))
    page.get_by_label("What to do").select_option("scale")
    page.get_by_label("a number, such as 2").fill("3")
    ran(page)
    expect(page.locator(".outcome .changed-nodes")).to_contain_text("scaled by 3")
    row = page.locator(".outcome tbody tr", has_text="Austin").locator("td").last
    page.locator(".in-model .commands > summary").click()
    shell, python = page.locator(".in-model .commands code").all_inner_texts()
    words = shlex.split(shell)
    assert words[0] == "circuitsae"
    main([*words[1:], "--target", " Austin", "--json"])
    told = re.search(r'"effect": (-?[\d.e-]+)', capsys.readouterr().out)
    assert told
    expect(row).to_have_text(page.evaluate("v => viewer.number(v)", float(told[1])))
    known: dict[str, object] = {}
    exec(python, known)
    capsys.readouterr()
    outcome = known["outcome"]
    assert isinstance(outcome, Outcome)
    token = graph.top_logits()[0].index
    assert float(outcome.changed[0, 0, -1, token] - outcome.clean[0, -1, token]) == pytest.approx(
        float(told[1]), abs=1e-5
    )


def test_an_edge_is_tested_where_it_is_listed(
    page: Page, graph: AttributionGraph, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    logit = graph.top_logits()[0].id
    select(page, logit)
    entry = page.locator("#panel .edges li", has=page.locator(f"[title='tok@7 → {logit}']"))
    entry.locator(".edge-model > summary").click()
    entry.get_by_role("button", name="Test this edge").click()
    entry.locator(".in-model .claims").wait_for(timeout=60_000)
    expect(entry.locator(".in-model .claims thead th")).to_have_text(["Graph", "Direct edge", "Model effect"])
    expect(entry.locator(".in-model .badge")).to_contain_text("confirmed")
    predicted = (
        entry.locator(".claims tr", has=page.get_by_role("rowheader", name="predicted")).locator("td").all_inner_texts()
    )
    weight = graph.weights[graph.position[logit], graph.position["tok@7"]]
    assert predicted[1] == page.evaluate("v => viewer.number(v)", -float(weight))
    shell, _ = entry.locator("code").all_inner_texts()
    words = shlex.split(shell)
    assert words[1:3] == ["validate", str(folder)]
    copied = tmp_path / "copy"
    graph.save(copied)
    main(["validate", str(copied), *words[3:], "--controls", "0", "--wide"])
    row = next(line for line in capsys.readouterr().out.splitlines() if "tok@7" in line)
    assert f"{float(predicted[0].replace('−', '-')):.2f}" in row


def test_labels_groups_and_notes_are_there_again(page: Page, graph: AttributionGraph, folder: Path, address: str):
    node = feature(graph)
    name = node.partition("@")[0]
    select(page, node)
    page.get_by_label(f"Label of {name}").fill(EVIL)
    page.get_by_role("button", name="Save label").click()
    expect(page.locator("#panel .label")).to_contain_text("<img src=x onerror=alert(1)>")
    page.keyboard.press("Escape")
    page.evaluate("document.activeElement.blur()")
    for one in (node, "tok@7"):
        select(page, one)
        page.keyboard.press("p")
    page.evaluate("name => viewer.makeGroup([...viewer.state.pins], name)", EVIL)
    until(lambda: page.evaluate("document.documentElement.dataset.kept"))
    until(lambda: (folder / "opened.json").exists() and "tok@7" in (folder / "opened.json").read_text())
    assert [label.text for label in Ledger.load(folder).labels] == [EVIL]
    page.goto("about:blank")
    opened(page, address)  # an address without what was chosen
    assert page.evaluate("viewer.state.groups.map(g => [...g.members].map(i => viewer.nodes.id[i]))") == [
        [node, "tok@7"]
    ]
    select(page, node)
    expect(page.locator("#panel .label")).to_contain_text("<img src=x onerror=alert(1)>")
    expect(page.get_by_label("With which nodes")).to_contain_text("group </script>")
    assert page.locator("img").count() == 0
    page.get_by_label("With which nodes").select_option("group")
    page.get_by_label("What to do").select_option("zero")
    ran(page)
    expect(page.locator(".outcome .changed-nodes")).to_contain_text(f"{node}, tok@7 removed")


def test_what_cannot_be_run_is_said(page: Page, graph: AttributionGraph):
    select(page, feature(graph, 1))
    page.get_by_label("What to do").select_option("replace")
    page.get_by_label("LAYER.INDEX, or a token for a token").fill("nothing")
    ran(page)
    expect(page.locator(".in-model .failed")).to_contain_text("Cannot read 'nothing'")


def test_it_is_accessible(page: Page, graph: AttributionGraph, serious: Callable[[Page], list[str]]):
    select(page, "tok@7")
    page.get_by_label("What to do").select_option("zero")
    ran(page)
    expect(page.locator(".outcome")).to_be_visible()
    page.locator(".edge-model > summary").first.click()
    page.locator(".in-model .commands > summary").click()
    assert serious(page) == []


def test_offline_the_page_shows_the_commands_and_runs_nothing(
    folder: Path, graph: AttributionGraph, open_page: OpenPage
):
    page = open_page(folder / "graph.html")
    select(page, feature(graph))
    assert page.locator(".in-model form").count() == 0
    page.locator("#panel .in-model > summary").click()
    expect(page.locator(".in-model .foreseen")).to_contain_text("Without it the graph foresees")
    shell = page.locator(".in-model code").first.inner_text()
    assert shlex.split(shell)[:5] == ["circuitsae", "intervene", PROMPT, "--feature", feature(graph)]
    page.get_by_label("Copy the command for a terminal").first.click()
    expect(page.locator("#live")).to_have_text("Copied")
