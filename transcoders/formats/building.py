"""From the weights a community stores to our dictionaries: identities between conventions, and the set they make.

Each of these is exact: the dictionary has the same features, activations and reconstruction as the published one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.dictionaries import (
    SAE,
    Activation,
    CrossLayerTranscoder,
    DictionaryProvenance,
    DictionarySet,
    JumpReLU,
    ReLU,
    SAESet,
    SparseDictionary,
    Transcoder,
    TranscoderSet,
)
from transcoders.dictionaries.token_norm import TokenNorm
from transcoders.errors import DictionaryError, FileFormatError
from transcoders.formats.files import MOST_LAYERS
from transcoders.sites import Site


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One dictionary in our convention: `a = σ(x W_enc + b_enc)`, `y = a W_dec + b_dec (+ x W_skip)`.

    `centred`: the encoder reads `x − b_dec`. `norm`: x and y are in units of each token.
    """

    W_enc: Float[Tensor, "d_in feature"]
    b_enc: Float[Tensor, "feature"]
    W_dec: Float[Tensor, "feature d_out"]
    b_dec: Float[Tensor, "d_out"]
    activation: Activation
    read: Site
    write: Site
    """The same as `read` for an autoencoder."""
    centred: bool = False
    W_skip: Float[Tensor, "d_in d_out"] | None = None
    norm: TokenNorm | None = None


def jump(threshold: Float[Tensor, "*feature"], like: Float[Tensor, "feature"]) -> JumpReLU:
    """`ReLU(h) · 1[h > θ]`, of one threshold for all features or one for each; a negative θ is as good as 0."""
    return JumpReLU(threshold.flatten().clamp_min(0).expand_as(like).to(like).clone())


def gated(
    W_enc: Float[Tensor, "d_in feature"],
    b_gate: Float[Tensor, "feature"],
    r_mag: Float[Tensor, "feature"],
    b_mag: Float[Tensor, "feature"],
) -> tuple[Float[Tensor, "d_in feature"], Float[Tensor, "feature"], JumpReLU]:
    """A gated encoder `1[x W_enc + b_gate > 0] · ReLU(x W_enc e^r + b_mag)` as a JumpReLU.

    Gate and magnitude see one projection u: u + b_gate > 0 is the same as h > b_mag − e^r b_gate of h = e^r u + b_mag.
    Source: Rajamanoharan et al. 2024, *Improving Dictionary Learning with Gated Sparse Autoencoders*, appendix.
    """
    scale = r_mag.exp()
    return W_enc * scale, b_mag, jump(b_mag - scale * b_gate, b_mag)


def rescaled(weights: LayerWeights, path: Path) -> LayerWeights:
    """Features that are ranked by `h ‖W_dec‖` and decoded by unit vectors: the norms moved into the encoder.

    Raises `FileFormatError`, of the file at `path`, where a norm is 0.
    """
    norm = weights.W_dec.norm(dim=1)
    if not bool((norm > 0).all()):
        raise FileFormatError(
            f"{path} has a feature of norm 0 in its decoder, by which activations are scaled; download or "
            "train it again."
        )
    W_enc, b_enc, W_dec = weights.W_enc * norm, weights.b_enc * norm, weights.W_dec / norm[:, None]
    return replace(weights, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec)


def threshold_of(dictionary: SparseDictionary | CrossLayerTranscoder, community: str) -> Tensor:
    """The thresholds of a JumpReLU, of which a ReLU is the one with θ = 0; `DictionaryError` for any other."""
    activation = dictionary.activation
    if isinstance(activation, JumpReLU):
        return activation.threshold
    if isinstance(activation, ReLU):
        return torch.zeros_like(dictionary.b_enc)
    raise DictionaryError(
        f"{community} holds dictionaries with JumpReLU or ReLU, not {called(activation)}; turn TopK into a "
        "JumpReLU by `transcoders.training.fold_topk`, or use the native format."
    )


def centred_bias(dictionary: SAE | Transcoder) -> Float[Tensor, "feature"]:
    """b_enc of the same dictionary with an encoder that reads `x − b_dec`."""
    if getattr(dictionary, "centred", False):
        return dictionary.b_enc
    return dictionary.b_enc + dictionary.b_dec @ dictionary.W_enc


def present(dictionaries: DictionarySet, community: str) -> Sequence[SAE | Transcoder]:
    """The dictionaries of the layers that have one; `DictionaryError` unless there is one for each layer."""
    if not isinstance(dictionaries, SAESet | TranscoderSet):
        raise DictionaryError(
            f"{community} holds one dictionary for each layer, not {dictionaries.kind!r} dictionaries; use the native "
            "format."
        )
    found = [dictionary for dictionary in dictionaries.layers if dictionary.n_features]
    if not found:
        raise DictionaryError(f"There is no dictionary to save as {community}: no layer has features.")
    return found


