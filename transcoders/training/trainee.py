"""The weights in training: every kind as one stack of layers, on normalised activations."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from transcoders.dictionaries import (
    SAE,
    Activation,
    CrossLayerTranscoder,
    DictionaryProvenance,
    DictionarySet,
    JumpReLU,
    SAESet,
    TopK,
    Transcoder,
    TranscoderSet,
)
from transcoders.sites import Site
from transcoders.training.config import TrainConfig


@dataclass(frozen=True)
class Scales:
    """One factor per layer that brings reads to mean square one and writes to variance one per coordinate."""

    read: Float[Tensor, "layer"]
    write: Float[Tensor, "layer"]


class Trainee(nn.Module):
    """All layers of one kind. `W_dec[l]` is `[feature, span, d_model]`: what layer l writes to layers l … l + span − 1.

    The span is one for SAEs and transcoders, and reaches the last layer for a cross-layer transcoder.
    """

    W_skip: Float[Tensor, "layer d_model d_out"] | None

    def __init__(
        self,
        *,
        W_enc: Float[Tensor, "layer d_model feature"],
        b_enc: Float[Tensor, "layer feature"],
        W_dec: Sequence[Float[Tensor, "feature _ d_model"]],
        b_dec: Float[Tensor, "layer d_model"],
        activation: Activation,
        W_skip: Float[Tensor, "layer d_model d_out"] | None = None,
    ) -> None:
        super().__init__()
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(b_enc)
        self.W_dec = nn.ParameterList(nn.Parameter(w) for w in W_dec)
        self.b_dec = nn.Parameter(b_dec)
        self.W_skip = None if W_skip is None else nn.Parameter(W_skip)
        self.activation = activation

    @property
    def n_layers(self) -> int:
        return self.W_enc.shape[0]

    def pre_activations(self, reads: Float[Tensor, "layer batch d_model"]) -> Float[Tensor, "layer batch feature"]:
        return torch.baddbmm(self.b_enc.unsqueeze(1), reads, self.W_enc)

    def activate(self, h: Float[Tensor, "layer batch feature"]) -> Float[Tensor, "layer batch feature"]:
        return self.activation(h.movedim(0, -2)).movedim(-2, 0)

    def decode(self, a: Float[Tensor, "layer batch feature"]) -> Float[Tensor, "layer batch d_model"]:
        """What the features write, without bias and skip term."""
        writes: list[Tensor | float] = [0.0] * self.n_layers
        for layer, W_dec in enumerate(self.W_dec):
            parts = a[layer] @ W_dec.flatten(1)
            for offset, part in enumerate(parts.unflatten(-1, W_dec.shape[1:]).unbind(-2)):
                writes[layer + offset] = writes[layer + offset] + part
        return torch.stack(writes)  # pyright: ignore[reportArgumentType]

    def reconstruct(
        self, a: Float[Tensor, "layer batch feature"], reads: Float[Tensor, "layer batch d_model"]
    ) -> Float[Tensor, "layer batch d_model"]:
        y = self.decode(a) + self.b_dec.unsqueeze(1)
        return y if self.W_skip is None else y + reads @ self.W_skip

    def decoder_norms(self) -> Float[Tensor, "layer feature"]:
        """The norm of all decoders of a feature stacked."""
        return torch.stack([W_dec.flatten(1).norm(dim=1) for W_dec in self.W_dec])

    @torch.no_grad()
    def constrain(self) -> None:
        """After every step: thresholds stay non-negative, and TopK, which ranks by size, ranks unit decoders."""
        if isinstance(self.activation, JumpReLU):
            self.activation.threshold.clamp_(min=0)
        if isinstance(self.activation, TopK):
            norms = self.decoder_norms()
            for layer, W_dec in enumerate(self.W_dec):
                W_dec /= norms[layer, :, None, None]

    @torch.no_grad()
    def export(
        self,
        config: TrainConfig,
        scales: Scales,
        reads: Sequence[Site],
        writes: Sequence[Site],
        provenance: DictionaryProvenance,
    ) -> DictionarySet:
        """The trained dictionaries on activations as the model has them: the same outputs, the scales folded in.

        With reads r and writes y of the model, the trainee saw `s r` and `t y`. Pre-activations are left as they are,
        so thresholds stay valid: `W_enc ← s W_enc`, `W_dec[l→l'] ← W_dec / t_l'`, `b_dec ← b_dec / t`,
        `W_skip ← s W_skip / t`.
        """
        s, t = scales.read, scales.write
        W_enc = s[:, None, None] * self.W_enc
        W_dec = [w / t[layer : layer + w.shape[1], None] for layer, w in enumerate(self.W_dec)]
        b_dec = self.b_dec / t[:, None]
        W_skip = None if self.W_skip is None else self.W_skip * (s / t)[:, None, None]
        if config.kind == "clt":
            return CrossLayerTranscoder(
                W_enc=W_enc, b_enc=self.b_enc.clone(), W_dec=W_dec, b_dec=b_dec, activation=_copy(self.activation),
                provenance=provenance, reads=reads, writes=writes, W_skip=W_skip,
            ).requires_grad_(False)  # fmt: skip
        if config.kind == "sae":
            saes = [
                SAE(
                    W_enc=W_enc[i], b_enc=self.b_enc[i].clone(), W_dec=W_dec[i][:, 0], b_dec=b_dec[i],
                    activation=_copy(self.activation, i), site=site,
                )
                for i, site in enumerate(reads)
            ]  # fmt: skip
            return SAESet(saes, provenance).requires_grad_(False)
        transcoders = [
            Transcoder(
                W_enc=W_enc[i], b_enc=self.b_enc[i].clone(), W_dec=W_dec[i][:, 0], b_dec=b_dec[i],
                activation=_copy(self.activation, i), read=reads[i], write=writes[i],
                W_skip=None if W_skip is None else W_skip[i],
            )
            for i in range(self.n_layers)
        ]  # fmt: skip
        return TranscoderSet(transcoders, provenance).requires_grad_(False)


def _copy(activation: Activation, layer: int | None = None) -> Activation:
    """The activation function of the whole stack, or of one of its layers, sharing no memory with it."""
    if isinstance(activation, JumpReLU):
        threshold = activation.threshold.detach()
        return JumpReLU((threshold if layer is None else threshold[layer]).clone(), activation.bandwidth)
    return activation
