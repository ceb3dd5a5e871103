"""Claims that are known to be false or true: how they are made, and what the verdicts make of them."""

import json
import warnings
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from circuitsae.attribution import LogitTargets, attribute
from circuitsae.graph import Node, NodeKind
from circuitsae.graph.notes import Claim
from circuitsae.interventions import Recording, node_change, reads_after
from circuitsae.replacement import ReplacementModel
from circuitsae.validation.calibration import Calibration, answer, calibrate, plant
from circuitsae.validation.claims import Settings
from circuitsae.validation.controls import REACHING, Controls, draw_controls
from circuitsae.validation.verdicts import FEWEST, against_controls
from tests.handmade import wired
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import InputError
from transcoders.loading import random_model

TOKENS = torch.tensor([0, 11, 22, 33, 44, 55])


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    dictionaries = random_dictionaries("clt", n_layers=3, d_model=16, features=48, dtype=torch.float64)
    return ReplacementModel(random_model(request.param, n_layers=3, d_model=16, dtype=torch.float64), dictionaries)


@pytest.fixture(scope="module")
def graph(model):
    return attribute(model, TOKENS, targets=LogitTargets([1, 2]))


@pytest.fixture(scope="module")
def found(model, graph):
    settings = Settings(claims=["graph", "direct"], controls=60)
    return calibrate(model, [graph], edges=30, plants=6, settings=settings)


def _effect(model, trace, source: Node, target: Node, regime) -> float:
    """The oracle: one plain run without the source, the target read with the dictionaries' own weights."""
    (after,) = reads_after(model, trace, [-1.0 * node_change(model, trace, source)], regime)
    if target.kind is NodeKind.LOGIT:
        logits = (after.final[-1] - trace.frozen.reads.final[-1]) @ model.model.W_U
        return float(logits[target.index] - logits.mean())
    row = model.dictionaries.encoder_rows(target.layer, torch.tensor([target.index]))[0].detach()
    return float((after.by_layer - trace.frozen.reads.by_layer)[target.layer, target.pos] @ row)


def _node(graph, name: str) -> Node:
    return graph.nodes[graph.position[name]]


@pytest.mark.parametrize(("claim", "regime"), [("graph", "linear"), ("direct", "frozen")])
def test_pairs_without_an_edge(model, graph, found, claim, regime):
    pairs = found.pairs[found.pairs["claim"] == claim]
    tested = pairs[pairs["what"] == "tested"]
    without = pairs[pairs["what"] == "without"]
    assert len(tested) == 30
    assert len(without) > 20
    lent = {(r["target"], r["kind"], r["predicted"]) for r in tested.to_dict("records")}
    trace = model.trace(TOKENS)
    for record in without.to_dict("records"):
        source, target = _node(graph, record["source"]), _node(graph, record["target"])
        own = _effect(model, trace, source, target, regime)
        assert record["own"] == pytest.approx(own, abs=1e-9)
        assert abs(own) <= 0.05 * abs(record["predicted"]) + 1e-12
        assert (record["target"], record["kind"], record["predicted"]) in lent
        assert source.layer < target.layer
        assert source.pos <= target.pos


@pytest.mark.parametrize("claim", ["graph", "direct"])
def test_shuffled_predictions_are_those_of_others_and_false(found, claim):
    pairs = found.pairs[found.pairs["claim"] == claim]
    tested, swapped = pairs[pairs["what"] == "tested"], pairs[pairs["what"].isin(["near", "shuffled"])]
    np.testing.assert_array_equal(tested["own"], tested["predicted"])
    own = tested.set_index(["source", "target"])["own"]
    for record in swapped.to_dict("records"):
        assert record["own"] == own.loc[(record["source"], record["target"])]
        assert record["predicted"] in tested.loc[tested["kind"] == record["kind"], "own"].to_numpy()
        ratio = record["predicted"] / record["own"]
        assert not 0.5 <= ratio <= 2
        assert record["what"] == ("near" if 0.25 <= ratio <= 4 else "shuffled")
    assert set(swapped["what"]) == {"near", "shuffled"}
    assert max(Counter(swapped["predicted"]).values()) <= 4  # swapped so many times
    every = found.pairs[found.pairs["what"].isin(["near", "shuffled"])]
    assert len(every) + found.left_out == 2 * 4 * len(tested)


def test_a_planted_edge_has_its_size_in_a_plain_run(model, graph):
    trace = model.trace(TOKENS)
    targets = [next(n for n in graph.nodes if n.kind is NodeKind.FEATURE and n.layer == 2 and n.pos == 3)]
    targets.append(next(n for n in graph.nodes if n.kind is NodeKind.LOGIT))
    sources = [Node(NodeKind.ERROR, t.layer - 1, t.pos) for t in targets]
    answers = [answer(model, Recording(model, trace), s.layer, t) for s, t in zip(sources, targets, strict=True)]
    planted = plant(trace, targets, answers, np.array([0.7, -0.3]))
    for source, target, size in zip(sources, targets, (0.7, -0.3), strict=True):
        for regime in ("frozen", "graph", "linear"):
            assert _effect(model, planted, source, target, regime) == pytest.approx(size, abs=1e-9)
        assert abs(_effect(model, trace, source, target, "graph") - size) > 1e-3
        # The rest of the error stays: only the part that the target reads was changed.
        moved = (planted.errors - trace.errors)[source.layer, source.pos].numpy()
        along = moved @ answers[targets.index(target)]
        assert abs(along) == pytest.approx(np.linalg.norm(moved) * np.linalg.norm(answers[targets.index(target)]))


