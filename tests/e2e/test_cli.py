"""The commands of README, as a user gives them: exit codes and files; in processes of their own where that matters."""

import json
import re
import subprocess
import sys

import networkx as nx
import pytest
import torch

from circuitsae.cli import main
from circuitsae.graph import NodeKind, load_graph
from circuitsae.loading import load_model
from transcoders import save_dictionaries
from transcoders.dictionaries import random_dictionaries

PROMPT = "When John and Mary went to the store, John gave a drink to"


def run(*arguments, cwd=None, code=0):
    """Run circuitsae; returns what it printed, after checking its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "circuitsae.cli", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=None,
        timeout=280,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traced")
    return run("trace", PROMPT, "--out", folder / "ioi", "--validate", "20"), folder / "ioi"


def test_help_answers_without_torch():
    code = """
import sys
from circuitsae.cli import main
try:
    main(["--help"])
except SystemExit:
    sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_trace_says_what_was_found(traced):
    printed, _ = traced
    logits = printed[printed.index("Top logits") :].splitlines()
    assert "Mary" in next(line for line in logits if "0." in line)
    expected = (
        "Nodes kept",
        "Edges kept",
        "Replacement score",
        "completeness score",
        "of 20 graph claims hold within a factor of two",
    )
    for text in expected:
        assert text in printed
    assert "graph.html" in printed


def test_trace_writes_a_graph_a_validation_and_a_page(traced):
    _, folder = traced
    graph = load_graph(folder)
    assert graph.top_logits()[0].text == " Mary"
    g = graph.to_networkx()
    assert nx.is_directed_acyclic_graph(g)
    assert sum({"graph_verdict", "direct_verdict", "model_measured"} <= set(d) for *_, d in g.edges(data=True)) == 20
    assert json.loads((folder / "validation.json").read_text())["frozen_error"] < 1e-4
    page = (folder / "graph.html").read_text()
    assert "<!doctype html>" in page[:100].lower()
    assert len(page.encode()) < 2_000_000
    (data,) = re.findall(r'<script type="application/json" id="graph-data">(.*?)</script>', page, re.DOTALL)
    shown = json.loads(data)
    features = {f"{n.layer}.{n.index}" for n in graph.nodes if n.kind is NodeKind.FEATURE}
    assert shown["cards"].keys() == features  # no feature that fires on the prompt is dead in the cards' corpus
    assert len(shown["tests"]["edges"]) == 20


def test_show_and_validate_work_from_the_folder(traced, tmp_path, capsys):
    _, folder = traced
    main(["show", str(folder), "--html", str(tmp_path / "again.html")])
    assert "Strongest 15 edges" in capsys.readouterr().out
    assert (tmp_path / "again.html").exists()
    main(["validate", str(folder), "--edges", "5", "--controls", "4"])
    printed = capsys.readouterr().out
    assert "of 5 graph claims hold within a factor of two" in printed
    assert sum("graph_verdict" in d for *_, d in load_graph(folder).to_networkx().edges(data=True)) == 5


def test_doctor_is_content(capsys):
    main(["doctor"])
    assert "Everything required is here" in capsys.readouterr().out


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Dictionaries of another width, and of the right sizes but another model."""
    folder = tmp_path_factory.mktemp("foreign")
    pocket = load_model()
    narrow = random_dictionaries("clt", n_layers=pocket.n_layers, d_model=16, features=8)
    save_dictionaries(narrow, folder / "narrow")
    shallow = random_dictionaries("plt", n_layers=2, d_model=pocket.d_model, features=8)
    save_dictionaries(shallow, folder / "shallow")
    saes = random_dictionaries("sae", n_layers=pocket.n_layers, d_model=pocket.d_model, features=8)
    save_dictionaries(saes, folder / "saes")
    (folder / "liar").mkdir()
    (folder / "liar" / "config.json").write_text("{}")
    (folder / "liar" / "weights.safetensors").write_bytes(b"\x80\x04 a pickle")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trace", ""], "prompt is empty"),
        (["trace", "word " * 2000], "reads at most"),
        (["trace", PROMPT, "--model", "./nowhere"], "There is no model folder"),
        (["trace", PROMPT, "--target", " incomprehensible"], "not one"),
        (["trace", PROMPT, "--nodes", "1.5"], "is not a share"),
        (["trace", PROMPT, "--dictionaries", "./nowhere"], "nowhere"),
        (["trace", PROMPT, "--dictionaries", "{foreign}/narrow"], "width 16"),
        (["trace", PROMPT, "--dictionaries", "{foreign}/shallow"], "for 2 layers, but pocket has 4"),
        (["trace", PROMPT, "--dictionaries", "{foreign}/liar"], "liar"),
        (["show", "./nowhere"], "There is no graph"),
        (["validate", "./nowhere"], "There is no graph"),
        (["train", "pocket", "--corpus", "./nowhere.txt", "--out", "x"], "nowhere.txt"),
        (["train", "gpt2", "--out", "x"], "No corpus was named for gpt2"),
        (
            ["train", "pocket", "--out", "x", "--kind", "sae", "--skip"],
            "no setting 'skip'; kind 'plt' and 'clt' have it",
        ),
        (["train", "pocket", "--out", "x", "--site", "mlp_in"], "no setting 'site'; kind 'sae' has it"),
        (["train", "pocket", "--out", "x", "--kind", "plt", "--no-centred"], "no setting 'centred'; kind 'sae' has it"),
        (["trace", PROMPT, "--device", "cuda:7"], "cuda:7"),
    ],
)
def test_wrong_use_gets_one_sentence_and_writes_nothing(arguments, message, foreign, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main([a.replace("{foreign}", str(foreign)) for a in arguments])
    assert exit.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert message in printed
    assert not list(tmp_path.iterdir())


def test_wrong_use_of_the_process_itself(tmp_path):
    assert "There is no graph" in run("show", "./nowhere", cwd=tmp_path, code=2)


def test_an_option_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["trace", PROMPT, "--modle", "x"])
    assert exit.value.code == 2
    assert "unrecognized" in capsys.readouterr().err.lower()


def test_train_then_trace(tmp_path, capsys):
    corpus = tmp_path / "corpus.txt"
    sentences = ["The cat sat on the mat .", "Tom gave Mary a drink .", "The capital of Texas is Austin ."]
    corpus.write_text("\n\n".join(sentences[i % 3] * 3 for i in range(400)))
    out = tmp_path / "clt"
    options = ("--features", "32", "--tokens", "6k", "--batch", "128", "--evaluate-tokens", "500")
    main(["train", "pocket", "--corpus", str(corpus), "--out", str(out), *options])
    assert "held-out tokens" in capsys.readouterr().out
    assert (out / "evaluation.json").exists()
    assert json.loads((out / "trained_on.json").read_text()) == {"model": "pocket", "corpus": str(corpus.resolve())}
    main(["trace", PROMPT, "--dictionaries", str(out), "--out", str(tmp_path / "graph"), "--validate", "5"])
    printed = capsys.readouterr().out
    assert re.search("of [1-5] graph claims? hold within a factor of two", printed)
    assert load_graph(tmp_path / "graph").provenance["dictionaries"]["model"] == "pocket"
    assert torch.isfinite(torch.tensor(load_graph(tmp_path / "graph").weights.data)).all()
