"""A toy model of superposition: sparse combinations of known directions, more of them than dimensions."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.errors import InputError

_CHUNK = 8192
"""Samples drawn at once: bounds the memory of the dense activations."""

_OWN_SEEDS = 0x5EED_0000
"""Added to the seed (torch keeps its lowest 32 bits): a dictionary trained with the same seed would else start from the
very directions it is to find, since both are normal draws of one shape."""

_CHILDREN_FROM = 4
"""Children are drawn from the features beyond the most frequent one in this many."""


class Sample(NamedTuple):
    """Vectors, and the activations of the known features that they are made of."""

    x: Float[Tensor, "batch d_model"]
    activations: Float[Tensor, "batch feature"]


class SuperpositionModel:
    """`x = Σ_i a_i W_i + σ n`, unit directions `W_i`, `a_i = s_i m_i`, `s_i ~ Bernoulli(p_i)`, `m_i ~ U[low, high]`.

    Frequencies follow Zipf's law, `p_i ∝ (i + 1)^−zipf`, scaled so that `Σ p_i = l0` with none above
    `max_probability`. `n` is standard normal noise.

    * `correlation` ρ: roots of one of `groups` groups fire together. `s_i = 1[√ρ g + √(1−ρ) ε_i > Φ⁻¹(1 − p_i)]` with
      the group's `g` and the feature's own `ε_i` standard normal: a Gaussian copula, so every `p_i` stays as it is.
    * `hierarchy`: this share of the features are children, each of one more frequent feature; a child fires only where
      its parent does, with probability `p_child / p_parent`, so every `p_i` stays as it is.

    The defaults are the setting in which the package states the quality of its training. `seed` draws directions,
    groups and parents; samples come from a generator of their own.

    Source: Elhage et al. 2022, *Toy Models of Superposition*; Sharkey et al. 2022, *Taking features out of
    superposition with sparse autoencoders* (correlated features, decaying frequencies); Chanin et al. 2024, *A is for
    Absorption* (hierarchies).
    """

    directions: Float[Tensor, "feature d_model"]
    probabilities: Float[Tensor, "feature"]
    """How often each feature fires, most frequent first."""
    parents: Int[Tensor, "feature"]
    """The feature without which each feature does not fire; −1 for a root."""
    groups: Int[Tensor, "feature"]
    """The group each feature is correlated within."""

    def __init__(
        self,
        *,
        features: int = 512,
        d_model: int = 128,
        l0: float = 8.0,
        zipf: float = 1.0,
        max_probability: float = 0.5,
        magnitude: tuple[float, float] = (0.5, 1.5),
        noise: float = 0.055,
        correlation: float = 0.0,
        groups: int = 32,
        hierarchy: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Raises `InputError` for settings that describe no model."""
        _check(features, d_model, l0, max_probability, magnitude, noise, correlation, groups, hierarchy)
        generator = torch.Generator().manual_seed(_OWN_SEEDS + seed)
        drawn = torch.randn(features, d_model, generator=generator)
        self.directions = drawn / drawn.norm(dim=1, keepdim=True)
        self.probabilities = zipf_probabilities(features, l0, zipf, max_probability)
        self.groups = torch.randperm(features, generator=generator) % groups
        self.parents = _draw_parents(features, hierarchy, generator)
        self.magnitude, self.noise, self.correlation = magnitude, noise, correlation
        self._threshold = torch.special.ndtri(1 - self.probabilities.double()).float()
        self._levels = _levels(self.parents)

    @property
    def n_features(self) -> int:
        return self.directions.shape[0]

    @property
    def d_model(self) -> int:
        return self.directions.shape[1]

    def sample(self, n: int, generator: torch.Generator) -> Sample:
        """`n` independent vectors with their activations, all in memory."""
        activations = self._fires(n, generator) * self._magnitudes(n, generator)
        x = activations @ self.directions
        if self.noise:
            x = x + self.noise * torch.randn(x.shape, generator=generator)
        return Sample(x, activations)

    def stream(self, batch: int, generator: torch.Generator) -> Iterator[Sample]:
        """Endless batches."""
        while True:
            yield self.sample(batch, generator)

    def vectors(self, n: int, generator: torch.Generator) -> Float[Tensor, "n d_model"]:
        """`n` vectors without their activations, which need `features / d_model` times the memory."""
        x = torch.empty(n, self.d_model)
        for part in x.split(_CHUNK):
            part.copy_(self.sample(len(part), generator).x)
        return x

    def _fires(self, n: int, generator: torch.Generator) -> Float[Tensor, "batch feature"]:
        own = torch.randn(n, self.n_features, generator=generator)
        if self.correlation:
            shared = torch.randn(n, int(self.groups.max()) + 1, generator=generator)[:, self.groups]
            drawn = self.correlation**0.5 * shared + (1 - self.correlation) ** 0.5 * own
        else:
            drawn = own
        fires = (drawn > self._threshold).float()
        for level in self._levels:
            parents = self.parents[level]
            given_parent = self.probabilities[level] / self.probabilities[parents]
            chosen = torch.rand(n, len(level), generator=generator) < given_parent
            fires[:, level] = fires[:, parents] * chosen
        return fires

    def _magnitudes(self, n: int, generator: torch.Generator) -> Float[Tensor, "batch feature"]:
        low, high = self.magnitude
        return low + (high - low) * torch.rand(n, self.n_features, generator=generator)


