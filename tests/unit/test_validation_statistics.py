"""Slopes, p-values and q-values against loops by hand and scipy; the table of verdicts, a case for each line."""

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from circuitsae.graph import Node, NodeKind
from circuitsae.validation import agreement
from circuitsae.validation.claims import _split_direct, _split_model, _Trial, shapley
from circuitsae.validation.controls import Controls
from circuitsae.validation.designs import HELD
from circuitsae.validation.statistics import RESAMPLES, _resamples, chance, corrected, interval, slopes
from circuitsae.validation.verdicts import FEWEST, Evidence, against_controls, decide

# slopes


def _points(n=6, doses=8, seed=3):
    rng = np.random.default_rng(seed)
    x = np.outer(rng.standard_normal(n), [0.1, 0.25, 0.5, 1.0, 0.7, 0.3, -0.4, 0.9][:doses])
    return x, x * rng.uniform(0.5, 1.5, (n, 1)) + 0.1 * rng.standard_normal(x.shape)


def test_a_slope_is_that_of_a_loop_and_of_least_squares():
    x, y = _points()
    for (ratio, low, high), a, b in zip(slopes(x, y), x, y, strict=True):
        over, under = 0.0, 0.0
        for i in range(len(a)):
            over, under = over + a[i] * b[i], under + a[i] * a[i]
        assert ratio == pytest.approx(over / under)
        assert ratio == pytest.approx(np.linalg.lstsq(a[:, None], b, rcond=None)[0][0])
        assert low < ratio < high


def test_the_interval_of_a_slope_is_scipys_of_that_row_alone():
    x, y = _points()
    for row, (_, low, high) in enumerate(slopes(x, y, seed=5)):
        drawn = stats.bootstrap(
            (x[row], y[row]),
            lambda a, b: (a @ b) / (a @ a),
            paired=True,
            vectorized=False,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=5,
            batch=100,
        ).confidence_interval
        assert (low, high) == pytest.approx(tuple(drawn))


def test_an_interval_of_a_slope_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 30))
    _, low, high = slopes(x, 1.3 * x + rng.standard_normal(x.shape)).T
    assert 0.9 < np.mean((low < 1.3) & (high > 1.3)) < 0.97


def test_what_stands_beside_a_row_does_not_move_it():
    x, y = _points()
    y[2, 5], x[4, 3], x[5] = np.nan, np.nan, 0.0
    whole, order = slopes(x, y), [5, 3, 1, 4, 0, 2]
    np.testing.assert_allclose(slopes(x[order], y[order]), whole[order], rtol=1e-12)
    for row in range(len(x)):
        np.testing.assert_allclose(slopes(x[[row]], y[[row]])[0], whole[row], rtol=1e-12)


def test_pairs_that_are_not_numbers_are_left_out():
    x, y = _points()
    y[:, 5], x[:, 2], y[:, 1] = np.nan, np.nan, np.inf
    kept = [0, 3, 4, 6, 7]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(slopes(x, y), slopes(x[:, kept], y[:, kept]))
        assert np.isnan(slopes(0 * x, y)).all()
        one = slopes(x[:, :1], y[:, :1])
        np.testing.assert_allclose(one[:, 0], y[:, 0] / x[:, 0])
        assert np.isnan(one[:, 1:]).all()
        assert slopes(np.zeros((0, 4)), np.zeros((0, 4))).shape == (0, 3)


# chances


def test_a_chance_counts_the_controls_that_do_as_much():
    controls = np.array([0.1, 0.5, 0.5, -2.0, 0.9])
    assert chance(0.5, controls) == (1 + 3) / 6  # a tie does as much
    assert chance(0.51, controls) == (1 + 1) / 6
    assert chance(1.0, controls) == 1 / 6
    assert chance(-3.0, controls) == 1


def test_q_values_are_those_of_benjamini_and_hochberg():
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.005, 0.8])
    known = p[np.isfinite(p)]
    order, expected, least = np.argsort(known), np.empty(len(known)), 1.0
    for rank in range(len(known), 0, -1):
        least = min(least, known[order[rank - 1]] * len(known) / rank)
        expected[order[rank - 1]] = least
    found = corrected(p)
    assert np.isnan(found[2])
    np.testing.assert_allclose(found[np.isfinite(p)], expected)
    assert np.isnan(corrected(np.array([np.nan]))).all()


FEATURE, TOKEN = Node(NodeKind.FEATURE, 1, 2, 7), Node(NodeKind.TOKEN, -1, 2, 7)
LOGIT = Node(NodeKind.LOGIT, 3, 4, 9)


