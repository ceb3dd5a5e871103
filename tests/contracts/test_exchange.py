"""Every exchange format: our graphs come back, those of other tools open, hostile files end in one sentence."""

import json
import random
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from circuitsae.cli import main
from circuitsae.graph import AttributionGraph, NodeKind, load_graph
from circuitsae.graph.exchange import FORMATS, Limits, read_graph, write_graph
from circuitsae.graph.notes import is_old
from circuitsae.report.data import page_data
from tests.sample_graphs import whole_graph
from transcoders.errors import FileFormatError, InputError

SUFFIX = {name: form.suffix for name, form in FORMATS.items()}
HOSTILE = ["</script>", "<img src=x onerror=alert(1)>", ' "q" & \\', "\u202eabc", "🙂", "", "\x00\r\n\t\x1b[31m", "]]>"]


NOTES = {
    "hops": [1, 2, 1, 1],
    "influence": [0.4, 1 / 3, 0.1, 0.0],
    "graph_predicted": [0.1, 0.2, 0.3, 0.4],
    "graph_measured": [0.1, np.nan, -0.3, 1 / 3],
    "graph_controls": [40, 0, 40, 200],
    "graph_q": [0.01, np.nan, 1.0, 0.02],
    "graph_verdict": ["confirmed", "undecided", "reversed", "confirmed"],
    "graph_reason": ["", "a measurement is not a finite number", "", ""],
    "direct_verdict": ["attention", "norms", "null", "confirmed"],
    "direct_head": ["2.3", None, None, None],
    "model_measured": [-0.5, np.nan, 2.0, 1e-17],
    "miss": ["patterns", "curvature", "first", "dictionary"],
}
"""What validation found of the first edges, of every type that a column may have."""


def our_graph(*, bias: bool = True, notes: bool = True) -> AttributionGraph:
    """A graph with every kind of node, hostile texts and weights that no short decimal holds."""
    graph = whole_graph(HOSTILE, bias=bias)
    if not notes:
        return graph
    return graph.annotate(graph.edges_frame()[["source", "target"]].head(4).assign(**NOTES))


def edges_by_id(graph: AttributionGraph) -> dict[tuple[str, str], float]:
    frame = graph.edges_frame()
    return dict(zip(zip(frame["source"], frame["target"], strict=True), frame["weight"], strict=True))


def assert_same(found: AttributionGraph, graph: AttributionGraph) -> None:
    assert list(map(repr, found.nodes)) == list(map(repr, graph.nodes))
    assert found.tokens == graph.tokens
    assert found.token_ids == graph.token_ids
    assert found.n_layers == graph.n_layers
    assert found.scores == graph.scores
    assert found.provenance == graph.provenance
    assert edges_by_id(found) == edges_by_id(graph)
    for name in ("rest", "influence", "inputs", "cumulative"):
        np.testing.assert_array_equal(getattr(found, name), getattr(graph, name), err_msg=name)


@pytest.mark.parametrize("form", FORMATS)
def test_our_graph_comes_back(form, tmp_path):
    graph = our_graph(bias=form in ("graphml", "gexf"))
    path = write_graph(graph, tmp_path / f"graph{SUFFIX[form]}", format=form)
    found = read_graph(path)
    assert_same(found, graph)
    ours, theirs = graph.edges_frame(), found.edges_frame()
    assert set(theirs) == set(ours) == {"source", "target", "weight", "share", *NOTES}
    pd.testing.assert_frame_equal(pd.DataFrame(theirs, columns=ours.columns), ours)
    again = write_graph(found, tmp_path / f"again{SUFFIX[form]}", format=form)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("form", FORMATS)
def test_findings_of_the_old_kind_come_back(form, tmp_path):
    graph = our_graph(bias=False, notes=False)
    old = {"predicted": [0.1, 0.2, 0.3], "measured": [0.1, np.nan, -0.3], "verdict": ["confirmed", "null", "reversed"]}
    graph = graph.annotate(graph.edges_frame()[["source", "target"]].head(3).assign(**old))
    found = read_graph(write_graph(graph, tmp_path / "graph", format=form))
    pd.testing.assert_frame_equal(found.edges_frame(), graph.edges_frame())
    assert found.edge_notes is not None
    assert is_old(found.edge_notes)


