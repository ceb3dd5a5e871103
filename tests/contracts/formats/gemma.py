"""JumpReLU dictionaries with the names and shapes of Gemma Scope's, and their definition in float64."""

from typing import Any

import numpy as np
import torch

from tests.contracts.formats.dense import load64
from transcoders import random_dictionaries

D, N = 8, 16


def draw(seed, *shape, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def arrays(seed, d=D, n=N):
    return {
        "W_enc": draw(seed, d, n, scale=d**-0.5),
        "W_dec": draw(seed + 1, n, d),
        "b_enc": draw(seed + 2, n, scale=0.3),
        "b_dec": draw(seed + 3, d),
        "threshold": np.abs(draw(seed + 4, n, scale=0.4)),
    }


def npz(root, place, seed=0, **options):
    (root / place).mkdir(parents=True)
    np.savez(root / place / "params.npz", **(found := arrays(seed, **options)))
    return found


def oracle(stored, x):
    """Features and reconstruction in float64."""
    w = {name.replace("w_", "W_"): torch.as_tensor(value).double() for name, value in stored.items()}
    h = x @ w["W_enc"] + w["b_enc"]
    a = torch.relu(h) * (h > w["threshold"])
    skip = x @ w["affine_skip_connection"] if "affine_skip_connection" in w else 0
    return a, a @ w["W_dec"] + w["b_dec"] + skip


def inputs(d=D):
    return torch.as_tensor(draw(99, 6, d)).double()


def assert_is(dictionary, stored, x=None):
    x = inputs(dictionary.d_in) if x is None else x
    a, y = oracle(stored, x)
    assert 0.05 < (a > 0).double().mean() < 0.95
    torch.testing.assert_close(dictionary.encode(x), a, atol=1e-12, rtol=0)
    torch.testing.assert_close(dictionary(x), y, atol=1e-12, rtol=0)


def load(path, **choice) -> Any:
    return load64(path, **choice)


def assert_same(loaded, original):
    d = original.d_model
    reads = torch.as_tensor(draw(5, original.n_layers, 6, d))
    assert (loaded.kind, loaded.reads, loaded.writes) == (original.kind, original.reads, original.writes)
    found, expected = loaded.encode(reads), original.encode(reads)
    assert torch.equal(found.index, expected.index)
    torch.testing.assert_close(found.value, expected.value, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        loaded.reconstruct(found, reads), original.reconstruct(expected, reads), atol=1e-5, rtol=1e-5
    )


def build(**case):
    return random_dictionaries(**case, n_layers=3, d_model=D, features=N, k=5, seed=7).requires_grad_(False)
