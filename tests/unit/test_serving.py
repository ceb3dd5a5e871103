"""The server behind a page: whom it lets in, what it runs, what it keeps, and what it refuses."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

import circuitsae as cs
from circuitsae.cli import main
from circuitsae.commands.graph_folders import write_folder
from circuitsae.commands.shared import page_parts, write_page
from circuitsae.features.ledger import Evidence, Label, Ledger, Verdict
from circuitsae.graph import AttributionGraph
from circuitsae.graph.totals import explained_rows
from circuitsae.interventions import Intervention, Patch, Replace, Scale, Zero, for_node, for_nodes, parse_target
from circuitsae.replacement import ReplacementModel
from circuitsae.serving.app import Served, make_app
from circuitsae.serving.edits import own_labels
from circuitsae.serving.guard import LARGEST_BODY
from circuitsae.serving.runs import Runs
from circuitsae.validation.measuring import Targets, traced
from tests.sample_graphs import column_of

PROMPT, OTHER = "The capital of the state containing Dallas is", "The capital of the state containing Denver is"
TOKEN, HOST = "t0ken-t0ken", "127.0.0.1:8123"
HOSTILE = ["</script><img src=x onerror=alert(1)>", "\"quotes' &amp;", "line\u2028end\u202e", "a\0b", "é" * 10_000]


@pytest.fixture(scope="module")
def model() -> ReplacementModel:
    return ReplacementModel(cs.load_model("pocket", device="cpu"), cs.load_dictionaries("pocket", device="cpu"))


@pytest.fixture(scope="module")
def graph(model: ReplacementModel) -> AttributionGraph:
    return cs.attribute(model, PROMPT).prune(nodes=0.6)


@pytest.fixture(scope="module")
def parts(graph: AttributionGraph) -> dict[str, Any]:
    return page_parts(graph)


@pytest.fixture
def folder(graph: AttributionGraph, tmp_path: Path) -> Path:
    return graph.save(tmp_path / "graph")


@pytest.fixture
def served(folder: Path, graph: AttributionGraph, model: ReplacementModel, parts: dict[str, Any]) -> Served:
    return Served(folder, Runs(graph, lambda: model), **parts)


@pytest.fixture
def client(served: Served) -> Iterator[TestClient]:
    with TestClient(make_app(served, token=TOKEN, hosts=[HOST]), base_url=f"http://{HOST}/{TOKEN}/") as made:
        yield made


def ended(client: TestClient, begun: Any) -> dict[str, Any]:
    """A run, once it has come to its end."""
    assert begun.status_code == 202, begun.text
    run = begun.json()
    while run["state"] == "running":
        time.sleep(0.01)
        run = client.get(f"runs/{run['number']}").json()
    return run


def shown(page: str) -> dict[str, Any]:
    """What a page holds."""
    return json.loads(page.split('id="graph-data">')[1].split("</script>")[0])


def strongest(graph: AttributionGraph, kind: str, count: int = 1) -> list[str]:
    nodes = graph.nodes_frame().query("kind == @kind").sort_values("influence", ascending=False)
    return nodes["id"].tolist()[:count]


# who is let in


@pytest.mark.parametrize(
    "path", ["/", "/wrong/", "/t0ken/", f"//{TOKEN}/", f"/x/%2e%2e/{TOKEN}/", "/graph.json", "/%2e%2e/"]
)
def test_nothing_is_told_without_the_token(client: TestClient, path: str):
    found = client.get(f"http://{HOST}{path}")
    assert found.status_code == 403
    assert "token" in found.json()["error"]
    assert TOKEN not in found.text


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": f"evil.example:{HOST.split(':')[1]}"},
        {"host": "127.0.0.1:1"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": f"https://{HOST}"},
        {"origin": "http://127.0.0.1:9999"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
    ids=str,
)
def test_other_names_and_other_origins_are_refused(client: TestClient, served: Served, headers: dict[str, str]):
    for method, path, body in (("GET", "", None), ("PUT", "opened", {"note": "evil"}), ("POST", "runs", {"edge": []})):
        found = client.request(method, path, json=body, headers=headers)
        assert found.status_code == 403, (method, found.text)
    assert not (served.folder / "opened.json").exists()


def test_its_own_page_is_let_in_and_may_ask_this_server_alone(client: TestClient):
    found = client.get("", headers={"origin": f"http://{HOST}", "sec-fetch-site": "same-origin"})
    assert found.status_code == 200
    assert found.headers["cache-control"] == "no-store"
    assert found.headers["x-frame-options"] == "DENY"
    assert found.text.count("connect-src") == 1
    assert "connect-src 'self';" in found.text
    assert TOKEN not in found.text


def test_the_page_offline_may_ask_nobody(graph: AttributionGraph, tmp_path: Path):
    page = graph.write_html(tmp_path / "page.html").read_text()
    assert "connect-src" not in page.partition("<style>")[0]
    assert '"serving":' not in page


@pytest.mark.parametrize(
    "path",
    ["graph.json", "../graph.json", "%2e%2e/graph.json", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "runs/x", "labels/"],
)
def test_no_path_leads_to_a_file(client: TestClient, folder: Path, path: str):
    (folder.parent / "graph.json").write_text("outside")
    found = client.get(f"http://{HOST}/{TOKEN}/{path}")
    assert found.status_code in (403, 404), found.text
    assert "outside" not in found.text
    assert "root:" not in found.text


def test_a_port_that_cannot_be_had_is_said(folder: Path, capsys: pytest.CaptureFixture[str]):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for port, said in ((str(taken.getsockname()[1]), "cannot be had"), ("70000", "is no port")):
            with pytest.raises(SystemExit) as stopped:
                main(["serve", str(folder), "--no-open", "--port", port])
            assert stopped.value.code == 2
            assert said in capsys.readouterr().err.replace("\n", " ")


# what is refused


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"a":' * 2000, b"null", b'{"note": NaN'])
def test_what_is_no_json_object_is_refused(client: TestClient, content: bytes):
    for method, path in (("PUT", "opened"), ("PUT", "labels/0.1"), ("POST", "runs")):
        found = client.request(method, path, content=content, headers={"content-type": "application/json"})
        assert found.status_code == 400, found.text
        assert found.json()["error"].endswith(".")


def test_a_form_of_another_site_is_no_request(client: TestClient):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert client.post("runs", content=b"{}", headers={"content-type": kind}).status_code == 422
    assert client.get("runs").status_code == client.post("opened", json={}).status_code == 405


def test_bodies_beyond_the_limit_are_refused_before_they_are_read(client: TestClient):
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 64 * LARGEST_BODY:
            sent += 2**16
            yield b" " * 2**16

    headers = {"content-type": "application/json"}
    assert client.post("runs", content=b" " * (LARGEST_BODY + 1), headers=headers).status_code == 413
    assert client.put("opened", content=endless(), headers=headers).status_code == 413


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"nodes": ["9.9@9"], "operation": "zero"}, "no node '9.9@9'"),
        ({"nodes": ["../../x"], "operation": "zero"}, "no node"),
        ({"nodes": [], "operation": "zero"}, "0 nodes"),
        ({"nodes": "tok@7", "operation": "zero"}, "expected a list"),
        ({"nodes": [7], "operation": "zero"}, "expected text"),
        ({"nodes": ["tok@7"], "operation": "remove"}, "expected one of zero"),
        ({"nodes": ["tok@7"], "operation": "scale"}, "factor"),
        ({"nodes": ["tok@7"], "operation": "scale", "value": "2"}, "expected a number"),
        ({"nodes": ["tok@7"], "operation": "scale", "value": 1e300}, "expected a number"),
        ({"nodes": ["tok@7"], "operation": "patch", "value": ""}, "0 characters"),
        ({"nodes": ["FEATURE"], "operation": "replace", "value": "tok@1"}, "names no feature"),
        ({"nodes": ["LOGIT"], "operation": "zero"}, "can be changed"),
        ({"edge": ["tok@7"]}, "two ends"),
        ({"edge": ["tok@7", "nowhere"]}, "no node 'nowhere'"),
        ({"edge": {}}, "expected a list"),
    ],
    ids=str,
)
def test_what_the_graph_has_not_is_refused_before_anything_runs(
    client: TestClient, graph: AttributionGraph, asked: dict[str, Any], said: str
):
    names = {"FEATURE": strongest(graph, "feature")[0], "LOGIT": strongest(graph, "logit")[0]}
    if isinstance(asked.get("nodes"), list):
        asked = asked | {"nodes": [names.get(node, node) for node in asked["nodes"]]}
    found = client.post("runs", json=asked)
    assert found.status_code == 422
    assert said in found.json()["error"]


def test_an_error_of_the_model_is_said_and_the_next_run_goes_on(client: TestClient):
    run = ended(client, client.post("runs", json={"nodes": ["tok@7"], "operation": "patch", "value": "Too short"}))
    assert run["state"] == "failed"
    assert "beyond the source prompt" in run["error"]
    run = ended(
        client, client.post("runs", json={"nodes": ["tok@7"], "operation": "replace", "value": "no such token"})
    )
    assert run["state"] == "failed"
    assert ended(client, client.post("runs", json={"nodes": ["tok@7"], "operation": "zero"}))["state"] == "done"


# what is run


Changes = Callable[[AttributionGraph, list[str]], list[Intervention]]


def _nodes(graph: AttributionGraph, names: list[str]):
    return [graph.nodes[graph.position[name]] for name in names]


CASES: dict[str, tuple[str, int, str, Any, Changes]] = {
    "remove": ("feature", 1, "zero", None, lambda g, n: for_nodes(_nodes(g, n), Zero())),
    "remove a group": ("feature", 3, "zero", None, lambda g, n: for_nodes(_nodes(g, n), Zero())),
    "scale": ("feature", 2, "scale", -1.5, lambda g, n: for_nodes(_nodes(g, n), Scale(-1.5))),
    "another prompt": ("token", 1, "patch", OTHER, lambda g, n: for_nodes(_nodes(g, n), Patch(OTHER))),
    "another feature": (
        "feature", 1, "replace", "0.2",
        lambda g, n: [for_node(node, Replace(parse_target("0.2"))) for node in _nodes(g, n)],  # pyright: ignore[reportArgumentType]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_measured_is_what_intervene_measures(
    client: TestClient, graph: AttributionGraph, model: ReplacementModel, case: str
):
    kind, count, operation, value, changes = CASES[case]
    names = strongest(graph, kind, count)
    run = ended(client, client.post("runs", json={"nodes": names, "operation": operation, "value": value}))
    assert run["state"] == "done", run["error"]
    found = run["result"]
    outcome = cs.intervene(model, PROMPT, changes(graph, names))
    top = outcome.top(5)
    assert [row["token"] for row in found["top"]] == top["token"].tolist()
    for column in ("logit_before", "logit_after", "probability_after"):
        np.testing.assert_allclose([row[column] for row in found["top"]], top[column], rtol=1e-6, atol=1e-6)
    moved = outcome.changed[0, 0, -1] - outcome.clean[0, -1]
    rows = explained_rows(graph.nodes_frame())
    assert [row["node"] for row in found["targets"]] == [graph.nodes[row].id for row in rows]
    centred = [float(moved[graph.nodes[row].index] - moved.mean()) for row in rows]
    np.testing.assert_allclose([row["measured"] for row in found["targets"]], centred, rtol=1e-4, atol=2e-4)
    reads = outcome.changed_reads
    assert reads is not None
    targets = Targets(model, traced(model, graph), [graph.nodes[row] for row in rows])
    exact = (targets.read(reads.by_layer[0], reads.final[0]) - targets.clean)[0]
    np.testing.assert_allclose([row["measured"] for row in found["targets"]], exact, rtol=1e-6, atol=1e-6)


def test_what_is_foreseen_is_what_the_linear_replacement_model_does(model: ReplacementModel, tmp_path: Path):
    whole = cs.attribute(model, "The capital of Texas is")  # unpruned: all paths are drawn
    served = Served(tmp_path, Runs(whole, lambda: model))
    with TestClient(make_app(served, token=TOKEN, hosts=[HOST]), base_url=f"http://{HOST}/{TOKEN}/") as client:
        name = strongest(whole, "feature")[0]
        asked = {"nodes": [name], "operation": "scale", "value": 3.0}
        (target,) = ended(client, client.post("runs", json=asked))["result"]["targets"]
    change = for_nodes(_nodes(whole, [name]), Scale(3.0))
    outcome = cs.intervene(model, "The capital of Texas is", change, regime="linear")
    moved = outcome.changed[0, 0, -1] - outcome.clean[0, -1]
    token = whole.nodes[whole.position[target["node"]]].index
    assert target["foreseen"] == pytest.approx(float(moved[token] - moved.mean()), rel=1e-4, abs=1e-4)


def test_an_edge_is_tested_and_its_verdict_is_on_the_page(
    client: TestClient, graph: AttributionGraph, model: ReplacementModel
):
    (logit,) = strongest(graph, "logit")
    run = ended(client, client.post("runs", json={"edge": ["tok@7", logit]}))
    assert run["state"] == "done", run["error"]
    claims = run["result"]["tests"]["claims"]
    edges = graph.edges_frame().set_index(["source", "target"])
    assert claims["direct"]["predicted"] == [pytest.approx(-edges.loc[("tok@7", logit), "weight"], rel=1e-3)]
    token = graph.nodes[graph.position[logit]].index
    for claim in ("graph", "model"):
        outcome = cs.intervene(model, PROMPT, for_nodes(_nodes(graph, ["tok@7"])), regime=claim)
        moved = outcome.changed[0, 0, -1] - outcome.clean[0, -1]
        assert claims[claim]["measured"] == [pytest.approx(float(moved[token] - moved.mean()), rel=1e-3)]
    assert claims["graph"]["verdict"] == ["confirmed"]
    data = shown(client.get("").text)
    (edge,) = data["tests"]["edges"]
    assert [data["nodes"]["id"][column_of(data["edges"][end])[edge]] for end in ("source", "target")] == [
        "tok@7",
        logit,
    ]


def test_one_run_at_a_time_which_can_be_cancelled(
    folder: Path, graph: AttributionGraph, model: ReplacementModel, parts: dict[str, Any]
):
    loading, go = threading.Event(), threading.Event()

    def load() -> ReplacementModel:
        loading.set()
        assert go.wait(20)
        return model

    served = Served(folder, Runs(graph, load), **parts)
    asked = {"nodes": ["tok@7"], "operation": "zero"}
    with TestClient(make_app(served, token=TOKEN, hosts=[HOST]), base_url=f"http://{HOST}/{TOKEN}/") as client:
        first = client.post("runs", json=asked)
        assert loading.wait(20)
        assert client.get("runs/1").json()["step"] == "loading the model"
        second = client.post("runs", json=asked)
        assert second.status_code == 409
        assert "one at a time" in second.json()["error"]
        assert client.delete("runs/1").json()["state"] == "running"
        go.set()
        assert ended(client, first)["state"] == "cancelled"
        assert client.get("runs/7").status_code == 422
        while (third := client.post("runs", json=asked)).status_code == 409:  # the thread of the first is ending
            time.sleep(0.01)
        assert ended(client, third)["state"] == "done"


# what is kept


def test_labels_go_into_the_graphs_own_ledger_and_other_labels_stay(
    client: TestClient, graph: AttributionGraph, folder: Path
):
    name = strongest(graph, "feature")[0].partition("@")[0]
    row = Evidence("steering", Verdict.SUPPORTED, {"effect": 1.0}, "circuitsae steer")
    other = Label("tested", (name,), {"steering": row})
    Ledger([other, Label("a group", (name, "3.1"))]).save(folder)
    label = client.put(f"labels/{name}", json={"text": "says capitals"}).json()["label"]
    assert (label["text"], label["status"]) == ("says capitals", "hypothesis")
    client.put(f"labels/{name}@5", json={"text": "names capitals"})
    ledger = own_labels(folder)
    assert ledger is not None
    assert [label.text for label in ledger.labels] == ["names capitals", "tested", "a group"]
    assert client.put(f"labels/{name}", json={"text": " "}).json()["label"]["text"] == "tested"
    assert client.put("labels/9.9", json={"text": "x"}).status_code == 422
    assert client.put("labels/..%2f..%2fx", json={"text": "x"}).status_code in (404, 422)
    assert client.put(f"labels/{name}", json={"text": 7}).status_code == 422
    assert client.put(f"labels/{name}", json={"text": "x" * 20_001}).status_code == 422


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_are_kept_as_they_are_and_stay_text_on_every_page(
    client: TestClient, graph: AttributionGraph, folder: Path, text: str
):
    node = strongest(graph, "feature")[0]
    name = node.partition("@")[0]
    client.put(f"labels/{name}", json={"text": text})
    note = text[:2000]
    kept = client.put("opened", json={"groups": [[text[:80], node]], "note": note, "notes": {node: note}})
    assert kept.status_code == 200, kept.text
    ledger = own_labels(folder)
    assert ledger is not None
    assert ledger.of(name)[0].text == text
    write_page(graph, folder / "graph.html")  # as `circuitsae show` does
    for page in (client.get("").text, (folder / "graph.html").read_text()):
        assert page.count("<script") == 3
        assert "<img" not in page.partition('id="graph-data">')[2].partition("</script>")[0]
        data = shown(page)
        assert data["opened"]["notes"] == {node: note}
        assert data["opened"]["groups"][0][1:] == [node]
        label = data["labels"][name]["text"]
        assert all(character.isprintable() for character in label)
        assert len(label) >= len(text)


def test_a_half_of_a_character_does_not_spoil_the_file(client: TestClient, graph: AttributionGraph, folder: Path):
    name = strongest(graph, "feature")[0].partition("@")[0]
    sent = client.put(
        f"labels/{name}", content=b'{"text": "half \\ud83d"}', headers={"content-type": "application/json"}
    )
    assert sent.json()["label"]["text"].startswith("half \ufffd")
    assert "half \ufffd" in (folder / "ledger.json").read_text()


@pytest.mark.parametrize(
    "document",
    [
        {"pinned": ["9.9@9"]},
        {"pinned": "tok@1"},
        {"groups": [["a", "9.9@9"]]},
        {"groups": [[]] * 61},
        {"groups": [["n" * 81, "tok@1"]]},
        {"groups": [["a", 7]]},
        {"note": 7},
        {"note": "n" * 2001},
        {"notes": {"9.9@9": "x"}},
        {"notes": []},
    ],
    ids=lambda document: str(document)[:40],
)
def test_what_is_no_view_of_this_graph_is_not_kept(client: TestClient, folder: Path, document: dict[str, Any]):
    client.put("opened", json={"pinned": ["tok@1"]})
    before = (folder / "opened.json").read_bytes()
    found = client.put("opened", json=document)
    assert found.status_code == 422
    assert found.json()["error"].startswith("Pins, groups and notes were not kept")
    assert (folder / "opened.json").read_bytes() == before


def test_groups_are_opened_again_and_go_with_the_graph_they_are_of(
    client: TestClient, graph: AttributionGraph, folder: Path
):
    client.put("opened", json={"pinned": ["tok@1"], "groups": [["one", "tok@2"], ["one", "tok@3"]], "note": "n"})
    expected = {"pinned": ["tok@1"], "groups": [["one", "tok@2"], ["one (2)", "tok@3"]], "note": "n"}

    def opened() -> Any:
        return shown((folder / "graph.html").read_text())["opened"]

    write_folder(graph, None, folder, edited=True)  # as `circuitsae validate` does
    assert opened() == expected
    (folder / "opened.json").write_text("{")
    write_page(graph, folder / "graph.html")
    assert opened() is None
    client.put("opened", json={"pinned": ["tok@1"]})
    client.put(f"labels/{strongest(graph, 'feature')[0]}", json={"text": "of this graph"})
    write_folder(graph, None, folder)  # as `circuitsae trace --overwrite` does
    assert opened() is None
    assert not (folder / "ledger.json").exists()


@pytest.mark.parametrize("name", ["ledger.json", "opened.json"])
def test_nothing_is_read_or_written_through_a_link_that_leads_out(
    client: TestClient, graph: AttributionGraph, folder: Path, name: str
):
    outside = folder.parent / name
    outside.write_text("mine")
    (folder / name).symlink_to(outside)
    label = client.put(f"labels/{strongest(graph, 'feature')[0]}", json={"text": "x"})
    opened = client.put("opened", json={"pinned": ["tok@1"]})
    refused = label if name == "ledger.json" else opened
    assert refused.status_code == 422
    assert "leads out" in refused.json()["error"]
    assert client.get("").status_code == 422
    assert outside.read_text() == "mine"
