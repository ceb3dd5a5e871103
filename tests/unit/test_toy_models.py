"""Bottlenecks against the paper's equations, exact integrals and the least loss that any weights have."""

import math
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from examples import superposition as example
from transcoders.errors import InputError
from transcoders.synthetic import Phase, ToyModels, candidate_losses, phase_diagram, phases_of, train_toy_models
from transcoders.synthetic.toy_figures import dimensionality_figure, phase_figure, plane_figure


def models_of(W, b=None, density=(0.3,), importance=None):
    W = torch.as_tensor(W, dtype=torch.float32).expand(len(density), -1, -1)
    zeros = torch.zeros(W.shape[:2])
    b = zeros if b is None else torch.as_tensor(b, dtype=torch.float32).expand_as(zeros)
    importance = zeros + 1 if importance is None else torch.as_tensor(importance, dtype=torch.float32).expand_as(zeros)
    return ToyModels(W=W, b=b, density=torch.tensor(density), importance=importance)


def polygon(n):
    angles = 2 * math.pi * torch.arange(n) / n
    return torch.stack([angles.cos(), angles.sin()], dim=1)


@cache
def grid(features, points=24):
    """Every set of features that may be there, with the midpoints of their values: (how many, x)."""
    sets = []
    middle = (np.arange(points) + 0.5) / points
    for mask in np.ndindex(*[2] * features):
        there = np.flatnonzero(mask)
        values = np.array(list(product(middle, repeat=len(there))))
        x = np.zeros((len(values), features))
        x[:, there] = values
        sets.append((len(there), x))
    return sets


def exact_loss(W, b, density, importance):
    """`E Σ_i I_i (x_i − x̂_i)²` over sets of features and the midpoints of a grid."""
    total, n = 0.0, len(b)
    for there, x in grid(n):
        error = (x - np.maximum(x @ W @ W.T + b, 0)) ** 2 @ importance
        total += density**there * (1 - density) ** (n - there) * error.mean()
    return total


