"""One dictionary for each layer: sets of transcoders, of SAEs, and of both."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from transcoders.dictionaries.by_name import Kind, load_set
from transcoders.dictionaries.dictionary_set import SparseFeatures, collect_active, count_positions, require_layer
from transcoders.dictionaries.provenance import DictionaryProvenance, check_fits
from transcoders.dictionaries.sparse_dictionary import SAE, SparseDictionary, Transcoder
from transcoders.dictionaries.token_norm import TokenNorm
from transcoders.errors import DictionaryError
from transcoders.language_model import LanguageModel
from transcoders.sites import Site

D = TypeVar("D", bound=SparseDictionary)
S = TypeVar("S", bound="_PerLayerSet[Any]")


class _PerLayerSet(nn.Module, Generic[D]):
    """A `DictionarySet` whose layers neither share nor exchange anything."""

    kind: str

    def __init__(self, dictionaries: Sequence[D], provenance: DictionaryProvenance) -> None:
        super().__init__()
        if not dictionaries:
            raise DictionaryError("A set of dictionaries needs at least one layer; got none.")
        widths = sorted({width for d in dictionaries for width in (d.d_in, d.d_out)})
        if len(widths) > 1:
            raise DictionaryError(f"The dictionaries of a set read and write one width; got widths {widths}.")
        self.dictionaries = nn.ModuleList(dictionaries)
        self.provenance = provenance

    def padded(self: S, n_layers: int) -> S:
        """This set and, up to `n_layers`, absent layers after its own; it shares its dictionaries with this one."""
        absent = [self.absent(layer) for layer in range(self.n_layers, n_layers)]
        return type(self)([*self.layers, *absent], self.provenance) if absent else self

    def only(self: S, layers: Collection[int]) -> S:
        """This set with absent layers in the place of all but some; it shares its dictionaries with this one."""
        kept = [d if layer in layers else self.absent(layer) for layer, d in enumerate(self.layers)]
        return type(self)(kept, self.provenance).requires_grad_(False)

    def absent(self, layer: int) -> D:
        """What stands for the dictionary of a layer that has none, at the sites of the last layer."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls: type[Kind], name: str | Path, **how: Any) -> Kind:
        """`load_dictionaries(name, **how)`; raises `DictionaryError` for a set of another kind."""
        return load_set(cls, name, how)

    def __getitem__(self, layer: int) -> D:
        require_layer(layer, len(self.dictionaries))
        return self.dictionaries[layer]  # pyright: ignore[reportReturnType]

    @property
    def layers(self) -> list[D]:
        return list(self.dictionaries)  # pyright: ignore[reportReturnType]

    @property
    def n_layers(self) -> int:
        return len(self.dictionaries)

    @property
    def d_model(self) -> int:
        return self[0].d_in

    @property
    def reads(self) -> tuple[Site, ...]:
        return tuple(d.read for d in self.layers)

    @property
    def writes(self) -> tuple[Site, ...]:
        return tuple(d.writes[0] for d in self.layers)

    def n_features(self, layer: int) -> int:
        return self[layer].n_features

    def encode(self, reads: Float[Tensor, "layer pos d_model"]) -> SparseFeatures:
        return collect_active(d.encode(read) for d, read in zip(self.layers, reads, strict=True))

    def reconstruct(
        self, features: SparseFeatures, reads: Float[Tensor, "layer pos d_model"] | None = None
    ) -> Float[Tensor, "layer pos d_model"]:
        writes = []
        for layer in range(self.n_layers):
            _, pos, feature = (active := features.of_layer(layer)).index.unbind(1)
            y = self.decoder_bias(layer).repeat(count_positions(features, reads), 1)
            y = y.index_add(0, pos, self.decoder_rows(layer, feature, layer) * active.value[:, None])
            y = self.finished(layer, y, None if reads is None else reads[layer])
            writes.append(y)
        return torch.stack(writes)

    def pre_activations(self, layer: int, read: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch feature"]:
        return self[layer].pre_activations(read)

    def activations(self, layer: int, read: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch feature"]:
        return self[layer].encode(read)

    def encoder_rows(self, layer: int, feature: Int[Tensor, "k"]) -> Float[Tensor, "k d_model"]:
        return self[layer].W_enc.index_select(1, feature).T

    def encoder_biases(self, layer: int, feature: Int[Tensor, "k"]) -> Float[Tensor, "k"]:
        return self[layer].encoder_bias[feature]

    def decoder_rows(self, layer: int, feature: Int[Tensor, "k"], write_layer: int) -> Float[Tensor, "k d_model"]:
        if write_layer != layer:
            raise DictionaryError(f"Features of layer {layer} write at layer {layer} only; asked for {write_layer}.")
        return self[layer].W_dec[feature]

    def decode_layer(
        self, layer: int, activations: Float[Tensor, "*batch feature"]
    ) -> Float[Tensor, "*batch write d_model"]:
        return (activations @ self[layer].W_dec).unsqueeze(-2)

    def write_layers(self, layer: int) -> range:
        return range(layer, layer + 1)

    def decoder_bias(self, layer: int) -> Float[Tensor, "d_model"]:
        return self[layer].b_dec

    def skip(self, layer: int) -> Float[Tensor, "d_model d_out"] | None:
        return self[layer].W_skip

    def norm(self, layer: int) -> TokenNorm | None:
        return self[layer].norm

    def finished(
        self, layer: int, y: Float[Tensor, "*batch d_model"], read: Float[Tensor, "*batch d_model"] | None
    ) -> Float[Tensor, "*batch d_model"]:
        return self[layer].finished(y, read)

    def check_fits(self, model: LanguageModel) -> None:
        check_fits(self.provenance, self.n_layers, self.d_model, model, self.reads[0])


class TranscoderSet(_PerLayerSet[Transcoder]):
    """A transcoder for each MLP."""

    kind = "plt"

    def absent(self, layer: int) -> Transcoder:
        last = self.layers[-1]
        absent = Transcoder.absent(layer, self.d_model, last.read.kind, last.writes[0].kind, last.b_dec.dtype)
        return absent.to(last.b_dec.device)


class SAESet(_PerLayerSet[SAE]):
    """An SAE for one site of each layer; attribution graphs of it are of derivatives between the sites."""

    kind = "sae"

    def absent(self, layer: int) -> SAE:
        return _no_sae(layer, self.layers[-1])


class MixedSet(_PerLayerSet[SparseDictionary]):
    """A transcoder for the MLP of some layers, an SAE for a site of others, as `mixed` puts them together.

    A layer without a dictionary keeps its MLP, as those with an SAE do.
    """

    kind = "mixed"

    def absent(self, layer: int) -> SparseDictionary:
        saes = [d for d in self.layers if isinstance(d, SAE)]
        return _no_sae(layer, (saes or self.layers)[-1])


def _no_sae(layer: int, like: SparseDictionary) -> SAE:
    return SAE.absent(layer, like.d_in, like.read.kind, like.b_dec.dtype).to(like.b_dec.device)
