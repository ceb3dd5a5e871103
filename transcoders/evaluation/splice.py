"""Reconstructions and constants in the place of what a model writes, while it runs."""

from collections.abc import Collection

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transcoders.dictionaries import CrossLayerTranscoder, DictionarySet, present_layers
from transcoders.language_model import Hook
from transcoders.sites import Site


def sequential(dictionaries: DictionarySet) -> bool:
    """Whether a layer's features are known before the later layers have run."""
    return not isinstance(dictionaries, CrossLayerTranscoder) or not dictionaries.activation.over_layers


class Splice:
    """Edits that replace the writes of some layers by what the dictionaries make of the edited model's own stream.

    A cross-layer transcoder's write at layer l' sums what the features of all layers l ≤ l' send there, each computed
    in the same pass. Positions before the first with features keep the model's own write, and so do `massive` tokens
    and layers without a dictionary. One `Splice` serves one forward pass at a time.
    """

    def __init__(
        self,
        dictionaries: DictionarySet,
        layers: Collection[int] | None = None,
        massive: Bool[Tensor, "batch pos"] | None = None,
    ) -> None:
        self.dictionaries, self.massive = dictionaries, massive
        self.layers = set(present_layers(dictionaries) if layers is None else layers)
        self._pending: dict[int, Tensor] = {}
        self._reads: dict[int, Tensor] = {}

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
        if layer in self.layers:
            self._reads[layer] = read

    def _emit(self, layer: int, value: Float[Tensor, "batch pos d_model"]) -> Tensor | None:
        if layer not in self.layers:
            return None
        y = self._pending.pop(layer) + self.dictionaries.decoder_bias(layer)
        replacement = self.dictionaries.finished(layer, y, self._reads.pop(layer))
        return with_features(value, replacement, self.dictionaries.provenance.first, self.massive)


def with_features(
    value: Float[Tensor, "batch pos d_model"],
    replacement: Float[Tensor, "*any d_model"],
    first: int,
    massive: Bool[Tensor, "batch pos"] | None,
) -> Float[Tensor, "batch pos d_model"]:
    """`replacement` at the positions with features: from `first` on, those that are not `massive`."""
    replaced = torch.cat([value[:, :first], replacement.expand_as(value)[:, first:]], dim=1)
    return replaced if massive is None else torch.where(massive[..., None], value, replaced)


def in_the_place(
    replacement: Float[Tensor, "*any d_model"], first: int, massive: Bool[Tensor, "batch pos"] | None = None
) -> Hook:
    """An edit that writes `replacement`, of every token or the same for all, at the positions with features."""
    return lambda value: with_features(value, replacement, first, massive)
