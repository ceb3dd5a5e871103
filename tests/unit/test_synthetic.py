"""The toy model's statistics are those it was asked for, whatever else is switched on."""

import math

import pytest
import torch

from transcoders.errors import InputError
from transcoders.evaluation import recovery
from transcoders.synthetic import SuperpositionModel
from transcoders.synthetic.superposition import zipf_probabilities
from transcoders.training import SAEConfig
from transcoders.training.step import Run


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def fires_of(model, n=40_000):
    return (model.sample(n, generator()).activations > 0).double()


@pytest.mark.parametrize(
    "settings",
    [{}, {"correlation": 0.6, "groups": 8}, {"hierarchy": 0.75}, {"correlation": 0.4, "hierarchy": 0.3}],
    ids=str,
)
def test_every_feature_fires_as_often_as_it_should(settings):
    model = SuperpositionModel(features=64, d_model=16, l0=4.0, zipf=0.8, seed=3, **settings)
    p = model.probabilities.double()
    fires = fires_of(model)
    assert float(p.sum()) == pytest.approx(4, abs=1e-5)
    # Four standard deviations of a mean of independent draws, for 64 features.
    assert ((fires.mean(0) - p).abs() < 4 * (p * (1 - p) / len(fires)).sqrt()).all()


def test_frequencies_follow_zipf_up_to_the_cap():
    p = zipf_probabilities(100, 5.0, 1.0, 0.5).double()
    assert float(p.sum()) == pytest.approx(5, abs=1e-5)
    assert p.max() == pytest.approx(0.5)
    free = p[p < 0.5]
    rank = torch.arange(101 - len(free), 101)
    torch.testing.assert_close(free * rank, (free * rank)[0].expand(len(free)), rtol=1e-5, atol=0)


def test_vectors_are_sums_of_the_directions():
    model = SuperpositionModel(features=40, d_model=8, l0=3.0, noise=0.0)
    x, a = model.sample(50, generator())
    by_hand = [sum((float(a[t, i]) * model.directions[i] for i in range(40)), torch.zeros(8)) for t in range(50)]
    torch.testing.assert_close(x, torch.stack(by_hand))
    torch.testing.assert_close(model.directions.norm(dim=1), torch.ones(40))
    positive = a[a > 0]
    assert positive.min() >= 0.5
    assert positive.max() <= 1.5
    assert positive.mean() == pytest.approx(1, abs=0.1)


def test_noise_is_isotropic_and_of_its_size():
    quiet, noisy = (SuperpositionModel(features=40, d_model=8, l0=3.0, noise=s) for s in (0.0, 0.3))
    x, a = noisy.sample(20_000, generator())
    rest = x - a @ quiet.directions
    torch.testing.assert_close(rest.T @ rest / len(x), 0.09 * torch.eye(8), atol=4e-3, rtol=0)


def test_correlated_features_fire_together_within_their_group_only():
    model = SuperpositionModel(features=40, d_model=8, l0=4.0, zipf=0.0, correlation=0.7, groups=4)
    corr = torch.corrcoef(fires_of(model).T)
    same = model.groups[:, None] == model.groups
    off = ~torch.eye(40, dtype=torch.bool)
    assert corr[same & off].min() > 0.2
    assert corr[~same].abs().max() < 0.05
    assert corr[same & off].mean() == pytest.approx(phi_by_quadrature(0.7, 0.1), abs=0.01)


def test_children_fire_only_with_their_parents():
    model = SuperpositionModel(features=64, d_model=16, l0=6.0, hierarchy=0.6, correlation=0.3)
    children = (model.parents >= 0).nonzero().flatten()
    assert len(children) == round(0.6 * 64)
    parents = model.parents[children]
    assert (parents < children // 2 + 1).all()
    fires = fires_of(model)
    assert not (fires[:, children].bool() & ~fires[:, parents].bool()).any()
    ratio = fires[:, children].sum(0) / fires[:, parents].sum(0)
    expected = (model.probabilities[children] / model.probabilities[parents]).double()
    torch.testing.assert_close(ratio, expected, atol=0.05, rtol=0)
    assert len(model._levels) > 1, "the test should cover children of children"


def test_seeds():
    one, again, other = (SuperpositionModel(features=30, d_model=8, l0=2.0, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.directions, again.directions)
    assert not torch.equal(one.directions, other.directions)
    assert torch.equal(one.sample(9, generator(5)).x, again.sample(9, generator(5)).x)
    assert not torch.equal(one.sample(9, generator(5)).x, one.sample(9, generator(6)).x)


def test_streams_and_vectors_are_samples():
    model = SuperpositionModel(features=30, d_model=8, l0=2.0)
    stream = model.stream(100, generator(1))
    first, second = next(stream), next(stream)
    assert first.x.shape == (100, 8)
    assert first.activations.shape == (100, 30)
    assert not torch.equal(first.x, second.x)
    x = model.vectors(9000, generator(1))  # more than one chunk
    assert x.shape == (9000, 8)
    assert not torch.equal(x[:808], x[8192:])
    assert x.var() == pytest.approx(float(first.x.var()), rel=0.2)


def phi_by_quadrature(rho, p):
    """The correlation of two indicators of rate p whose normals have correlation ρ."""
    threshold = torch.special.ndtri(torch.tensor(1 - p, dtype=torch.float64))
    z = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    given = torch.special.ndtr((math.sqrt(rho) * z - threshold) / math.sqrt(1 - rho))
    both = float(torch.trapezoid(density * given**2, z))
    return (both - p**2) / (p * (1 - p))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": 0}, "features must be at least 1"),
        ({"features": 10, "l0": 6.0}, "at most features × max_probability = 5; got 6"),
        ({"max_probability": 1.5}, "got 1.5"),
        ({"correlation": 1.0}, "correlation must be"),
        ({"hierarchy": 0.9}, "share of features with a parent, from 0 to 0.75; got 0.9"),
        ({"magnitude": (2.0, 1.0)}, "range"),
        ({"noise": -1.0}, "noise is a standard deviation"),
    ],
)
def test_impossible_models_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        SuperpositionModel(**settings)


def test_a_dictionary_of_the_same_seed_does_not_start_from_the_directions_it_is_to_find():
    for seed in (0, 1, 7):
        model = SuperpositionModel(features=40, d_model=16, l0=3.0, seed=seed)
        x = model.vectors(64, torch.Generator().manual_seed(3))[:, None]
        start = Run.start(SAEConfig(features=40, activation="topk", k=3, seed=seed), x, x)
        assert recovery(start.weights.W_enc[0].detach(), model.directions).recovered == 0
