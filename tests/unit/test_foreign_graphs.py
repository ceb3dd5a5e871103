"""Verdicts on graphs of other tools: those of our own graph of the prompt, in a file that says all it said."""

import json
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from circuitsae.attribution import attribute
from circuitsae.cli import main
from circuitsae.graph.exchange import read_graph, write_graph
from circuitsae.graph.exchange.verdicts import read_document, with_verdicts, write_document
from circuitsae.loading import load_dictionaries as load_pocket_dictionaries
from circuitsae.loading import load_model as load_pocket
from circuitsae.replacement import ReplacementModel
from circuitsae.validation import matched, validate
from circuitsae.validation.choice import choose_edges
from transcoders import load_dictionaries, load_model
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import FileFormatError, InputError
from transcoders.random_models import random_model

TOKENS = torch.tensor([0, 11, 22, 33, 11])
OWN = "circuitsae"


def loaded(family: Any = "gpt2", seed=0, dictionaries=1, n_layers=2, kind: Any = "plt"):
    sizes: dict[str, Any] = {"n_layers": n_layers, "d_model": 16, "n_heads": 4, "d_vocab": 64}
    found = random_dictionaries(
        kind, n_layers=n_layers, d_model=16, features=24, dtype=torch.float64, seed=dictionaries
    )  # fmt: skip
    return ReplacementModel(random_model(family, seed=seed, dtype=torch.float64, **sizes), found)


def foreign(document):
    """What another tool would have written: nothing of ours, error nodes by their older names, keys of its own."""
    document = json.loads(json.dumps(document))
    del document["metadata"][OWN]
    document["metadata"] |= {"scan": "their-model", "info": {"generator": {"name": "another"}}, "theirs": [1.0, None]}
    document["extra"] = {"deep": {"deeper": "🙂"}}
    names = {}
    for node in document["nodes"]:
        node.pop(OWN, None)
        if node["feature_type"] == "mlp reconstruction error":
            names[node["node_id"]] = node["node_id"] = f"0_{node['layer']}_{node['ctx_idx']}_err"
            names[f"{node['layer']}_-1_{node['ctx_idx']}"] = node["node_id"]
        node["theirs"] = node["jsNodeId"]
    for number, link in enumerate(document["links"]):
        link |= {end: names.get(link[end], link[end]) for end in ("source", "target")} | {"note": number}
    return document


def written(graph, folder):
    path = write_graph(graph, folder / "own.json")
    path.write_text(json.dumps(foreign(json.loads(path.read_text()))))
    return path


@pytest.fixture(scope="module")
def own():
    model = loaded()
    return model, attribute(model, TOKENS).prune(nodes=0.6, edges=0.8)


@pytest.fixture(scope="module")
def file(own, tmp_path_factory):
    return written(own[1], tmp_path_factory.mktemp("foreign"))


def without_ours(document):
    """The document as another tool reads it."""
    return {
        **document,
        "metadata": {key: value for key, value in document["metadata"].items() if key != OWN},
        "links": [{key: value for key, value in link.items() if key != OWN} for link in document["links"]],
    }


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "plt"), ("llama", "clt")])
def test_the_verdicts_are_those_of_our_own_graph(family, kind, tmp_path, shared):
    model = loaded(family, kind=kind)
    graph = attribute(model, TOKENS).prune(nodes=0.8, edges=0.8)
    path = written(graph, tmp_path)
    document, read = read_document(path)
    part, match = matched(model, read)
    assert (match.tokens, match.inactive) == (5, ())
    assert match.activation_error < 1e-12
    assert match.probability_error < 1e-12
    strongest = choose_edges(part, 8).rows[["s", "t"]].to_numpy()
    edges = [f"{part.ids[s]} → {part.ids[t]}" for s, t in strongest]
    check = validate(model, part, edges=edges, controls=9)
    assert check.frozen_error < 1e-9
    about = {"match": match.to_json()}
    place = write_document(with_verdicts(document, read, check.annotate(part), about), tmp_path / "out.json")
    expected = validate(model, graph, edges=edges, controls=9).edges.set_index(["source", "target"]).sort_index()
    notes = read_graph(place).edge_notes
    assert notes is not None
    found = notes.dropna(subset=["graph_verdict"]).set_index(["source", "target"]).sort_index()
    assert list(found.index) == list(expected.index)
    assert len(found) == 8
    for claim in ("graph", "direct"):
        assert found[f"{claim}_verdict"].tolist() == expected[f"{claim}_verdict"].tolist()
    for column in ("graph_measured", "direct_measured", "model_measured", "graph_ratio"):
        np.testing.assert_allclose(found[column].astype(float), expected[column].astype(float), atol=1e-9)
    after = json.loads(place.read_text())
    assert without_ours(after) == json.loads(path.read_text())
    assert after["metadata"][OWN]["tested"]["match"]["features"] == match.features
    schema = shared / "data" / "graphs" / "neuronpedia-graph-schema.json"
    jsonschema.validate(after, json.loads(schema.read_text()))


