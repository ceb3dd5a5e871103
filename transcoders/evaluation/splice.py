"""Reconstructions in the place of what a model writes, while it runs."""

from collections.abc import Callable, Collection

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.dictionaries import DictionarySet
from transcoders.language_model import Hook
from transcoders.sites import Site


class Splice:
    """Edits that replace the writes of some layers by what the dictionaries make of the edited model's own stream.

    A cross-layer transcoder's write at layer l' sums what the features of all layers l ≤ l' send there, each computed
    in the same pass. The first position keeps the model's own write. One `Splice` serves one forward pass at a time.
    """

    def __init__(self, dictionaries: DictionarySet, layers: Collection[int] | None = None) -> None:
        self.dictionaries = dictionaries
        self.layers = set(range(dictionaries.n_layers) if layers is None else layers)
        self._pending: dict[int, Tensor] = {}

    def edits(self) -> dict[Site, Hook]:
        """For `LanguageModel.run`."""
        edits: dict[Site, Hook] = {}
        for layer in range(self.dictionaries.n_layers):
            read, write = self.dictionaries.reads[layer], self.dictionaries.writes[layer]
            if read == write:
                edits[read] = self._both(layer)
            else:
                edits[read] = self._reader(layer)
                edits[write] = self._writer(layer)
        return edits

    def _reader(self, layer: int) -> Hook:
        def read(value: Float[Tensor, "batch pos d_model"]) -> None:
            self._receive(layer, value)

        return read

    def _writer(self, layer: int) -> Hook:
        def write(value: Float[Tensor, "batch pos d_model"]) -> Tensor | None:
            return self._emit(layer, value)

        return write

    def _both(self, layer: int) -> Hook:
        def replace(value: Float[Tensor, "batch pos d_model"]) -> Tensor | None:
            self._receive(layer, value)
            return self._emit(layer, value)

        return replace

    def _receive(self, layer: int, read: Float[Tensor, "batch pos d_model"]) -> None:
        """Encode one layer's read, and set aside what its features write to this and later layers."""
        targets = [target for target in self.dictionaries.write_layers(layer) if target in self.layers]
        if not targets:
            return
        first = self.dictionaries.write_layers(layer).start
        parts = self.dictionaries.decode_layer(layer, self.dictionaries.activations(layer, read))
        for target in targets:
            part = parts[..., target - first, :]
            self._pending[target] = self._pending[target] + part if target in self._pending else part
        if (skip := self.dictionaries.skip(layer)) is not None and layer in self.layers:
            self._pending[layer] = self._pending[layer] + read @ skip

    def _emit(self, layer: int, value: Float[Tensor, "batch pos d_model"]) -> Tensor | None:
        if layer not in self.layers:
            return None
        replacement = self._pending.pop(layer) + self.dictionaries.decoder_bias(layer)
        return keep_first(value, replacement)


class Fixed:
    """Edits that replace the writes of some layers by given ones; the first position keeps the model's own."""

    def __init__(
        self, dictionaries: DictionarySet, writes: Float[Tensor, "layer batch pos d_model"], layers: Collection[int]
    ) -> None:
        self.edited = {dictionaries.writes[layer]: writes[layer] for layer in layers}

    def edits(self) -> dict[Site, Hook]:
        """For `LanguageModel.run`."""
        return {site: self._writer(replacement) for site, replacement in self.edited.items()}

    def _writer(self, replacement: Float[Tensor, "batch pos d_model"]) -> Hook:
        return lambda value: keep_first(value, replacement)


def keep_first(
    value: Float[Tensor, "batch pos d_model"], replacement: Float[Tensor, "*any d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """`replacement` at all positions but the first."""
    return torch.cat([value[:, :1], replacement.expand_as(value)[:, 1:]], dim=1)


def constant(vector: Float[Tensor, "d_model"]) -> Callable[[Tensor], Tensor]:
    """An edit that writes the same vector at all positions but the first."""
    return lambda value: keep_first(value, vector)
