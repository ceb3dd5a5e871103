"""Each task where the answer is known: concepts planted in activations, features that are these concepts or are not."""

import numpy as np
import pytest
import torch

from circuitsae.benchmark.absorption import absorbed_fraction, absorption, fully_absorbed, split_features
from circuitsae.benchmark.layers import BenchmarkLayer, Seen
from circuitsae.benchmark.probing import sparse_probing
from circuitsae.benchmark.removal import (
    probe_attribution,
    spurious_correlation_removal,
    targeted_probe_perturbation,
)
from transcoders.dictionaries import SAE, DictionaryProvenance, ReLU, SAESet, TopK
from transcoders.evaluation.probes import logistic_probe
from transcoders.sites import Site

D = 16
GENERATOR = np.random.default_rng(0)
BASIS = np.linalg.qr(GENERATOR.normal(size=(D, D)))[0]


def layer_of(directions, activation=None):
    """A dictionary that reads and writes these directions."""
    rows = torch.tensor(directions, dtype=torch.float64)
    sae = SAE(
        W_enc=rows.T.contiguous(), b_enc=torch.zeros(len(rows), dtype=torch.float64), W_dec=rows,
        b_dec=torch.zeros(D, dtype=torch.float64), activation=activation or ReLU(), site=Site(0, "resid_post"),
    )  # fmt: skip
    return BenchmarkLayer(SAESet([sae], DictionaryProvenance(model="planted")), 0)


def seen(layer, x):
    with torch.no_grad():
        return Seen(x, layer.activations(torch.tensor(x)).numpy())


def noise(*shape, size=0.1, seed=0):
    return size * np.random.default_rng(seed).normal(size=shape)


CONCEPTS = np.concatenate([BASIS, -BASIS])
"""Every concept, and its absence, is a feature."""
RANDOM = np.random.default_rng(1).normal(size=(2 * D, D)) / D**0.5


@pytest.fixture(scope="module")
def spurious():
    """Four cells alike: a weak concept along the first direction, a strong spurious one along the second."""
    cells = np.array([[a, b] for a in (True, False) for b in (True, False)] * 40)
    sign = np.where(cells, 1.0, -1.0)
    return cells, sign @ (np.array([[0.5], [2.0]]) * BASIS[:2]) + noise(len(cells), D, size=0.2)


def test_ablating_the_spurious_concept_repairs_the_biased_probe(spurious):
    cells, x = spurious
    scores = {}
    for name, directions in {"concepts": CONCEPTS, "random": RANDOM}.items():
        layer = layer_of(directions)
        found = seen(layer, x)
        scores[name] = spurious_correlation_removal(layer, found[:80], found[80:], cells[:80], cells[80:], ns=(2,))
    assert scores["concepts"]["base"] < 0.7
    assert scores["concepts"]["oracle"] > 0.95
    assert scores["concepts"]["n=2"] > 0.75
    assert scores["random"]["n=2"] < 0.5
    # The two features are the spurious direction with either sign: the same as projecting it out.
    biased = cells[:80, 0] == cells[:80, 1]
    probe = logistic_probe(x[:80][biased], cells[:80][biased][:, [0]])
    projected = x[80:] - np.outer(x[80:] @ BASIS[1], BASIS[1])
    accuracy = probe.accuracy(projected, cells[80:, [0]])[0]
    base, oracle = scores["concepts"]["base"], scores["concepts"]["oracle"]
    assert scores["concepts"]["n=2"] == pytest.approx((accuracy - base) / (oracle - base))


def test_without_is_the_ablation_one_by_one():
    layer = layer_of(RANDOM)
    found = seen(layer, noise(5, D, size=1.0))
    chosen = np.array([3, 7, 20])
    expected = found.write.copy()
    for row in range(5):
        for feature in chosen:
            expected[row] -= found.features[row, feature] * RANDOM[feature]
    np.testing.assert_allclose(found.without(layer, chosen), expected, atol=1e-12)


def test_attribution_is_the_change_of_the_scores_difference():
    y = np.arange(40)[:, None] % 2 == 0
    x = noise(40, D, size=1.0) + np.where(y, 1.0, 0.0) * BASIS[0]
    layer = layer_of(RANDOM)
    found, probe = seen(layer, x), logistic_probe(x, y)
    effects = probe_attribution(layer, probe.weight, found, y)[:, 0]

    def gap(write):
        scores = probe.scores(write)[:, 0]
        return scores[y[:, 0]].mean() - scores[~y[:, 0]].mean()

    for feature in (0, 11):
        alone = found.without(layer, np.array([feature]))
        assert gap(x) - gap(alone) == pytest.approx(effects[feature], abs=1e-9)


@pytest.fixture(scope="module")
def classes():
    """Four classes, each along a direction of its own."""
    number = np.arange(160) % 4
    return number[:, None] == np.arange(4), 2 * BASIS[number] + noise(160, D, size=0.3)