def _controls(seed=0, n=60):
    rng = np.random.default_rng(seed)
    layer, pos = rng.integers(0, 3, n), rng.integers(1, 6, n)
    is_token = np.arange(n) >= n - 15
    layer[is_token] = -1
    drawn = Controls([], layer, pos, np.arange(len(layer)), is_token)
    return drawn, rng.standard_normal(n) * 0.3, rng.standard_normal(n) * (1 + pos)


@pytest.mark.parametrize("source", [FEATURE, TOKEN])
@pytest.mark.parametrize("target", [LOGIT, Node(NodeKind.FEATURE, 2, 3, 1)])
@pytest.mark.parametrize(("predicted", "measured"), [(1.0, 2.0), (-0.8, 1.0), (-0.8, -3.0)])
def test_a_claim_is_held_against_writers_that_reach_its_target_but_have_no_edge_to_speak_of(
    source, target, predicted, measured
):
    drawn, foreseen, done = _controls()
    done[3] = np.nan
    usable = []
    for i in range(len(foreseen)):
        if drawn.is_token[i] and source.kind is not NodeKind.TOKEN:
            continue
        if drawn.layer[i] >= target.layer or drawn.pos[i] > target.pos:
            continue
        if abs(foreseen[i]) <= 0.25 * abs(predicted) and np.isfinite(done[i]):
            usable.append(i)

    def size(pos):
        here = [done[i] for i in usable if drawn.pos[i] == pos]
        return np.sqrt(np.mean(np.square(here if len(here) >= 5 else [done[i] for i in usable])))

    sign = np.sign(predicted)
    own = sign * measured / size(source.pos)
    more = sum(sign * done[i] / size(drawn.pos[i]) >= own for i in usable)
    p, count = against_controls(drawn, source, target, predicted, measured, foreseen, done)
    assert count == len(usable)
    if count < FEWEST:
        assert np.isnan(p)
    else:
        assert p == pytest.approx((1 + more) / (1 + count))


def test_a_source_is_no_control_of_itself():
    n = 30
    at = Controls([], np.ones(n, dtype=int), np.full(n, 2), np.arange(n), np.zeros(n, dtype=bool))
    p, count = against_controls(at, FEATURE, LOGIT, 1.0, 3.0, np.zeros(n), np.where(at.index == 7, 3.0, 0.1))
    assert (p, count) == (1 / n, n - 1)


def test_too_few_controls_and_measurements_that_are_no_numbers_have_no_chance():
    drawn, foreseen, done = _controls()
    arrays = 0 * drawn.layer, 0 * drawn.pos, drawn.index, drawn.is_token
    few = Controls([], *(values[: FEWEST - 1] for values in arrays))
    some = foreseen[: FEWEST - 1] * 0, done[: FEWEST - 1]
    p, count = against_controls(few, FEATURE, LOGIT, 1.0, 1.0, *some)
    assert np.isnan(p)
    assert count == FEWEST - 1
    assert np.isnan(against_controls(drawn, FEATURE, LOGIT, 1.0, np.inf, foreseen, done)[0])
    assert against_controls(drawn, FEATURE, LOGIT, 0.0, 1.0, foreseen, done)[1] == 0


def test_with_controls_as_strong_everywhere_a_claim_is_as_likely_as_any():
    """p is uniform where the source is one more control: no more than its share lies below a bound."""
    rng, n = np.random.default_rng(1), 40
    drawn = Controls([], np.zeros(n, dtype=int), np.full(n, 2), np.arange(n), np.zeros(n, dtype=bool))
    found = [
        against_controls(drawn, FEATURE, LOGIT, 1.0, values[0], np.zeros(n), values[1:])[0]
        for values in rng.standard_normal((2000, n + 1))
    ]
    for bound in (0.05, 0.1, 0.3):
        assert np.mean(np.array(found) <= bound) == pytest.approx(bound, abs=0.02)


# verdicts

KNOWN = {"predicted": 1.0, "measured": 1.0, "ratio": 1.0, "low": 0.9, "high": 1.1}
KNOWN |= {"finite": True, "controls": 50, "q": 0.01, "delta": 0.05}


def _decide(**changes) -> tuple[str, str]:
    values: dict[str, Any] = {name: np.array([value]) for name, value in (KNOWN | changes).items()}
    verdict, reason = decide(Evidence(**values))
    return verdict[0], reason[0]


