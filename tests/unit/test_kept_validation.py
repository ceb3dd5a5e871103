"""A validation that was ended goes on, and comes to the same table to the last bit."""

import os
import signal
from typing import Any

import numpy as np
import pytest
import torch

import circuitsae as cs
from circuitsae.attribution import LogitTargets
from circuitsae.replacement import ReplacementModel
from circuitsae.validation import measuring
from tests.killed import ended, forked
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import Stopped
from transcoders.loading import random_model

RUN_READS = measuring.run_reads
SETTINGS: dict[str, Any] = {"edges": 12, "controls": 20, "seed": 1}
TOKENS = torch.tensor([0, 11, 22, 33, 44])


@pytest.fixture(scope="module")
def case():
    """A random model, a graph, and what an undisturbed validation says of it."""
    dictionaries = random_dictionaries("clt", n_layers=3, d_model=16, features=24)
    model = ReplacementModel(random_model("gpt2", n_layers=3, d_model=16), dictionaries)
    graph = cs.attribute(model, TOKENS, targets=LogitTargets([1, 2]))
    return model, graph, cs.validate(model, graph, **SETTINGS)


def counted(monkeypatch, at=None, then=None):
    """The numbers of runs in each list that is measured; `then` is done before the `at`-th."""
    made = []

    def run_reads(model, prompt, alternatives, regime, **how):
        made.append(len(alternatives))
        if len(made) == at and then is not None:
            then()
        return RUN_READS(model, prompt, alternatives, regime, **how)

    monkeypatch.setattr(measuring, "run_reads", run_reads)
    return made


def same(a, b):
    assert a.to_json() == b.to_json()
    assert a.edges.equals(b.edges)


def test_it_goes_on_after_ctrl_c_with_the_same_numbers(case, tmp_path, monkeypatch):
    model, graph, whole = case
    made = counted(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped, match="what was measured is kept, and the same command goes on") as stopped:
        cs.validate(model, graph, **SETTINGS, keep=tmp_path)
    assert stopped.value.exit_code == 130
    assert len(made) == 4
    assert len(list(tmp_path.glob("*.npy"))) == 3
    again = counted(monkeypatch)
    same(cs.validate(model, graph, **SETTINGS, keep=tmp_path), whole)
    lists = len(again) + 3
    assert len(list(tmp_path.iterdir())) == lists
    none = counted(monkeypatch)
    same(cs.validate(model, graph, **SETTINGS, keep=tmp_path), whole)
    assert none == []


def test_it_goes_on_after_a_kill(case, tmp_path, monkeypatch):
    model, graph, whole = case
    counted(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert ended(forked(lambda: cs.validate(model, graph, **SETTINGS, keep=tmp_path))) == -signal.SIGKILL
    kept = sorted(tmp_path.glob("*.npy"))
    assert len(kept) == 2
    kept[0].write_bytes(kept[0].read_bytes()[:100])  # cut short: measured again
    made = counted(monkeypatch)
    same(cs.validate(model, graph, **SETTINGS, keep=tmp_path), whole)
    assert len(list(tmp_path.glob("*.npy"))) == len(made) + 1


def test_other_settings_and_other_graphs_find_nothing_of_it(case, tmp_path, monkeypatch):
    model, graph, _ = case
    made = counted(monkeypatch)
    cs.validate(model, graph, **SETTINGS, keep=tmp_path)
    lists = len(made)
    for changed, new in (({"controls": 19}, 4), ({"edges": 11}, lists)):
        made.clear()
        settings: dict[str, Any] = SETTINGS | changed
        kept = cs.validate(model, graph, **settings, keep=tmp_path)
        assert len(made) >= new
        same(kept, cs.validate(model, graph, **settings))
    made.clear()
    other = cs.attribute(model, TOKENS + 1, targets=LogitTargets([1, 2]))
    same(cs.validate(model, other, **SETTINGS, keep=tmp_path), cs.validate(model, other, **SETTINGS))
    assert len(made) == 2 * lists


def test_runs_that_share_passes_are_kept_together(case, tmp_path):
    model, graph, _ = case
    pairs = measuring_case(model, graph)
    apart = measuring.effects_in(*pairs, together=True)
    kept = measuring.Kept(tmp_path, model)
    begun = []
    for _ in range(2):
        found = measuring.effects_in(*pairs, together=True, kept=kept, begin=begun.append)
        assert all(np.array_equal(a, b) for a, b in zip(apart, found, strict=True))
    assert begun == [sum(map(len, apart)), 0]
    assert len(list(tmp_path.iterdir())) == 1


def measuring_case(model, graph) -> Any:
    from circuitsae.interventions import Recording
    from circuitsae.interventions.changes import node_changes
    from circuitsae.interventions.writers import Shares, Writers

    prompt = Recording(model, measuring.traced(model, graph))
    nodes = [node for node in graph.nodes if node.kind == "feature" and node.layer == 0][:5]
    shares = Shares.removing(Writers(model, prompt, node_changes(model, prompt.trace, nodes)))
    return (
        model,
        prompt,
        [(shares, "frozen"), (shares, "graph")],
        measuring.Targets(model, prompt.trace, graph.top_logits()),
    )
