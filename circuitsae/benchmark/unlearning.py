"""Unlearning by features: what is forgotten, and what else is, where features of some texts are clamped below 0."""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitsae.benchmark.layers import BenchmarkLayer, Rows, exempt, predictions, rows_of
from transcoders.evaluation.probes import strongest
from transcoders.language_model import LanguageModel

NS = (10, 50)
"""Features that are clamped."""
MULTIPLES = (1.0, 4.0, 16.0)
"""Clamped to so many times their mean activation, below zero."""
RARE = 0.01
"""Features that fire on more than this share of the tokens to retain are left alone."""
RETAINED = 0.99
"""Of what is known of the texts to retain, the share that must be left."""


class Firing(NamedTuple):
    """Features of a layer on some texts."""

    share: Float[np.ndarray, "feature"]
    """Of the tokens on which each fires."""
    strength: Float[np.ndarray, "feature"]
    """Mean activation where it does."""


class Known(NamedTuple):
    """Texts, and which of their tokens the model predicts."""

    rows: Rows
    right: Bool[Tensor, "row pos"]


class Halves(NamedTuple):
    """Texts to choose by, and texts to measure on, as `known_tokens` gives them."""

    train: Sequence[Known]
    test: Sequence[Known]


def unlearning(
    model: LanguageModel, layer: BenchmarkLayer, forget: Halves, retain: Halves, *, ns: Sequence[int] = NS,
    multiples: Sequence[float] = MULTIPLES,
) -> dict[str, float]:  # fmt: skip
    """How much less is known of texts to forget where that costs at most a hundredth of what is known of the others.

    Clamped are the n features that fire on the most tokens of the texts to forget, of those that fire on at most 0.01
    of the tokens to retain: wherever `a_i > 0`, `a_i` becomes `−c ā_i`, ā_i its mean activation where it fires on the
    texts to forget. Known are the tokens that the model predicts (top-1) untouched; `forgotten` and `lost` are the
    shares of them that it no longer does, of either kind of text. n and c are those with the largest `forgotten` among
    those with `lost ≤ 0.01` on the training half, and the figures are of the test half; nothing is clamped where there
    are none. The score is `forgotten`.

    Source: Farrell et al. 2024, *Applying Sparse Autoencoders to Unlearn Knowledge in Language Models*
    (arXiv 2410.19278), whose c is an activation and not a multiple; Karvonen et al. 2025, *SAEBench*.
    """
    fires, stays = firing(model, layer, forget.train), firing(model, layer, retain.train)
    ranked = np.where(stays.share <= RARE, fires.share, 0.0)
    best, most = None, 0.0
    for n, times in product(ns, multiples):
        clamp = Clamp(strongest(ranked, n), fires.strength * times)
        forgotten = 1 - known_share(model, layer, forget.train, clamp)
        if forgotten > most and known_share(model, layer, retain.train, clamp) >= RETAINED:
            best, most = clamp, forgotten
    if best is None:
        return {"score": 0.0, "forgotten": 0.0, "lost": 0.0, "features": 0.0}
    forgotten, lost = (1 - known_share(model, layer, known, best) for known in (forget.test, retain.test))
    return {"score": forgotten, "forgotten": forgotten, "lost": lost, "features": float(len(best.features))}


@torch.no_grad()
def firing(model: LanguageModel, layer: BenchmarkLayer, texts: Sequence[Known]) -> Firing:
    """On how many tokens each feature fires, and how strongly."""
    count, sums, tokens = np.zeros(layer.n_features), np.zeros(layer.n_features), 0
    for rows, _ in texts:
        read = model.activations(rows.tokens, [layer.read])[layer.read]
        a = layer.activations(read)[~exempt(model, layer.dictionaries, rows)].double().cpu().numpy()
        count, sums, tokens = count + (a > 0).sum(axis=0), sums + a.sum(axis=0), tokens + len(a)
    return Firing(count / max(tokens, 1), sums / np.maximum(count, 1))


class Clamp(NamedTuple):
    """Features, and how far below zero each goes where it is active."""

    features: Int[np.ndarray, "k"]
    strength: Float[np.ndarray, "feature"]


def known_tokens(model: LanguageModel, texts: Sequence[str]) -> list[Known]:
    """The texts in groups, with the positions whose next token is the model's first choice."""
    return [
        Known(rows, (predictions(model, rows)[:, :-1] == rows.tokens[:, 1:]) & ~rows.filled[:, 1:])
        for rows in rows_of(model, texts)
    ]


def known_share(model: LanguageModel, layer: BenchmarkLayer, known: Sequence[Known], clamp: Clamp) -> float:
    """Of the tokens that the model predicts, the share that it still does with features clamped below zero."""
    places = torch.from_numpy(clamp.features.copy()).to(model.device)
    below = torch.from_numpy(-clamp.strength[clamp.features]).to(model.device)

    def change(a: Tensor) -> Tensor:
        changed = a.clone()
        part = a[..., places]
        changed[..., places] = torch.where(part > 0, below.to(a.dtype), part)
        return changed

    left = 0
    for rows, right in known:
        edits = layer.edits(change, exempt(model, layer.dictionaries, rows))
        still = predictions(model, rows, edits)[:, :-1] == rows.tokens[:, 1:]
        left += int((right & still).sum())
    return left / max(1, sum(int(right.sum()) for _, right in known))
