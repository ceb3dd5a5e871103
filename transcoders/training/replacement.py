"""Weights in training in the place of the MLPs, a layer after the other, as a forward pass comes to them.

Each layer is a stack of one with parameters of its own (`TrainingParameters.views`), in memory that all layers share,
so that a layer's gradient is no tensor of the whole. Everything here is differentiable in what is read as well.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transcoders.edits import Hook
from transcoders.kernels import decode, inner_products
from transcoders.sites import Site
from transcoders.training.codes import Code, DenseCode, SparseCode
from transcoders.training.export import Scales
from transcoders.training.parameters import TrainingParameters


class Replacement:
    """What the dictionaries of all layers write, per-layer or cross-layer."""

    def __init__(self, weights: TrainingParameters, scales: Scales, *, sparse: bool = False) -> None:
        """`sparse`: whether only the weights of active features are touched."""
        self.layers = [weights.views(layer, layer + 1) for layer in range(weights.n_layers)]
        self.scales, self.sparse = scales, sparse

    def normalised(self, layer: int, read: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """In the coordinates of training."""
        return read.to(self.layers[layer].W_enc.dtype) * self.scales.read[layer]

    def code(self, layer: int, x: Float[Tensor, "token d_model"]) -> Code:
        """The features of one layer, of normalised reads."""
        weights = self.layers[layer]
        return SparseCode.of(weights, x[None], 0.0) if self.sparse else DenseCode.of(weights, x[None])

    def splice(
        self, usable: Bool[Tensor, "row pos"], reads: Sequence[Site], writes: Sequence[Site]
    ) -> dict[Site, Hook]:
        """Edits that put what the dictionaries make of the edited run's own reads in the place of what MLPs write.

        Tokens that are not `usable` keep their MLPs' writes.
        """
        written = _Written(self)

        def read(layer: int) -> Hook:
            def encode(value: Tensor) -> None:
                x = self.normalised(layer, value[usable])
                written.add(layer, self.of_features(layer, self.code(layer, x)), self.layers[layer].base(x[None])[0])

            return encode

        def write(layer: int) -> Hook:
            return lambda value: _placed(value, usable, written.take(layer))

        edits: dict[Site, Hook] = {}
        for layer, (before, behind) in enumerate(zip(reads, writes, strict=True)):
            edits |= {before: read(layer), behind: write(layer)}
        return edits

    def answers(self, codes: Sequence[Code], usable: Bool[Tensor, "row pos"]) -> Callable[[int, Tensor], Tensor]:
        """`(l, v_l) ↦ (J v)_l` with the features of `codes` held active, to be asked of layer 0, 1, … in order.

        `codes`: those of the usable tokens. Nothing passes at others.
        """
        written = _Written(self)

        def answer(layer: int, v: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
            change = self.normalised(layer, v[usable])
            skipped = self.layers[layer].skipped(change[None])
            written.add(layer, self._moved(layer, codes[layer], change), None if skipped is None else skipped[0])
            return _placed(torch.zeros_like(v), usable, written.take(layer))

        return answer

    def reconstruct(self, codes: Sequence[Code], x: Sequence[Float[Tensor, "token d_model"]]) -> list[Tensor]:
        """What is written at every layer, in the coordinates of training, each layer given its own reads."""
        written, found = _Written(self), []
        for layer, code in enumerate(codes):
            written.add(layer, self.of_features(layer, code), self.layers[layer].base(x[layer][None])[0])
            found.append(written.take(layer, scaled=False))
        return found

    def of_features(self, layer: int, code: Code) -> Float[Tensor, "span token d_model"]:
        """What the features of one layer write to it and to later ones, in the coordinates of training."""
        weights = self.layers[layer]
        W_dec = weights.W_dec[0]
        if isinstance(code, SparseCode):
            y = decode(code.a, code.active, W_dec.flatten(1)[None])[0]
        else:
            y = weights.product(code.a[0], W_dec.flatten(1))
        return y.unflatten(-1, W_dec.shape[1:]).movedim(-2, 0)

    def _moved(self, layer: int, code: Code, change: Tensor) -> Float[Tensor, "span token d_model"]:
        """What a change of the reads changes of what the features write, the active ones held."""
        encoder = self.layers[layer].encoder()[0]
        if isinstance(code, SparseCode):
            active = code.active.keep((code.a > 0).nonzero().squeeze(1))
            h = inner_products(change, active, encoder)
            return self.of_features(layer, SparseCode(h, h, active))
        h = torch.where(code.a > 0, self.layers[layer].product(change, encoder.T)[None], 0.0)
        return self.of_features(layer, DenseCode(h, h))


class _Written:
    """What was written so far to the layers that are still to come."""

    def __init__(self, replacement: Replacement) -> None:
        self._scale = replacement.scales.write
        self._pending: dict[int, Tensor] = {}

    def add(self, layer: int, parts: Float[Tensor, "span token d_model"], beside: Tensor | None) -> None:
        """`beside`: what is written at the layer itself past the features."""
        for to, part in enumerate(parts.unbind(0), layer):
            self._pending[to] = self._pending[to] + part if to in self._pending else part
        if beside is not None:
            self._pending[layer] = self._pending[layer] + beside

    def take(self, layer: int, *, scaled: bool = True) -> Tensor:
        """All that was written at a layer; `scaled`: in the model's own coordinates."""
        y = self._pending.pop(layer)
        return y / self._scale[layer] if scaled else y


def _placed(value: Tensor, where: Bool[Tensor, "row pos"], y: Float[Tensor, "token d_model"]) -> Tensor:
    """`value` with `y` at some tokens."""
    return value.index_put((where,), y.to(value.dtype))
