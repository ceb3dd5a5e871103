"""Edges of one prompt on other prompts: who corresponds to whom, what is claimed there, how stable that is."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from circuitsae import validation
from circuitsae.attribution import LogitTargets, attribute
from circuitsae.graph import Node, NodeKind
from circuitsae.interventions import Prompt, node_change, reads_after
from circuitsae.replacement import ReplacementModel
from circuitsae.validation import prompts
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import InputError
from transcoders.loading import random_model

# Tables come back as Any: pandas' declared types are wider than what these hold.
validate: Any = validation.validate
on_prompts: Any = prompts.on_prompts
stability: Any = prompts.stability
survey: Any = validation.survey
Answered = prompts.Answered

TOKENS = torch.tensor([0, 11, 22, 33])
OTHER = torch.tensor([0, 44, 55, 60])
LONGER = torch.tensor([0, 9, 11, 22, 33])


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    dictionaries = random_dictionaries("clt", n_layers=3, d_model=16, features=24, dtype=torch.float64)
    return ReplacementModel(random_model(request.param, n_layers=3, d_model=16, dtype=torch.float64), dictionaries)


@pytest.fixture(scope="module")
def graph(model):
    return attribute(model, TOKENS, targets=LogitTargets([1, 2]))


@pytest.fixture(scope="module")
def check(model, graph):
    return validate(model, graph, edges=40, controls=60, prompts=[TOKENS, OTHER])


def _effect(model, tokens, source: Node, target: Node, regime) -> float:
    """The oracle: one plain run without the source, the target read with the dictionaries' own weights."""
    trace = model.trace(tokens)
    (after,) = reads_after(model, trace, [-1.0 * node_change(model, trace, source)], regime)
    if target.kind is NodeKind.LOGIT:
        logits = (after.final[-1] - trace.frozen.reads.final[-1]) @ model.model.W_U
        return float(logits[target.index] - logits.mean())
    row = model.dictionaries.encoder_rows(target.layer, torch.tensor([target.index]))[0].detach()
    return float((after.by_layer - trace.frozen.reads.by_layer)[target.layer, target.pos] @ row)


def test_on_the_same_prompt_every_claim_is_the_same(check):
    own = check.prompts[check.prompts["prompt"] == 0].reset_index(drop=True)
    assert own["active"].all()
    shared = [c for c in own if c in check.edges]
    assert {"graph_verdict", "graph_p", "direct_ratio", "model_measured", "miss_patterns"} <= set(shared)
    pd.testing.assert_frame_equal(own[shared], check.edges[shared], check_dtype=False, rtol=1e-9, atol=1e-12)


def test_elsewhere_the_claims_are_those_of_the_other_prompts_graph(model, graph, check):
    there = attribute(model, OTHER, targets=LogitTargets([1, 2]))
    other = check.prompts[check.prompts["prompt"] == 1]
    assert len(other) == len(check.edges)
    assert set(other["active"]) == {True, False}
    for record in other.to_dict("records"):
        names = record["source"], record["target"]
        assert record["active"] == all(name in there.position for name in names)
        if not record["active"]:
            assert np.isnan(record["graph_measured"])
            continue
        ends = [there.position[name] for name in names]
        assert record["direct_predicted"] == pytest.approx(-there.weights[ends[1], ends[0]], abs=1e-9)
        nodes = there.nodes[ends[0]], there.nodes[ends[1]]
        for name, regime in (("graph_predicted", "linear"), ("graph_measured", "graph"), ("model_measured", "model")):
            assert record[name] == pytest.approx(_effect(model, OTHER, *nodes, regime), abs=1e-9)


