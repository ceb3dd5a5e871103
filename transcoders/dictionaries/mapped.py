"""MappedDictionaries: decoders that stay in their file, of which only the rows asked for are read.

A decoder is needed only where its features are active. The decoders of a cross-layer transcoder, `O(L²)` matrices, may
be larger than the memory; attribution reads a few thousand of their rows.
"""

import copy
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.dictionaries.cross_layer import CrossLayerTranscoder
from transcoders.dictionaries.dictionary_set import SparseFeatures, count_positions
from transcoders.dictionaries.per_layer import MixedSet, SAESet, TranscoderSet
from transcoders.dictionaries.token_norm import TokenNorm
from transcoders.errors import DictionaryError
from transcoders.language_model import LanguageModel

_SLICE_BYTES = 64 * 2**20


class MappedDictionaries:
    """A `DictionarySet` with its encoders in memory and its decoders in a file.

    `y_l' = Σ_{l ≤ l'} a_l W_dec[l→l'] + b_dec[l'] (+ r_l' W_skip[l'])`, where only the rows of `W_dec` whose features
    are active are read, and only they are converted to the precision and device of the rest.
    `held` is the set without its decoders (their place is on the meta device), `W_dec[l]` the decoder of layer `l` as
    mapped from the file: `[feature, d_model]`, or `[feature, L − l, d_model]` of a cross-layer transcoder.

    It cannot be trained or saved; load it into memory for that. What is read stays in the system's cache of the file,
    which it takes back when memory is short. Raises `DictionaryError` where decoders and set disagree.
    """

    def __init__(self, held: TranscoderSet | SAESet | MixedSet | CrossLayerTranscoder, W_dec: Sequence[Tensor]) -> None:
        self._held = held
        self._W_dec = [W if W.ndim == 3 else W.unsqueeze(1) for W in W_dec]
        found = [tuple(W.shape) for W in self._W_dec]
        layers = range(held.n_layers)
        expected = [(held.n_features(layer), len(held.write_layers(layer)), held.d_model) for layer in layers]
        if found != expected:
            raise DictionaryError(
                f"The decoders must have shapes [feature, write layer, d_model] = {expected}; got {found}."
            )
        self.kind, self.provenance = held.kind, held.provenance
        self.n_layers, self.d_model = held.n_layers, held.d_model
        self.reads, self.writes = held.reads, held.writes

    def n_features(self, layer: int) -> int:
        return self._held.n_features(layer)

    # encoders: those of the set

    def encode(self, reads: Float[Tensor, "layer pos d_model"]) -> SparseFeatures:
        return self._held.encode(reads)

    def pre_activations(self, layer: int, read: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch feature"]:
        return self._held.pre_activations(layer, read)

    def activations(self, layer: int, read: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch feature"]:
        return self._held.activations(layer, read)

    def encoder_rows(self, layer: int, feature: Int[Tensor, "k"]) -> Float[Tensor, "k d_model"]:
        return self._held.encoder_rows(layer, feature)

    def encoder_biases(self, layer: int, feature: Int[Tensor, "k"]) -> Float[Tensor, "k"]:
        return self._held.encoder_biases(layer, feature)

    # decoders: rows of the file

    def decoder_rows(self, layer: int, feature: Int[Tensor, "k"], write_layer: int) -> Float[Tensor, "k d_model"]:
        if write_layer not in (writes := self.write_layers(layer)):
            raise DictionaryError(
                f"Features of layer {layer} write at layers {writes[0]} to {writes[-1]}; asked for {write_layer}."
            )
        return self._rows(self._W_dec[layer][:, write_layer - writes[0]], feature)

    def reconstruct(
        self, features: SparseFeatures, reads: Float[Tensor, "layer pos d_model"] | None = None
    ) -> Float[Tensor, "layer pos d_model"]:
        n_positions, layers = count_positions(features, reads), range(self.n_layers)
        y = torch.stack([self.decoder_bias(layer).repeat(n_positions, 1) for layer in layers])
        for layer in layers:
            _, pos, feature = (active := features.of_layer(layer)).index.unbind(1)
            for write_layer in self.write_layers(layer):
                rows = self.decoder_rows(layer, feature, write_layer)
                y[write_layer].index_add_(0, pos, rows * active.value[:, None])
        return torch.stack([self.finished(i, y[i], None if reads is None else reads[i]) for i in layers])

    def decode_layer(
        self, layer: int, activations: Float[Tensor, "*batch feature"]
    ) -> Float[Tensor, "*batch write d_model"]:
        a, W_dec = activations.flatten(0, -2), self._W_dec[layer]
        y = a.new_zeros(len(a), math.prod(W_dec.shape[1:]))
        active = (a != 0).any(0).nonzero()[:, 0]
        for feature in active.split(max(1, _SLICE_BYTES // (8 * y.shape[1]))):
            y += a[:, feature] @ self._rows(W_dec, feature).flatten(1)
        return y.unflatten(-1, W_dec.shape[1:]).unflatten(0, activations.shape[:-1])

    def _rows(self, W_dec: Tensor, feature: Int[Tensor, "k"]) -> Tensor:
        """Each row is read once, in the order of the file."""
        wanted, place = feature.unique(return_inverse=True)
        like = self.decoder_bias(0)
        rows = W_dec[wanted.to(W_dec.device)].to(like.device, like.dtype)
        if rows.numel() and not float(rows.abs().max()) < math.inf:  # the rest of the file is never looked at
            finite = rows.flatten(1).isfinite().all(1)
            raise DictionaryError(
                f"The decoder of feature {int(wanted[~finite][0])} has a weight that is not a finite number; "
                "download or train the dictionaries again."
            )
        return rows if torch.equal(wanted, feature) else rows[place]

    # the rest: those of the set

    def write_layers(self, layer: int) -> range:
        return self._held.write_layers(layer)

    def decoder_bias(self, layer: int) -> Float[Tensor, "d_model"]:
        return self._held.decoder_bias(layer)

    def skip(self, layer: int) -> Float[Tensor, "d_model d_out"] | None:
        return self._held.skip(layer)

    def norm(self, layer: int) -> TokenNorm | None:
        return self._held.norm(layer)

    def finished(
        self, layer: int, y: Float[Tensor, "*batch d_model"], read: Float[Tensor, "*batch d_model"] | None
    ) -> Float[Tensor, "*batch d_model"]:
        return self._held.finished(layer, y, read)

    def padded(self, n_layers: int) -> "MappedDictionaries":
        """This set and, up to `n_layers`, absent layers after its own; `DictionaryError` for cross-layer ones."""
        if isinstance(self._held, CrossLayerTranscoder):
            raise DictionaryError(f"A cross-layer transcoder of {self.n_layers} layers cannot be made {n_layers}.")
        W_dec = [torch.zeros(0, self.d_model) for _ in range(self.n_layers, n_layers)]
        return MappedDictionaries(self._held.padded(n_layers), [*self._W_dec, *W_dec]) if W_dec else self

    def to(self, to: torch.dtype | torch.device, /) -> "MappedDictionaries":
        self._held._apply(lambda held: held if held.is_meta else held.to(to))
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> "MappedDictionaries":
        """A copy that reads the same file."""
        return MappedDictionaries(copy.deepcopy(self._held, memo), self._W_dec)

    def check_fits(self, model: LanguageModel) -> None:
        self._held.check_fits(model)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._held!r})"
