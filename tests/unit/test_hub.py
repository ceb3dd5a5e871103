"""Names of the hub on a machine without a network, and on one where a server answers."""

import http.server
import sys
import threading
import time

import pytest

import circuitsae
from circuitsae.cli import main
from transcoders import hub
from transcoders.data import open_corpus
from transcoders.errors import FileFormatError, InputError, ModelError


@pytest.fixture
def endpoint(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return lambda url: monkeypatch.setattr(constants, "ENDPOINT", url)


@pytest.fixture
def server():
    class Answers(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize(
    ("load", "error", "advice"),
    [
        (circuitsae.load_model, ModelError, "give a folder in Hugging Face layout"),
        (circuitsae.load_dictionaries, FileFormatError, "give a local folder"),
        (open_corpus, InputError, "give a text file"),
    ],
)
def test_a_name_is_refused_at_once_where_there_is_no_network(endpoint, load, error, advice):
    endpoint("http://nobody.invalid")
    start = time.monotonic()
    with pytest.raises(error, match=rf"'nobody/nothing' (is|are) not on this machine, .*nobody\.invalid.*{advice}"):
        load("nobody/nothing")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "command",
    [
        ("train", "pocket", "--out", "out"),
        ("evaluate", "pocket", "pocket"),
        ("features", "collect", "pocket", "--out", "out"),
    ],
)
def test_commands_refuse_a_corpus_at_once_where_there_is_no_network(endpoint, command, tmp_path, monkeypatch, capsys):
    endpoint("http://nobody.invalid")
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--corpus", "nobody/nothing"])
    assert time.monotonic() - start < 5
    assert stopped.value.code == 2
    assert "The data set 'nobody/nothing' is not on this machine" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_server_that_is_silent_is_not_waited_for(endpoint, monkeypatch):
    import socket

    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        problem = str(hub.hub_problem())  # said by the client or by whoever waits for it, whichever is first
        assert "set HF_HUB_ETAG_TIMEOUT" in problem or "timed out" in problem
        assert time.monotonic() - start < 2


def test_a_name_server_that_is_silent_is_not_waited_for(endpoint, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    monkeypatch.setattr(hub, "_ask", lambda *_: time.sleep(3))
    endpoint("http://nobody.invalid")
    start = time.monotonic()
    assert "does not answer within 0.2 s" in str(hub.hub_problem())
    assert time.monotonic() - start < 2


def test_where_the_hub_answers_its_names_are_left_to_it(endpoint, server):
    endpoint(server)
    assert hub.hub_problem() is None
    assert hub.model_source("nobody/nothing") == "nobody/nothing"


def test_offline_what_was_downloaded_is_used(endpoint, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0")
    assert hub.model_source("some/model") == str(snapshot)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        hub.model_source("other/model")


def test_offline_a_corpus_that_was_downloaded_is_read(endpoint, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "datasets--some--texts" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    refs = tmp_path / "datasets--some--texts" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0")
    corpus = open_corpus("some/texts")
    assert (corpus.name, list(corpus.documents())) == ("some/texts", ["one", "two"])


def test_names_are_looked_at_without_torch():
    import subprocess

    code = "import sys, transcoders.hub; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
