"""Decoder directions as sums of fewer, more general directions: is a latent made of others?"""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.dictionaries import SparseDictionary
from transcoders.evaluation.matching import unit


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """The decoders of a dictionary, reconstructed by a meta-SAE."""

    fvu: float
    """Fraction of the variance of the unit decoders that is left unexplained."""
    l0: float
    """Meta-latents per latent."""
    parts: tuple[tuple[tuple[int, float], ...], ...]
    """For each latent its meta-latents with their activations, strongest first."""
    members: tuple[tuple[int, ...], ...]
    """For each meta-latent the latents that it is part of, strongest first."""

    @property
    def atomic(self) -> float:
        """Share of latents made of at most one meta-latent."""
        return sum(len(part) <= 1 for part in self.parts) / len(self.parts)

    @property
    def unused(self) -> float:
        """Share of meta-latents that are part of no latent."""
        return sum(not members for members in self.members) / len(self.members)


@torch.no_grad()
def decompose(decoders: Float[Tensor, "feature d_model"], meta: SparseDictionary) -> Decomposition:
    """`w_i / ‖w_i‖ ≈ Σ_m a_im v_m + b` with the sparse `a_i = meta.encode(w_i / ‖w_i‖)`.

    `meta` is an SAE that was trained on the unit decoders of a dictionary: `transcoders.training.meta_sae` does it.

    Source: Leask et al. 2025, *Sparse Autoencoders Do Not Find Canonical Units of Analysis*, section 5; Bussmann et al.
    2024, *Showing SAE Latents Are Not Atomic Using Meta-SAEs*.
    """
    directions = unit(decoders)
    x = directions.to(meta.W_enc)
    a = meta.encode(x)
    error = (directions - meta.decode(a, x).double()).square().sum()
    variance = (directions - directions.mean(dim=0)).square().sum()
    return Decomposition(
        fvu=float(error / variance),
        l0=float((a > 0).double().sum(dim=1).mean()),
        parts=tuple(tuple(_strongest(row)) for row in a),
        members=tuple(tuple(i for i, _ in _strongest(column)) for column in a.T),
    )


def meta_parents(decompositions: Mapping[int, Decomposition]) -> pd.DataFrame:
    """Of the features of some layers the strongest meta-latent that each is made of: `layer`, `index`, `parent`."""
    rows = [
        (layer, index, parts[0][0])
        for layer, found in decompositions.items()
        for index, parts in enumerate(found.parts)
        if parts
    ]
    return pd.DataFrame(rows, columns=["layer", "index", "parent"])


def _strongest(row: Float[Tensor, "n"]) -> list[tuple[int, float]]:
    index = row.nonzero().flatten()
    order = index[row[index].argsort(descending=True, stable=True)]
    return list(zip(order.tolist(), row[order].tolist(), strict=True))
