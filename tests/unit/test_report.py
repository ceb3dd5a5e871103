"""The report without a browser: what the file says, what it must not contain, where nodes are placed."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import circuitsae.report
from circuitsae.features.ledger import Evidence, Label, Ledger, Verdict
from circuitsae.report import to_figure, write_html
from circuitsae.report.cards import card_data
from circuitsae.report.cells import summary_html
from circuitsae.report.claims import with_validation
from circuitsae.report.data import page_data
from circuitsae.report.index import write_index
from circuitsae.report.layout import arrange
from circuitsae.report.text import plotly_text, visible
from tests.sample_graphs import SampleCards, older_validation, sample_graph, sample_suggestions, whole_graph
from transcoders.errors import InputError
from transcoders.plotly_bundle import BUNDLE_FILE, BUNDLE_URL, basic_bundle

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
    return path.read_text(encoding="utf-8").replace(basic_bundle(), "")


def test_no_text_of_a_script_runs_over_the_end_of_its_line():
    """Pages hold scripts without indentation and lines of comment."""
    static = Path(circuitsae.report.__file__).parent / "static"
    scripts = sorted(static.rglob("*.js"))
    assert len(scripts) > 30
    for script in scripts:
        for number, line in enumerate(script.read_text(encoding="utf-8").splitlines(), 1):
            assert line.count("`") % 2 == 0, f"{script.name}:{number}: {line}"


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
    page = page.replace("http://www.w3.org/2000/svg", "")  # a name, never loaded
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:,"]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    assert "default-src 'none'" in policy[1]
    assert "unsafe-eval" not in policy[1]
    assert policy[1].count("'sha256-") == 2


def test_same_graph_same_file(tmp_path: Path):
    first = write_html(sample_graph(), tmp_path / "a.html").read_bytes()
    assert write_html(sample_graph(), tmp_path / "b.html").read_bytes() == first
    assert len(first) < 1_600_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_other_places_for_plotly(tmp_path: Path):
    cdn = write_html(sample_graph(), tmp_path / "cdn.html", plotlyjs="cdn").read_text(encoding="utf-8")
    assert f'<script src="{BUNDLE_URL}" integrity="sha256-' in cdn
    assert f"script-src {BUNDLE_URL} 'sha256-" in cdn
    write_html(sample_graph(), tmp_path / "beside.html", plotlyjs="directory")
    assert (tmp_path / BUNDLE_FILE).read_text(encoding="utf-8") == basic_bundle()


def test_validation_is_joined_to_the_edges():
    graph = sample_graph(validated=0)
    edge = graph.edges_frame().iloc[7]
    found = {"graph_measured": 0.5, "graph_verdict": "confirmed", "graph_q": np.nan, "direct_norms": -0.123456}
    table = pd.DataFrame([{"source": edge["source"], "target": edge["target"], **found}])
    tests = page_data(graph, Checked(table))["tests"]
    assert tests == page_data(graph, table)["tests"]
    assert tests == {
        "edges": [7],
        "claims": {"graph": {"measured": [0.5], "q": [None], "verdict": ["confirmed"]}},
        "parts": {"direct": {"norms": [-0.1235]}},
    }
    with pytest.raises(InputError, match="twice"):
        page_data(graph, pd.concat([table, table]))
    with pytest.raises(InputError, match=r"lacks the columns \['target'\]"):
        page_data(graph, table.drop(columns="target"))


def test_only_tested_edges_take_room_and_keep_all_their_columns():
    graph = sample_graph(validated=20)
    tests = page_data(graph)["tests"]
    edges = graph.edges_frame()
    rows = [row for row, verdict in enumerate(edges["graph_verdict"]) if isinstance(verdict, str)]
    assert tests["edges"] == rows
    assert set(tests["claims"]) == {"graph", "direct", "model"}
    for claim, columns in tests["claims"].items():
        assert ("verdict" in columns) == (claim != "model")
        for name, values in columns.items():
            expected = edges[f"{claim}_{name}"].tolist()
            for row, value in zip(rows, values, strict=True):
                wanted = expected[row] or None if name == "reason" else expected[row]
                assert value == (pytest.approx(wanted, rel=1e-3) if isinstance(wanted, float) else wanted)
    for whole, parts in tests["parts"].items():
        for part, values in parts.items():
            assert values == pytest.approx([edges[f"{whole}_{part}"][row] for row in rows], rel=1e-3)
    assert set(tests["parts"]["miss"]) == {"dictionary", "curvature", "first", "patterns", "norms"}
    assert len(tests["influence"]) == len(tests["hops"]) == 20
    assert page_data(sample_graph(validated=0))["tests"] is None


def test_a_validation_takes_the_place_of_what_the_graph_holds():
    graph = sample_graph(validated=30)
    tests = page_data(graph, older_validation(graph.edges_frame(), 6))["tests"]
    assert tests["edges"] == [0, 1, 2, 3, 4, 5]
    assert list(tests["claims"]) == ["older"]
    assert tests["claims"]["older"]["verdict"] == ["confirmed", "null", "reversed"] * 2
    graph.edges = with_validation(graph.edges_frame(), older_validation(graph.edges_frame(), 6))
    assert list(page_data(graph, sample_graph(validated=30).edges)["tests"]["claims"]) == ["graph", "direct", "model"]


def test_what_is_no_number_and_no_verdict_is_left_out():
    graph = sample_graph(validated=0)
    ends = graph.edges_frame().iloc[0][["source", "target"]].to_dict()
    row = ends | {"graph_measured": "<b>", "graph_ratio": np.inf, "graph_verdict": "<u>", "graph_reason": "a\u202eb"}
    tests = page_data(graph, pd.DataFrame([row]))["tests"]
    claim = {"measured": [None], "ratio": [None], "verdict": [None], "reason": ["a\\u202eb"]}
    assert tests == {"edges": [0], "claims": {"graph": claim}, "parts": {}}


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


def test_a_long_token_is_cut_on_every_page(tmp_path: Path):
    long = " " + "x" * 9_999
    assert visible(long) == "·" + "x" * 199 + "… (10,000 characters)"
    assert visible(long, most=None) == "·" + "x" * 9_999
    (example,) = card_data({"layer": 0, "feature": 0, "examples": [{"tokens": [long], "activations": [1]}]})["examples"]
    assert len(example["tokens"][0]) < 250
    sizes = []
    for word in (" xxx", long):
        graph = whole_graph([word] * 8)
        graph.save(tmp_path / str(len(word)) / "graph")
        page = write_index(tmp_path / str(len(word)))
        sizes.append(page.stat().st_size + len(summary_html(graph)))
        shown = page_data(graph)
        del shown["raw"]  # for exports: each token of the prompt once
        sizes.append(len(json.dumps(shown)))
    assert max(sizes[2] - sizes[0], sizes[3] - sizes[1]) < 100_000  # the provenance has the prompt, once


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


def test_only_cards_of_the_graph_are_embedded_bounded_and_rounded(tmp_path: Path):
    graph = sample_graph(n_features=200)
    cards = SampleCards(graph, share=1.0)
    key = next(iter(cards.cards))
    tokens = ["\n", "", *(f" word{k}" for k in range(198))]
    long = {"tokens": tokens, "activations": [0.0] * 150 + [1.23456789] + [0.0] * 49, "peak": 150}
    cards.cards[key] |= {"examples": [long] * 30, "max_activation": 1.23456789, "mean_activation": float("nan")}
    cards.cards["99.99"] = cards.cards[key] | {"layer": 99, "feature": 99}
    data = data_of(write_html(graph, tmp_path / "cards.html", cards=cards).read_text(encoding="utf-8"))
    assert len(data["cards"]) == 200
    card = data["cards"][key]
    assert card["max_activation"] == 1.235
    assert not {"mean_activation", "label", "dead"} & set(card)
    assert len(card["examples"]) == 10
    example = card["examples"][0]
    assert len(example["tokens"]) == len(example["activations"]) == 48
    assert example["tokens"][example["peak"]] == tokens[150]
    assert example["activations"][example["peak"]] == 1.235
    written = json.dumps(data["cards"], separators=(",", ":"))  # as the page has it
    assert len(written) < 1_000_000


def test_tokens_of_a_card_are_visible_and_spaces_stay():
    card = card_data(
        {
            "layer": 0,
            "feature": 1,
            "examples": [{"tokens": [" a", "\n", "", "\u202e"], "activations": [0, 1, 0, 0], "peak": None}],
            "top_logits": [{"token": " a", "value": 1 / 3}],
        }
    )
    assert card["examples"] == [
        {"tokens": [" a", "↵", "∅", "\\u202e"], "activations": [0, 1, 0, 0], "peak": 1, "stratum": "top"}
    ]
    assert card["top_logits"] == [{"token": "·a", "value": 0.3333}]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"examples": [{"tokens": ["a"], "activations": [1, 2]}]}, "1 tokens and 2 activations"),
        ({"histogram": {"edges": [0, 1], "counts": [1, 2]}}, "2 edges and 2 counts"),
    ],
)
def test_cards_that_do_not_fit_together_are_refused(part: dict, message: str):
    with pytest.raises(InputError, match=message):
        card_data({"layer": 0, "feature": 0} | part)


def test_labels_say_whether_they_were_tested():
    graph = sample_graph()
    key = next(iter(SampleCards(graph, share=1.0).cards))
    row = Evidence("steering", Verdict.SUPPORTED, {"effect": 0.51234, "prompts": 40}, "circuitsae steer")
    ledger = Ledger([Label("group", (key, "0.0")), Label("names", (key,)).with_rows(row), Label("else", ("9.9",))])
    labels = page_data(graph, ledger=ledger)["labels"]
    assert labels == {
        key: {
            "text": "names",
            "status": "supported",
            "display": "names; hypothesis: group",
            "evidence": ["steering: supported · effect 0.512, prompts 40 · circuitsae steer"],
        }
    }


def test_suggested_groups_are_of_this_graph():
    graph = sample_graph()
    made = [*sample_suggestions(graph, groups=1), SimpleNamespace(name="object", members=["tok@1"], score=float("inf"))]
    data = page_data(graph, supernodes=made)["supernodes"]
    assert data[0]["reason"] == "inputs and outputs alike"
    assert data[1] == {"name": "object", "members": ["tok@1"], "reason": "", "score": None}
    with pytest.raises(InputError, match="9.9@9"):
        page_data(graph, supernodes=[{"name": "x", "members": ["9.9@9"]}])


def test_a_page_opens_with_the_groups_pins_and_note_it_is_given(tmp_path: Path):
    graph = sample_graph()
    opened = {"groups": {"two": ["tok@0", "tok@1"], "none": []}, "pinned": ["tok@2"], "note": "why\n</script>"}
    page = own_text(write_html(graph, tmp_path / "page.html", opened=opened))
    assert data_of(page)["opened"] == opened | {"groups": [["two", "tok@0", "tok@1"]]}
    assert page.count("</script>") == 3
    for wrong in ({"pinned": ["9.9@9"]}, {"groups": {"x": ["tok@0", "9.9@9"]}}):
        with pytest.raises(InputError, match=r"'9\.9@9', which is not among"):
            write_html(graph, tmp_path / "wrong.html", opened=wrong)
    assert not (tmp_path / "wrong.html").exists()


def test_the_page_keeps_the_tokens_of_the_model_and_the_pins_of_the_file():
    graph = sample_graph(tokens=HOSTILE, n_features=5, n_edges=20)
    assert page_data(graph)["opened"] is None
    held = {"pinnedIds": ["E_0_0", 7], "supernodes": [["two", "E_0_0", "E_1_1"], "bad", [1], ["x", "E_9_9"]]}
    graph.provenance = dict(graph.provenance) | {"carried": {"neuronpedia": {"document": {"qParams": held}}}}
    data = page_data(graph)
    assert data["opened"] == {"pinned": [], "groups": [["two", "tok@0", "tok@1"]]}
    assert data["raw"]["tokens"] == HOSTILE
    rows = [row for row, kind in enumerate(data["nodes"]["kind"]) if kind == "logit"]
    texts = graph.nodes_frame()["text"].tolist()
    for row in rows:
        assert data["raw"]["texts"].get(str(row), data["nodes"]["text"][row]) == texts[row]


def test_pins_of_a_file_are_found_under_whatever_ids_it_has():
    """Older files call the error of layer 0 at position 1 `0_0_1`; the import notes what is not the usual id."""
    graph = sample_graph(tokens=HOSTILE, n_features=5, n_edges=20)
    feature = graph.nodes.query("kind == 'feature'").iloc[0]
    usual = f"{feature['layer']}_{feature['index']}_{feature['pos']}"
    held = {"pinnedIds": ["0_0_1", "1_-1_2", usual, f"{graph.n_layers + 1}_0_8", "0_-1_1"], "supernodes": []}
    noted = {"0.err@1": {"node_id": "0_0_1"}, "tok@1": {"node_id": 5}, "tok@2": "bad"}
    graph.provenance = {"carried": {"neuronpedia": {"document": {"qParams": held}, "nodes": noted}}}
    opened = page_data(graph)["opened"]
    assert opened == {"pinned": ["0.err@1", "1.err@2", feature["id"], "logit.0@8"], "groups": []}


def test_a_file_pins_so_many_nodes_at_most(caplog: pytest.LogCaptureFixture):
    graph = sample_graph(n_features=2000, n_edges=20)
    features = graph.nodes.query("kind == 'feature'")
    ids = [f"{n['layer']}_{n['index']}_{n['pos']}" for n in features.to_dict("records")]
    held = {"pinnedIds": ids, "supernodes": [["first", *ids[:3]]]}
    graph.provenance = {"carried": {"neuronpedia": {"document": {"qParams": held}}}}
    opened = page_data(graph)["opened"]
    assert opened is not None
    assert opened["groups"] == [["first", *features["id"].tolist()[:3]]]
    assert opened["pinned"] == features["id"].tolist()[3:503]
    assert "pins 1997 nodes" in caplog.text


@pytest.mark.parametrize("provenance", [{}, {"carried": 1}, {"carried": {"neuronpedia": {"document": {"qParams": 2}}}}])
def test_files_without_pins_open_with_none(provenance: dict):
    graph = sample_graph(n_features=5, n_edges=20)
    graph.provenance = provenance
    assert page_data(graph)["opened"] is None


def test_lines_of_the_page_can_be_read():
    static = Path(circuitsae.report.__file__).parent / "static"
    files = sorted(path for path in static.rglob("*") if path.is_file())
    assert len(files) > 30
    long = [
        f"{path.relative_to(static)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120
    ]
    assert long == []
