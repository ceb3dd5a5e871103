"""Which corpus a command reads: a file or a data set, by its configuration, split, revision and column."""

import json

import pytest

from circuitsae.cli import main
from circuitsae.commands.runs import TrainedOn
from circuitsae.commands.shared import CorpusPart, Weights

STORIES = [f"Number {i} went home and {'and ' * (i % 5)}slept." for i in range(200)]


@pytest.fixture
def stories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps({"story": text}) + "\n" for text in STORIES))
    return "stories.jsonl"


COMMANDS = [
    ("train", "pocket", "--out", "out"),
    ("evaluate", "pocket", "pocket"),
    ("features", "collect", "pocket", "--out", "out"),
    ("convert", "pocket", "out", "--calibrate-on"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_column_that_is_not_there_is_refused_before_a_model_is_loaded(stories, command, monkeypatch, capsys):
    monkeypatch.setattr("circuitsae.loading.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    named = command if command[-1] == "--calibrate-on" else (*command, "--corpus")
    with pytest.raises(SystemExit) as stopped:
        main([*named, stories, "--corpus-column", "body"])
    assert stopped.value.code == 2
    assert "has no column 'body'; it has story" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", COMMANDS[:3], ids=lambda command: command[0])
def test_a_part_of_nothing_is_refused(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--corpus-config", "en"])
    assert stopped.value.code == 2
    assert "choose of a text; give --corpus as well" in " ".join(capsys.readouterr().err.split())


def test_a_run_is_evaluated_on_the_column_that_it_was_trained_on(stories, tmp_path):
    how = ["--kind", "sae", "--features", "8", "--tokens", "256", "--batch", "64", "--context", "16", "--documents"]
    out = ["--out", "run", "--evaluate-tokens", "0", "--buffer-mb", "1", "--activation", "topk", "--k", "2"]
    main(["train", "pocket", "--corpus", stories, "--corpus-column", "story", *how, "masked", *out])
    assert TrainedOn.of(tmp_path / "run").corpus_column == "story"
    main(["evaluate", "run", "--tokens", "64", "--loss-tokens", "32"])
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["tokens"] <= 64


def test_a_run_remembers_its_part_and_what_is_given_goes_before(tmp_path):
    part = CorpusPart(corpus_config="en", corpus_split="validation")
    TrainedOn.given("pocket", "some/texts", Weights(), part).save(tmp_path)
    found = TrainedOn.of(tmp_path)
    assert found.part(CorpusPart()) == part
    assert found.part(CorpusPart(corpus_split="test")) == CorpusPart(corpus_config="en", corpus_split="test")
    assert TrainedOn.given("pocket", None, Weights()).part(CorpusPart()) == CorpusPart()
