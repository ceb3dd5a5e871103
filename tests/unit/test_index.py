"""The index of a folder of graphs, and a graph in a notebook, without a browser."""

import json
import os
import re
from pathlib import Path

import pytest

from circuitsae.graph import AttributionGraph
from circuitsae.report import write_index
from circuitsae.report.index import find_graphs
from tests.sample_graphs import small_graph
from transcoders.errors import CheckFailedError, DictionaryError, InputError

HOSTILE = ["</script>", "<img src=x onerror=alert(1)>", "\"quotes' &amp;", "\u202e", ""]


def rows_of(page: Path) -> list[dict]:
    found = re.search(r'id="index-data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return json.loads(found[1])["rows"]


def test_a_row_per_graph_and_a_page_for_each(tmp_path: Path):
    folders = [small_graph().save(tmp_path / name) for name in ("one", "deeper/two", "a b/javascript:x#y")]
    broken = small_graph().save(tmp_path / "broken")
    (broken / "graph.json").write_text("{")
    page = write_index(tmp_path)
    rows = {row["name"]: row for row in rows_of(page)}
    assert set(rows) == {"one", "deeper/two", "a b/javascript:x#y", "broken"}
    assert "does not hold a whole graph: it is not JSON" in rows["broken"]["problem"]
    assert "href" not in rows["broken"]
    one = rows["one"]
    said = {"logit": "·b", "probability": 0.75, "nodes": 5, "edges": 4, "claim": "graph", "verdicts": {"confirmed": 1}}
    assert {key: one[key] for key in said} == said
    assert one["prompt"] == ["<s>", "·a"]
    assert rows["a b/javascript:x#y"]["href"] == "./a%20b/javascript%3Ax%23y/graph.html"
    for folder in folders:
        assert (folder / "graph.html").stat().st_size > 1_000_000


@pytest.mark.parametrize("claim", ["graph", "direct", "older"])
def test_the_first_claim_with_verdicts_is_counted(tmp_path: Path, claim: str):
    graph = small_graph()
    ends = graph.edges_frame()[["source", "target"]]
    column, verdicts = "verdict" if claim == "older" else f"{claim}_verdict", ["confirmed", "null", "confirmed", None]
    graph.annotate(ends.assign(**{column: verdicts})).save(tmp_path / "one")
    row = rows_of(write_index(tmp_path))[0]
    assert (row["claim"], row["verdicts"]) == (claim, {"confirmed": 2, "null": 1})


def test_pages_are_made_only_where_they_are_missing_or_old(tmp_path: Path):
    for name in ("old", "new", "missing"):
        folder = small_graph().save(tmp_path / name)
        if name != "missing":
            (folder / "graph.html").write_text("mine")
        saved = (folder / "graph.json").stat().st_mtime
        if name == "old":
            os.utime(folder / "graph.html", (saved - 10, saved - 10))
    write_index(tmp_path)
    assert (tmp_path / "new" / "graph.html").read_text() == "mine"
    assert (tmp_path / "old" / "graph.html").stat().st_size > 1_000_000
    assert (tmp_path / "missing" / "graph.html").exists()


def test_the_page_loads_nothing_and_shows_text_only_as_data(tmp_path: Path):
    small_graph().save(tmp_path / "one")
    page = write_index(tmp_path, title="<b>&title</b>").read_text(encoding="utf-8")
    page = page.replace("http://www.w3.org/2000/svg", "")  # a name, never loaded
    assert "<title>&lt;b&gt;&amp;title&lt;/b&gt;</title>" in page
    assert not re.search(r"https?://|@import|url\(|innerHTML| style=", page)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    assert policy[1].count("'sha256-") == 2
    assert "unsafe" not in policy[1]


@pytest.mark.parametrize(
    "error", [DictionaryError("not of these."), CheckFailedError("no."), PermissionError("read only")]
)
def test_a_graph_that_cannot_be_drawn_does_not_stop_the_others(tmp_path: Path, error: Exception):
    for name in ("one", "two"):
        small_graph().save(tmp_path / name)

    def write_page(graph: AttributionGraph, path: Path) -> Path:
        if path.parent.name == "one":
            raise error
        path.write_text("a page")
        return path

    one, two = rows_of(write_index(tmp_path, write_page=write_page))
    assert one["problem"] == str(error)
    assert two["href"] == "./two/graph.html"


def test_no_graphs(tmp_path: Path):
    assert find_graphs(tmp_path) == []
    with pytest.raises(InputError, match="There is no graph in"):
        write_index(tmp_path)
