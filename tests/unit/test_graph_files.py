"""The native files of a graph, as a stranger might have made them: one sentence each, and no memory taken before."""

import io
import json
import multiprocessing
import random
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from circuitsae.graph import load_graph, load_header
from circuitsae.graph.checking import Limits
from circuitsae.graph.notes import is_old
from circuitsae.report import write_html
from tests.sample_graphs import small_graph
from transcoders.errors import FileFormatError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small_graph().save(tmp_path / "graph")


def refusal(folder: Path, limits: Limits | None = None) -> str:
    """What loading says, which must be one sentence, whoever reads it."""
    with pytest.raises(FileFormatError) as caught:
        load_graph(folder, limits=limits)
    said = str(caught.value)
    assert said.startswith(f"{folder} does not hold a whole graph: ")
    assert said.endswith("; trace the prompt again.")
    assert "\n" not in said
    assert len(said) < len(str(folder)) + 400
    return said


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    path = folder / "graph.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")
    return refusal(folder)


def note(document: dict[str, Any], **values: Any) -> None:
    """Other values in the first row of the notes, in columns that may be new."""
    notes = document["edge_notes"]
    row = dict(zip(notes["columns"], notes["data"][0], strict=True)) | values
    notes["columns"], notes["data"][0] = list(row), list(row.values())


def without_digest(folder: Path) -> None:
    """A graph as it was written before `graph.json` named the hash of `edges.npz`."""
    path = folder / "graph.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document.pop("edges", None)
    path.write_text(json.dumps(document), encoding="utf-8")


def write_npz(folder: Path, **arrays: Any) -> None:
    without_digest(folder)
    with zipfile.ZipFile(folder / "edges.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=True)
            archive.writestr(f"{name}.npy", buffer.getvalue())


def outcome(folder: Path) -> str:
    try:
        return f"{load_graph(folder).weights.nnz} edges"
    except FileFormatError as error:
        return str(error)


def test_header_and_graph_agree(folder: Path):
    graph, head = load_graph(folder), load_header(folder)
    assert head.n_edges == graph.weights.nnz == 4
    assert head.nodes == graph.nodes
    assert [n.id for n in head.nodes] == list(graph.ids)
    assert head.scores == graph.scores
    assert head.edge_notes is not None
    for notes in (graph.edge_notes, small_graph().edge_notes):
        assert notes is not None
        pd.testing.assert_frame_equal(head.edge_notes, notes)
    np.testing.assert_array_equal(graph.weights.toarray(), small_graph().weights.toarray())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(n_edges=10**12), "edges, more than"),
        (lambda d: d.update(n_edges=26), "26 edges between 5 nodes"),
        (lambda d: d.update(n_edges=3), "expected (3,)"),
        (lambda d: d.update(n_layers=10**9), "layers, more than"),
        (lambda d: d.update(tokens="ab"), "tokens is 'ab'; expected a list"),
        (lambda d: d.update(tokens=[1, 2]), "a token is 1; expected text"),
        (lambda d: d["influence"].pop(), "influence has 4 numbers for 5 nodes"),
        (lambda d: d["inputs"].__setitem__(0, "x"), "inputs of node 0 is 'x'; expected a number"),
        (lambda d: d["inputs"].__setitem__(0, 1e300), "expected a number below"),
        (lambda d: d["inputs"].__setitem__(0, -1), "inputs of node 0 is -1"),
        (lambda d: d["influence"].__setitem__(0, -1), "influence of node 0 is -1"),
        (lambda d: d["cumulative"].__setitem__(0, 2), "cumulative of node 0 is 2"),
        (lambda d: d["nodes"][4].update(probability=-7), "probability of node 4 is -7; expected a number from 0 to 1"),
        (lambda d: d["nodes"][4].update(probability=1.1), "expected a number from 0 to 1"),
        (lambda d: d["nodes"][4].update(probability=None), "probability of node 4 is missing"),
        (lambda d: d["scores"].update(replacement=3), "the replacement score is 3; expected a number from 0 to 1"),
        (lambda d: d["token_ids"].pop(), "1 token_ids for 2 tokens"),
        (lambda d: d["nodes"][4].update(pos=0) or d.update(edge_notes=None), "the source is at a later position"),
        (lambda d: d["nodes"].clear() or d.update(n_edges=0), "it has no nodes"),
        (lambda d: d["nodes"][0].update(pos=2), "position 2, but there are 2 tokens"),
        (lambda d: d["nodes"][0].update(layer=1), "layer 1, but there are 1 layers"),
        (lambda d: d["nodes"][0].update(layer=2**70), "expected a whole number"),
        (lambda d: d["nodes"][0].update(kind=["feature"]), "the kind of node 0 is a list"),
        (lambda d: d["nodes"].__setitem__(0, None), "node 0 is missing; expected an object"),
        (lambda d: d["nodes"][1].update(kind="feature", index=7), "occurs twice"),
        (lambda d: d["scores"].pop("replacement"), "the replacement score is missing"),
        (lambda d: d["edge_notes"]["data"][0].pop(), "20 values for 21 columns"),
        (lambda d: d["edge_notes"]["data"][0].__setitem__(0, "9.9@9"), "'9.9@9', which is not among the nodes"),
        (lambda d: d["edge_notes"].update(columns=["source"]), "the columns of edge_notes"),
        (lambda d: note(d, graph_verdict=0), "graph_verdict of edge_notes is 0; expected text"),
        (lambda d: note(d, direct_verdict="held"), "direct_verdict of edge_notes is 'held'; expected one of confirmed"),
        (lambda d: note(d, graph_low="0.8"), "graph_low of edge_notes is '0.8'; expected a number"),
        (lambda d: note(d, model_measured=1e300), "model_measured of edge_notes is 1e+300; expected a number below"),
        (lambda d: note(d, graph_q=1.5), "graph_q of edge_notes is 1.5; expected a number from 0 to 1"),
        (lambda d: note(d, influence=-1), "influence of edge_notes is -1; expected a number from 0 to 1"),
        (lambda d: note(d, graph_controls=0.5), "graph_controls of edge_notes is 0.5; expected a whole number"),
        (lambda d: note(d, miss=["patterns"]), "miss of edge_notes is a list; expected text"),
        (lambda d: note(d, graph_reason=7), "graph_reason of edge_notes is 7; expected text"),
        (lambda d: d.update(provenance=json.loads("[" * 99 + "]" * 99)), "provenance is a list"),
        (lambda d: d.update(provenance={"a": json.loads("[" * 99 + "]" * 99)}), "nests objects"),
    ],
)
def test_a_document_that_is_not_what_it_claims(folder: Path, change: Callable[[dict[str, Any]], Any], said: str):
    assert said in changed(folder, change)


