"""DictionarySet: all that evaluation and attribution know of dictionaries. SparseFeatures: what they read."""

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol, overload, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.dictionaries.provenance import DictionaryProvenance
from transcoders.dictionaries.token_norm import TokenNorm
from transcoders.errors import DictionaryError
from transcoders.language_model import LanguageModel
from transcoders.sites import Site


class SparseFeatures(NamedTuple):
    """The active features of one prompt."""

    index: Int[Tensor, "n 3"]  # pyright: ignore[reportIncompatibleMethodOverride]
    """Layer, position and feature of each, sorted in this order."""
    value: Float[Tensor, "n"]
    """Activations, all positive."""

    def of_layer(self, layer: int) -> "SparseFeatures":
        """The features of one layer (their index keeps its three columns)."""
        keep = self.index[:, 0] == layer
        return SparseFeatures(self.index[keep], self.value[keep])


def collect_active(activations: Iterable[Float[Tensor, "pos _"]]) -> SparseFeatures:
    """`SparseFeatures` of dense activations, one tensor for each layer; of an iterator one at a time is alive."""
    index, value = [], []
    for layer, dense in enumerate(activations):
        where = dense.nonzero()  # lexicographic, hence sorted by position and feature
        index.append(torch.nn.functional.pad(where, (1, 0), value=layer))
        value.append(dense[where[:, 0], where[:, 1]])
    return SparseFeatures(torch.cat(index), torch.cat(value))


def count_positions(features: SparseFeatures, reads: Tensor | None) -> int:
    """Positions of the prompt; without `reads`, up to the last one with an active feature."""
    if reads is not None:
        return reads.shape[1]
    return int(features.index[:, 1].max()) + 1 if len(features.index) else 0


def require_layer(layer: int, n_layers: int) -> None:
    if not 0 <= layer < n_layers:
        raise DictionaryError(f"There is no layer {layer}; these dictionaries have layers 0 to {n_layers - 1}.")


@runtime_checkable
class DictionarySet(Protocol):
    """Dictionaries for the layers of one model.

    Sizes: a feature is named by its layer and its number in the layer; `pos` are the positions of one prompt.
    `d_model` is the width of what is read and of what is written. Layers may have different numbers of features; one
    without a dictionary has none (`present_layers`).
    """

    kind: str
    """`plt`: per-layer transcoders. `clt`: a cross-layer transcoder. `sae`: autoencoders. `mixed`: some of both."""
    provenance: DictionaryProvenance

    @property
    def n_layers(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def reads(self) -> tuple[Site, ...]:
        """The site each layer's features read."""
        ...

    @property
    def writes(self) -> tuple[Site, ...]:
        """The site reconstructed at each layer."""
        ...

    def n_features(self, layer: int) -> int: ...

    def encode(self, reads: Float[Tensor, "layer pos d_model"]) -> SparseFeatures:
        """The active features of one prompt."""
        ...

    def reconstruct(
        self, features: SparseFeatures, reads: Float[Tensor, "layer pos d_model"] | None = None
    ) -> Float[Tensor, "layer pos d_model"]:
        """What the features write, with `b_dec`, and with `reads @ W_skip` where there is a skip term.

        Without `reads` the result ends at the last position that has an active feature; a skip term needs them.
        """
        ...

    def pre_activations(self, layer: int, read: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch feature"]:
        """h of one layer: `read @ encoder_rows.T + encoder_biases`, of the read in its `norm` where there is one."""
        ...

    def activations(self, layer: int, read: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch feature"]:
        """Dense activations of one layer; `DictionaryError` where layers cannot be encoded one at a time."""
        ...

    def encoder_rows(self, layer: int, feature: Int[Tensor, "k"]) -> Float[Tensor, "k d_model"]: ...

    def encoder_biases(self, layer: int, feature: Int[Tensor, "k"]) -> Float[Tensor, "k"]:
        """The constant of each pre-activation: `b_enc`, and `−b_dec W_enc` where the encoder centres its input."""
        ...

    def decoder_rows(self, layer: int, feature: Int[Tensor, "k"], write_layer: int) -> Float[Tensor, "k d_model"]:
        """What an activation of 1 adds at `write_layer`; `DictionaryError` where the layer does not write there."""
        ...

    def decode_layer(
        self, layer: int, activations: Float[Tensor, "*batch feature"]
    ) -> Float[Tensor, "*batch write d_model"]:
        """What dense activations of one layer add at each of its `write_layers`; no bias, no skip term."""
        ...

    def write_layers(self, layer: int) -> range:
        """The layers whose write site the features of `layer` write to."""
        ...

    def decoder_bias(self, layer: int) -> Float[Tensor, "d_model"]: ...

    def skip(self, layer: int) -> Float[Tensor, "d_model d_out"] | None:
        """`W_skip` in `y = … + read @ W_skip`, or None."""
        ...

    def norm(self, layer: int) -> TokenNorm | None:
        """What one layer's encoder reads its input through, or None."""
        ...

    def finished(
        self, layer: int, y: Float[Tensor, "*batch d_model"], read: Float[Tensor, "*batch d_model"] | None
    ) -> Float[Tensor, "*batch d_model"]:
        """What is written at a layer, of the sum `y` of its bias and of what features write there.

        The skip term is added, and a norm taken back; `DictionaryError` where these need `read` and it is None.
        """
        ...

    # This set, converted in place to another precision or taken to another device.
    @overload
    def to(self, device: torch.device, /) -> Any: ...
    @overload
    def to(self, dtype: torch.dtype, /) -> Any: ...

    def check_fits(self, model: LanguageModel) -> None:
        """Raises `DictionaryError` where the set does not belong to the model (width, layers, frame, weights)."""
        ...


def present_layers(dictionaries: DictionarySet) -> list[int]:
    """The layers that have a dictionary: features, a skip term, or at least a bias."""
    return [
        layer
        for layer in range(dictionaries.n_layers)
        if dictionaries.n_features(layer)
        or dictionaries.skip(layer) is not None
        or bool(dictionaries.decoder_bias(layer).any())
    ]
