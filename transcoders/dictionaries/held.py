"""Dictionaries with the features that are active held active: what they make of a small change of what they read.

Inside the region of inputs where the same features are active, every activation used here is linear in what it reads
with slope one, so that this map is the derivative of the dictionaries, exactly.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transcoders.dictionaries.dictionary_set import DictionarySet
from transcoders.errors import DictionaryError

_ENCODED_VALUES = 2**24
"""Activations that are held together while the active features are looked for."""


class ActiveFeatures(NamedTuple):
    """The features of a layer that are active on some token."""

    feature: Int[Tensor, "k"]
    active: Bool[Tensor, "token k"]


class HeldFeatures:
    """The derivative `J` of a set of dictionaries at given reads, the set of active features held.

    `(J v)_l' = Σ_{l ≤ l'} ((v_l W_enc[l]) ∘ active_l) W_dec[l→l'] (+ v_l' W_skip[l'])`, of per-layer dictionaries with
    `l = l'` alone. `with_features`: the tokens that have features; a skip term reads all. Raises `DictionaryError` for
    dictionaries that `nonlinear` names.
    """

    @torch.no_grad()
    def __init__(
        self,
        dictionaries: DictionarySet,
        reads: Float[Tensor, "layer *batch d_model"],
        with_features: Bool[Tensor, "*batch"] | None = None,
    ) -> None:
        if (reason := nonlinear(dictionaries)) is not None:
            raise DictionaryError(reason)
        self.dictionaries = dictionaries
        self.layers = _active(dictionaries, reads.flatten(1, -2))
        if with_features is not None:
            keep = with_features.flatten()[:, None]
            self.layers = [ActiveFeatures(layer.feature, layer.active & keep) for layer in self.layers]

    @torch.no_grad()
    def change(self, layer: int, v: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "write *batch d_model"]:
        """What a change of one layer's read adds at each of its `write_layers`, its skip term included."""
        feature, active = self.layers[layer]
        rows = v.flatten(0, -2)
        h = (rows @ self.dictionaries.encoder_rows(layer, feature).T) * active
        writes = self.dictionaries.write_layers(layer)
        added = [h @ self.dictionaries.decoder_rows(layer, feature, to) for to in writes]
        if (skip := self.dictionaries.skip(layer)) is not None:
            added[0] = added[0] + rows @ skip
        return torch.stack(added).unflatten(1, v.shape[:-1])

    def answers(self) -> Callable[[int, Float[Tensor, "*batch d_model"]], Float[Tensor, "*batch d_model"]]:
        """`(l, v_l) ↦ (J v)_l`, to be asked of layer 0, 1, … in order, as a forward pass does."""
        pending: dict[int, Tensor] = {}

        def answer(layer: int, v: Tensor) -> Tensor:
            for to, added in zip(self.dictionaries.write_layers(layer), self.change(layer, v), strict=True):
                pending[to] = pending[to] + added if to in pending else added
            return pending.pop(layer)

        return answer

    def joint(self, v: Float[Tensor, "layer *batch d_model"]) -> Float[Tensor, "layer *batch d_model"]:
        """`J v` of all layers, for a change of all reads."""
        answer = self.answers()
        return torch.stack([answer(layer, change) for layer, change in enumerate(v)])


def nonlinear(dictionaries: DictionarySet) -> str | None:
    """Why dictionaries have no linear map even where the same features stay active; None where they have."""
    for layer in range(dictionaries.n_layers):
        if (norm := dictionaries.norm(layer)) is not None:
            return (
                f"The dictionary of layer {layer} reads each token in units of its own ({norm}), which makes what it "
                "writes no linear function of what it reads; derivatives need dictionaries without such a norm."
            )
    return None


def _active(dictionaries: DictionarySet, reads: Float[Tensor, "layer token d_model"]) -> list[ActiveFeatures]:
    widths = [dictionaries.n_features(layer) for layer in range(dictionaries.n_layers)]
    at_once = max(1, _ENCODED_VALUES // max(1, sum(widths)))
    found: list[list[Tensor]] = [[] for _ in widths]
    for start, part in zip(range(0, reads.shape[1], at_once), reads.split(at_once, dim=1), strict=True):
        index = dictionaries.encode(part).index
        for layer, places in enumerate(found):
            places.append(index[index[:, 0] == layer, 1:] + index.new_tensor([start, 0]))
    return [_layer(torch.cat(places), reads.shape[1]) for places in found]


def _layer(places: Int[Tensor, "n 2"], tokens: int) -> ActiveFeatures:
    feature, column = places[:, 1].unique(return_inverse=True)
    active = torch.zeros(tokens, len(feature), dtype=torch.bool, device=places.device)
    active[places[:, 0], column] = True
    return ActiveFeatures(feature, active)
