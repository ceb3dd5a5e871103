"""A reproduction that was ended goes on with its next stage, and comes to the same report."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from circuitsae.graph.aggregate import aggregate
from circuitsae.loading import load_model
from circuitsae.reproduce import Reproduction, Settings, reproduce
from circuitsae.reproduce import run as stages
from circuitsae.reproduce.finished import Finished
from circuitsae.reproduce.page import page
from tests.killed import ended, forked
from tests.sample_graphs import small_graph
from transcoders.errors import Stopped

SETTINGS = replace(Settings.quick().capped(3), rescore=2, resamples=2, subsets=1, parts=1, seed=2)


def contents(report):
    """All but seconds, which differ."""
    return [
        report.claims,
        json.dumps([section.to_json() for section in report.sections]),
        page([replace_seconds(report)]),
    ]


def replace_seconds(report):
    return Reproduction(report.task, report.model, report.settings, report.claims, report.sections, {"all": 1.0})


def test_it_goes_on_after_ctrl_c_and_after_a_kill_with_the_same_report(tmp_path, monkeypatch):
    model, steps = load_model("pocket", device="cpu"), []
    whole = reproduce("induction", model, settings=SETTINGS)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stages, "role_stage", interrupted)
        with pytest.raises(
            Stopped, match="Stopped in induction: roles of heads; the stages before are kept"
        ) as stopped:
            reproduce("induction", model, settings=SETTINGS, keep=tmp_path)
        assert stopped.value.exit_code == 130
        patched.setattr(stages, "role_stage", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        patched.setattr(stages, "component_stage", None)  # done before
        status = ended(forked(lambda: reproduce("induction", model, settings=SETTINGS, keep=tmp_path)))
        assert status == -signal.SIGKILL
        patched.undo()
        patched.setattr(stages, "component_stage", None)
        again = reproduce("induction", model, settings=SETTINGS, keep=tmp_path, progress=steps.append)
    assert contents(again) == contents(whole)
    assert [step for step in steps if step.endswith("done before")] == [
        "induction: behaviour: done before",
        "induction: heads and MLPs: done before",
    ]
    other = replace(SETTINGS, seed=3)
    with monkeypatch.context() as patched:
        patched.setattr(stages, "behaviour_stage", interrupted)  # of other settings nothing is done
        with pytest.raises(Stopped, match="behaviour"):
            reproduce("induction", model, settings=other, keep=tmp_path)


def test_what_a_stage_adds_comes_back_as_it_was(tmp_path):
    report, graph = Reproduction("ioi", "m", {}, seconds={"features": 2.5}), small_graph()
    report.add("before", 1.0)
    report.add("a claim", np.float64(0.1) + 0.2, at_least=0.5, note="‽")
    report.add("none", float("nan"))
    frame = pd.DataFrame(
        {"x": [1, 2], "y": [0.1, np.nan], "head": ["a0.h1", None], "seen": [True, False]}, index=[3, 1]
    )
    figure = go.Figure().add_scatter(x=np.arange(3), y=np.array([0.1, 1 / 3, np.nan]))
    report.section("a section", "with a text", frame, figure)
    report.section("empty", table=pd.DataFrame())
    report.graph = aggregate([graph], [{}])
    kept = Finished(tmp_path, {"task": "ioi"})
    kept.save("features", report, (1, 0), None)
    found = Reproduction("ioi", "m", {})
    assert kept.restore("features", found, None) == (True, None)
    assert [(c.name, c.at_least, c.note) for c in found.claims] == [("a claim", 0.5, "‽"), ("none", None, "")]
    assert found.claims[0].measured == 0.1 + 0.2
    table = found.sections[0].table
    pd.testing.assert_frame_equal(table, frame)
    assert found.sections[0].figure.to_json() == figure.to_json()
    assert (found.seconds, found.sections[1].table.shape) == ({"features": 2.5}, (0, 0))
    for name in ("nodes", "edges"):
        pd.testing.assert_frame_equal(getattr(found.graph, name), getattr(report.graph, name))
    assert found.graph.places == report.graph.places
    assert found.graph.scores == report.graph.scores
    (file,) = (path for path in tmp_path.rglob("*.json"))
    file.write_text(file.read_text()[:-40])  # cut off: not done
    assert kept.restore("features", found, None) == (False, None)
    assert len(found.claims) == 2
