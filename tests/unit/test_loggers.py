"""Sinks write what they are given, and say one clear sentence where their package is missing."""

import importlib
import sys
import types

import pytest

from transcoders.errors import InputError
from transcoders.training.loggers import open_sink, scalars

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


def test_wandb_gets_the_settings_and_every_line(monkeypatch, tmp_path):
    runs = []
    fake = types.ModuleType("wandb")
    fake.__dict__["init"] = lambda **settings: runs.append(FakeRun(**settings)) or runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with open_sink("wandb", folder=tmp_path, name="topk", config={"k": 8}) as sink:
        sink(METRICS)
        sink({"step": 8, "fvu": 0.25})
        assert not runs[0].finished
    assert runs[0].finished
    assert runs[0].settings["config"] == {"k": 8}
    assert runs[0].settings["name"] == "topk"
    assert runs[0].settings["dir"] == str(tmp_path)
    assert runs[0].lines == [(7, {"fvu": 0.5, "l0_per_layer/0": 1.0, "l0_per_layer/1": 2.0}), (8, {"fvu": 0.25})]


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