def test_what_was_tested_travels_and_is_replaced(own, file, tmp_path):
    model, _ = own
    document, read = read_document(file)
    part, _ = matched(model, read)
    first = validate(model, part, edges=3, controls=3)
    once = with_verdicts(document, read, first.annotate(part), {"run": 1})
    place = write_document(once, tmp_path / "once.json")
    graph = read_graph(place)
    assert graph.provenance["tested"] == {"run": 1}
    assert graph.provenance["imported"]["made_by"].startswith("another")
    assert read_graph(write_graph(graph, tmp_path / "again.json")).provenance["tested"] == {"run": 1}
    document, read = read_document(place)
    second = validate(model, matched(model, read)[0], edges="token→logit", controls=3)
    twice = with_verdicts(document, read, second.annotate(part), {"run": 2})
    tested = [link for link in twice["links"] if OWN in link]
    assert len(tested) == len(second.edges)
    assert twice["metadata"][OWN] == {"tested": {"run": 2}}
    assert without_ours(twice) == without_ours(document)


def test_a_graph_of_something_else_is_refused(own, file):
    _, read = read_document(file)
    with pytest.raises(InputError, match="2 layers, but random-gpt2-0 has 3"):
        matched(loaded(n_layers=3), read)
    with pytest.raises(InputError, match=r"probabilities of the graph's outputs differ by up to 0\.\d+ from those of"):
        matched(loaded(seed=5), read, tolerance=0.01)
    with pytest.raises(InputError, match="are not active in these dictionaries"):
        matched(loaded(dictionaries=9), read)
    other = (0, 5, 9, 7, 40)
    with pytest.raises(InputError, match="of the graph's"):
        matched(own[0], replace(read, token_ids=other))
    with pytest.raises(InputError, match="does not cut the graph's prompt"):
        matched(own[0], replace(read, token_ids=(-1,) * 5))


def test_weaker_activations_are_other_dictionaries_and_silent_features_are_left_out(own, file):
    model, _ = own
    document, _ = read_document(file)
    features = [node for node in document["nodes"] if node["feature_type"] == "cross layer transcoder"]
    for node in features:
        node["activation"] *= 1.05
    again = _as_graph(document)
    _, match = matched(model, again)
    assert match.activation_error == pytest.approx(0.05 / 1.05)
    for node in features:
        node["activation"] *= 1.2
    with pytest.raises(InputError, match="activations of the graph's features differ by 0.2"):
        matched(model, _as_graph(document))
    document, _ = read_document(file)
    silent = next(n for n in range(24) if f"0_{n}_2" not in {node["node_id"] for node in document["nodes"]}
                  and not _fires(model, 0, 2, n))  # fmt: skip
    document["nodes"].insert(0, features[0] | {"node_id": f"0_{silent}_2", "layer": "0", "ctx_idx": 2})
    target = next(node["node_id"] for node in document["nodes"] if node["feature_type"] == "logit")
    document["links"].append({"source": f"0_{silent}_2", "target": target, "weight": 1.0})
    graph = _as_graph(document)
    part, match = matched(model, graph, tolerance=0.5)
    assert match.inactive == (f"0.{silent}@2",)
    assert len(part.nodes) == len(graph.nodes) - 1
    check = validate(model, part, edges=None, controls=0, claims=["graph"])
    after = with_verdicts(document, graph, check.annotate(part), {})
    assert OWN not in after["links"][-1]
    assert OWN in after["links"][0]


def _as_graph(document):
    from circuitsae.graph.exchange import Limits, neuronpedia

    return neuronpedia.read(document, "x", Limits())


def _fires(model, layer, pos, feature):
    return [layer, pos, feature] in model.trace(TOKENS).features.index.tolist()


