"""Ghost gradients: a second forward pass in which dead latents alone predict what is left, with exp for their ReLU."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transcoders.kernels import host
from transcoders.training.codes import Code, DenseCode
from transcoders.training.config import TrainConfig
from transcoders.training.parameters import TrainingParameters
from transcoders.training.split import WHOLE, Split

_NOTHING = 1e-20
"""Norm up to which nothing is written."""


def ghost_loss(
    weights: TrainingParameters,
    code: Code,
    reads: Float[Tensor, "layer batch d_model"],
    error: Float[Tensor, "layer batch d_model"],
    dead: Bool[Tensor, "layer feature"],
    config: TrainConfig,
    split: Split = WHOLE,
) -> Float[Tensor, ""]:
    """`r · mean_l ‖e_l − s ĝ_l‖² / d` with `ĝ = Σ_dead exp(h) W_dec`, averaged over the batch; no gradient for e, s, r.

    `s = ‖e‖ / 2‖ĝ‖` of every token and layer brings the ghosts' output to half the norm of the residual e; r, of every
    layer (a cross-layer transcoder: of all), brings the loss to the size of the reconstruction's, `mean_l ‖e_l‖² / d`.
    Layers that no dead latent writes to have no part. Where ranks share the tokens of a batch, their values add up to
    the loss.

    `exp(h − max h)` of a token stands for `exp(h)`: s makes up for the factor, in the gradient too, and nothing
    overflows. Of a gated dictionary, h is the gate's.

    Source: Jermyn & Templeton 2024, *Ghost Grads: An improvement on resampling*, Transformer Circuits, January update.
    """
    on_device = host.queued(error) and split.features.size == 1
    ghost = (_ghosts_of_all if on_device else _ghosts_of_dead)(weights, code, reads, dead, split)
    norm = ghost.detach().norm(dim=2, keepdim=True)
    written = norm > _NOTHING
    ghost = ghost * torch.where(written, error.norm(dim=2, keepdim=True) / (2 * norm), 0.0)
    left, of = ((x * written).square().sum(dim=(1, 2)) for x in (error - ghost, error))
    total = split.tokens.sum(torch.stack([left.detach(), of]))
    if config.kind == "clt":
        total = total.sum(dim=1, keepdim=True)
    ratio = total[1] / total[0].clamp(min=1e-30)
    tokens = reads.shape[1] / split.share_of(reads.shape[1], config.batch)
    return (ratio * left).sum() / (weights.n_layers * tokens * error.shape[2])


def _ghosts_of_dead(
    weights: TrainingParameters, code: Code, reads: Tensor, dead: Bool[Tensor, "layer feature"], split: Split
) -> Float[Tensor, "layer batch d_model"]:
    """What the dead latents write, up to a factor for each token; only their weights are touched."""
    encoder = weights.encoder()
    bias = weights.encoder_bias(encoder)
    which = [of_layer.nonzero().squeeze(1) for of_layer in dead]
    h: list[Tensor] = []
    for layer, features in enumerate(which):
        known = code.dead_pre_activations(layer, features)
        found = weights.product(reads[layer], encoder[layer, features].T) + bias[layer, features]
        h.append(found if known is None else known)
    highest = torch.stack([_highest(of_layer) for of_layer in h])
    highest = _shift(weights, -split.features.least(-highest))
    width = weights.W_dec[0].shape[2]
    written = list(reads.new_zeros(*reads.shape[:2], width).unbind())
    for layer, features in enumerate(which):
        W_dec = weights.W_dec[layer][features]
        y = weights.product((h[layer] - highest[layer].unsqueeze(1)).exp(), W_dec.flatten(1))
        for to, part in enumerate(y.unflatten(1, W_dec.shape[1:]).unbind(1), layer):
            written[to] = written[to] + torch.nn.functional.pad(part, (0, width - part.shape[1]))
    return split.features.total(weights.spread(torch.stack(written)))


def _ghosts_of_all(
    weights: TrainingParameters, code: Code, reads: Tensor, dead: Bool[Tensor, "layer feature"], split: Split
) -> Float[Tensor, "layer batch d_model"]:
    """`_ghosts_of_dead` by masks over all features: more arithmetic, but nothing the host has to know."""
    h = code.h if isinstance(code, DenseCode) else weights.pre_activations(reads)
    h = h.masked_fill(~dead.unsqueeze(1), -torch.inf)
    highest = _shift(weights, h.detach().amax(dim=2))
    return weights.decode((h - highest.unsqueeze(2)).exp())


def _highest(h: Float[Tensor, "batch n"]) -> Float[Tensor, "batch"]:
    """Of every token; −∞ where there is none."""
    h = h.detach()
    return h.amax(dim=1) if h.shape[1] else h.new_full((len(h),), -torch.inf)


def _shift(weights: TrainingParameters, highest: Float[Tensor, "layer batch"]) -> Float[Tensor, "layer batch"]:
    """What is taken from a token's pre-activations: of all layers alike where several write to one output."""
    if len(weights.W_later) or any(W_dec.shape[1] > 1 for W_dec in weights.W_dec):
        highest = highest.amax(dim=0, keepdim=True).expand_as(highest)
    return highest.nan_to_num(neginf=0.0)
