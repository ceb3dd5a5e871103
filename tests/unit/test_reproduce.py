"""Claims, roles of heads, supernodes and walks, each against what is known by hand."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from circuitsae.commands import app
from circuitsae.components import Scores
from circuitsae.components.discovery import Rescored
from circuitsae.components.network import Network
from circuitsae.graph import AttributionGraph, Node, NodeKind
from circuitsae.interventions import Feature
from circuitsae.loading import load_model
from circuitsae.reproduce import Claim, Reproduction, Settings, head_roles, reproduce
from circuitsae.reproduce.circuit import FoundCircuit, bootstrap_jaccard, stability_stage
from circuitsae.reproduce.cross_layer import walk
from circuitsae.reproduce.features import supernodes
from circuitsae.reproduce.page import markdown, page
from circuitsae.reproduce.result import write_json
from circuitsae.reproduce.roles import Pattern, attention_between
from circuitsae.tasks import load_task
from circuitsae.validation import Ranking
from transcoders.errors import InputError
from transcoders.random_models import random_model


@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        ({"measured": 0.96, "at_least": 0.95}, "met"),
        ({"measured": 1.2, "at_least": 0.95, "at_most": 1.05}, "not met"),
        ({"measured": float("nan"), "at_least": 0.95}, "not met"),
        ({"measured": 3.4, "published": 3.56}, "agrees"),
        ({"measured": 1.0, "published": 3.56}, "differs"),
        ({"measured": 1.0}, "measured"),
        ({"measured": None}, "not measured"),
    ],
)
def test_verdicts(options, verdict):
    assert Claim(task="ioi", name="x", **options).verdict == verdict


def test_reports_hold_every_claim_and_escape_what_they_say(tmp_path):
    report = Reproduction("ioi", "<b>model</b>", {})
    report.add("a claim", float("nan"), at_least=1.0, note="<script>")
    report.section("A table", "text", pd.DataFrame({"x": [0.5], "head": ["a0.h1"]}))
    assert report.failed
    text = page([report], "circuitsae reproduce ioi")
    assert "&lt;script&gt;</td>" in text
    assert text.count("<script>") == page([], "").count("<script>"), "only those of the page itself"
    assert "&lt;script&gt;" in text
    assert "not met" in text
    assert "| a0.h1 |" in markdown([report], "circuitsae reproduce ioi")
    written = json.loads(write_json([report], tmp_path / "r.json").read_text(encoding="utf-8"))
    assert written[0]["claims"][0]["measured"] is None


def test_attention_between_roles_is_the_models_own():
    model = load_model("pocket")
    task = load_task("ioi", model, 6, 0)
    pattern = Pattern("x", "END", "S2", offsets=(0, 1))
    found = attention_between(model, task, (pattern,))[pattern]
    slow = torch.zeros(2, 32, dtype=torch.float64)
    for example in range(len(task)):
        (pair,) = task.take([example]).tokens(model)
        for layer in range(4):
            name = f"blocks.{layer}.attn.hook_pattern"
            _, cache = model.run_hooked(pair.clean, read=[name])
            for offset in (0, 1):
                at = cache[name][0, :, -1, int(pair.roles["S2"][0]) + offset]
                slow[offset, 8 * layer : 8 * layer + 8] += at.double() / len(task)
    assert torch.allclose(found[0], slow, atol=1e-6)


def test_the_pocket_models_mover_is_found():
    model = load_model("pocket")
    table = head_roles(model, load_task("ioi", model, 12, 0))
    movers = table[table["role"] == "name mover through S2"].set_index("head")
    assert "a1.h1" in movers.index
    assert movers.loc["a1.h1", "attention"] > 0.8
    assert movers.loc["a1.h1", "effect"] < -0.5
    with pytest.raises(InputError, match="docstring"):
        head_roles(model, load_task("docstring", model, 2, 0))


def test_nodes_with_one_profile_are_one_supernode():
    nodes = (Feature(0, 1, "S"), Feature(1, 2, "S"), Feature(0, 3, "S"), Feature(0, 1, "END"))
    scores = np.array([[1.0, 2.0, 3.0, 1.0], [1.0, 2.0, -3.0, 1.0]] * 2)
    ranking = Ranking(nodes, scores)
    found = supernodes(ranking, ranking.circuit(), ["a", "b", "a", "b"])
    assert sorted(sorted(int(node.index) for node in group.nodes if isinstance(node, Feature)) for group in found) == [
        [1],
        [1, 2],
        [3],
    ]
    pair = next(group for group in found if len(group.nodes) == 2)
    assert pair.effect == pytest.approx(3.0)
    assert pair.invariant
    assert not next(group for group in found if group.nodes[0] == Feature(0, 3, "S")).invariant


def test_walks_count_the_edges_between():
    feature = Node(NodeKind.FEATURE, 0, 1, 7, activation=1.0)
    logit = Node(NodeKind.LOGIT, 1, 1, 5, probability=0.5)
    nodes = [Node(NodeKind.TOKEN, -1, 1, 3), feature, Node(NodeKind.ERROR, 0, 1), logit]
    table = np.zeros((4, 4))
    table[1, 0] = 2.0
    table[3, [0, 1, 2]] = 1.0, -2.0, 1.0
    graph = AttributionGraph.build(nodes, sparse.csr_array(table), ["x", "y"], [0, 1], 1, {})
    found = walk(graph, 1, {(0, 7)})
    assert found.steps == pytest.approx({1: 0.25, 2: 0.5})
    assert found.to_errors == pytest.approx(0.25)
    assert found.through == pytest.approx(0.5)


def test_edges_that_never_vary_are_selected_every_time():
    values = torch.tensor([3.0, 2.0, 1.0, 0.0]).expand(10, 4)[..., None]
    scores = Scores(tuple("abcd"), values, "exact")
    assert bootstrap_jaccard(scores, 2, 10, Settings.quick()) == 1.0


def test_an_unknown_task_is_refused():
    with pytest.raises(InputError, match="docstring"):
        reproduce("docstring", load_model("pocket"))


def test_capped_settings_leave_no_long_stage():
    capped = Settings.quick(seed=3).capped(4)
    assert (capped.behaviour, capped.discovery, capped.stability, capped.features) == (4, 4, 4, 4)
    assert (capped.pruning, capped.greedy, capped.seed) == (0, 0, 3)
    assert capped.ablated == 4 <= Settings.quick().ablated
    with pytest.raises(InputError, match="at least 2"):
        Settings().capped(1)


def test_quick_takes_less_of_a_large_model_unless_told_otherwise():
    large = random_model("llama", n_layers=12, d_model=16, n_heads=8, d_vocab=11, context=4)
    quick = Settings.quick()
    assert quick.quick_for(load_model("pocket")) == quick
    small = quick.quick_for(large)
    assert (small.discovery, small.stability, small.doublings, small.rescore) == (24, 24, 0, 200)
    asked = replace(quick.capped(30), rescore=7)
    assert asked.quick_for(large, prompts=30) == asked


def test_a_stage_that_is_capped_scores_no_more_prompts(monkeypatch):
    """The selected edges of two prompts never agree; without doublings that is said at once."""
    model, sizes = load_model("pocket"), []
    values = torch.randn(4, 6, 1, generator=torch.Generator().manual_seed(0))
    edges = Network.of(model).graph.edges[:6]
    scored = Rescored(Scores(edges, values, "exact"), Scores(edges, values, "exact"), frozenset(), 0)
    monkeypatch.setattr("circuitsae.reproduce.circuit.score_edges", lambda *_, **__: scored)
    found = FoundCircuit(frozenset(edges[:2]), scored, Network.of(model).graph)
    for settings in (Settings.quick().capped(4), replace(Settings.quick().capped(4), doublings=2)):
        report, told = Reproduction("ioi", "made", {}), []
        stability_stage(report, model, found, settings, told.append)
        sizes.append(told)
    assert sizes[0] == ["scoring edges on 4 prompts"]
    assert sizes[1] == [f"scoring edges on {n} prompts" for n in (4, 8, 16)]


def test_the_command_passes_on_that_only_known_prompts_are_taken(tmp_path, monkeypatch):
    given = []

    def run(task, *_, settings, **__):
        given.append(settings)
        return Reproduction(task, "pocket", {})

    monkeypatch.setattr("circuitsae.reproduce.reproduce", run)
    for flags in ([], ["--known"]):
        app.run(["reproduce", "ioi", "--quick", *flags, "--out", str(tmp_path), "--docs", str(tmp_path / "page.md")])
        assert given.pop().known == bool(flags)
        assert ("reproduce ioi --quick --known" in (tmp_path / "page.md").read_text()) == bool(flags)
