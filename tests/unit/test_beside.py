"""Links between pages: only to pages of ours that are there, relative, whatever a folder or a title is called."""

from pathlib import Path

from circuitsae.report import write_html, write_index
from circuitsae.report.beside import kind_of, pages_of, pages_there, ways_from
from tests.sample_graphs import small_graph


def made(path: Path, kind: str, title: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'<meta name="generator" content="circuitsae {kind}" /><title>{title}</title>', encoding="utf-8")
    return path


def test_ways_lead_up_to_three_folders_and_to_pages_of_ours_alone(tmp_path: Path):
    page = tmp_path / "a b" / "c#?" / "graph.html"
    assert ways_from(page) == []
    (tmp_path / "index.html").write_text("<title>somebody's page</title>")
    assert ways_from(page) == []
    made(tmp_path / "index.html", "graphs")
    assert ways_from(page) == [{"href": "../../index.html", "text": "All graphs"}]
    made(tmp_path / "a b" / "index.html", "features")
    made(tmp_path / "a b" / "features" / "index.html", "features")
    made(page.parent / "report.html", "report")
    assert [way["href"] for way in ways_from(page)] == ["../../index.html", "../features/index.html", "report.html"]
    assert ways_from(page.parent / "report.html") == ways_from(page)[:2]
    assert ways_from(tmp_path / "1" / "2" / "3" / "4" / "graph.html") == []
    assert pages_there([("x", page), ("y", None), ("z", tmp_path / "index.html")], page) == [
        {"href": "../../index.html", "text": "z"}
    ]


def test_an_index_lists_comparisons_by_their_titles(tmp_path: Path):
    write_html(small_graph(), tmp_path / "graph.html")
    assert kind_of(tmp_path / "graph.html") == "graph"
    made(tmp_path / "x#y.html", "comparison", "one &lt;b&gt; other")
    made(tmp_path / "long.html", "comparison", "w" * 5000)
    assert pages_of(tmp_path) == [
        {"href": "long.html", "text": "long.html"},
        {"href": "x%23y.html", "text": "one <b> other"},
    ]
    small_graph().save(tmp_path / "g")
    assert kind_of(write_index(tmp_path)) == "graphs"
    assert kind_of(tmp_path / "g" / "graph.json") is None
