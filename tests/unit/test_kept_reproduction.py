"""A reproduction that was ended goes on with its next stage, and comes to the same report."""

import json
import os
import signal
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from circuitsae.components import Edge, problems_of, score_edges
from circuitsae.components.network import Network
from circuitsae.graph.aggregate import aggregate
from circuitsae.reproduce import Reproduction, Settings, reproduce
from circuitsae.reproduce import run as stages
from circuitsae.reproduce.circuit import FoundCircuit
from circuitsae.reproduce.finished import Finished
from tests.killed import ended, forked
from tests.sample_graphs import small_graph
from transcoders.errors import Stopped

SETTINGS = replace(Settings.quick().capped(3), rescore=2, resamples=2, subsets=1, parts=1, seed=2)


def contents(report):
    """All but seconds, which differ."""
    figures = [section.figure and json.loads(str(section.figure.to_json())) for section in report.sections]
    return report.claims, json.dumps([section.to_json() for section in report.sections]), figures


def few_edges(report, model, settings, tell):
    """The stage of heads and MLPs, with the search for a circuit left out."""
    tell("scoring edges")
    scored = score_edges(problems_of(model, settings.prompts(report.task, model, settings.discovery)), rescore=2)
    best = [edge for edge in scored.scores.ranked() if isinstance(edge, Edge)][:5]
    report.add("edges", float(len(best)), at_least=3.0)
    report.section("Scores", "of all edges", scored.scores.frame())
    return FoundCircuit(frozenset(best), scored, Network.of(model).graph)


def heads_alone(report, model, task, circuit, **_):
    """The stage of roles, with all but the circuit left out."""
    report.section("Roles of heads", f"of {len(task)} prompts", pd.DataFrame({"head": circuit}))


def test_it_goes_on_after_ctrl_c_and_after_a_kill_with_the_same_report(pocket, tmp_path, monkeypatch):
    steps, done = [], list[str]()

    def reproduced(stop=None, **how):
        """With the second stage interrupted, if wished, and `done` told of those that are run."""
        with monkeypatch.context() as patched:
            for name, work in (("component_stage", few_edges), ("role_stage", stop or heads_alone)):
                patched.setattr(
                    stages, name, lambda *a, name=name, work=work, **k: (done.append(name), work(*a, **k))[1]
                )
            given: dict[str, Any] = {"settings": SETTINGS} | how
            return reproduce("induction", pocket, **given)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    whole = reproduced()
    assert {section.title for section in whole.sections} >= {"Scores", "Roles of heads", "Heads and MLPs: stability"}
    with pytest.raises(Stopped, match="Stopped in induction: roles of heads; the stages before are kept") as stopped:
        reproduced(interrupted, keep=tmp_path)
    assert stopped.value.exit_code == 130
    killed = forked(lambda: reproduced(lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL), keep=tmp_path))
    assert ended(killed) == -signal.SIGKILL
    done.clear()
    again = reproduced(keep=tmp_path, progress=steps.append)
    assert contents(again) == contents(whole)
    assert done == ["role_stage"]
    assert [step for step in steps if step.endswith("done before")] == [
        "induction: behaviour: done before",
        "induction: heads and MLPs: done before",
    ]
    with pytest.raises(Stopped, match="roles"):
        reproduced(interrupted, keep=tmp_path, settings=replace(SETTINGS, seed=3))
    assert done == ["role_stage", "component_stage", "role_stage"]  # of other settings nothing is done


def test_what_a_stage_adds_comes_back_as_it_was(pocket, tmp_path):
    components = Network.of(pocket).graph
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
    assert kept.restore("features", found, components) == (True, None)
    assert [(c.name, c.at_least, c.note) for c in found.claims] == [("a claim", 0.5, "‽"), ("none", None, "")]
    assert found.claims[0].measured == 0.1 + 0.2
    first, second = found.sections
    assert first.table is not None
    assert second.table is not None
    assert first.figure is not None
    pd.testing.assert_frame_equal(first.table, frame)
    assert json.loads(str(first.figure.to_json())) == json.loads(str(figure.to_json()))
    assert (found.seconds, second.table.shape) == ({"features": 2.5}, (0, 0))
    for name in ("nodes", "edges"):
        pd.testing.assert_frame_equal(getattr(found.graph, name), getattr(report.graph, name))
    assert found.graph.places == report.graph.places
    assert found.graph.scores == report.graph.scores
    (file,) = (path for path in tmp_path.rglob("*.json"))
    file.write_text(file.read_text()[:-40])  # cut off: not done
    assert kept.restore("features", found, components) == (False, None)
    assert len(found.claims) == 2
