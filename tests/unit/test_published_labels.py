"""Labels of Neuronpedia's exports and of circuit-tracer's files, in the forms that these have."""

import gzip
import json

import pytest

from circuitsae.cli import main
from circuitsae.features import Label, Ledger
from circuitsae.features.labels.published import add_labels, read_labels, unpaired
from circuitsae.graph import NodeKind
from circuitsae.graph.exchange import write_graph
from tests.sample_graphs import small_graph
from transcoders.errors import FileFormatError, InputError

FUZZ = {"value": 0.8, "explanationScoreTypeName": "eleuther_fuzz", "explanationScoreModelName": "claude"}
RECALL = {"value": 0.6, "explanationScoreTypeName": "eleuther_recall", "explanationScoreModelName": "claude"}
OTHER = {"value": 0.9, "explanationScoreTypeName": "eleuther_embedding", "explanationScoreModelName": "stella"}


def record(index, description, layer="6-res-jb", model="gpt-4o-mini", **more):
    """A line of an export."""
    return {"modelId": "gpt2-small", "layer": layer, "index": str(index), "authorId": "x", "description": description,
            "typeName": "oai_token-act-pair", "explanationModelName": model, "embedding": [0.1]} | more  # fmt: skip


def write(path, records):
    content = "".join(json.dumps(each) + "\n" for each in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def texts(ledger):
    return {label.features[0]: label.text for label in ledger.labels}


def test_an_export_of_neuronpedia_is_read_with_its_scores_as_they_are_stated(tmp_path):
    found = read_labels(write(tmp_path / "batch-0.jsonl.gz", [record(7, "cats", scores=[FUZZ, RECALL, OTHER])]))
    (label,) = found.labels
    assert (label.text, label.features, label.source) == ("cats", ("6.7",), "gpt-4o-mini (Neuronpedia)")
    assert label.rows.keys() == {"fuzzing", "detection"}
    row = label.rows["detection"]
    assert row.verdict == "open"  # stated by them, and not measured here
    assert row.measurement == {"stated": 0.6, "as": "eleuther_recall", "judge": "claude", "file": "batch-0.jsonl.gz"}
    assert found.provenance == {"published": "res-jb"}
    assert Ledger.load(found.save(tmp_path / "ledger.json")) == found


def test_of_several_descriptions_the_one_with_the_best_score_is_taken(tmp_path):
    records = [record(1, "first"), record(1, "second", scores=[FUZZ]), record(1, "third", scores=[RECALL])]
    records += [record(2, "one"), record(2, "two"), record(3, " "), record(3, None)]
    path = write(tmp_path / "explanations.jsonl", records)
    assert texts(read_labels(path)) == {"6.1": "second", "6.2": "one"}
    assert {label.source for label in read_labels(path, source="them").labels} == {"them"}


def test_other_forms_of_the_same_are_read(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([record(1, "a"), record(2, "b", layer="6")]))
    with pytest.raises(InputError, match=r"labels of several dictionaries, , res-jb; name one with --set"):
        read_labels(tmp_path / "list.json")
    assert texts(read_labels(tmp_path / "list.json", of="res-jb")) == {"6.1": "a"}
    assert texts(read_labels(tmp_path / "list.json", of="6-res-jb")) == {"6.1": "a"}
    explanations = [{"description": "c", "explanationModelName": "m", "scores": [FUZZ]}, {"description": "d"}]
    answer = {"modelId": "m", "layer": "0-clt", "index": "5", "explanations": explanations, "activations": []}
    (tmp_path / "feature.json").write_text(json.dumps(answer))
    assert texts(read_labels(tmp_path / "feature.json")) == {"0.5": "c"}


def test_feature_files_of_circuit_tracer_name_layer_and_feature_by_one_number(tmp_path):
    for layer, feature in ((0, 0), (3, 5), (17, 123_456), (10**5, 10**6)):
        assert unpaired((layer + feature) * (layer + feature + 1) // 2 + feature) == (layer, feature)
    body = {"top_logits": [" a"], "bottom_logits": [" b"], "act_min": 0, "act_max": 1, "examples_quantiles": []}
    (tmp_path / "41.json").write_text(json.dumps(body | {"label": "by its name"}))
    (tmp_path / "x.json").write_text(json.dumps(body | {"index": 41, "clerp": "again"}))
    (tmp_path / "y.json").write_text(json.dumps(body | {"index": 7, "layer": 2, "label": "by layer"}))
    (tmp_path / "z.json").write_text(json.dumps(body | {"index": 8}))
    assert texts(read_labels(tmp_path)) == {"3.5": "by its name", "2.7": "by layer"}
    assert read_labels(tmp_path).labels[0].source == "circuit-tracer"


def test_the_labels_of_a_graph_are_those_of_its_features(tmp_path):
    graph = small_graph()
    path = write_graph(graph, tmp_path / "graph.json")
    document = json.loads(path.read_text())
    named = next(node for node in document["nodes"] if node["feature_type"] == "cross layer transcoder")
    named["clerp"] = "\u202ecats\x00"
    path.write_text(json.dumps(document))
    feature = next(node for node in graph.nodes if node.kind is NodeKind.FEATURE)
    assert texts(read_labels(path))[f"{feature.layer}.{feature.index}"] == "cats"


def test_hostile_labels_are_cut_and_hold_nothing_that_is_no_text(tmp_path):
    hostile = ["<script>alert(1)</script>", "a\u2028b\u2029c", "\x00nul", "x" * 10_000, "\u202eright to left", "\ud800"]
    path = write(tmp_path / "a.jsonl", [record(n, said) for n, said in enumerate(hostile)])
    found = list(texts(read_labels(path)).values())
    assert found == ["<script>alert(1)</script>", "a b c", "nul", "x" * 119 + "…", "right to left", "�" * 3]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b"[1", "it is not JSON"),
        ("a.json", b"[1]", "record 1 is 1; expected an object"),
        ("a.json", b'{"a": 1}', "neither description, explanations nor examples_quantiles"),
        ("a.jsonl", b'{"description": "a", "layer": "res", "index": 1}\n', "expected one such as 6-res-jb"),
        ("a.jsonl", b'{"description": "a", "layer": "6", "index": -1}\n', "index of record 1 is -1"),
        ("a.jsonl", b'{"description": 7, "layer": "6", "index": 1}\n', "description of record 1 is 7"),
        ("a.jsonl", b'{"description": "", "layer": "6", "index": 1}\n', "holds no label"),
        ("a.jsonl.gz", b"not packed", "it cannot be unpacked"),
        ("a.json", b'{"nodes": [], "links": 1}', "links"),
        ("a.json", b'{"examples_quantiles": [], "label": "a", "index": "no"}', "index is"),
        ("a.json", b"[" * 100_000, "it is not JSON"),
    ],
)
def test_other_files_are_refused_in_a_sentence(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError, match="a.json") as error:
        read_labels(tmp_path / name)
    assert said in str(error.value)
    assert str(error.value).endswith(".")
    with pytest.raises(FileFormatError, match="there is no such file"):
        read_labels(tmp_path / "missing.json")


def test_labels_of_others_stay(tmp_path):
    mine, theirs, old = (
        Label("mine", ("6.1",)),
        Label("rule", ("6.1",), source="rules"),
        Label("old", ("6.1",), source="x"),
    )
    new = Label("new", ("6.1",), source="x")
    assert add_labels(Ledger([new]), Ledger([mine, theirs, old])).labels == [mine, theirs, new]


def test_the_command_writes_the_ledger_and_refuses_labels_of_other_dictionaries(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [record(3, "names", layer="1-clt", scores=[FUZZ])])
    words = ["features", "import-labels", str(path), "--dictionaries", "pocket", "--out", str(tmp_path / "ledger.json")]
    main(words)
    assert texts(Ledger.load(tmp_path / "ledger.json")) == {"1.3": "names"}
    assert "circuitsae features browse pocket --out features --labels" in capsys.readouterr().out.replace("\n", " ")
    write(path, [record(10**6, "names", layer="1-clt")])
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "labels feature 1.1000000, which these dictionaries do not have" in capsys.readouterr().err.replace(
        "\n", " "
    )
