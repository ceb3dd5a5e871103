"""The examples run, in their quick mode."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name, *arguments, cwd):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, "--quick", *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_trace_prompt(tmp_path):
    assert "edges confirmed in the model" in run("trace_prompt.py", cwd=tmp_path)
    assert (tmp_path / "graph.html").exists()


def test_train_transcoders(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(["Once upon a time there was a cat . The cat saw a dog ."] * 300))
    assert "fvu" in run("train_transcoders.py", "pocket", text, tmp_path / "clt", cwd=tmp_path)