def test_perturbing_a_class_that_is_one_feature_leaves_the_others(classes):
    y, x = classes
    scores = {}
    for name, directions in {"concepts": CONCEPTS, "random": RANDOM}.items():
        layer = layer_of(directions)
        found = seen(layer, x)
        scores[name] = targeted_probe_perturbation(layer, found[:80], found[80:], y[:80], y[80:], ns=(1,))
    assert scores["concepts"]["clean"] > 0.98
    assert scores["concepts"]["intended n=1"] > 0.4  # to chance, which is one half
    assert scores["concepts"]["unintended n=1"] < 0.1
    assert scores["concepts"]["n=1"] > 2 * scores["random"]["n=1"]
    for one in scores.values():
        assert one["n=1"] == pytest.approx(one["intended n=1"] - one["unintended n=1"])


def test_one_feature_probes_a_class_that_it_is(classes):
    y, x = classes
    found = {
        name: sparse_probing(each[:80], each[80:], y[:80], y[80:], ks=(1, 2))
        for name, each in {"concepts": seen(layer_of(CONCEPTS), x), "random": seen(layer_of(RANDOM), x)}.items()
    }
    assert found["concepts"]["k=1"] > 0.98
    assert found["concepts"]["write"] > 0.98
    assert found["random"]["k=1"] < 0.9 < found["random"]["write"]


def test_sparse_probing_takes_the_feature_with_the_largest_difference_of_means():
    y = np.arange(40)[:, None] % 2 == 0
    features = noise(40, 6, size=1.0)
    features[:, 4] += np.where(y[:, 0], 6.0, 0.0)
    half = Seen(noise(40, D), features)
    expected = logistic_probe(features[:, [4]], y).accuracy(features[:, [4]], y)[0]
    assert sparse_probing(half, half, y, y, ks=(1,))["k=1"] == pytest.approx(expected)


SPECIAL = 4
"""Words of the first class whose class its own feature leaves to others; too few each to be a part of the concept."""


@pytest.fixture(scope="module")
def absorbed():
    """Two hundred words of two classes; four of the first have a feature each, which also writes their class."""
    y = np.arange(200) % 2 == 0
    special = np.flatnonzero(y)[:SPECIAL]
    narrow = (BASIS[[0]] + BASIS[4 : 4 + SPECIAL]) / 2**0.5
    directions = np.concatenate([BASIS[:2], narrow, BASIS[10:13]])
    features = np.zeros((len(y), len(directions)))
    features[y, 0] = features[~y, 1] = 1.0
    features[special, 0] = 0.0
    features[special, 2 + np.arange(SPECIAL)] = 2**0.5
    features[:, -3:] = np.abs(noise(len(y), 3, size=0.2))
    layer = layer_of(directions)
    return layer, Seen(features @ directions, features), np.stack([y, ~y], axis=1), special


def test_absorption_that_was_planted_is_found(absorbed):
    layer, words, y, special = absorbed
    found = absorption(layer, words, words, y, y)
    assert (found["classes"], found["split"]) == (2, 1)
    assert found["f1"] == pytest.approx(1)
    assert found["full"] == pytest.approx(SPECIAL / 100 / 2)  # none of the other class
    which = fully_absorbed(layer, words, BASIS[0], np.array([0]))
    assert np.flatnonzero(which).tolist() == special.tolist()
    fraction = absorbed_fraction(layer, words, BASIS[0], np.array([0]))
    assert np.flatnonzero(fraction).tolist() == special.tolist()
    assert set(fraction[special]) == {1.0}


def test_absorption_in_part_is_the_share_of_the_projection():
    layer = layer_of(np.stack([BASIS[0], (BASIS[0] + BASIS[1]) / 2**0.5]))
    features = np.array([[1.0, 3 * 2**0.5], [1.0, 0.0], [5.0, 2**0.5], [1.0, 0.2]])
    words = Seen(features @ layer.W_dec, features)
    part = absorbed_fraction(layer, words, BASIS[0], np.array([0]))
    # three of four parts; all its own; one of six, less than .4 of it; too little
    np.testing.assert_allclose(part, [0.75, 0, 0, 0], atol=1e-12)
    assert not fully_absorbed(layer, words, BASIS[0], np.array([0])).any()


def test_a_dictionary_whose_features_are_the_classes_absorbs_nothing(absorbed):
    _, words, y, _ = absorbed
    layer = layer_of(CONCEPTS)
    found = absorption(layer, seen(layer, words.write), seen(layer, words.write), y, y)
    assert (found["full"], found["fraction"]) == (0, 0)


def test_a_class_in_two_halves_is_two_features():
    y = np.arange(40) < 20
    features = np.zeros((40, 3))
    features[:10, 0] = features[10:20, 1] = 1.0
    features[:, 2] = np.abs(noise(40, size=0.1))
    assert sorted(split_features(features, y, features[y].mean(0) - features[~y].mean(0))) == [0, 1]


def test_classes_that_the_model_does_not_know_are_left_out():
    layer = layer_of(RANDOM, TopK(4))
    words = seen(layer, noise(40, D, size=1.0))
    y = np.random.default_rng(5).random((40, 2)) > 0.5
    found = absorption(layer, words[:20], words[20:], y[:20], y[20:])
    assert found["classes"] < 2 or found["f1"] >= 0.6
    if not found["classes"]:
        assert np.isnan(found["full"])