def test_planted_edges_have_the_size_of_the_median_edge(found, graph):
    for claim in ("graph", "direct"):
        pairs = found.pairs[found.pairs["claim"] == claim]
        tested, planted = (pairs[pairs["what"] == what] for what in ("tested", "planted"))
        assert len(planted) == 7
        for kind in ("feature", "logit"):
            sizes = tested.loc[tested["target"].map(lambda name: _node(graph, name).kind) == kind, "predicted"].abs()
            given = planted.loc[planted["kind"] == f"error→{kind}", "predicted"].abs()
            np.testing.assert_allclose(given, sizes.median())
        if claim == "graph":
            np.testing.assert_allclose(planted["measured"], planted["predicted"], rtol=1e-9)


def test_rates_have_exact_intervals(found):
    pairs = pd.DataFrame({"claim": "graph", "what": "without", "verdict": ["confirmed"] + ["undecided"] * 39})
    (row,) = Calibration(pairs, 0).frame().to_dict("records")
    assert (row["n"], row["confirmed"], row["rate"]) == (40, 1, 1 / 40)
    assert row["low"] == pytest.approx(stats.beta.ppf(0.025, 1, 40))
    assert row["high"] == pytest.approx(stats.beta.ppf(0.975, 2, 39))
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert len(document["pairs"]) == len(found.pairs)
    assert {row["what"] for row in document["rates"]} == {"tested", "without", "near", "shuffled", "planted"}


@pytest.mark.parametrize("claim", ["graph", "direct"])
def test_of_a_network_whose_wiring_is_known_every_edge_is_confirmed_and_no_other(claim: Claim):
    network, tokens = wired(), torch.tensor([0, 3, 5, 1, 6])
    trace = network.model.trace(tokens)
    pairs, effects = network.truth(trace, claim)
    regime = {"graph": "graph", "direct": "direct"}[claim]
    for i in (0, 40, 500, 1500, 2555):  # the truth by the wiring is what runs of the model say
        ends = pairs.sources[pairs.source[i]], pairs.targets[pairs.target[i]]
        assert _effect(network.model, trace, *ends, regime) == pytest.approx(effects[i], abs=1e-9)
    judged = network.judged(tokens, claim)
    true, verdict = (judged[name].to_numpy() for name in ("true", f"{claim}_verdict"))
    assert true.sum() > 300
    np.testing.assert_array_equal(verdict == "confirmed", true)


def test_early_targets_have_controls_where_the_prompt_has_features(model):
    trace = model.trace(TOKENS)
    index = trace.features.index.numpy()
    nodes = [Node(NodeKind.FEATURE, *row) for row in index.tolist()]
    targets = [node for node in nodes if node.layer > 0]
    few = draw_controls(model, trace, nodes, targets, 20, 0)
    enough = draw_controls(model, trace, nodes, targets, 60, 0)
    for drawn, wanted in ((few, 20), (enough, REACHING)):
        for layer, pos in {(node.layer, node.pos) for node in targets}:
            below = int(((index[:, 0] < layer) & (index[:, 1] <= pos)).sum())
            there = int(((drawn.layer < layer) & (drawn.pos <= pos) & ~drawn.is_token).sum())
            assert there >= min(wanted, below)
    places = list(zip(enough.layer, enough.pos, [str(c.vectors) for c in enough.contributions], strict=True))
    assert len(set(places)) == len(places)
    assert REACHING > FEWEST
    assert draw_controls(model, trace, nodes, targets, 0, 0).contributions == []


def test_a_place_whose_controls_do_nothing_is_measured_by_all_of_them():
    """Divided by the smallest number there is, or by one, a large effect there is more, or less, than any."""
    places = np.repeat([1, 2], 20)
    controls = Controls([], np.zeros(40, dtype=int), places, np.arange(40), np.zeros(40, dtype=bool))
    moved = np.zeros(40)
    moved[:3] = [0.2, -0.1, 0.1]
    source, target = Node(NodeKind.FEATURE, 0, 2, 0), Node(NodeKind.FEATURE, 1, 2, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for predicted in (1.5, -1.5):
            p, count = against_controls(controls, source, target, predicted, predicted, np.zeros(40), moved)
            assert (p, count) == (1 / 41, 40)
        assert against_controls(controls, source, target, 1.5, 1.5, np.zeros(40), np.zeros(40)) == (1 / 41, 40)
        assert against_controls(controls, source, target, 1.5, 0.0, np.zeros(40), np.zeros(40)) == (1.0, 40)


def test_what_cannot_be_calibrated(model, graph):
    with pytest.raises(InputError, match="no graph to calibrate on"):
        calibrate(model, [])
    with pytest.raises(InputError, match="gets no verdict to calibrate"):
        calibrate(model, [graph], settings=Settings(claims=["model"]))
