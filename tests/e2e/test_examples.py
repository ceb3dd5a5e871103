"""The examples run, in their quick mode."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def run(name, *arguments, cwd):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, "--quick", *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_trace_prompt(tmp_path):
    assert "have their graph claim confirmed" in run("trace_prompt.py", cwd=tmp_path)
    assert (tmp_path / "graph.html").exists()


def test_train_transcoders(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(["Once upon a time there was a cat . The cat saw a dog ."] * 300))
    assert "fvu" in run("train_transcoders.py", "pocket", text, tmp_path / "clt", cwd=tmp_path)


def test_validate_pocket(tmp_path):
    run("validate_pocket.py", "--write", tmp_path / "validation.md", cwd=tmp_path)
    page = (tmp_path / "validation.md").read_text(encoding="utf-8")
    assert "### The ten largest misses" in page
    assert "Circuit of IOI" in page