@pytest.mark.parametrize("form", ["neuronpedia", "eleuther"])
def test_what_biases_add_stays_in_the_rest(form, tmp_path):
    graph = our_graph()
    found = read_graph(write_graph(graph, tmp_path / "graph.json", format=form))
    kept = ~graph.mask(NodeKind.BIAS)
    assert [node.id for node in found.nodes] == [node.id for node in graph.nodes if node.kind != "bias"]
    assert np.abs(found.rest - graph.rest[kept]).max() > 0.1
    np.testing.assert_allclose(found.residual(), graph.residual()[kept], atol=1e-12)
    np.testing.assert_array_equal(found.influence, graph.influence[kept])


@pytest.mark.parametrize("form", FORMATS)
def test_a_graph_without_edges_comes_back(form, tmp_path):
    graph = our_graph(bias=False, notes=False)
    graph = replace(graph, weights=sparse.csr_array(graph.weights.shape))
    assert_same(read_graph(write_graph(graph, tmp_path / "g", format=form)), graph)


# graphs of others

NEURONPEDIA = {
    "metadata": {"slug": "s", "scan": "gemma-2-2b", "prompt_tokens": ["<bos>", " a"], "prompt": "<bos> a", "x": [1]},
    "qParams": {"pinnedIds": ["0_1_1", "2_7_1"], "supernodes": [["both", "0_1_1", "2_7_1"]], "linkType": "both"},
    "nodes": [
        {"node_id": "E_9_1", "feature": 1, "layer": "E", "ctx_idx": 1, "feature_type": "embedding", "jsNodeId": "E_9-1",
         "clerp": 'Emb: " a"', "influence": 0.4, "activation": None},
        {"node_id": "2_7_1", "feature": 7, "layer": 2, "ctx_idx": 1, "feature_type": "cross layer transcoder",
         "jsNodeId": "2_7-0", "clerp": "a label", "influence": 0.6, "activation": 1.5, "odd": {"k": ["v"]}},
        {"node_id": "0_1_1", "feature": -1, "layer": "1", "ctx_idx": 1, "feature_type": "mlp reconstruction error",
         "jsNodeId": "1_1-0", "clerp": "", "influence": 0.75, "activation": None},
        {"node_id": "5_33_1", "feature": 33, "layer": "5", "ctx_idx": 1, "feature_type": "logit", "token_prob": 0.7,
         "jsNodeId": "L_33-1", "clerp": 'Output " b" (p=0.700)', "influence": None, "activation": None},
    ],
    "links": [
        {"source": "E_9_1", "target": "2_7_1", "weight": 2},
        {"source": "0_1_1", "target": "2_7_1", "weight": -1.0},
        {"source": "2_7_1", "target": "5_33_1", "weight": 0.5},
    ],
}  # fmt: skip
ELEUTHER_NODES = [
    {"id": "input_0", "layer_index": 0, "token_position": 0, "token_str": "C", "node_type": "InputNode"},
    {"id": "intermediate_0_1_7", "layer_index": 1, "token_position": 0, "feature_index": 7.0, "activation": 2.5,
     "node_type": "IntermediateNode"},
    {"id": "error_0_0", "layer_index": 0, "token_position": 0, "node_type": "ErrorNode"},
    {"id": "skip_0_0", "layer_index": 0, "token_position": 0, "node_type": "SkipNode"},
    {"id": "output_0_0", "layer_index": 2, "token_position": 0, "token_str": "x", "probability": 0.75, "logit": 9.5,
     "node_type": "OutputNode"},
]  # fmt: skip
ELEUTHER = {
    "nodes": ELEUTHER_NODES,
    "edges": [
        {"source": ELEUTHER_NODES[s], "target": ELEUTHER_NODES[t], "weight": w}
        for s, t, w in ((0, 1, 1.5), (3, 1, 0.25), (1, 4, -2.0), (2, 4, 1.0))
    ],
}
GRAPHML = """<?xml version="1.0" encoding="UTF-8"?>
<graphml xmlns="http://graphml.graphdrawing.org/xmlns">
  <key id="d0" for="node" attr.name="label" attr.type="string"/>
  <key id="d1" for="edge" attr.name="weight" attr.type="double"/>
  <key id="d2" for="edge" attr.name="colour" attr.type="string"/>
  <graph edgedefault="directed">
    <node id="a"><data key="d0">first &lt;b&gt;</data></node><node id="b"/><node id="c"/>
    <edge source="a" target="b"><data key="d1">0.5</data><data key="d2">red</data></edge>
    <edge source="b" target="c"><data key="d1">-1.5</data></edge>
  </graph>
</graphml>"""
GEXF = """<?xml version="1.0" encoding="UTF-8"?>
<gexf xmlns="http://www.gexf.net/1.2draft" version="1.2"><meta><description>mine</description></meta>
<graph defaultedgetype="directed"><nodes><node id="a" label="first"/><node id="b" label="second"/></nodes>
<edges><edge id="0" source="a" target="b" weight="0.5"/></edges></graph></gexf>"""
OTHERS = {
    "neuronpedia": json.dumps(NEURONPEDIA),
    "eleuther": json.dumps(ELEUTHER),
    "graphml": GRAPHML,
    "gexf": GEXF,
}


