"""`circuitsae evaluate` as a user runs it: tables, exit codes and files."""

import json
import shutil
import subprocess
import sys

import pytest

from circuitsae.cli import main
from circuitsae.commands.runs import TrainedOn
from circuitsae.commands.shared import Weights
from circuitsae.loading import load_dictionaries, load_model
from circuitsae.pocket.corpus import held_out_text
from transcoders import evaluate, save_dictionaries
from transcoders.data import take_rows
from transcoders.dictionaries import random_dictionaries
from transcoders.evaluation import load_evaluation


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run circuitsae in an empty folder; returns what it printed, after checking its exit code.

    In this process: each of another would spend its time on imports.
    """
    monkeypatch.chdir(tmp_path)

    def command(*arguments, code=0):
        try:
            main([*map(str, arguments)])
            found = 0
        except SystemExit as end:
            found = end.code
        printed = capsys.readouterr()
        assert found == code, printed.out + printed.err
        return printed.out if code == 0 else printed.err

    return command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Random transcoders for the pocket model, and two of another width."""
    folder = tmp_path_factory.mktemp("saved")
    pocket = load_model()
    sizes = {"n_layers": pocket.n_layers, "d_model": pocket.d_model, "features": 12}
    save_dictionaries(random_dictionaries("plt", **sizes), folder / "plt")
    save_dictionaries(random_dictionaries("clt", activation="topk", **sizes), folder / "topk-clt")
    save_dictionaries(random_dictionaries("plt", n_layers=pocket.n_layers, d_model=8, features=4), folder / "narrow")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n\n".join(held_out_text(12_000)))
    return path


def test_the_table_is_printed_and_saved(run, saved, corpus, tmp_path):
    out = tmp_path / "new" / "found.json"
    printed = run("evaluate", "pocket", saved / "plt", "--corpus", corpus, "--tokens", "600", "--out", out, "--wide")
    for text in ("held-out tokens", "FVU", "aligned cos", "loss recovered", "with all layers replaced", "found.json"):
        assert text in printed
    found = load_evaluation(out)
    assert 500 < found.tokens <= 600
    assert f"{found.fvu:.3f}" in printed
    assert f"{found.layers[0].alignment.product:.3f}" in printed, "the score is the inner product"
    assert f"{found.replaced.top1_agreement:.1%}" in printed
    assert found.layers[0].firing.never + sum(found.layers[0].firing.counts) == 12
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_pocket_model_brings_its_own_text_and_figures_agree_with_python(run, saved):
    run("evaluate", "pocket", saved / "topk-clt", "--tokens", "300", "--context", "64")
    found = load_evaluation(saved / "topk-clt" / "evaluation.json")
    assert found.replaced.features == "original"
    model = load_model()
    rows = take_rows(model, held_out_text(320), rows=5, context=64)
    expected = evaluate(model, load_dictionaries(saved / "topk-clt"), rows)
    assert found.tokens == expected.tokens
    assert found.fvu == pytest.approx(expected.fvu, rel=1e-4)
    assert found.replaced.kl == pytest.approx(expected.replaced.kl, rel=1e-4)


def test_losses_can_be_measured_on_fewer_tokens(run, saved, corpus, tmp_path):
    out = tmp_path / "found.json"
    printed = run(
        "evaluate", "pocket", saved / "plt", "--corpus", corpus, "--tokens", "600", "--loss-tokens", "128", "--out", out
    )
    found = load_evaluation(out)
    assert (found.tokens, found.loss_tokens) == (4 * 127, 127)
    assert "own writes, on 127 tokens" in printed


@pytest.fixture
def named_run(saved, corpus, tmp_path):
    """A run folder with the model and the text that it was trained on, as `train` writes it."""
    folder = shutil.copytree(saved / "plt", tmp_path / "run")
    TrainedOn.given("pocket", str(corpus), Weights()).save(folder)
    return folder


def test_a_run_is_evaluated_by_its_name_alone(run, named_run, corpus, tmp_path):
    run("evaluate", named_run, "--tokens", "300")
    run("evaluate", "pocket", named_run, "--corpus", corpus, "--tokens", "300", "--out", tmp_path / "named.json")
    assert load_evaluation(named_run / "evaluation.json") == load_evaluation(tmp_path / "named.json")


def test_a_run_without_a_record_is_what_its_dictionaries_say(run, named_run, corpus, tmp_path):
    (named_run / "trained_on.json").unlink()
    config = json.loads((named_run / "config.json").read_text())
    config["provenance"] |= {"model": "pocket", "corpus": "pocket"}
    (named_run / "config.json").write_text(json.dumps(config))
    run("evaluate", named_run, "--tokens", "100")
    run("evaluate", "pocket", named_run, "--tokens", "100", "--out", tmp_path / "named.json")
    assert load_evaluation(named_run / "evaluation.json") == load_evaluation(tmp_path / "named.json")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"model": 3}', "does not say what the run was trained on"),
        ('["pocket"]', "expected an object"),
        ('{"model": "pocket", "trust_remote_code": "yes"}', "does not say what the run was trained on"),
        ('{"model": "pocket", "corpus": "./gone.txt"}', "There is no text file"),
        ('{"model": "./gone"}', "No text was named"),
    ],
)
def test_a_record_that_leads_nowhere_gets_one_sentence(run, named_run, record, message):
    (named_run / "trained_on.json").write_text(record)
    printed = run("evaluate", named_run, code=2)
    assert "Traceback" not in printed
    assert message in printed


def test_a_bar_that_is_missed_is_a_failed_check(run, saved, corpus, tmp_path):
    common = ("evaluate", "pocket", saved / "plt", "--corpus", corpus, "--tokens", "200", "--out", tmp_path / "e.json")
    printed = run(*common, "--require-agreement", "1.0", code=1)
    assert "check failed" in printed
    assert "below the 100.0% that was required" in printed
    assert (tmp_path / "e.json").exists(), "what was measured is there to be looked at"
    assert "above the 0.01 that was required" in run(*common, "--require-fvu", "0.01", code=1)
    run(*common, "--require-fvu", "1e9", "--require-agreement", "0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere", "{saved}/plt", "--corpus", "{corpus}"], "There is no model folder"),
        (["pocket", "./nowhere", "--corpus", "{corpus}"], "nowhere"),
        (["pocket", "{saved}/narrow", "--corpus", "{corpus}"], "width 8"),
        (["pocket", "{saved}/plt", "--corpus", "./nowhere.txt"], "There is no text file"),
        (["gpt2", "{saved}/plt"], "No text was named"),
        (["./nowhere"], "There is no run folder ./nowhere"),
        (["pocket", "{saved}/plt", "--tokens", "0"], "--tokens 0 leaves nothing to measure"),
        (["pocket", "{saved}/plt", "--loss-tokens", "0"], "--loss-tokens 0 leaves nothing to measure"),
        (["pocket", "{saved}/plt", "--require-agreement", "95"], "is not a share"),
        (["pocket", "{saved}/plt", "--out", "{saved}"], "is a folder"),
    ],
)
def test_wrong_use_gets_one_sentence_and_writes_nothing(run, arguments, message, saved, corpus, tmp_path):
    filled = [a.replace("{saved}", str(saved)).replace("{corpus}", str(corpus)) for a in arguments]
    printed = run("evaluate", *filled, code=2)
    assert "Traceback" not in printed
    assert message in printed
    assert not list(tmp_path.iterdir())


def test_help_needs_no_torch_and_names_the_command():
    code = "import sys, circuitsae.cli as c\ntry:\n c.main(['evaluate', '--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True, capture_output=True, text=True
    )
    assert "--require-agreement" in done.stdout
