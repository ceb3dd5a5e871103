"""First values: scales of the activations, weights and biases."""

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.dictionaries import Activation, JumpReLU, ReLU, TopK
from transcoders.training.config import TrainConfig
from transcoders.training.trainee import Scales, Trainee

_SMALLEST_VARIANCE = 1e-12
"""So that a layer that writes a constant does not divide by zero."""

_DECODER_SCALE = 0.1
"""Norm of a transcoder's first decoders, where a write has norm √d."""


def measure_scales(reads: Float[Tensor, "batch layer d_model"], writes: Float[Tensor, "batch layer d_model"]) -> Scales:
    """Scalars that give every layer's reads mean square one, and its writes variance one per coordinate."""
    read = reads.square().mean(dim=(0, 2))
    write = (writes - writes.mean(dim=0)).square().mean(dim=(0, 2))
    return Scales(*(square.clamp(min=_SMALLEST_VARIANCE).rsqrt() for square in (read, write)))


def initial_trainee(
    config: TrainConfig, reads: Float[Tensor, "batch layer d_model"], writes: Float[Tensor, "batch layer d_model"]
) -> Trainee:
    """Unit encoder columns, decoders that begin small, `b_dec` the mean of the (normalised) writes.

    Encoder biases centre the pre-activations on the first batch, so that all features start alike. An SAE's decoder
    begins as its encoder's transpose.
    """
    n_layers, d_model = reads.shape[1:]
    generator = torch.Generator().manual_seed(config.seed)

    def directions(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator).to(reads)
        return drawn / drawn.norm(dim=-1, keepdim=True)

    encoder = directions(n_layers, config.features, d_model)
    W_enc = encoder.transpose(1, 2).contiguous()
    b_enc = -torch.einsum("ld,ldf->lf", reads.mean(dim=0), W_enc)
    spans = [n_layers - layer if config.kind == "clt" else 1 for layer in range(n_layers)]
    if config.kind == "sae":
        # Half of the features are active at first: this scale makes their sum about as large as the input.
        scale = min(1.0, 2 * d_model / config.features)
        W_dec = [scale * encoder[layer].unsqueeze(1) for layer in range(n_layers)]
    else:
        W_dec = [_DECODER_SCALE * directions(config.features, span, d_model) / span**0.5 for span in spans]
    skip = torch.zeros(n_layers, d_model, d_model).to(reads) if getattr(config, "skip", False) else None
    trainee = Trainee(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=writes.mean(dim=0),
        activation=_activation(config, torch.full_like(b_enc, config.threshold)),
        W_skip=skip,
    )
    trainee.constrain()
    return trainee


def _activation(config: TrainConfig, threshold: Float[Tensor, "layer feature"]) -> Activation:
    if config.activation == "jumprelu":
        return JumpReLU(threshold, config.bandwidth)
    return TopK(config.k, over_layers=config.kind == "clt") if config.activation == "topk" else ReLU()