@pytest.fixture(params=FORMATS)
def other(request, tmp_path):
    """A graph of another tool: its format and file."""
    path = tmp_path / f"other{SUFFIX[request.param]}"
    path.write_text(OTHERS[request.param], encoding="utf-8")
    return request.param, path


def test_others_open_in_the_viewer_and_survive_every_step(other, tmp_path):
    form, path = other
    graph = read_graph(path)
    assert graph.provenance["imported"]["format"] == form
    page = graph.write_html(tmp_path / "graph.html").read_text(encoding="utf-8")
    assert "carried" not in json.dumps(page_data(graph)["provenance"])
    assert all(node.id in page for node in graph.nodes)
    loaded = load_graph(graph.save(tmp_path / "native"))
    for between in FORMATS if form in ("graphml", "gexf") else ("graphml", "gexf", form):
        there = read_graph(write_graph(loaded, tmp_path / "between", format=between))
        back = read_graph(write_graph(there, tmp_path / "back", format=form))
        assert edges_by_id(back) == edges_by_id(graph), between
        if between in ("graphml", "gexf"):
            assert list(map(repr, back.nodes)) == list(map(repr, graph.nodes)), between


def test_neuronpedia_says_all_it_said(tmp_path):
    (tmp_path / "in.json").write_text(OTHERS["neuronpedia"])
    graph = read_graph(tmp_path / "in.json")
    assert [node.id for node in graph.nodes] == ["tok@1", "2.7@1", "1.err@1", "logit.33@1"]
    assert graph.n_layers == 4
    assert graph.nodes[1].text == "a label"
    assert np.isnan(graph.nodes[1].pre_activation)
    assert graph.nodes[3].text == " b"
    np.testing.assert_allclose(graph.cumulative, [0, 0.6, 0.75, 0])
    np.testing.assert_allclose(graph.influence, [0.7 * 2 / 3, 0.7, 0.7 / 3, 0])
    written = json.loads(write_graph(graph, tmp_path / "out.json").read_text())
    assert written["qParams"] == {
        "pinnedIds": ["1_-1_1", "2_7_1"], "supernodes": [["both", "1_-1_1", "2_7_1"]], "linkType": "both",
    }  # fmt: skip
    assert_says(written, NEURONPEDIA)


def assert_says(written: dict, read: dict) -> None:
    """All that a file said is in the one written from it; errors are called `{layer}_-1_{pos}`."""
    assert written["metadata"] | read["metadata"] == written["metadata"]
    names = {}
    for node, before in zip(written["nodes"], read["nodes"], strict=True):
        names[before["node_id"]] = node["node_id"]
        if before["feature_type"] == "mlp reconstruction error":
            assert node["node_id"] == f"{before['layer']}_-1_{before['ctx_idx']}"
            before = before | {"node_id": node["node_id"]}
        assert {key: node[key] for key in before} == before
    ours = {(link["source"], link["target"]): link["weight"] for link in written["links"]}
    assert ours == {(names[link["source"]], names[link["target"]]): link["weight"] for link in read["links"]}


def test_eleuther_says_all_it_said(tmp_path):
    (tmp_path / "in.json").write_text(OTHERS["eleuther"])
    graph = read_graph(tmp_path / "in.json")
    assert [node.id for node in graph.nodes] == ["tok@0", "1.7@0", "0.err@0", "0.skip@0", "logit.0@0"]
    assert np.isnan(graph.nodes[4].pre_activation)
    written = json.loads(write_graph(graph, tmp_path / "out.json", format="eleuther").read_text())
    for node, before in zip(written["nodes"], ELEUTHER["nodes"], strict=True):
        assert {key: node[key] for key in before} == before
    weights = {(edge["source"]["id"], edge["target"]["id"]): edge["weight"] for edge in written["edges"]}
    assert weights == {(edge["source"]["id"], edge["target"]["id"]): edge["weight"] for edge in ELEUTHER["edges"]}


def test_a_graph_without_layers_gets_those_of_its_shape(tmp_path):
    (tmp_path / "in.graphml").write_text(GRAPHML)
    graph = read_graph(tmp_path / "in.graphml")
    assert [node.layer for node in graph.nodes] == [0, 1, 2]
    assert graph.nodes[0].text == "first <b>"
    assert graph.provenance["imported"]["not_in_the_file"] == ["kind", "layer", "pos"]
    written = write_graph(graph, tmp_path / "out.graphml").read_text()
    assert all(f'<node id="{name}"' in written for name in "abc")
    assert "red" in written


