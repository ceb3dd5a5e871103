"""From what was trained to what is used: `TrainingParameters` → SAEs, transcoders or a cross-layer transcoder.

`fold_topk` replaces TopK by a threshold afterwards.
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.dictionaries import (
    SAE,
    Activation,
    CrossLayerTranscoder,
    DictionaryProvenance,
    JumpReLU,
    SAESet,
    TopK,
    Transcoder,
    TranscoderSet,
    fold_normalisation,
)
from transcoders.errors import DictionaryError
from transcoders.sites import Site
from transcoders.training.activations import BatchTopK, Gated
from transcoders.training.parameters import TrainingParameters

_LIBRARIES = ("circuitsae", "torch", "transformer-lens", "transformers")


def library_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:  # not installed, or run from a checkout
            continue
    return versions


@dataclass(frozen=True)
class Scales:
    """One factor per layer that brings reads to mean square one and writes to variance one per coordinate."""

    read: Float[Tensor, "layer"]
    write: Float[Tensor, "layer"]


@torch.no_grad()
def export(
    weights: TrainingParameters,
    kind: str,
    scales: Scales,
    reads: Sequence[Site],
    writes: Sequence[Site],
    provenance: DictionaryProvenance,
) -> TranscoderSet | CrossLayerTranscoder | SAESet:
    """The trained dictionaries on activations as the model has them: the same outputs, the scales folded in.

    Aligned encoders become plain ones. A gated dictionary becomes a JumpReLU one with the same outputs: with
    h = m = exp(r) · x W_gate + b_mag, π > 0 is h > θ = b_mag − exp(r) b_gate, so a = h · 1[h > max(θ, 0)]. BatchTopK
    becomes JumpReLU with the threshold estimated in training, the same for all features of a layer.
    """
    W_enc, b_enc, activation = _pointwise(weights)
    W_dec = weights.full_decoders()
    b_dec = weights.b_dec.detach().clone()
    W_skip = None if (past := weights.skip_map()) is None else past.detach().clone()
    layers = range(weights.n_layers)
    built: TranscoderSet | CrossLayerTranscoder | SAESet
    if kind == "clt":
        built = CrossLayerTranscoder(
            W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, activation=_copy(activation),
            provenance=provenance, reads=reads, writes=writes, W_skip=W_skip,
        )  # fmt: skip
    elif kind == "sae":
        built = SAESet(
            [
                SAE(
                    W_enc=W_enc[i], b_enc=b_enc[i], W_dec=W_dec[i][:, 0].contiguous(), b_dec=b_dec[i],
                    activation=_copy(activation, i), site=reads[i], centred=weights.centred,
                )
                for i in layers
            ],
            provenance,
        )  # fmt: skip
    else:
        built = TranscoderSet(
            [
                Transcoder(
                    W_enc=W_enc[i], b_enc=b_enc[i], W_dec=W_dec[i][:, 0].contiguous(), b_dec=b_dec[i],
                    activation=_copy(activation, i), read=reads[i], write=writes[i],
                    W_skip=None if W_skip is None else W_skip[i],
                )
                for i in layers
            ],
            provenance,
        )  # fmt: skip
    return fold_normalisation(built.requires_grad_(False), scales.read, scales.write)


def _pointwise(
    weights: TrainingParameters,
) -> tuple[Float[Tensor, "layer d_model feature"], Float[Tensor, "layer _"], Activation]:
    """Encoder, bias and an activation function that inference knows."""
    W_enc, b_enc = weights.encoder().detach(), weights.b_enc.detach().clone()
    activation = weights.activation
    if isinstance(activation, BatchTopK):
        thresholds = activation.threshold.to(b_enc)[:, None].expand_as(b_enc)
        activation = JumpReLU(thresholds.clone())
    elif isinstance(activation, Gated):
        gain = activation.r.exp()
        activation, b_enc, W_enc = (
            JumpReLU((activation.b_mag - gain * b_enc).clamp(min=0)),
            activation.b_mag.detach().clone(),
            W_enc * gain[..., None],
        )
    return W_enc.transpose(1, 2).clone(memory_format=torch.contiguous_format), b_enc, activation


def _copy(activation: Activation, layer: int | None = None) -> Activation:
    """The activation function of the whole stack, or of one of its layers, sharing no memory with it."""
    if isinstance(activation, JumpReLU):
        threshold = activation.threshold.detach()
        return JumpReLU((threshold if layer is None else threshold[layer]).clone(), activation.bandwidth)
    return TopK(activation.k, over_layers=activation.over_layers) if isinstance(activation, TopK) else activation


Folded = TranscoderSet | CrossLayerTranscoder | SAESet


@torch.no_grad()
def fold_topk(dictionaries: Folded, reads: Float[Tensor, "layer token d_model"]) -> Folded:
    """Replace TopK, in place, by the threshold that leaves k features active per token on average.

    The threshold is estimated on `reads`: one for each layer, or a single one where TopK ranks all layers together.
    Afterwards a layer's features depend on that layer alone, so they can be computed while the model runs.
    """
    if isinstance(dictionaries, CrossLayerTranscoder):
        k = _k(dictionaries.activation)
        h, count = dictionaries.pre_activations_dense(reads), k * reads.shape[1]
        cuts = (
            [_threshold(h, count)] if dictionaries.activation.over_layers else [_threshold(each, count) for each in h]
        )
        thresholds = torch.tensor(cuts).to(dictionaries.b_enc)[:, None].expand_as(dictionaries.b_enc).clone()
        dictionaries.activation = JumpReLU(thresholds).requires_grad_(False)
        return dictionaries
    for layer, dictionary in enumerate(dictionaries.layers):
        if dictionary.n_features == 0:  # a layer that has none
            continue
        k = _k(dictionary.activation)
        threshold = _threshold(dictionaries.pre_activations(layer, reads[layer]), k * reads.shape[1])
        dictionary.activation = JumpReLU(torch.full_like(dictionary.b_enc, threshold)).requires_grad_(False)
    return dictionaries


def _k(activation: Activation) -> int:
    if not isinstance(activation, TopK):
        raise DictionaryError(f"Only TopK is replaced by a threshold; these dictionaries have {activation.name!r}.")
    return activation.k


def _threshold(h: Tensor, count: int) -> float:
    """The value that `count` positive pre-activations exceed; zero where there are not that many."""
    flat = h.flatten()
    if count >= len(flat):
        return 0.0
    return max(0.0, float(flat.kthvalue(len(flat) - count).values))