def test_circuit_tracers_own_attribution_is_judged(shared):
    """Its adjacency matrix in its JSON form: each weight is what removing the source does in the frozen model."""
    folder = shared / "references/gpt2-mini-plt"
    model = ReplacementModel(load_model(folder / "model"), load_dictionaries(folder / "transcoders"))
    theirs = np.load(folder / "attribution.npz", allow_pickle=False)
    graph = _as_graph(circuit_tracer_document(theirs))
    part, match = matched(model, graph)
    assert match.activation_error < 1e-5
    assert match.probability_error < 1e-5
    check = validate(model, part, edges=20, controls=3, claims=["graph"])
    assert check.frozen_error < 1e-5
    assert len(check.edges) == sum(check.verdicts("graph").values()) == 20


def circuit_tracer_document(theirs, strongest=300):
    last, layers = len(theirs["tokens"]) - 1, 3
    features = [f"{layer}_{feature}_{pos}" for layer, pos, feature in theirs["active_features"]]
    nodes = [
        {"node_id": name, "layer": str(layer), "ctx_idx": int(pos), "feature_type": "cross layer transcoder",
         "activation": float(value)}
        for name, (layer, pos, _), value in zip(
            features, theirs["active_features"].tolist(), theirs["activation_values"], strict=True
        )
    ]  # fmt: skip
    nodes += [
        {"node_id": f"0_{layer}_{pos}_", "layer": str(layer), "ctx_idx": pos,
         "feature_type": "mlp reconstruction error", "activation": None}
        for layer in range(layers) for pos in range(last + 1)
    ]  # fmt: skip
    nodes += [
        {"node_id": f"E_{token}_{pos}", "layer": "E", "ctx_idx": pos, "feature_type": "embedding"}
        for pos, token in enumerate(theirs["tokens"].tolist())
    ]
    nodes += [
        {"node_id": f"{layers + 1}_{token}_{last}", "layer": str(layers + 1), "ctx_idx": last, "feature": token,
         "feature_type": "logit", "token_prob": float(p)}
        for token, p in zip(theirs["logit_ids"].tolist(), theirs["logit_probs"].tolist(), strict=True)
    ]  # fmt: skip
    matrix = theirs["adjacency"]
    targets, sources = np.unravel_index(np.abs(matrix).argsort(axis=None)[::-1][:strongest], matrix.shape)
    links = [
        {"source": nodes[s]["node_id"], "target": nodes[t]["node_id"], "weight": float(matrix[t, s])}
        for t, s in zip(targets, sources, strict=True)
        if matrix[t, s]
    ]
    tokens = [str(token) for token in theirs["tokens"].tolist()]
    return {"metadata": {"prompt_tokens": tokens, "prompt": " "}, "qParams": {}, "nodes": nodes, "links": links}


def test_other_forms_are_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"nodes": [], "edges": []}')
    with pytest.raises(FileFormatError, match="nodes and links"):
        read_document(tmp_path / "x.json")


def test_the_command_takes_a_missing_token_from_the_prompt_and_writes_what_import_shows(tmp_path, capsys, monkeypatch):
    pocket = ReplacementModel(load_pocket("pocket"), load_pocket_dictionaries("pocket"))
    graph = attribute(pocket, "The capital of Texas is", max_features=8).prune(nodes=0.9)
    document = foreign(json.loads(write_graph(graph, tmp_path / "own.json").read_text()))
    document["metadata"]["prompt"] = "The capital of Texas is"
    gone = next(node["node_id"] for node in document["nodes"] if node["node_id"].startswith("E_"))
    document["nodes"] = [node for node in document["nodes"] if node["node_id"] != gone]
    document["links"] = [link for link in document["links"] if link["source"] != gone]
    (tmp_path / "theirs.json").write_text(json.dumps(document))
    monkeypatch.setattr("circuitsae.commands.verdicts.load_replacement", lambda *_: pocket)
    few = ["--edges", "feature→logit", "--controls", "3", "--claims", "graph"]
    main(["verdicts", str(tmp_path / "theirs.json"), "--model", "pocket", *few])
    printed = capsys.readouterr().out
    assert "tokens agree" in printed
    notes = read_graph(tmp_path / "theirs.verdicts.json").edge_notes
    assert notes is not None
    assert f"of {notes['graph_verdict'].notna().sum()} graph claims hold" in printed