PUBLISHED = (
    "3plus5-plt",
    "bee-insect-clt",
    "dallas-austin",
    "eleuther_attribution_graph",
    "hiss-clt-hp",
    "puppy-clt-hp",
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_graphs_import_open_export_and_validate(name, shared, tmp_path):
    folder = shared / "data" / "graphs"
    if not folder.is_dir():
        pytest.skip(f"needs the published graphs in {folder}, which are absent")
    before = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    graph = read_graph(folder / f"{name}.json")
    assert len(graph.nodes) == len(before["nodes"])
    assert graph.weights.nnz == len(before.get("links", before.get("edges")))
    assert graph.write_html(tmp_path / "graph.html").stat().st_size > 2**20  # plotly.js is in it
    written = json.loads(write_graph(graph, tmp_path / "out.json").read_text())
    jsonschema.validate(written, json.loads((folder / "neuronpedia-graph-schema.json").read_text()))
    if "links" in before:
        assert_says(written, before)
    else:
        assert len(written["nodes"]) == len(before["nodes"]) - sum(
            n["node_type"] == "SkipNode" for n in before["nodes"]
        )


def test_our_export_validates_against_the_schema(shared, tmp_path):
    schema = shared / "data" / "graphs" / "neuronpedia-graph-schema.json"
    if not schema.is_file():
        pytest.skip(f"needs {schema}, which is absent")
    written = json.loads(write_graph(our_graph(), tmp_path / "out.json").read_text())
    jsonschema.validate(written, json.loads(schema.read_text()))


# hostile files


def complaint(path, content: str | bytes | None = None, limits: Limits | None = None) -> str:
    """What reading the file says, which must be one sentence."""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileFormatError) as caught:
        read_graph(path, limits=limits)
    said = str(caught.value)
    assert said.startswith(str(path))
    assert said.endswith(".")
    assert "\n" not in said
    assert len(said) < 500
    return said


def test_a_truncated_file_is_one_sentence(other):
    _, path = other
    content = path.read_bytes().strip()
    for end in range(0, len(content) - 1, max(len(content) // 40, 1)):
        complaint(path, content[:end])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"\x89PNG\r\n", "neither JSON nor XML"),
        (b'{"nodes": [], "links": []', "cut off"),
        (b'{"nodes": [{"node_id": "2_7', "cut off"),
        (b'{"nodes": "\xff"}', "UTF-8"),
        ("[1, 2]", "expected an object"),
        ('{"a": 1}', "the keys 'a'"),
        ('{"nodes": {}, "links": []}', "expected a list"),
        ('{"nodes": ' + "[" * 100_000 + "]" * 100_000 + ', "links": []}', "nesting"),
        (json.dumps(NEURONPEDIA)[:-1] + ', "x": ' + "[" * 200 + "]" * 200 + "}", "deep"),
        ('{"nodes": [], "links": []}', "no nodes"),
        ('{"nodes": [], "edges": []}', "no nodes"),
        ('<graphml><graph edgedefault="directed"/></graphml>', "no nodes"),
        (GRAPHML.replace('target="c"', 'target="a"'), "in a circle"),
        (GRAPHML.replace('source="b" target="c"', 'source="b" target="b"'), "in a circle"),
        ('{"nodes": [], "links": [], "x": ' + "9" * 5000 + "}", "number"),
        ("<svg></svg>", "<svg>"),
        ('<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "b">]><graphml>&a;</graphml>', "entities"),
        ('<?xml version="1.0" encoding="utf-7"?><graphml/>', "UTF-8"),
        (GRAPHML.replace("directed", "undirected"), "direction"),
        (GRAPHML.replace('source="b" target="c"', 'source="a" target="b"'), "several edges"),
        (GRAPHML.replace("-1.5", "1e300"), "weight"),
        (GRAPHML.replace("-1.5", "nan"), "missing"),
        (GEXF.replace('weight="0.5"', 'weight="much"'), "GEXF"),
    ],
)
def test_what_is_wrong_is_said(content, says, tmp_path):
    assert says in complaint(tmp_path / "hostile", content)


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        (("nodes", 1, "ctx_idx"), 2, "from 0 to 1"),
        (("nodes", 1, "ctx_idx"), "1e3", "whole number"),
        (("nodes", 1, "layer"), 10**9, "10000"),
        (("nodes", 1, "node_id"), "E_9_1", "occurs twice"),
        (("nodes", 1, "activation"), [1], "expected a number"),
        (("nodes", 3, "token_prob"), None, "missing"),
        (("links", 0, "source"), "<b>nobody</b>", "not among the nodes"),
        (("links", 0, "source"), "0_1_1", "given twice"),
        (("links", 0, "weight"), None, "missing"),
        (("links", 0, "weight"), 10**400, "a huge number"),
        (("links", 0, "weight"), 1e300, "expected a number below"),
        (("links", 0, "target"), "E_9_1", "only features and logits"),
        (("links", 0, "source"), "2_7_1", "not in a lower layer"),
        (("links", 1, "source"), "5_33_1", "not in a lower layer"),
        (("nodes", 1, "ctx_idx"), 0, "at a later position"),
        (("nodes", 3, "token_prob"), -7, "from 0 to 1"),
        (("nodes", 3, "token_prob"), 1.5, "from 0 to 1"),
        (("metadata", "prompt_tokens"), [1, 2], "expected text"),
        (("links", 0, "graph_measured"), "<b>", "expected a number"),
        (("links", 0, "measured"), "<b>", "expected a number"),
        (("links", 0, "model_ratio"), 1e300, "expected a number below"),
        (("links", 0, "direct_q"), 2, "from 0 to 1"),
        (("links", 0, "direct_verdict"), "<b>", "expected one of confirmed"),
        (("links", 0, "direct_reason"), ["<b>"], "expected text"),
    ],
)
def test_a_wrong_value_is_named(where, value, says, tmp_path):
    document = json.loads(OTHERS["neuronpedia"])
    at = document
    for key in where[:-1]:
        at = at[key]
    at[where[-1]] = value
    assert says in complaint(tmp_path / "hostile.json", json.dumps(document)).replace(",", "")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("form", ["neuronpedia", "eleuther"])
