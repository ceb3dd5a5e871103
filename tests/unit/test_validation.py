"""Validation: predictions, measurements, controls and verdicts."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from circuitsae.attribution import LogitTargets, attribute
from circuitsae.attribution.nodes import logit_targets
from circuitsae.graph import NodeKind
from circuitsae.interventions import node_change, reads_after
from circuitsae.replacement import ReplacementModel
from circuitsae.validation import Validation, agreement, validate
from circuitsae.validation.edges import _verdicts
from circuitsae.validation.statistics import _resamples, interval
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import InputError
from transcoders.loading import random_model

TOKENS = torch.tensor([0, 11, 22, 33])
REGIMES = ("frozen", "replacement", "model")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    dictionaries = random_dictionaries("clt", n_layers=3, d_model=16, features=24, dtype=torch.float64)
    return ReplacementModel(random_model(request.param, n_layers=3, d_model=16, dtype=torch.float64), dictionaries)


@pytest.fixture(scope="module")
def graph(model):
    return attribute(model, TOKENS, targets=LogitTargets([1, 2]))


@pytest.fixture(scope="module")
def check(model, graph):
    return validate(model, graph, edges=60, regimes=REGIMES, controls=8)


def test_the_strongest_edges_are_chosen(graph, check):
    usable = graph.mask(NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN)
    coo = graph.weights.tocoo()
    strongest = np.sort(abs(coo.data[usable[coo.col]]))[::-1][:60]
    np.testing.assert_allclose(check.edges["weight"].abs(), strongest)
    np.testing.assert_allclose(check.edges["predicted"], -check.edges["weight"])


def test_the_frozen_regime_agrees_to_rounding(check):
    np.testing.assert_allclose(check.edges["frozen"], check.edges["predicted"], atol=1e-9)
    assert check.frozen_error < 1e-9


def test_with_error_nodes_the_logits_are_the_models(check):
    assert check.logit_error < 1e-9


def test_a_measured_effect_on_a_logit_is_a_run_of_the_model(model, graph, check):
    trace = model.trace(TOKENS)
    row = check.edges[check.edges["target"].str.startswith("logit")].iloc[0]
    source, target = graph.nodes[graph.position[row.source]], graph.nodes[graph.position[row.target]]
    (reads,) = reads_after(model, trace, [-1.0 * node_change(model, trace, source)], "model")
    logits = reads.final[-1] @ model.model.W_U
    after, before = (float((x - x.mean())[target.index]) for x in (logits, trace.logits[-1]))
    assert row.measured == pytest.approx(after - before, abs=1e-9)
    assert logit_targets(trace, torch.tensor([target.index])).vector.shape == (1, 16)


def test_every_control_is_kept_and_bounds_the_verdict(check):
    assert len(check.controls) == 60 * 8
    effects = np.abs(check.controls["measured"].to_numpy(float)).reshape(60, 8)
    np.testing.assert_allclose(check.edges["control"], np.quantile(effects, 0.95, axis=1))
    assert sum(check.verdicts().values()) == 60


def test_verdicts_follow_their_definition():
    frame = pd.DataFrame({"predicted": [1.0, 1.0, 1.0, -1.0], "measured": [2.0, -2.0, 0.5, -2.0], "control": 1.0})
    assert list(_verdicts(frame)) == ["confirmed", "reversed", "null", "confirmed"]


@pytest.mark.parametrize(("measured", "control"), [(0.0, 0.0), (1.0, 1.0), (-1.0, 1.0), (np.nan, 0.0), (1.0, np.nan)])
def test_an_effect_that_only_ties_with_its_controls_is_null(measured, control):
    frame = pd.DataFrame({"predicted": [1.0, -1.0], "measured": measured, "control": control})
    assert list(_verdicts(frame)) == ["null", "null"]


def test_the_seed_fixes_the_controls(model, graph):
    one, same, other = (validate(model, graph, edges=5, controls=3, seed=seed) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(one.controls, same.controls)
    assert not np.allclose(one.controls["measured"].to_numpy(float), other.controls["measured"].to_numpy(float))


def test_findings_stand_on_the_networkx_edges_and_in_the_file(graph, check, tmp_path):
    g = check.annotate(graph).to_networkx()
    row = check.edges.iloc[0]
    edge = g.edges[row.source, row.target]
    assert edge["verdict"] == row.verdict
    assert edge["measured"] == row.measured
    document = json.loads(check.save(tmp_path / "validation.json").read_text())
    assert document["verdicts"] == check.verdicts()
    assert len(document["edges"]) == 60
    assert document["agreement"]["all"]["n"] == 60


def test_without_the_model_regime_there_is_no_verdict(model, graph):
    check = validate(model, graph, edges=5, regimes=("frozen",))
    assert "verdict" not in check.edges
    assert check.verdicts() == {"confirmed": 0, "null": 0, "reversed": 0}


def test_a_graph_of_another_model_is_refused(graph):
    other = ReplacementModel(
        random_model("gpt2", n_layers=3, d_model=16, dtype=torch.float64, seed=9),
        random_dictionaries("clt", n_layers=3, d_model=16, features=24, dtype=torch.float64),
    )
    with pytest.raises(InputError, match="validate it with the model it was made with"):
        validate(other, graph)


def test_other_dictionaries_are_refused(model, graph):
    other = ReplacementModel(
        model.model, random_dictionaries("clt", n_layers=3, d_model=16, features=24, dtype=torch.float64, seed=5)
    )
    with pytest.raises(InputError, match="not active in these dictionaries"):
        validate(other, graph)


def test_agreement_of_simple_pairs():
    x = np.array([1.0, -2.0, 3.0, 4.0])
    same = agreement(x, 2 * x)
    assert (same.spearman, same.sign, same.slope, same.r2) == (1.0, 1.0, 2.0, 1.0)
    assert agreement(x, -x).sign == 0
    assert np.isnan(agreement(x[:0], x[:0]).slope)
    assert np.isnan(agreement(x[:1], x[:1]).spearman)


def test_figures_are_those_of_their_formulas():
    predicted, measured = np.array([0.1, 0.3, -0.2, 0.05, 0.25]), np.array([0.3, 0.2, -0.3, -0.1, 0.4])
    found = agreement(predicted, measured)
    slope = np.linalg.lstsq(predicted[:, None], measured, rcond=None)[0][0]
    assert found.spearman == pytest.approx(stats.spearmanr(predicted, measured)[0])
    assert (found.slope, found.sign) == (pytest.approx(slope), 0.8)
    assert found.r2 == pytest.approx(1 - np.sum((measured - slope * predicted) ** 2) / np.sum(measured**2))
    assert found.intervals == {}


@pytest.mark.parametrize(
    ("predicted", "measured", "spearman", "slope"),
    [
        ([], [], False, False),
        ([1.0], [2.0], False, True),
        ([1.0, 2.0], [2.0, 3.0], False, True),
        ([0.1, 0.2, 0.3], [0.2, 0.3, 0.1], True, True),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], False, True),
        ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0], False, True),
        ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0], False, False),
        ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], False, False),
        ([1.0, 0.0, 0.0], [1.0, 0.0, 0.0], True, True),
    ],
)
def test_a_figure_that_the_pairs_do_not_define_is_nan(predicted, measured, spearman, slope):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = agreement(np.array(predicted), np.array(measured))
    assert (np.isfinite(found.spearman), np.isfinite(found.slope)) == (spearman, slope)
    assert np.isfinite(found.sign) == np.isfinite(found.r2) == slope


def test_intervals_are_those_of_the_seed():
    x = np.linspace(-1, 1, 20)
    y = x + np.sin(9 * x)
    one, same, other = (agreement(x, y, bootstrap=20, seed=seed) for seed in (0, 0, 1))
    assert one == same != other
    assert one.intervals == agreement(x, y, bootstrap=20).intervals
    assert all(low < high for name, (low, high) in one.intervals.items() if name != "sign")


def test_an_interval_holds_the_middle_of_what_is_finite():
    assert interval(np.array([*np.arange(1001.0), np.nan, np.inf])) == pytest.approx((25, 975))
    assert np.isnan(interval(np.array([np.nan]))).all()


def test_resamples_draw_every_pair_or_whole_clusters():
    x = np.arange(6.0)
    assert set(np.concatenate(_resamples(x, None, 20, 0))) == set(range(6))
    for drawn in _resamples(x, np.array(list("aabbcc")), 20, 0):
        assert all(set(pair) in ({0, 1}, {2, 3}, {4, 5}) for pair in drawn.reshape(-1, 2))
    y = x**2 % 7
    clustered = agreement(x, y, bootstrap=50, clusters=np.array(list("aabbcc"))).intervals
    assert clustered != agreement(x, y, bootstrap=50).intervals


def test_verdict_counts_of_an_empty_validation():
    assert Validation(pd.DataFrame({"predicted": []}), pd.DataFrame(), np.nan, np.nan).verdicts()["confirmed"] == 0
