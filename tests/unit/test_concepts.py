"""Probes, purities and baselines against planted units, pair counts and another optimiser."""

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.decomposition import PCA
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from transcoders.errors import InputError
from transcoders.evaluation import concept_table, direction_baselines, purity_table, unit_auroc


@pytest.fixture(scope="module")
def table():
    """Three concepts: `one` is unit 3, `few` the sum of units 5 to 8, `pair` the product of two signs."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, 12))
    x[:, 10:] = np.sign(x[:, 10:])
    labels = np.full(600, "rest", dtype=object)
    labels[x[:, 10] * x[:, 11] > 0] = "pair"
    labels[x[:, 5:9].sum(axis=1) > 1.5] = "few"
    labels[x[:, 3] < -1] = "one"
    return x, labels.astype(str)


@pytest.fixture(scope="module")
def found(table):
    return concept_table({"units": table[0]}, table[1], k=(1, 4), seed=1).set_index(["concept", "probe"])


def test_auroc_is_that_of_all_pairs_and_of_scikit_learn(table):
    x, labels = table
    x = x.round(1)  # ties
    found = unit_auroc(x, labels)
    for number, concept in enumerate(np.unique(labels)):
        own, others = x[labels == concept], x[labels != concept]
        for unit in (0, 3, 7, 10):
            pairs = own[:, None, unit] - others[None, :, unit]
            expected = (pairs > 0).mean() + (pairs == 0).mean() / 2
            assert found[number, unit] == pytest.approx(expected)
            assert found[number, unit] == pytest.approx(roc_auc_score(labels == concept, x[:, unit]))


def test_a_concept_is_found_where_it_was_planted(found):
    assert found.loc[("one", "1"), "best"] == 3
    assert found.loc[("one", "1"), "auroc"] > 0.99  # though the unit is low there
    assert found.loc[("few", "4"), "auroc"] > 0.93 > 0.05 + found.loc[("few", "1"), "auroc"]
    assert found.loc[("few", "1"), "best"] in (5, 6, 7, 8)
    assert found.loc[("pair", "all"), "auroc"] < 0.75, "no linear probe finds a product"
    assert set(found["units"]) == {1, 4, 12}


def test_rows_are_held_out_alike_for_every_concept(table, found):
    _, counts = np.unique(table[1], return_counts=True)
    np.testing.assert_array_equal(found.xs("1", level="probe")["rows"], np.round(0.3 * counts))


def test_a_probe_is_the_penalised_regression_that_it_says(table):
    x, labels = table
    held = np.arange(len(x)) % 3 == 0
    row = concept_table({"units": x}, labels, k=(), held_out=held).set_index("concept").loc["few"]
    z = (x - x[~held].mean(axis=0)) / x[~held].std(axis=0)
    y = np.where(labels == "few", 1, -1)
    n = (~held).sum()
    weight = np.where(y > 0, n / (2 * (y[~held] > 0).sum()), n / (2 * (y[~held] < 0).sum()))[~held]

    def objective(v):
        return 0.1 * (weight * np.logaddexp(0, -y[~held] * (z[~held] @ v[1:] + v[0]))).sum() + v[1:] @ v[1:] / 2

    v = minimize(objective, np.zeros(13), method="BFGS").x
    score = z[held] @ v[1:] + v[0]
    assert row["auroc"] == pytest.approx(roc_auc_score(y[held], score), abs=2e-3)
    assert row["accuracy"] == pytest.approx(balanced_accuracy_score(y[held] > 0, score > 0), abs=0.01)


def test_purity_is_the_share_of_a_units_mean_activation():
    rng = np.random.default_rng(2)
    labels = np.repeat(["a", "b", "c"], (40, 80, 20))
    x = np.stack(
        [np.where(labels == "b", 2.0, 0.0), np.ones(140), rng.random(140) - 0.4, np.zeros(140), -np.ones(140)], axis=1
    )
    held = np.arange(140) % 2 == 0
    found = purity_table(x, labels, held_out=held).to_dict("list")
    assert found["concept"][0] == "b"
    np.testing.assert_allclose(found["purity"][:2], [1, 1 / 3])
    np.testing.assert_allclose(found["concepts"][:2], [1, 3])
    assert np.isnan(found["purity"][3:]).all()
    assert found["rows"][:2] == [40, 70]
    means: dict[bool, dict[str, float]] = {}
    for side in (False, True):
        rows = [(max(v, 0), name) for v, name, h in zip(x[:, 2], labels, held, strict=True) if h == side]
        means[side] = {c: float(np.mean([v for v, name in rows if name == c])) for c in "abc"}
    chosen = max("abc", key=means[False].__getitem__)
    shares = [means[True][c] / sum(means[True].values()) for c in "abc"]
    assert found["concept"][2] == chosen
    assert found["purity"][2] == pytest.approx(shares["abc".index(chosen)])
    assert found["concepts"][2] == pytest.approx(np.prod([p**-p for p in shares]))


def test_baselines_are_principal_components_and_unit_directions(table):
    x = table[0] * np.linspace(1, 3, 12)
    held = np.arange(len(x)) % 4 == 0
    made = direction_baselines(x, held, 5, seed=0)
    fitted = PCA(5).fit(x[~held])
    assert made["PCA"].shape == made["random directions"].shape == (600, 10)
    np.testing.assert_allclose(np.abs(made["PCA"][:, :5]), np.abs(fitted.transform(x)), atol=1e-9)
    np.testing.assert_array_equal(made["PCA"][:, 5:], -made["PCA"][:, :5])
    gained = np.linalg.lstsq(x - x[~held].mean(axis=0), made["random directions"][:, :5], rcond=None)[0]
    np.testing.assert_allclose(np.linalg.norm(gained, axis=0), 1)
    assert not np.allclose(made["random directions"], direction_baselines(x, held, 5, seed=1)["random directions"])


def test_tables_that_cannot_be_judged_are_refused(table, monkeypatch):
    x, labels = table
    with pytest.raises(InputError, match=r"each of the 600 labels; those of 'short' have the shape \[5, 12\]"):
        concept_table({"short": x[:5]}, labels)
    with pytest.raises(InputError, match="the labels name 1, give at least two"):
        purity_table(x, ["a"] * 600)
    with pytest.raises(InputError, match=r"Of 'few' 0 of \d+ rows are held out"):
        purity_table(x, labels, held_out=labels != "few")
    monkeypatch.setattr("transcoders.evaluation.probes.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'circuitsae\[probes\]'"):
        concept_table({"units": x}, labels)