def test_what_is_read_is_what_was_checked(folder: Path, tmp_path: Path):
    path = folder / "graph.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["provenance"] = {"model": "\ud800", "seeds": [1e999, 10**40], "\udfff": 1}
    note(document, graph_reason="\udc00", remark=["\ud800"], graph_measured=None)
    path.write_text(json.dumps(document), encoding="utf-8")
    graph = load_graph(folder)
    assert graph.provenance == {"model": "\ufffd" * 3, "seeds": [None, str(10**40)], "\ufffd" * 3: 1}
    assert graph.edge_notes is not None
    assert graph.edge_notes.loc[0, ["graph_reason", "remark"]].tolist() == ["\ufffd" * 3, ["\ufffd" * 3]]
    assert np.isnan(graph.edge_notes.loc[0, "graph_measured"])
    assert load_graph(graph.save(tmp_path / "again")).provenance == graph.provenance
    assert write_html(graph, tmp_path / "graph.html").is_file()


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"weight": np.zeros(9)}, "shape (9,)"),
        ({"weight": np.zeros((4, 1))}, "shape (4, 1)"),
        ({"weight": np.array([None] * 4)}, "'object'"),
        ({"row": np.zeros(4)}, "'float64'; expected (4,) and int32"),
        ({"row": np.array([0, 1, 2, 5])}, "beyond its 5 nodes"),
        ({"col": np.array([-1, 1, 2, 3])}, "beyond its 5 nodes"),
        ({"weight": np.array([1, np.inf, 1, 1])}, "not a finite number"),
        ({"weight": np.array([1, 1, np.nan, 1])}, "not a finite number"),
        ({"weight": np.array([1, 1e300, 1, 1])}, "not a finite number below"),
        ({"col": np.array([0, 0, 1, 3])}, "from '0.7@1' to '0.7@1', but the source is not in a lower layer"),
        ({"col": np.array([4, 0, 1, 3])}, "from 'logit.5@1' to '0.7@1', but the source is not in a lower layer"),
        ({"row": np.array([2, 4, 4, 4])}, "to 'tok@0', but only features and logits have inputs"),
        ({"row": np.zeros(4, int), "col": np.zeros(4, int)}, "an edge twice"),
    ],
)
def test_edges_that_do_not_fit(folder: Path, arrays: dict[str, np.ndarray], said: str):
    whole = {"row": np.array([0, 4, 4, 4]), "col": np.array([2, 0, 1, 3]), "weight": np.ones(4)}
    write_npz(folder, **whole)
    assert load_graph(folder).weights.nnz == 4
    write_npz(folder, **whole | arrays)
    assert said in refusal(folder)


