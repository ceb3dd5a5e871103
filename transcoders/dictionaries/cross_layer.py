"""The cross-layer transcoder: features read one MLP's input and write the outputs of its own and all later MLPs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from transcoders.dictionaries.activations import Activation
from transcoders.dictionaries.by_name import Kind, load_set
from transcoders.dictionaries.dictionary_set import SparseFeatures, collect_active, count_positions, require_layer
from transcoders.dictionaries.provenance import DictionaryProvenance, check_fits
from transcoders.dictionaries.token_norm import TokenNorm
from transcoders.errors import DictionaryError
from transcoders.language_model import LanguageModel
from transcoders.sites import Site


class CrossLayerTranscoder(nn.Module):
    """`a_l = σ(r_l W_enc[l] + b_enc[l])`, `y_l' = Σ_{l ≤ l'} a_l W_dec[l→l'] + b_dec[l'] (+ r_l' W_skip[l'])`.

    `W_dec[l]` is `[feature, L − l, d_model]`: its second axis runs over the write layers `l … L−1`.

    Source: Ameisen et al. 2025, *Circuit Tracing: Revealing Computational Graphs in Language Models*.
    """

    kind = "clt"
    W_enc: Float[Tensor, "layer d_model feature"]
    b_enc: Float[Tensor, "layer feature"]
    b_dec: Float[Tensor, "layer d_model"]
    W_skip: Float[Tensor, "layer d_model d_out"] | None

    def __init__(
        self,
        *,
        W_enc: Float[Tensor, "layer d_model feature"],
        b_enc: Float[Tensor, "layer feature"],
        W_dec: Sequence[Float[Tensor, "feature _ d_model"]],
        b_dec: Float[Tensor, "layer d_model"],
        activation: Activation,
        provenance: DictionaryProvenance,
        reads: Sequence[Site] | None = None,
        writes: Sequence[Site] | None = None,
        W_skip: Float[Tensor, "layer d_model d_out"] | None = None,
    ) -> None:
        super().__init__()
        n_layers, d_model, n_features = W_enc.shape
        expected = [(n_features, n_layers - layer, d_model) for layer in range(n_layers)]
        if [tuple(w.shape) for w in W_dec] != expected:
            raise DictionaryError(
                f"The decoders of {n_layers} layers must have shapes [feature, L − l, d_model] = {expected}; "
                f"got {[tuple(w.shape) for w in W_dec]}."
            )
        activation.require(n_features)
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(b_enc)
        self.W_dec = nn.ParameterList(nn.Parameter(w) for w in W_dec)
        self.b_dec = nn.Parameter(b_dec)
        self.W_skip = None if W_skip is None else nn.Parameter(W_skip)
        self.activation = activation
        self.provenance = provenance
        self.reads = tuple(reads or (Site(layer, "mlp_in") for layer in range(n_layers)))
        self.writes = tuple(writes or (Site(layer, "mlp_out") for layer in range(n_layers)))

    @classmethod
    def from_pretrained(cls: type[Kind], name: str | Path, **how: Any) -> Kind:
        """`load_dictionaries(name, **how)`; raises `DictionaryError` for a set of another kind."""
        return load_set(cls, name, how)

    @property
    def n_layers(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_model(self) -> int:
        return self.W_enc.shape[1]

    def n_features(self, layer: int) -> int:
        return self.W_enc.shape[2]

    # all layers at once, dense: training

    def encode_dense(self, reads: Float[Tensor, "layer *batch d_model"]) -> Float[Tensor, "layer *batch feature"]:
        """Activations of all layers."""
        return self.activate(self.pre_activations_dense(reads))

    def pre_activations_dense(
        self, reads: Float[Tensor, "layer *batch d_model"]
    ) -> Float[Tensor, "layer *batch feature"]:
        rows = reads.reshape(self.n_layers, -1, self.d_model)
        h = torch.baddbmm(self.b_enc.unsqueeze(1), rows, self.W_enc)
        return h.reshape(*reads.shape[:-1], h.shape[-1])

    def activate(self, h: Float[Tensor, "layer *batch feature"]) -> Float[Tensor, "layer *batch feature"]:
        """σ, which sees the features of all layers of a token."""
        return self.activation(h.movedim(0, -2)).movedim(-2, 0)

    def decode_dense(
        self,
        a: Float[Tensor, "layer *batch feature"],
        reads: Float[Tensor, "layer *batch d_model"] | None = None,
    ) -> Float[Tensor, "layer *batch d_model"]:
        """The reconstruction of every layer's write; a skip term needs the reads."""
        parts = [self.decode_layer(layer, a[layer]) for layer in range(self.n_layers)]
        writes = []
        for write_layer in range(self.n_layers):
            y = sum(
                (parts[layer][..., write_layer - layer, :] for layer in range(write_layer + 1)),
                start=self.b_dec[write_layer],
            )
            if (skip := self.skip(write_layer)) is not None:
                y = y + self._require_reads(reads)[write_layer] @ skip
            writes.append(y)
        return torch.stack(writes)

    def forward(self, reads: Float[Tensor, "layer *batch d_model"]) -> Float[Tensor, "layer *batch d_model"]:
        return self.decode_dense(self.encode_dense(reads), reads)

    # one prompt, sparse: attribution

    def encode(self, reads: Float[Tensor, "layer pos d_model"]) -> SparseFeatures:
        return collect_active(list(self.encode_dense(reads)))

    def reconstruct(
        self, features: SparseFeatures, reads: Float[Tensor, "layer pos d_model"] | None = None
    ) -> Float[Tensor, "layer pos d_model"]:
        writes = self.b_dec.unsqueeze(1).repeat(1, count_positions(features, reads), 1)
        if self.W_skip is not None:
            writes = writes + self._require_reads(reads) @ self.W_skip
        for layer in range(self.n_layers):
            _, pos, feature = (active := features.of_layer(layer)).index.unbind(1)
            rows = (self.W_dec[layer][feature] * active.value[:, None, None]).transpose(0, 1)
            later = writes[layer:].index_add(1, pos, rows)
            writes = torch.cat([writes[:layer], later])
        return writes

    # by layer

    def pre_activations(self, layer: int, read: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch feature"]:
        require_layer(layer, self.n_layers)
        return read @ self.W_enc[layer] + self.b_enc[layer]

    def activations(self, layer: int, read: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch feature"]:
        return self.activation.at_layer(layer)(self.pre_activations(layer, read))

    def encoder_rows(self, layer: int, feature: Int[Tensor, "k"]) -> Float[Tensor, "k d_model"]:
        require_layer(layer, self.n_layers)
        return self.W_enc[layer].index_select(1, feature).T

    def encoder_biases(self, layer: int, feature: Int[Tensor, "k"]) -> Float[Tensor, "k"]:
        require_layer(layer, self.n_layers)
        return self.b_enc[layer][feature]

    def decoder_rows(self, layer: int, feature: Int[Tensor, "k"], write_layer: int) -> Float[Tensor, "k d_model"]:
        if write_layer not in self.write_layers(layer):
            raise DictionaryError(
                f"Features of layer {layer} write at layers {layer} to {self.n_layers - 1}; asked for {write_layer}."
            )
        return self.W_dec[layer][feature, write_layer - layer]

    def decode_layer(
        self, layer: int, activations: Float[Tensor, "*batch feature"]
    ) -> Float[Tensor, "*batch write d_model"]:
        W_dec = self.W_dec[layer]
        return (activations @ W_dec.flatten(1)).unflatten(-1, W_dec.shape[1:])

    def write_layers(self, layer: int) -> range:
        require_layer(layer, self.n_layers)
        return range(layer, self.n_layers)

    def decoder_bias(self, layer: int) -> Float[Tensor, "d_model"]:
        require_layer(layer, self.n_layers)
        return self.b_dec[layer]

    def skip(self, layer: int) -> Float[Tensor, "d_model d_out"] | None:
        require_layer(layer, self.n_layers)
        return None if self.W_skip is None else self.W_skip[layer]

    def norm(self, layer: int) -> TokenNorm | None:
        return None

    def finished(
        self, layer: int, y: Float[Tensor, "*batch d_model"], read: Float[Tensor, "*batch d_model"] | None
    ) -> Float[Tensor, "*batch d_model"]:
        return y if (skip := self.skip(layer)) is None else y + self._require_reads(read) @ skip

    def check_fits(self, model: LanguageModel) -> None:
        check_fits(self.provenance, self.n_layers, self.d_model, model, self.reads[0])

    def _require_reads(self, reads: Tensor | None) -> Tensor:
        if reads is None:
            raise DictionaryError("This cross-layer transcoder has a skip term; give the reads beside the features.")
        return reads

    def extra_repr(self) -> str:
        return f"layers={self.n_layers}, d_model={self.d_model}, features={self.n_features(0)}"
