"""The examples run, in their quick mode: one as a user's process, the others in this one, which has torch already."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script as `python` does, in an empty folder; what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), "--quick", *map(str, arguments)])
        runpy.run_path(sys.argv[0], run_name="__main__")
        return capsys.readouterr().out

    return run


def test_trace_prompt(tmp_path):
    """What a script prints is all that is printed: no bars of transformers, no line of whoever loads or traces."""
    script = [sys.executable, EXAMPLES / "trace_prompt.py", "--quick"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith("AttributionGraph")
    assert "have their graph claim confirmed" in done.stdout
    assert (tmp_path / "graph.html").exists()


def test_train_transcoders(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(["Once upon a time there was a cat . The cat saw a dog ."] * 300))
    assert "fvu" in run("train_transcoders.py", "pocket", text, tmp_path / "clt")


def test_validate_pocket(run, tmp_path):
    run("validate_pocket.py", "--write", tmp_path / "validation.md")
    page = (tmp_path / "validation.md").read_text(encoding="utf-8")
    assert "### The ten largest misses" in page
    assert "Circuit of IOI" in page
