"""What a run shows of itself while it goes on, and what its folder says afterwards."""

import io
import json
import sys
import xml.etree.ElementTree as ET
from importlib.metadata import version

import pytest
import torch
from rich.console import Console

import transcoders as tc
from circuitsae.commands.runs import TrainedOn
from circuitsae.commands.shared import CorpusPart, Weights
from circuitsae.loading import load_model
from transcoders.training import Trainer, VectorSource, record
from transcoders.training.display import Display
from transcoders.training.trained_on import TRAINED_ON

METRICS = {"fvu": 0.2, "l0": 8.0, "dead": 0.015}


def display(seconds, *, steps=100, terminal=False, names=("one",)):
    text, clock = io.StringIO(), iter(seconds)
    console = Console(file=text, force_terminal=terminal, width=160)
    shown = Display(names, steps=steps, done=0, batch=50, shown=True, console=console, clock=lambda: next(clock))
    return shown, text


def test_without_a_terminal_a_line_says_every_half_minute_how_far_it_is():
    shown, text = display([0.0, 10.0, 31.0, 40.0, 62.0])
    with shown:
        shown.advance()
        shown.measured([METRICS])
        for _ in range(3):
            shown.advance()
    assert text.getvalue().splitlines() == [
        "step 2 of 100: 3 tokens/s, FVU 0.200, L0 8.0, dead 1.5%, 25 min left",
        "step 4 of 100: 3 tokens/s, FVU 0.200, L0 8.0, dead 1.5%, 25 min left",
    ]


def test_the_last_step_has_a_line_however_soon_it_comes():
    shown, text = display([0.0, 1.0], steps=1, names=("a", "b"))
    with shown:
        shown.measured([METRICS, METRICS])
        shown.advance()
    assert text.getvalue() == (
        "step 1 of 1: 50 tokens/s, a: FVU 0.200, L0 8.0, dead 1.5%; b: FVU 0.200, L0 8.0, dead 1.5%, 0 s left\n"
    )


def test_on_a_terminal_the_same_is_beside_the_bar():
    shown, text = display([0.0, 1.0, 2.0], steps=2, terminal=True)
    with shown:
        shown.measured([METRICS])
        shown.advance()
        shown.advance()
    assert "50 tokens/s, FVU 0.200, L0 8.0, dead 1.5%" in text.getvalue()
    assert "2/2" in text.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "my run"
    x = torch.randn(400, 2, 8, generator=torch.Generator().manual_seed(0))
    config = tc.SAEConfig(
        features=16, activation="topk", k=2, tokens=640, batch=64, log_every=2, checkpoint_every=4, lr=3e-3
    )
    source = VectorSource(x, None, seed=0)
    trainer = Trainer(source, [config], out=out)
    trainer.run(until=4, progress=False)
    half = (out / "README.md").read_text()
    trainer.run(progress=False)
    trainer.finish()
    return out, half


def test_the_folder_of_a_run_says_what_made_it_and_how_to_go_on(run):
    out, half = run
    text = (out / "README.md").read_text()
    assert half.startswith("# sae of vectors, at step 4 of 10; not finished")
    assert "`--resume`" in half
    assert text.startswith("# sae of vectors, finished")
    assert "| tokens trained on | 640 |" in text
    assert "| `features` | `16` |" in text
    assert "`clip`" not in text  # a default
    assert f"torch {version('torch')}" in text  # as installed: the build's own version may say more
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"| all layers | {last['fvu']:.4f} | 2.0 | {last['dead']:.1%} |" in text
    assert f"| layer 1 | {last['fvu_per_layer'][1]:.4f} |" in text
    assert f"load_dictionaries({str(out)!r})" in text  # of vectors, which no model can be evaluated on


def test_the_curve_has_a_line_for_each_layer_and_one_for_all(run):
    root = ET.fromstring((run[0] / "curve.svg").read_text())
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 3
    heights = [[float(p.split(",")[1]) for p in line.attrib["points"].split()] for line in lines]
    assert all(len(each) == 5 for each in heights)
    metrics = record.read_metrics(run[0] / "metrics.jsonl")
    order = sorted(range(5), key=lambda i: metrics[i]["fvu"])
    assert sorted(range(5), key=lambda i: -heights[2][i]) == order  # a larger FVU is higher up


def test_a_curve_is_drawn_of_one_point_and_of_numbers_that_have_no_logarithm():
    for values in ([0.5], [0.0, 0.0], [1.0, float("inf")]):
        metrics = [{"step": i + 1, "fvu": v, "fvu_per_layer": [v]} for i, v in enumerate(values)]
        root = ET.fromstring(record.loss_curve(metrics))
        for line in root.findall("{http://www.w3.org/2000/svg}polyline"):
            assert len(line.attrib["points"].split()) == 2  # of one point a line to itself, which is seen


def test_the_command_is_what_was_typed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/circuitsae", "train", "pocket", "--out", "my run"])
    assert record.command_line() == "circuitsae train pocket --out 'my run'"
    monkeypatch.setattr("sys.argv", ["/lib/circuitsae/__main__.py", "train", "pocket"])  # as torchrun starts it
    assert record.command_line() == "circuitsae train pocket"
    for other in ("notebook.py", "/lib/pytest/__main__.py"):
        monkeypatch.setattr("sys.argv", [other])
        assert record.command_line() == "transcoders.train"


def test_a_script_is_named_beside_the_function_that_it_called(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/home/me/sweep.py", "--k", "8"])
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/home/me/sweep.py", raising=False)  # xdist has none
    assert record.command_line() == "transcoders.train, in python /home/me/sweep.py --k 8"


def test_a_run_from_python_says_under_which_names_model_and_text_are_found_again(tmp_path):
    """As the command does, so that `circuitsae evaluate RUN` needs no more."""
    text = tmp_path / "texts.jsonl"
    text.write_text("\n".join(json.dumps({"story": "John gave a drink to Mary. " * 8}) for _ in range(40)))
    config = tc.SAEConfig(features=8, activation="topk", k=2, tokens=64, batch=32, context=16)
    model, corpus = load_model("pocket", device="cpu"), tc.open_corpus(text, column="story")
    tc.train(model, corpus, config, out=tmp_path / "run", progress=False)
    part = CorpusPart(corpus_column="story")
    assert TrainedOn.of(tmp_path / "run") == TrainedOn.given("pocket", str(text), Weights(), part)
    tc.train(model, ["John gave a drink to Mary. " * 8] * 40, config, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / TRAINED_ON).exists()  # documents that were given have no name
