"""Features of two sets of dictionaries that write alike, where both are active on one prompt."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from transcoders.dictionaries import DictionarySet
from transcoders.errors import DictionaryError, InputError
from transcoders.evaluation.matching import unit

ABOVE = 0.5
"""Cosine of what two features write, below which they are not paired."""


@torch.no_grad()
def match_features(
    a: pd.DataFrame,
    b: pd.DataFrame,
    dictionaries: tuple[DictionarySet, DictionarySet],
    *,
    above: float = ABOVE,
    layers_apart: int = 1,
    by: Literal["sum", "own"] = "sum",
) -> pd.DataFrame:
    """Pairs of features at the same position: `id_a`, `id_b`, `similarity`; each feature in one pair at most.

    `a` and `b` are tables of nodes with `id`, `kind`, `layer`, `pos` and `index`. At each position the pairs are those
    of the highest Σ cos(d_s, d_t) over one-to-one maps, among features at most `layers_apart` layers apart with a
    cosine of `above` or more. d is what a feature writes into the residual stream: `by="sum"`, Σ over the layers that
    it writes at, or `by="own"`, at its own layer.

    Raises `InputError` for settings out of range, and `DictionaryError` for dictionaries of unequal widths or that lack
    a feature.

    Source: the Hungarian method, as Paulo & Belrose 2025, *Sparse Autoencoders Trained on the Same Data Learn Different
    Features*, section 3, pair whole dictionaries.
    """
    if not 0 < above <= 1 or layers_apart < 0 or by not in ("sum", "own"):
        raise InputError(
            f"above={above}, layers_apart={layers_apart}, by={by!r} pair no features; give a cosine above 0 and at "
            "most 1, a number of layers, and 'sum' or 'own'."
        )
    if dictionaries[0].d_model != dictionaries[1].d_model:
        widths = [one.d_model for one in dictionaries]
        raise DictionaryError(f"Dictionaries of one model can be compared; these are of widths {widths}.")
    sides = [_by_position(frame) for frame in (a, b)]
    written = [_written(one, frame, by) for one, frame in zip(dictionaries, (a, b), strict=True)]
    found: list[tuple[str, str, float]] = []
    for pos in sorted(sides[0].keys() & sides[1].keys()):
        rows, columns = sides[0][pos], sides[1][pos]
        cosine = _directions(written[0], rows) @ _directions(written[1], columns).T
        apart = np.abs(rows["layer"].to_numpy()[:, None] - columns["layer"].to_numpy()[None])
        allowed = np.where((cosine >= above) & (apart <= layers_apart), cosine, 0.0)
        for row, column in zip(*linear_sum_assignment(allowed, maximize=True), strict=True):
            if allowed[row, column] > 0:
                ids = str(rows["id"].iloc[row]), str(columns["id"].iloc[column])
                found.append((*ids, float(cosine[row, column])))
    return pd.DataFrame(found, columns=["id_a", "id_b", "similarity"])


def _by_position(nodes: pd.DataFrame) -> dict[Any, pd.DataFrame]:
    features = nodes.iloc[np.flatnonzero(nodes["kind"] == "feature")]
    return dict(iter(features.groupby("pos", sort=False)))


def _directions(written: dict[tuple[int, int], np.ndarray], nodes: pd.DataFrame) -> np.ndarray:
    return np.stack([written[place] for place in zip(nodes["layer"], nodes["index"], strict=True)])


def _written(
    dictionaries: DictionarySet, nodes: pd.DataFrame, by: Literal["sum", "own"]
) -> dict[tuple[int, int], np.ndarray]:
    """By layer and number what each feature among the nodes writes, of norm one."""
    features = nodes.iloc[np.flatnonzero(nodes["kind"] == "feature")]
    found: dict[tuple[int, int], np.ndarray] = {}
    for layer, own in features.groupby("layer"):
        numbers = sorted(set(own["index"].tolist()))
        rows = unit(_rows(dictionaries, int(str(layer)), numbers, by)).cpu().numpy()
        found |= {(int(str(layer)), number): row for number, row in zip(numbers, rows, strict=True)}
    return found


def _rows(
    dictionaries: DictionarySet, layer: int, numbers: Sequence[int], by: Literal["sum", "own"]
) -> Float[Tensor, "feature d_model"]:
    if not 0 <= layer < dictionaries.n_layers or not 0 <= numbers[0] <= numbers[-1] < dictionaries.n_features(layer):
        raise DictionaryError(
            f"The dictionaries have no feature {layer}.{numbers[-1]}, which the graph has; give those that it was "
            "traced with."
        )
    index = torch.tensor(numbers, device=dictionaries.decoder_bias(layer).device)
    layers = [layer] if by == "own" else dictionaries.write_layers(layer)
    return torch.stack([dictionaries.decoder_rows(layer, index, at).double() for at in layers]).sum(0)
