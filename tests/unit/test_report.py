"""The report without a browser: what the file says, what it must not contain, where nodes are placed."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from plotly.offline import get_plotlyjs

from circuitsae.report import to_figure, write_html
from circuitsae.report.data import page_data
from circuitsae.report.layout import arrange
from circuitsae.report.sample import sample_graph
from circuitsae.report.text import plotly_text, visible
from transcoders.errors import InputError

HOSTILE = [
    "</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "\"quotes' &amp;",
    "שלום",
    "👩‍🔬",
    "",
    "\u202e",
    "{data}",
]


@dataclass
class Checked:
    edges: pd.DataFrame


def data_of(text: str) -> dict:
    found = re.search(r'<script type="application/json" id="graph-data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def own_text(path: Path) -> str:
    """The page without plotly's source."""
    return path.read_text(encoding="utf-8").replace(get_plotlyjs(), "")


def test_hostile_tokens_reach_the_page_only_as_escaped_data(tmp_path: Path):
    graph = sample_graph(tokens=HOSTILE, n_features=10, n_edges=50)
    page = own_text(write_html(graph, tmp_path / "page.html", title='<b>&"title</title>'))
    assert "<img" not in page
    assert "onerror=alert(1)>" not in page
    assert page.count("</script>") == 3
    assert "<title>&lt;b&gt;&amp;&quot;title&lt;/title&gt;</title>" in page
    data = data_of(page)
    assert data["title"] == '<b>&"title</title>'
    assert data["tokens"][:6] == HOSTILE[:6]
    assert data["tokens"][6:] == ["∅", "\\u202e", "{data}"]


def test_the_file_loads_nothing(tmp_path: Path):
    page = own_text(write_html(sample_graph(), tmp_path / "page.html"))
    assert not re.search(r"https?://|@import|url\(", page)
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:,"]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    assert "default-src 'none'" in policy[1]
    assert "unsafe-eval" not in policy[1]
    assert policy[1].count("'sha256-") == 2


def test_same_graph_same_file(tmp_path: Path):
    first = write_html(sample_graph(), tmp_path / "a.html").read_bytes()
    assert write_html(sample_graph(), tmp_path / "b.html").read_bytes() == first
    assert len(first) < 8_000_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_other_places_for_plotly(tmp_path: Path):
    cdn = write_html(sample_graph(), tmp_path / "cdn.html", plotlyjs="cdn").read_text(encoding="utf-8")
    assert re.search(r'<script src="https://cdn\.plot\.ly/plotly-[\d.]+\.min\.js" integrity="sha256-', cdn)
    write_html(sample_graph(), tmp_path / "beside.html", plotlyjs="directory")
    assert (tmp_path / "plotly.min.js").read_text(encoding="utf-8") == get_plotlyjs()


def test_validation_is_joined_to_the_edges():
    graph = sample_graph(validated=0)
    edge = graph.edges_frame().iloc[7]
    table = pd.DataFrame(
        [{"source": edge["source"], "target": edge["target"], "measured": 0.5, "verdict": "confirmed"}]
    )
    edges = page_data(graph, Checked(table))["edges"]
    assert edges == page_data(graph, table)["edges"]
    assert edges["verdict"][7] == "confirmed"
    assert edges["measured"][7] == 0.5
    assert sum(verdict is not None for verdict in edges["verdict"]) == 1
    with pytest.raises(InputError, match="twice"):
        page_data(graph, pd.concat([table, table]))


def test_numbers_that_are_not_finite_become_null():
    data = page_data(sample_graph())
    assert json.dumps(data, allow_nan=False)
    bias = data["nodes"]["kind"].index("bias")
    assert data["nodes"]["influence"][bias] is None


def test_a_table_that_cannot_be_used_is_refused():
    graph = sample_graph()
    graph.edges = graph.edges.drop(columns="share")
    with pytest.raises(InputError, match="share"):
        page_data(graph)
    graph = sample_graph()
    graph.edges.loc[0, "source"] = "9.9@9"
    with pytest.raises(InputError, match=r"9\.9@9"):
        page_data(graph)
    graph = sample_graph()
    graph.nodes.loc[1, "id"] = graph.nodes.loc[0, "id"]
    with pytest.raises(InputError, match="unique"):
        page_data(graph)


@pytest.mark.parametrize("n_features", [0, 90, 2000])
def test_no_two_nodes_share_a_place_and_each_is_in_its_cell(n_features: int):
    graph = sample_graph(n_features=n_features, n_edges=10)
    nodes = graph.nodes_frame()
    layout = arrange(nodes, list(graph.tokens), graph.n_layers)
    places = np.array([layout.x, layout.y]).T
    distances = np.abs(places[:, None] - places[None]).max(-1) + np.eye(len(nodes))
    assert distances.min() > 0.4
    for layer, pos, x, y in zip(nodes["layer"].tolist(), nodes["pos"].tolist(), layout.x, layout.y, strict=True):
        row = layout.rows[layer + 1]
        column = layout.columns[pos] if pos >= 0 else layout.bias_column
        assert column is not None
        assert row.start < y < row.end
        assert column.start < x < column.end


def test_features_of_a_cell_are_stacked_by_influence_above_the_error():
    graph = sample_graph(n_features=300, n_edges=10)
    nodes = graph.nodes_frame()
    layout = arrange(nodes, list(graph.tokens), graph.n_layers)
    nodes = nodes.assign(x=layout.x, y=layout.y)
    cell = nodes.query("layer == 2 and pos == 10").sort_values(by=["x", "y"], ascending=[True, False])
    assert len(cell) > 2
    assert cell["kind"].tolist() == ["feature"] * (len(cell) - 1) + ["error"]
    assert cell["influence"].iloc[:-1].is_monotonic_decreasing


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (" John", "·John"),
        ("", "∅"),
        ("  ", "··"),
        ("a\n", "a↵"),
        ("\u202eevil", "\\u202eevil"),
        ("a b ", "a b·"),
        ("\x00", "\\u0000"),
        ("\ud800", "\\ud800"),
    ],
)
def test_visible(token: str, expected: str):
    assert visible(token) == expected


def test_plotly_text_is_literal_and_isolated():
    assert plotly_text("<b>&amp;") == "\u2068&lt;b&gt;&amp;amp;\u2069"


def test_figure_draws_the_strongest_edges_in_a_few_traces():
    graph = sample_graph(tokens=HOSTILE[:8], n_features=200, n_edges=3000)
    figure = to_figure(graph)
    document = json.loads(figure.to_json() or "")
    lines = [trace for trace in document["data"] if trace["mode"] == "lines"]
    assert len(lines) <= 6
    assert sum(len(trace["x"]) // 3 for trace in lines) == 1000
    assert sum(trace["showlegend"] for trace in lines) == 2
    assert "&lt;/script&gt;" in document["layout"]["xaxis"]["ticktext"][0]


def test_report_does_not_import_torch():
    code = "import sys, circuitsae.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