def test_a_model_computes_what_the_paper_says():
    generator = torch.Generator().manual_seed(0)
    drawn = {"W": torch.randn(2, 5, 3, generator=generator), "b": torch.randn(2, 5, generator=generator)}
    models = ToyModels(**drawn, density=torch.tensor([0.2, 0.9]), importance=torch.rand(2, 5, generator=generator))
    x = models.sample(40, generator)
    for k in range(2):
        W = models.W[k].double().T.numpy()  # as in the paper, a column for each feature
        for n in range(40):
            expected = np.maximum(W.T @ (W @ x[k, n].numpy()) + models.b[k].numpy(), 0)
            np.testing.assert_allclose(models.reconstruct(x)[k, n].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_inputs_are_as_dense_as_asked_and_uniform():
    models = models_of(polygon(4), density=(0.1, 1.0))
    x = models.sample(20_000, torch.Generator().manual_seed(1))
    assert float((x[0] > 0).double().mean()) == pytest.approx(0.1, abs=0.005)
    for values in (x[0][x[0] > 0], x[1].flatten()):
        quantiles = torch.quantile(values[:50_000], torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
        torch.testing.assert_close(quantiles, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), atol=0.02, rtol=0)


def test_losses_are_the_exact_integral():
    W, b, importance = polygon(3).numpy(), np.array([0.1, -0.2, 0.0]), np.array([1.0, 0.5, 2.0])
    models = models_of(W, b, (0.2, 0.7), importance)
    found = models.losses(200_000, torch.Generator().manual_seed(2))
    for density, loss in zip((0.2, 0.7), found.tolist(), strict=True):
        assert loss == pytest.approx(exact_loss(W, b, density, importance), rel=0.02)


@pytest.mark.parametrize(
    ("W", "shares"),
    [
        (torch.eye(3), [1, 1, 1]),
        ([[1.0], [-1.0]], [1 / 2, 1 / 2]),
        (polygon(3) * 1.3, [2 / 3] * 3),
        (polygon(5), [2 / 5] * 5),
        ([[1.0, 0.0], [0.0, 0.0]], [1, 0]),
    ],
    ids=["own", "digon", "triangle", "pentagon", "absent"],
)
def test_dimensionality_of_known_shapes(W, shares):
    models = models_of(W)
    torch.testing.assert_close(models.dimensionality[0], torch.tensor(shares, dtype=torch.float32))
    squares = torch.as_tensor(W).square().sum()
    assert float(models.dimensions_per_feature) == pytest.approx(models.W.shape[2] / float(squares))


def test_models_are_trained_as_if_alone():
    density, ones = torch.tensor([0.4, 0.1, 0.8]), torch.ones(3, 8)
    both = train_toy_models(density, ones, 4, steps=60)
    alone = train_toy_models(density[:1], ones[:1], 4, steps=60)
    torch.testing.assert_close(both.W[:1], alone.W, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(both.W[0], both.W[1])


CANDIDATES = {
    2: [([[1], [0]], [0, 0.5]), ([[0], [1]], [0.5, 0]), ([[1], [-1]], [0, 0])],
    3: [
        ([[1, 0], [0, 1], [0, 0]], [0, 0, 0.5]),
        ([[1, 0], [0, 0], [0, 1]], [0, 0.5, 0]),
        ([[1, 0], [0, 1], [0, -1]], [0, 0, 0]),
        ([[1, 0], [-1, 0], [0, 1]], [0, 0, 0]),
    ],
}


@pytest.mark.parametrize("features", [2, 3])
def test_candidate_losses_are_the_integrals_of_their_weights(features):
    density, last = 0.35, 1.7
    importance = np.array([1.0] * (features - 1) + [last])
    for (W, b), (phase, loss) in zip(CANDIDATES[features], candidate_losses(features, density, last), strict=True):
        models = models_of(W, importance=importance)
        bias = np.array(b) * density  # of a feature that is left out: its mean
        assert loss == pytest.approx(exact_loss(np.array(W, dtype=float), bias, density, importance), rel=5e-3)
        assert phases_of(models)[0, -1] == phase


def least_of_all(density, importance):
    """The least loss of any weights and biases, and the weights: two features in one dimension, from many starts."""
    sides = np.array([1.0, importance])

    def loss(v):
        return exact_loss(v[:2, None], v[2:], density, sides)

    starts = ([1, 0.1], [0.1, 1], [1, -0.8], [0.8, -1], [0.7, 0.7])
    found = [minimize(loss, [*start, 0.1, 0.1], method="BFGS", options={"maxiter": 60}) for start in starts]
    best = min(found, key=lambda result: result.fun)
    return best.fun, best.x[:2]


def test_what_is_trained_is_the_best_that_any_weights_can_do():
    cells = {
        (0.8, 0.3): Phase.ABSENT,
        (0.8, 3.0): Phase.OWN,
        (0.15, 1.0): Phase.SUPERPOSED,
        (0.1, 0.4): Phase.SUPERPOSED,
    }
    starts = 4
    density = torch.tensor([cell[0] for cell in cells]).repeat_interleave(starts)
    importance = torch.tensor([[1.0, cell[1]] for cell in cells]).repeat_interleave(starts, dim=0)
    trained = train_toy_models(density, importance, 1, steps=600, lr=0.02)
    for number, (cell, phase) in enumerate(cells.items()):
        W, b = (side[number * starts : (number + 1) * starts].double().numpy() for side in (trained.W, trained.b))
        losses = [exact_loss(*weights, cell[0], np.array([1.0, cell[1]])) for weights in zip(W, b, strict=True)]
        least, best = least_of_all(*cell)
        assert 0.999 * least < min(losses) < 1.03 * least, cell
        chosen = number * starts + int(np.argmin(losses))
        assert phases_of(trained)[chosen, -1] == phases_of(models_of(best[:, None]))[0, -1] == phase


@pytest.mark.parametrize("features", [2, 3])
def test_phases_are_those_of_the_least_loss_away_from_boundaries(features):
    frame = phase_diagram(features, [1.0, 0.35, 0.08], [0.12, 0.7, 1.5, 8.0], seeds=5, steps=400)
    far = frame[frame["margin"] > 1.5]
    assert set(far["phase"]) == {"not represented", "own dimension", "superposed"}
    assert far["phase"].tolist() == far["theory"].tolist()
    assert len(far) >= 6


def test_five_features_in_a_plane_are_two_digons_and_then_a_pentagon():
    found = example.best_of((0.3, 0.05), 5, 2, example.Settings(starts=6, steps=700))
    digons, pentagon = found.dimensionality.sort(dim=1).values
    torch.testing.assert_close(digons, torch.tensor([0, 0.5, 0.5, 0.5, 0.5]), atol=0.02, rtol=0)
    torch.testing.assert_close(pentagon, torch.full((5,), 0.4), atol=0.02, rtol=0)
    torch.testing.assert_close(found.dimensionality.sum(dim=1), torch.full((2,), 2.0), atol=0.02, rtol=0)


def test_the_example_writes_its_page_and_figures(tmp_path):
    text = example.run(example.QUICK, tmp_path)
    assert text.count("| --- |") >= 4
    assert "nan" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dimensionality.html", "phases.html", "plane.html"]


def test_autoencoders_find_sparse_directions_and_not_dense_ones():
    settings = example.Settings(features=16, d_hidden=8, steps=300, vectors=12_000)
    found = {}
    for density in (0.5, 0.04):
        model = example.equal([density], 16, 8, settings)
        vectors = model.hidden(model.sample(settings.vectors, torch.Generator().manual_seed(3)))[0]
        found[density] = example.recovered(model, vectors, settings, seed=0)
    assert found[0.04]["mean max cosine"] > found[0.04]["random"] + 0.1
    assert found[0.04]["mean max cosine"] > found[0.5]["mean max cosine"] + 0.05


def traces(figure) -> tuple[Any, ...]:
    return figure.data


def test_figures_show_the_phases_and_shares():
    frame = phase_diagram(2, [1.0, 0.1], [0.1, 10.0], seeds=2, steps=300)
    trained, theory = traces(phase_figure({"two": frame}))
    assert theory.marker.color[:2] == ("rgb(255,255,255)", "rgb(29,78,216)")
    assert list(trained.x) == [1, 1, 10, 10]
    assert list(trained.text) == list(frame["phase"])
    models = models_of(polygon(5), density=(0.05, 0.1))
    points, line = traces(dimensionality_figure(models))
    assert len(points.y) == 10
    np.testing.assert_allclose(points.y, 0.4, rtol=1e-5)
    np.testing.assert_allclose(line.y, 2 / 5, rtol=1e-5)
    assert len(traces(plane_figure(models))) == 2
    assert list(traces(plane_figure(models))[0].x[1:4:2]) == pytest.approx([1, math.cos(2 * math.pi / 5)])


def test_what_describes_no_model_is_refused():
    with pytest.raises(InputError, match=r"density is the probability 1 − S .* got 1\.5"):
        train_toy_models(torch.tensor([0.5, 1.5]), torch.ones(2, 3), 1)
    with pytest.raises(InputError, match=r"importance must be at least 0; got -1"):
        train_toy_models(torch.tensor([0.5]), torch.tensor([[1.0, -1.0]]), 1)
    with pytest.raises(InputError, match="d_hidden must be at least 1; got 0"):
        train_toy_models(torch.tensor([0.5]), torch.ones(1, 2), 0)
    with pytest.raises(InputError, match="at least 2 features; got 1"):
        candidate_losses(1, 0.5, 1.0)
    with pytest.raises(InputError, match="got 1, 0, 4"):
        phase_diagram(2, [0.5], [])
    with pytest.raises(InputError, match="3 dimensions, not 2"):
        plane_figure(models_of(torch.eye(3)))
    with pytest.raises(InputError, match="no phase diagram"):
        phase_figure({})
