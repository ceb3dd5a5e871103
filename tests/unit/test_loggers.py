"""Sinks write what they are given, and say one clear sentence where their package is missing."""

import importlib
import json
import sys
import types

import pytest
import torch

from transcoders import SAEConfig, train
from transcoders.errors import InputError
from transcoders.training import Trainer, VectorSource
from transcoders.training.metrics import open_sink, scalars

METRICS = {"step": 7, "fvu": 0.5, "l0_per_layer": [1.0, 2], "note": "text", "done": True}


def test_lists_become_one_curve_for_each_layer():
    assert dict(scalars(METRICS)) == {"fvu": 0.5, "l0_per_layer/0": 1.0, "l0_per_layer/1": 2.0}


class FakeRun:
    def __init__(self, **settings):
        self.settings, self.lines, self.finished = settings, [], False

    def log(self, values, step):
        self.lines.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def fake_wandb(monkeypatch):
    runs = []
    fake = types.ModuleType("wandb")
    fake.__dict__["init"] = lambda **settings: runs.append(FakeRun(**settings)) or runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return runs


def test_wandb_gets_the_settings_and_every_line(fake_wandb, tmp_path):
    with open_sink("wandb", folder=tmp_path, name="topk", config={"k": 8}) as sink:
        sink(METRICS)
        sink({"step": 8, "fvu": 0.25})
        assert not fake_wandb[0].finished
    assert fake_wandb[0].finished
    assert fake_wandb[0].settings["config"] == {"k": 8}
    assert fake_wandb[0].settings["name"] == "topk"
    assert fake_wandb[0].settings["dir"] == str(tmp_path)
    assert fake_wandb[0].lines == [(7, {"fvu": 0.5, "l0_per_layer/0": 1.0, "l0_per_layer/1": 2.0}), (8, {"fvu": 0.25})]


def test_tensorboard_files_hold_the_curves(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the optional package tensorboard")
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    with open_sink("tensorboard", folder=tmp_path, name="topk", config={"k": 8}) as sink:
        sink(METRICS)
        sink({"step": 8, "fvu": 0.25})
    events = reader.EventAccumulator(str(tmp_path / "tensorboard" / "topk"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("fvu")] == [(7, 0.5), (8, 0.25)]
    assert [e.value for e in events.Scalars("l0_per_layer/1")] == [2.0]


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_clear_sentence(kind, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, kind, None)  # makes the import fail
    with pytest.raises(InputError, match=f"needs the package `{kind}`: run `pip install {kind}`"):
        open_sink(kind, folder=tmp_path / "x", name="x", config={})
    assert not list(tmp_path.iterdir())


def test_an_unknown_logger_is_refused(tmp_path):
    with pytest.raises(InputError, match="no logger 'comet'; there are 'tensorboard', 'wandb'"):
        open_sink("comet", folder=tmp_path, name="x", config={})


# wired into training


def vectors():
    return torch.randn(300, 8, generator=torch.Generator().manual_seed(0))


def config(**options):
    return SAEConfig(activation="topk", features=12, k=2, batch=64, tokens=640, log_every=4, **options)


def test_training_sends_the_lines_of_the_metrics_file_of_those_that_ask(fake_wandb, tmp_path):
    configs = [config(log_to="wandb"), config(seed=1), config(seed=2, log_to="wandb")]
    train(None, vectors(), configs, names=["a", "b", "c"], out=tmp_path, progress=False)
    assert [run.settings["name"] for run in fake_wandb] == ["a", "c"]
    assert all(run.finished for run in fake_wandb)
    for run, name in zip(fake_wandb, "ac", strict=True):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert run.lines == [(line["step"], dict(scalars(line))) for line in lines]
        assert [step for step, _ in run.lines] == [4, 8, 10]


def test_a_run_is_finished_when_training_fails(fake_wandb, tmp_path, monkeypatch):
    trainer = Trainer(VectorSource(vectors(), None, seed=0), [config(log_to="wandb")], out=tmp_path)
    monkeypatch.setattr(trainer, "_train_step", lambda activations, **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.run(progress=False)
    assert fake_wandb[0].finished


def test_a_run_is_resumed_with_another_sink(fake_wandb, tmp_path):
    settings = {"checkpoint_every": 5}
    Trainer(VectorSource(vectors(), None, seed=0), [config(**settings)], out=tmp_path).run(until=5, progress=False)
    train(None, vectors(), config(log_to="wandb", **settings), out=tmp_path, resume=True, progress=False)
    assert [step for step, _ in fake_wandb[0].lines] == [8, 10]


def test_training_without_the_package_or_a_folder_is_one_clear_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="needs the package `wandb`: run `pip install wandb`"):
        train(None, vectors(), config(log_to="wandb"), out=tmp_path, progress=False)
    assert not (tmp_path / "metrics.jsonl").exists()
    with pytest.raises(InputError, match="log_to='wandb' writes below an output folder; give `out`"):
        train(None, vectors(), config(log_to="wandb"), progress=False)