def zipf_probabilities(features: int, l0: float, exponent: float, most: float) -> Float[Tensor, "feature"]:
    """`p_i = min(c (i + 1)^−exponent, most)` with c such that `Σ p_i = l0`."""
    shares = torch.arange(1, features + 1, dtype=torch.float64) ** -exponent
    low, high = 0.0, most / float(shares[-1])
    for _ in range(100):  # bisection: the sum rises with c, from 0 to features · most
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * shares).clamp(max=most).sum()) < l0 else (low, middle)
    return (high * shares).clamp(max=most).float()


def _draw_parents(features: int, hierarchy: float, generator: torch.Generator) -> Int[Tensor, "feature"]:
    """Children are drawn from the rarer features; a parent ranks in the more frequent half of those before its child.

    Half, because a parent hardly more frequent than its child could not be told from it.
    """
    parents = torch.full((features,), -1)
    first = features // _CHILDREN_FROM
    children = first + torch.randperm(features - first, generator=generator)[: round(hierarchy * features)]
    position = torch.rand(len(children), generator=generator)
    parents[children] = (position * (children // 2)).long()
    return parents


def _levels(parents: Int[Tensor, "feature"]) -> list[Int[Tensor, "_"]]:
    """Children by their distance from a root, so that each level's parents are settled before it."""
    depth = torch.zeros_like(parents)
    for feature, parent in enumerate(parents.tolist()):  # a parent ranks before its children
        if parent >= 0:
            depth[feature] = depth[parent] + 1
    return [(depth == level).nonzero().flatten() for level in range(1, int(depth.max()) + 1)]


def _check(
    features: int,
    d_model: int,
    l0: float,
    most: float,
    magnitude: tuple[float, float],
    noise: float,
    correlation: float,
    groups: int,
    hierarchy: float,
) -> None:
    for name, count in (("features", features), ("d_model", d_model), ("groups", groups)):
        if count < 1:
            raise InputError(f"{name} must be at least 1; got {count}.")
    if not 0 < most <= 1:
        raise InputError(f"max_probability must be above 0 and at most 1; got {most}.")
    if not 0 < l0 <= features * most:
        raise InputError(
            f"l0 must be above 0 and at most features × max_probability = {features * most:g}; got {l0:g}."
        )
    if not 0 <= magnitude[0] <= magnitude[1] or magnitude[1] == 0:
        raise InputError(f"magnitude is the range (low, high) of positive activations; got {magnitude}.")
    if noise < 0:
        raise InputError(f"noise is a standard deviation, at least 0; got {noise}.")
    if not 0 <= correlation < 1:
        raise InputError(f"correlation must be from 0 to below 1; got {correlation}.")
    largest = 1 - 1 / _CHILDREN_FROM
    if not 0 <= hierarchy <= largest:
        raise InputError(f"hierarchy is the share of features with a parent, from 0 to {largest}; got {hierarchy}.")