def without(dictionary: SAE | Transcoder | CrossLayerTranscoder, community: str, *, skip: bool = True) -> None:
    """Raises `DictionaryError` for a dictionary with a norm, or (`skip`) a skip term, that a format cannot hold."""
    is_across = isinstance(dictionary, CrossLayerTranscoder)
    what = None if is_across or dictionary.norm is None else "a norm of each token"
    what = "a skip term" if skip and dictionary.W_skip is not None else what
    if what is not None:
        where = "" if is_across else f" (layer {dictionary.read.layer})"
        raise DictionaryError(f"{community} cannot hold {what}{where}; use the native format.")


def called(activation: Activation) -> str:
    """The name of an activation function, for messages."""
    return "TopK over all layers" if activation.over_layers else type(activation).__name__


def assemble(layers: Sequence[LayerWeights], provenance: DictionaryProvenance, label: str) -> SAESet | TranscoderSet:
    """The set of one dictionary a layer, in any order; layers below the last that have none get one without features.

    Raises `FileFormatError` where a layer has two, or kinds, sites or widths are mixed.
    """
    by_layer = {weights.read.layer: weights for weights in layers}
    first = next(iter(by_layer.values()))
    if len(by_layer) < len(layers):
        raise FileFormatError(f"{label} holds two dictionaries of one layer; give the folder of one of them.")
    for weights in layers:
        if (weights.read.kind, weights.write.kind) != (first.read.kind, first.write.kind):
            raise FileFormatError(
                f"{label} holds dictionaries that read {first.read} and write {first.write}, and such that read "
                f"{weights.read} and write {weights.write}; give the folder of one of them."
            )
    if (last := max(by_layer)) >= MOST_LAYERS:
        raise FileFormatError(
            f"{label} speaks of layer {last}, but no model has {MOST_LAYERS} layers; check its names."
        )
    is_sae = first.read == first.write
    try:
        made = [_made(by_layer[i], is_sae) if i in by_layer else _absent(first, i) for i in range(max(by_layer) + 1)]
        whole = SAESet(made, provenance) if is_sae else TranscoderSet(made, provenance)  # pyright: ignore[reportArgumentType]
    except (DictionaryError, RuntimeError, ValueError) as error:
        raise FileFormatError(f"{label} holds no dictionaries that fit together: {error}") from error
    return whole.requires_grad_(False)


def assemble_cross_layer(
    label: str,
    *,
    W_enc: Sequence[Float[Tensor, "d_model feature"]],
    b_enc: Sequence[Float[Tensor, "feature"]],
    W_dec: Sequence[Float[Tensor, "feature _ d_model"]],
    b_dec: Sequence[Float[Tensor, "d_model"]],
    activation: Activation,
    provenance: DictionaryProvenance,
    reads: Sequence[Site],
    writes: Sequence[Site],
    W_skip: Sequence[Float[Tensor, "d_model d_out"]] | None = None,
) -> CrossLayerTranscoder:
    """The cross-layer transcoder of these layers; `FileFormatError` where they do not fit together."""
    try:
        return CrossLayerTranscoder(
            W_enc=torch.stack(list(W_enc)),
            b_enc=torch.stack(list(b_enc)),
            W_dec=W_dec,
            b_dec=torch.stack(list(b_dec)),
            activation=activation,
            provenance=provenance,
            reads=reads,
            writes=writes,
            W_skip=None if W_skip is None else torch.stack(list(W_skip)),
        ).requires_grad_(False)
    except (DictionaryError, RuntimeError, ValueError) as error:
        raise FileFormatError(f"{label} holds no cross-layer transcoder: {error}") from error


def _made(weights: LayerWeights, is_sae: bool) -> SAE | Transcoder:
    if weights.centred and not is_sae:  # a transcoder's encoder has one constant
        weights = replace(weights, b_enc=weights.b_enc - weights.b_dec @ weights.W_enc, centred=False)
    common = {name: getattr(weights, name).contiguous() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    skip = None if weights.W_skip is None else weights.W_skip.contiguous()
    common |= {"activation": weights.activation, "W_skip": skip, "norm": weights.norm}
    if is_sae:
        return SAE(**common, site=weights.read, centred=weights.centred)
    return Transcoder(**common, read=weights.read, write=weights.write)


def _absent(like: LayerWeights, layer: int) -> SAE | Transcoder:
    width, dtype = len(like.b_dec), like.b_dec.dtype
    if like.read == like.write:
        absent = SAE.absent(layer, width, like.read.kind, dtype)
    else:
        absent = Transcoder.absent(layer, width, like.read.kind, like.write.kind, dtype)
    return absent.to(like.b_dec.device)