def test_any_value_for_any_other(form, seed, tmp_path):
    """Either the file is refused in one sentence, or the graph can be drawn, saved and written."""
    rng, path, outcomes = random.Random(seed), tmp_path / "fuzzed.json", set()
    junk = [None, True, -1, 0, 3, 1e308, 10**30, "", "\ud800", "</script>", "7", [], {}, [{}], {"a": [1]}, float("nan")]
    for _ in range(40):
        document = json.loads(OTHERS[form])
        at, key = document, rng.choice(list(document))
        while isinstance(at[key], dict | list) and at[key] and rng.random() < 0.9:
            at = at[key]
            key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        at[key] = rng.choice(junk)
        path.write_text(json.dumps(document))
        try:
            graph = read_graph(path)
        except FileFormatError as error:
            outcomes.add("refused, in one line" if len(str(error).splitlines()) == 1 else str(error))
            continue
        outcomes.add("read")
        page_data(graph)
        assert load_graph(graph.save(tmp_path / "native")).tokens == graph.tokens
        for other_form in FORMATS:
            read_graph(write_graph(graph, tmp_path / "again", format=other_form))
    assert outcomes == {"refused, in one line", "read"}


def test_sizes_are_checked_first(other):
    _, path = other
    for limit in ("file_bytes", "values", "nodes", "edges"):
        said = complaint(path, limits=Limits(**{limit: 1 if limit != "edges" else 0}))
        assert limit.replace("_", " ") in said
        assert f"Limits({limit}=" in said
    assert read_graph(path, limits=Limits(nodes=5)).nodes


def test_only_regular_files_are_read(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        assert "no such file" in complaint(path)
    assert "no such file" in complaint(Path("/dev/zero"))


def test_unknown_formats_are_refused(tmp_path):
    with pytest.raises(InputError, match="suffix"):
        write_graph(our_graph(), tmp_path / "graph.txt")


def test_import_and_export_from_the_command_line(tmp_path, capsys):
    source = tmp_path / "in.json"
    source.write_text(OTHERS["neuronpedia"])
    main(["import", str(source), "--out", str(tmp_path / "graph")])
    assert (tmp_path / "graph" / "graph.html").is_file()
    main(["export", str(tmp_path / "graph"), str(tmp_path / "out.gexf")])
    assert edges_by_id(read_graph(tmp_path / "out.gexf")) == edges_by_id(load_graph(tmp_path / "graph"))
    for content in (OTHERS["neuronpedia"][:-9], '{"nodes": [], "links": []}'):
        source.write_text(content)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(["import", str(source), "--out", str(tmp_path / "other")])
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert "Traceback" not in said
        assert not (tmp_path / "other").exists()
