"""Factors between the model's activations and those a dictionary was trained on: folded into its weights, or out."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.dictionaries.cross_layer import CrossLayerTranscoder
from transcoders.dictionaries.per_layer import SAESet, TranscoderSet
from transcoders.errors import DictionaryError

S = TypeVar("S", TranscoderSet, CrossLayerTranscoder, SAESet, TranscoderSet | CrossLayerTranscoder | SAESet)


@torch.no_grad()
def fold_normalisation(
    dictionaries: S, read: Sequence[float] | Float[Tensor, "layer"], write: Sequence[float] | Float[Tensor, "layer"]
) -> S:
    """Make dictionaries of normalised activations, in place, into dictionaries of the model's own.

    Layer l was trained to map `s_l · read` to `t_l · write`; afterwards it maps `read` to `write`, with the same
    features and activations: `W_enc ← s W_enc`, `W_dec[l→l'] ← W_dec / t_l'`, `b_dec ← b_dec / t`,
    `W_skip ← s W_skip / t`. Pre-activations are left as they are, so thresholds stay valid. The factors are recorded
    in the provenance. `DictionaryError` where an encoder that reads `x − b_dec` has two different factors.
    """
    if dictionaries.provenance.normalisation:
        raise DictionaryError(
            "The factors of these dictionaries are folded in already; call `unfold_normalisation` first to change them."
        )
    s, t = (torch.as_tensor(side, dtype=torch.float64).tolist() for side in (read, write))
    if len(s) != dictionaries.n_layers or len(t) != dictionaries.n_layers:
        raise DictionaryError(f"{dictionaries.n_layers} layers need as many factors; got {len(s)} and {len(t)}.")
    _scale(dictionaries, s, t)
    dictionaries.provenance = replace(dictionaries.provenance, normalisation={"read": s, "write": t})
    return dictionaries


@torch.no_grad()
def unfold_normalisation(dictionaries: S) -> S:
    """The inverse, in place: what was trained, which reads `s · read` and writes `t · write`."""
    recorded = dictionaries.provenance.normalisation
    if not recorded:
        raise DictionaryError("These dictionaries record no factors; nothing is folded into their weights.")
    _scale(dictionaries, [1 / x for x in recorded["read"]], [1 / x for x in recorded["write"]])
    dictionaries.provenance = replace(dictionaries.provenance, normalisation={})
    return dictionaries


def _scale(dictionaries: TranscoderSet | CrossLayerTranscoder | SAESet, s: list[float], t: list[float]) -> None:
    if isinstance(dictionaries, CrossLayerTranscoder):
        for layer, W_dec in enumerate(dictionaries.W_dec):
            dictionaries.W_enc[layer] *= s[layer]
            dictionaries.b_dec[layer] /= t[layer]
            W_dec /= W_dec.new_tensor(t[layer:])[:, None]
            if dictionaries.W_skip is not None:
                dictionaries.W_skip[layer] *= s[layer] / t[layer]
        return
    for layer, dictionary in enumerate(dictionaries.layers):
        if getattr(dictionary, "centred", False) and s[layer] != t[layer]:
            raise DictionaryError(
                f"An encoder that reads x − b_dec has one factor for both; got {s[layer]} and {t[layer]}."
            )
        dictionary.W_enc *= s[layer]
        dictionary.W_dec /= t[layer]
        dictionary.b_dec /= t[layer]
        if dictionary.W_skip is not None:
            dictionary.W_skip *= s[layer] / t[layer]