def test_roles_say_which_positions_correspond(model, graph):
    edges = pd.DataFrame(
        {
            "source": ["tok@1", "tok@2", "tok@3", "tok@1"],
            "target": ["logit.1@3", "logit.2@3", "logit.1@3", "logit.2@3"],
        }
    )
    shifted = Prompt(LONGER, {"A": 2, "B": 3})
    found = on_prompts(model, graph, edges, [shifted], roles={"A": 1, "B": 2})
    assert found["source"].tolist() == ["tok@1", "tok@2", "tok@1"]  # position 3 has no role, and the lengths differ
    for record, pos in zip(found.to_dict("records"), (2, 3, 2), strict=True):
        target = graph.nodes[graph.position[record["target"]]]
        effect = _effect(model, LONGER, Node(NodeKind.TOKEN, -1, pos), target, "direct")
        assert record["direct_measured"] == pytest.approx(effect, abs=1e-9)


def test_edges_against_the_order_of_positions_have_no_row(model, graph):
    target = next(n.id for n in graph.nodes if n.kind is NodeKind.FEATURE and n.pos == 2)
    edges = pd.DataFrame({"source": ["tok@1"], "target": [target]})
    swapped = Prompt(TOKENS, {"A": 2, "B": 1})
    assert on_prompts(model, graph, edges, [swapped], roles={"A": 1, "B": 2}).empty
    assert len(on_prompts(model, graph, edges, [TOKENS], roles={"A": 1, "B": 2})) == 0  # without roles over there
    assert len(on_prompts(model, graph, edges, [TOKENS])) == 1


def test_another_token_may_be_the_answer(model, graph):
    edges = pd.DataFrame({"source": ["tok@1", "tok@1"], "target": ["logit.1@3", "logit.2@3"]})
    found = on_prompts(model, graph, edges, [Answered(OTHER, answers={1: 7})])
    assert found["target"].tolist() == ["logit.1@3"]  # nothing there stands for token 2
    effect = _effect(model, OTHER, Node(NodeKind.TOKEN, -1, 1), Node(NodeKind.LOGIT, 3, 3, 7), "graph")
    assert found["graph_measured"].item() == pytest.approx(effect, abs=1e-9)


def test_a_feature_at_the_first_position_has_no_counterpart(model, graph):
    source = next(n for n in graph.nodes if n.kind is NodeKind.FEATURE and n.pos == 1)
    edges = pd.DataFrame({"source": [source.id], "target": ["logit.1@3"]})
    assert on_prompts(model, graph, edges, [Prompt(TOKENS, {"A": 0})], roles={"A": 1}).empty


def test_stability_beside_the_edges(check, tmp_path):
    own = check.edges.set_index(["source", "target"])
    for ends, rows in check.prompts.groupby(["source", "target"]):
        on = rows[rows["active"]]
        record = own.loc[ends]
        assert record["prompts"] == len(on)
        assert record["stability"] == pytest.approx((on["graph_verdict"] == "confirmed").mean())
        x, y = on["graph_predicted"].astype(float), on["graph_measured"].astype(float)
        assert record["pooled"] == pytest.approx((x @ y) / (x @ x))
    again = validation.Validation.load(check.save(tmp_path / "validation.json"))
    assert len(again.prompts) == len(check.prompts)
    np.testing.assert_allclose(again.edges["pooled"], check.edges["pooled"])


def test_stability_by_hand():
    frame = pd.DataFrame(
        {
            "source": ["a"] * 4 + ["b"],
            "target": "t",
            "prompt": [0, 1, 2, 3, 0],
            "active": [True, True, True, False, False],
            "graph_verdict": ["confirmed", "confirmed", "undecided", None, None],
            "graph_predicted": [1.0, 2.0, 1.0, np.nan, np.nan],
            "graph_measured": [1.0, 2.0, -1.0, np.nan, np.nan],
        }
    )
    first, second = stability(frame).to_dict("records")
    assert (first["source"], first["prompts"], first["stability"]) == ("a", 3, 2 / 3)
    # Clopper–Pearson: the beta quantiles of k and n − k.
    assert first["stability_low"] == pytest.approx(stats.beta.ppf(0.025, 2, 2))
    assert first["stability_high"] == pytest.approx(stats.beta.ppf(0.975, 3, 1))
    assert (first["pooled"], first["pooled_low"], first["pooled_high"]) == pytest.approx((4 / 6, -1.0, 1.0))
    assert (second["source"], second["prompts"]) == ("b", 0)
    assert np.isnan([second[c] for c in ("stability", "stability_high", "pooled", "pooled_low")]).all()


