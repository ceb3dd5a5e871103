"""Logistic probes against what can be said in closed form."""

import numpy as np
import pytest

from transcoders.errors import InputError
from transcoders.evaluation.probes import logistic_probe, mean_differences, strongest


def test_a_probe_of_one_bit_has_the_logarithms_of_the_odds():
    # 8 of 10 yes have the bit, 3 of 10 no: the fit is exact, s(x) = logit of the share of yes among those with x.
    x = np.array([1.0] * 8 + [0] * 2 + [1] * 3 + [0] * 7)[:, None]
    y = np.array([True] * 10 + [False] * 10)[:, None]
    probe = logistic_probe(x, y, l2=0.0)
    with_bit, without = np.log(8 / 3), np.log(2 / 7)
    assert probe.bias[0] == pytest.approx(without, abs=1e-3)
    assert probe.weight[0, 0] == pytest.approx(with_bit - without, abs=1e-3)


def test_classes_are_weighted_alike_and_the_gradient_is_zero():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(60, 5)) * [1, 10, 0.1, 1, 0] + 3
    y = x[:, :2] + generator.normal(size=(60, 2)) > [3.8, -5]
    probe = logistic_probe(x, y, l2=0.1)
    z = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    w = probe.weight * x.std(0)[:, None]
    for k in range(2):
        share = np.where(y[:, k], 0.5 / y[:, k].sum(), 0.5 / (~y[:, k]).sum())
        sign = np.where(y[:, k], 1, -1)
        pull = -share * sign / (1 + np.exp(sign * (x @ probe.weight + probe.bias)[:, k]))
        np.testing.assert_allclose(z.T @ pull + 0.1 * w[:, k], 0, atol=1e-4)
        assert pull.sum() == pytest.approx(0, abs=1e-4)
    assert probe.weight[4].tolist() == [0, 0]


def test_one_class_at_a_time_is_the_same():
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(40, 4)), generator.random((40, 3)) > 0.6
    together = logistic_probe(x, y)
    for k in range(3):
        np.testing.assert_allclose(together.weight[:, [k]], logistic_probe(x, y[:, [k]]).weight, atol=1e-2)


def test_accuracy_is_balanced_and_f1_counts_hits():
    x = np.array([[1.0], [1], [-1], [-1], [-1], [-1]])
    y = np.array([True, True, True, False, False, False])[:, None]
    probe = logistic_probe(x, y)
    assert probe.accuracy(x, y)[0] == pytest.approx((2 / 3 + 1) / 2)
    assert probe.f1(x, y)[0] == pytest.approx(2 * 2 / (2 * 2 + 1))


def test_differences_of_means_and_the_strongest():
    x, y = np.array([[1.0, 0], [3, 0], [5, 2]]), np.array([[True], [False], [False]])
    assert mean_differences(x, y)[:, 0].tolist() == [-3, -1]
    assert strongest(np.array([0.0, 2, -1, 5]), 3).tolist() == [3, 1]


def test_a_class_without_examples_is_refused():
    with pytest.raises(InputError, match="examples of its class and of others"):
        logistic_probe(np.zeros((3, 2)), np.ones((3, 1), dtype=bool))