@pytest.mark.parametrize(
    ("changes", "verdict", "reason"),
    [
        ({}, "confirmed", ""),
        ({"low": 0.5, "high": 2.0, "q": 0.05}, "confirmed", ""),
        ({"predicted": -1.0, "measured": -1.0}, "confirmed", ""),
        ({"predicted": 0.01, "measured": 0.01}, "confirmed", ""),  # small, but more than any control
        ({"low": 0.499}, "undecided", "at some doses less than half of what is predicted"),
        ({"high": 2.001}, "undecided", "at some doses more than twice what is predicted"),
        ({"q": 0.051}, "undecided", "controls do as much"),
        ({"q": np.nan, "controls": 18}, "undecided", "too few controls"),
        ({"q": np.nan, "controls": 0}, "undecided", "too few controls"),
        ({"low": -1.2, "high": -0.9, "measured": -1.0}, "reversed", ""),
        ({"low": -1.2, "high": -0.9, "measured": -1.0, "q": 1.0, "controls": 0}, "reversed", ""),
        ({"low": -0.06, "high": -0.04, "measured": -0.05}, "undecided", "the other way, by too little to tell"),
        ({"low": -0.06, "high": -0.04, "measured": -0.0501}, "reversed", ""),
        ({"low": -0.06, "high": 0.0, "measured": -0.06}, "undecided", "the sign depends on the dose"),
        ({"low": -0.04, "high": 0.04}, "null", ""),
        ({"low": -0.04, "high": 0.04, "predicted": -1.0}, "null", ""),
        ({"low": -0.04, "high": -0.01, "measured": -0.02}, "null", ""),
        ({"low": -0.05, "high": 0.04}, "undecided", "the sign depends on the dose"),
        ({"low": -0.04, "high": 0.05}, "undecided", "the sign depends on the dose"),
        ({"predicted": 0.01, "q": 0.5}, "null", ""),
        ({"low": 0.1, "high": 0.4}, "undecided", "less than half of what is predicted"),
        ({"low": 2.1, "high": 3.0}, "undecided", "more than twice what is predicted"),
        ({"low": 0.2, "high": 3.0}, "undecided", "the ratio depends on the dose"),
        (
            {"predicted": 0.0, "ratio": np.nan, "low": np.nan, "high": np.nan, "q": np.nan},
            "undecided",
            "nothing is predicted",
        ),
        ({"finite": False}, "undecided", "a measurement is not a finite number"),
        ({"finite": False, "low": -1.2, "high": -0.9}, "undecided", "a measurement is not a finite number"),
        ({"finite": False, "low": -0.01, "high": 0.01}, "undecided", "a measurement is not a finite number"),
        ({"delta": 0.0, "low": -1e-9, "high": -1e-12, "measured": -1e-12}, "reversed", ""),
        ({"delta": 0.0, "low": 0.0, "high": 0.0, "measured": 0.0}, "undecided", "less than half of what is predicted"),
    ],
)
def test_each_line_of_the_table_of_verdicts(changes, verdict, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _decide(**changes) == (verdict, reason)


def test_verdicts_of_many_are_those_of_each():
    cases = [{}, {"low": -1.2, "high": -0.9}, {"low": 0.1, "high": 0.4}, {"low": -0.04, "high": 0.04}]
    rows = [KNOWN | case for case in cases]
    values: Any = {name: np.array([row[name] for row in rows]) for name in KNOWN}
    verdicts, reasons = decide(Evidence(**values))
    assert list(zip(verdicts, reasons, strict=True)) == [_decide(**case) for case in cases]


# splits


class Runs(_Trial):
    """Effects of full removals, written by hand."""

    design = HELD

    def __init__(self, **effects: list[float]) -> None:
        self.effects = {name.replace("_", " "): np.array(values, dtype=float) for name, values in effects.items()}

    def full(self, name: str) -> np.ndarray:
        return self.effects[name]


def test_what_carries_more_than_the_edge_gives_the_verdict():
    """Rows: half the edge; by attention; by norms; exactly the edge; attention against norms; attention that undoes."""
    trial = Runs(
        frozen=[1, 1, 1, 1, 1, -1],
        direct_patterns=[1.5, 3, 1.5, 2, 4, 1],
        direct_norms=[1, 1.5, 3, 1, -1.5, -1],
        direct=[1.5, 3.5, 3.5, 2, 1.5, 1.5],
    )
    given = {"direct_verdict": ["confirmed"] * 6, "direct_reason": ["why"] * 6}
    frame = pd.DataFrame(given | {"direct_predicted": [1, 1, 1, 1, 1, -1]})
    _split_direct(frame, trial)
    assert list(frame["direct_verdict"]) == ["confirmed", "attention", "norms", "confirmed", "confirmed", "attention"]
    assert list(frame["direct_reason"]) == ["why", "", "", "why", "why", ""]
    held, full = trial.full("frozen"), trial.full("direct")
    np.testing.assert_allclose(frame["direct_patterns"] + frame["direct_norms"] + held, full)


def test_what_carries_is_held_against_what_is_claimed_not_against_the_pairs_own_edge():
    """A false claim of 2 about a pair without an edge, which patterns and norms move by 1.5, stays as it was judged."""
    trial = Runs(frozen=[0, 0], direct_patterns=[1, 3], direct_norms=[0.5, 0.5], direct=[1.5, 3.5])
    frame = pd.DataFrame(
        {"direct_verdict": ["confirmed"] * 2, "direct_reason": [""] * 2, "direct_predicted": [2.0, 2.0]}
    )
    _split_direct(frame, trial)
    assert list(frame["direct_verdict"]) == ["confirmed", "attention"]


def test_shapley_is_the_mean_of_the_two_orders():
    first, second = shapley(*(np.array([v]) for v in (1.0, 3.0, 4.0, 10.0)))
    assert first == pytest.approx(((3 - 1) + (10 - 4)) / 2)
    assert second == pytest.approx(((4 - 1) + (10 - 3)) / 2)


def test_a_miss_is_split_along_one_path_and_named_by_its_largest_part():
    trial = Runs(
        linear=[1, 1], small=[1.1, 1], graph=[1.3, 1], first=[1.3, 0.5], model_patterns=[1.3, 0.6],
        model_norms=[1.3, 0.5], model=[1.3, 0.6],
    )  # fmt: skip
    frame = pd.DataFrame({"model_measured": [1.3, 0.6]})
    _split_model(frame, trial)
    columns = [f"miss_{part}" for part in ("dictionary", "curvature", "first", "patterns", "norms")]
    np.testing.assert_allclose(frame[columns], [[0.1, 0.2, 0, 0, 0], [0, 0, -0.5, 0.1, 0]], atol=1e-12)
    assert list(frame["miss"]) == ["curvature", "first"]


def test_a_miss_of_derivatives_is_of_the_dictionary_or_of_curvature():
    trial = Runs(linear=[1, 1], small=[1.1, 0.9], removed=[1.3, 0.95])
    trial.design = replace(HELD, derivative=True)
    frame = pd.DataFrame({"model_measured": [1.3, 0.6]})
    _split_model(frame, trial)
    np.testing.assert_allclose(frame[["miss_dictionary", "miss_curvature"]], [[0.1, 0.2], [-0.1, 0.05]], atol=1e-12)
    assert list(frame["miss"]) == ["curvature", "dictionary"]
    assert "miss_first" not in frame


@pytest.mark.parametrize("broken", ["linear", "graph", "model"])
def test_a_miss_that_is_no_number_has_no_name(broken):
    names = ("linear", "small", "graph", "first", "model_patterns", "model_norms", "model")
    effects = {name: [np.nan if name == broken else 1.0, 1.0] for name in names}
    frame = pd.DataFrame(index=[0, 1])
    _split_model(frame, Runs(**effects))
    assert list(frame["miss"]) == ["", "dictionary"]


# agreement


def test_agreement_of_simple_pairs():
    x = np.array([1.0, -2.0, 3.0, 4.0])
    same = agreement(x, 2 * x)
    assert (same.spearman, same.sign, same.within, same.slope, same.r2) == (1.0, 1.0, 1.0, 2.0, 1.0)
    assert agreement(x, -x).sign == agreement(x, -x).within == 0
    assert np.isnan(agreement(x[:0], x[:0]).slope)
    assert np.isnan(agreement(x[:1], x[:1]).spearman)


def test_within_is_the_share_of_ratios_from_a_half_to_two():
    predicted = np.array([1.0, -1.0, 1.0, 1.0, 1.0, -2.0])
    measured = np.array([0.5, -2.0, 0.49, 2.01, -1.0, -2.0])
    assert agreement(predicted, measured).within == 3 / 6


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


def test_bootstrap_intervals_hold_the_figures():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(200)
    y = 2 * x + 0.3 * rng.standard_normal(200)
    found = agreement(x, y, bootstrap=300)
    for name, (low, high) in found.intervals.items():
        assert low <= getattr(found, name) <= high
    assert found.intervals["slope"][1] - found.intervals["slope"][0] < 0.2
    assert agreement(x, y).intervals == {}


def test_clusters_are_drawn_whole():
    x, y = np.tile([1.0, 2.0, 3.0], 4), np.repeat([1.0, -1.0], 6) * np.tile([1.0, 2.0, 3.0], 4)
    clusters = np.repeat(np.arange(4), 3)
    alone, together = (agreement(x, y, bootstrap=400, clusters=c) for c in (None, clusters))
    assert alone.intervals["sign"][0] > 0.1
    assert together.intervals["sign"] == (0.0, 1.0)