def test_what_cannot_be_asked(model, graph):
    edges = pd.DataFrame({"source": ["tok@1"], "target": ["logit.1@3"]})
    with pytest.raises(InputError, match="Role 'A' is at position 4, but the graph's prompt has 4 tokens"):
        on_prompts(model, graph, edges, [TOKENS], roles={"A": 4})
    with pytest.raises(InputError, match="no verdict on other prompts"):
        validate(model, graph, claims=["model"], prompts=[TOKENS])
    assert on_prompts(model, graph, edges, []).empty


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("One prompt of\n\n  Another, with its spaces \n")
    assert prompts.read_prompts(path) == ["One prompt of", "  Another, with its spaces "]
    path.write_text("\n \n")
    with pytest.raises(InputError, match="has no prompt; give a text file with one prompt a line"):
        prompts.read_prompts(path)
    with pytest.raises(InputError, match="cannot be read"):
        prompts.read_prompts(tmp_path / "absent.txt")


# many prompts of many tasks


@pytest.fixture(scope="module")
def found(model):
    settings = {"edges": 12, "claims": ["graph", "direct"], "controls": 30}
    return survey(model, {"one": [TOKENS, OTHER], "two": [TOKENS]}, nodes=0.95, **settings)


def test_a_survey_is_every_prompt_validated(model, found):
    graph = attribute(model, TOKENS).prune(nodes=0.95)
    alone = validate(model, graph, edges=12, claims=["graph", "direct"], controls=30)
    mine = found.edges[found.edges["task"] == "two"].drop(columns=["task", "prompt"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, alone.edges, check_dtype=False)
    assert found.tasks == ["one", "two"]
    assert found.prompts[["task", "prompt"]].to_numpy().tolist() == [["one", 0], ["one", 1], ["two", 0]]
    assert found.prompts["share"].iloc[2] == pytest.approx(alone.share)
    assert found.prompts[["frozen_error", "logit_error"]].to_numpy().max() < 1e-9


def test_a_survey_sums_up_by_task_and_class(found):
    for claim in ("graph", "direct"):
        every = found.agreement(claim, bootstrap=20).set_index("edges")
        assert every.loc["all", "n"] == len(found.edges)
        one = found.agreement(claim, "one", bootstrap=0).set_index("edges")
        rows = found.edges[found.edges["task"] == "one"]
        x, y = (rows[f"{claim}_{name}"].to_numpy(float) for name in ("predicted", "measured"))
        assert one.loc["all", "slope"] == pytest.approx((x @ y) / (x @ x))
        assert one.loc["all", "n"] == len(rows) == one["n"].iloc[1:].sum()
        counts = found.verdicts(claim).set_index("task")
        assert counts.to_numpy().sum() == len(found.edges)
        assert all(pd.api.types.is_integer_dtype(dtype) for dtype in counts.dtypes)
        confirmed = (rows[f"{claim}_verdict"] == "confirmed").sum()
        assert counts.get("confirmed", pd.Series({"one": 0}))["one"] == confirmed
    json.dumps(found.to_json(), allow_nan=False)


def test_the_intervals_of_a_survey_draw_whole_prompts():
    rows = {"kind": "a→b", "task": "t", "prompt": np.repeat([0, 1, 2, 3], 25), "graph_predicted": 1.0}
    measured = np.repeat([1.0, 1.0, -1.0, -1.0], 25)
    edges = pd.DataFrame(rows).assign(graph_measured=measured)
    (record, _) = validation.Survey(edges, pd.DataFrame()).agreement(bootstrap=400).to_dict("records")
    assert record["sign"] == 0.5
    assert (record["sign_low"], record["sign_high"]) == (0.0, 1.0)  # of 100 edges drawn alone, [.4, .6]


def test_a_survey_of_nothing(model):
    with pytest.raises(InputError, match="no prompt to validate"):
        survey(model, {"one": []})