def test_an_archive_that_unpacks_to_gigabytes_is_refused_unopened(folder: Path):
    write_npz(folder, row=np.zeros(2_000_000, int), col=np.zeros(2_000_000, int), weight=np.zeros(2_000_000))
    tracemalloc.start()
    said = refusal(folder)
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()
    assert "shape (2000000,)" in said


def test_headers_that_are_no_headers_are_refused(folder: Path):
    without_digest(folder)
    for header in (b"((((\n", b"{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -2)}\n", b"\xff\n"):
        with zipfile.ZipFile(folder / "edges.npz", "w") as archive:
            archive.writestr("row.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
        assert "row" in (said := refusal(folder)) or "edges.npz cannot be read" in said


def test_missing_cut_off_and_random_files(folder: Path):
    for name in ("edges.npz", "graph.json"):
        path = folder / name
        whole = path.read_bytes()
        generator = random.Random(0)
        for _ in range(60):
            if generator.random() < 0.5:
                path.write_bytes(whole[: generator.randrange(len(whole))])
            else:
                spoilt = bytearray(whole)
                spoilt[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
                path.write_bytes(spoilt)
            said = outcome(folder)
            assert said == "4 edges" or (said.startswith(str(folder)) and "\n" not in said)
        path.write_bytes(whole)
    (folder / "edges.npz").unlink()
    assert "edges.npz cannot be read" in refusal(folder)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e35])
def test_a_measurement_that_is_no_number_is_saved_as_missing(value: float, tmp_path: Path):
    graph = small_graph()
    assert graph.edge_notes is not None
    graph = graph.annotate(graph.edge_notes.assign(graph_measured=value, graph_verdict="undecided"))
    notes = load_graph(graph.save(tmp_path / "graph")).edge_notes
    assert notes is not None
    assert np.isnan(notes.loc[0, "graph_measured"])
    assert notes.loc[0, "graph_verdict"] == "undecided"


def test_notes_of_the_old_kind_load(folder: Path):
    path = folder / "graph.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    columns = ["source", "target", "predicted", "frozen", "measured", "control", "verdict"]
    row = ["0.7@1", "logit.5@1", -1, -1, -0.9, 0.5, "reversed"]
    document["edge_notes"] = {"columns": columns, "data": [row]}
    path.write_text(json.dumps(document), encoding="utf-8")
    notes = load_graph(folder).edge_notes
    assert notes is not None
    assert is_old(notes)
    assert notes.to_dict("split")["data"] == [row]
    graph = small_graph()
    assert graph.edge_notes is not None
    assert not is_old(graph.edge_notes)


def test_a_graph_from_before_the_hash_loads(folder: Path):
    assert len(json.loads((folder / "graph.json").read_text())["edges"]) == 64
    without_digest(folder)
    assert load_graph(folder).weights.nnz == 4


def test_the_files_of_two_graphs_are_no_graph(folder: Path, tmp_path: Path):
    graph = small_graph()
    other = replace(graph, weights=graph.weights * 2).save(tmp_path / "other")
    (other / "edges.npz").replace(folder / "edges.npz")
    assert "edges.npz was changed, or not written together with graph.json" in refusal(folder)


def _save_again_and_again(folder: Path, scale: float, stop: Event) -> None:
    graph = small_graph()
    tokens = (str(scale), *graph.tokens[1:])
    graph = replace(graph, weights=graph.weights * scale, tokens=tokens)
    while not stop.is_set():
        graph.save(folder)


def test_graphs_saved_at_the_same_time_are_never_mixed(tmp_path: Path):
    folder, context = small_graph().save(tmp_path / "graph"), multiprocessing.get_context("fork")
    stop = context.Event()
    writers = [context.Process(target=_save_again_and_again, args=(folder, scale, stop)) for scale in (1.0, 2.0, 3.0)]
    for writer in writers:
        writer.start()
    found, begun = set(), time.monotonic()
    try:
        while (passed := time.monotonic() - begun) < 1 or (len(found) < 2 and passed < 60):
            graph = load_graph(folder)
            if graph.tokens[0] != "<s>":
                assert graph.weights.data.max() == 2 * float(graph.tokens[0])
                found.add(graph.tokens[0])
    finally:
        stop.set()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(found) > 1
    assert load_graph(folder).tokens[0] in {"1.0", "2.0", "3.0"}
    assert sorted(path.name for path in folder.iterdir()) == ["edges.npz", "graph.json"]


def test_limits(folder: Path):
    for name in ("file_bytes", "values", "nodes", "edges", "tokens"):
        assert f"Limits({name}=" in refusal(folder, Limits(**{name: 1}))
    assert load_graph(folder, limits=Limits(nodes=5, edges=4)).weights.nnz == 4
