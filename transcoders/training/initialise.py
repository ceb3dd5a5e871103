"""First values: scales of the activations, weights and biases."""

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.dictionaries import Activation, JumpReLU, ReLU, TopK
from transcoders.training import low_rank
from transcoders.training.activations import BatchTopK, Gated
from transcoders.training.config import CLTConfig, MLPConfig, SAEConfig, TrainConfig
from transcoders.training.export import Scales
from transcoders.training.parameters import TrainingParameters
from transcoders.training.sparsity import START_OVER_TARGET
from transcoders.training.split import WHOLE, Split

_SMALLEST_VARIANCE = 1e-12
"""So that a layer that writes a constant does not divide by zero."""

_DECODER_NORM = 0.1
"""Norm of a transcoder's first decoders, where a write has norm √d."""


def measure_scales(
    reads: Float[Tensor, "batch layer d_model"],
    writes: Float[Tensor, "batch layer d_model"],
    config: TrainConfig | None = None,
) -> Scales:
    """Scalars that give every layer's reads mean square one, and its writes variance one per coordinate.

    An SAE reads what it writes, so its one scalar is that of the writes. With `normalise="none"` all are one.
    """
    read = reads.square().mean(dim=(0, 2))
    write = (writes - writes.mean(dim=0)).square().mean(dim=(0, 2))
    if config is not None and config.kind == "sae":
        read = write
    scales = Scales(*(square.clamp(min=_SMALLEST_VARIANCE).rsqrt() for square in (read, write)))
    if config is not None and config.normalise == "none":
        return Scales(torch.ones_like(scales.read), torch.ones_like(scales.write))
    return scales


def initial_parameters(
    config: TrainConfig,
    reads: Float[Tensor, "batch layer d_model"],
    writes: Float[Tensor, "batch layer d_model"],
    *,
    split: Split = WHOLE,
    n_layers: int | None = None,
) -> TrainingParameters:
    """Encoders in random directions, decoders that begin small, `b_dec` the mean of the (normalised) writes.

    Encoder biases centre the pre-activations on the first batch, so that all features start alike; with `start_l0`
    they are such that each feature fires equally often. An SAE's decoder begins as its encoder's transpose. Decoders of
    low rank begin as large as full ones, at their own layer and at later ones.

    `split`: whose layers and features; the weights are those that a single process gives these, of `n_layers` in all.
    """
    n_own, d_model = reads.shape[1:]
    n_layers = n_layers or n_own
    layers, features = split.layers_of(n_layers), split.features_of(config.features)
    generator = torch.Generator().manual_seed(config.seed)

    def directions(*span: int, width: int = d_model) -> Tensor:
        drawn = torch.randn((config.features, *span, width), generator=generator)
        own = drawn[features.start : features.stop].to(reads)
        return own / own.norm(dim=-1, keepdim=True)

    def of_own(*spans: tuple[int, ...]) -> list[Tensor]:
        # the others' are drawn and dropped, one by one
        return [drawn for layer, span in enumerate(spans) for drawn in [directions(*span)] if layer in layers]

    encoder = torch.stack(of_own(*[()] * n_layers))
    b_dec = first_bias(config, writes)
    spans = [n_layers - layer if config.kind == "clt" else 1 for layer in range(n_layers)]
    rank = config.decoder_rank if isinstance(config, CLTConfig) else None
    apart = spans if rank is None else [1] * n_layers
    transposed = config.decoder_init == "transpose" or (config.decoder_init == "default" and config.kind == "sae")
    norm = _decoder_norm(config, d_model)
    if transposed:
        written = [encoder[i].unsqueeze(1).expand(-1, apart[layer], -1) for i, layer in enumerate(layers)]
    else:
        written = of_own(*((span,) for span in apart))
    W_dec = [norm * W / span**0.5 for W, span in zip(written, (spans[layer] for layer in layers), strict=True)]
    W_later: list[Tensor] = []
    if rank is not None:
        for layer, span in enumerate(spans[:-1]):
            codes = norm * ((span - 1) / span) ** 0.5 * directions(1, width=rank)
            W_dec[layer] = torch.cat([W_dec[layer], codes], dim=2)
            W_later.append(low_rank.first_maps(rank, span - 1, d_model, generator).to(reads))
    centred = isinstance(config, SAEConfig) and config.centred
    W_enc = (config.encoder_scale or 1.0) * encoder
    centre = reads.mean(dim=0) - b_dec if centred else reads.mean(dim=0)
    b_enc = -torch.einsum("ld,lfd->lf", centre, W_enc)
    skip = skip_out = None
    if isinstance(config, MLPConfig) and config.skip:
        skip = torch.zeros(n_own, d_model, d_model).to(reads)
        if config.skip_rank is not None:  # a random projection at first, of which nothing is written
            drawn = torch.randn(n_layers, d_model, config.skip_rank, generator=generator)[layers.start : layers.stop]
            skip = drawn.to(reads) / d_model**0.5
            skip_out = torch.zeros(n_own, config.skip_rank, d_model).to(reads)
    weights = TrainingParameters(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        activation=_activation(config, b_enc),
        W_skip=skip,
        W_skip_out=skip_out,
        W_later=W_later,
        centred=centred,
        aligned=config.aligned,
        unit_decoders=config.unit_decoders,
        side_by_side=getattr(config, "side_by_side", 1),
        bf16=config.precision == "bf16",
        ranks=split.features,
    )
    weights.constrain()
    start_l0 = config.start_l0
    if start_l0 is None and config.target_l0 is not None:
        start_l0 = min(START_OVER_TARGET * config.target_l0, config.features / 2)
    if start_l0 is not None:
        calibrate_bias(weights, reads.transpose(0, 1), start_l0 * len(features) / config.features)
    elif config.aligned:  # the encoder in use is not the one the bias was centred for
        centre_bias(weights, reads.mean(dim=0))
    return weights


def first_bias(config: TrainConfig, writes: Float[Tensor, "batch layer d_model"]) -> Float[Tensor, "layer d_model"]:
    if config.bias_init == "zero":
        return torch.zeros_like(writes[0])
    return geometric_median(writes) if config.bias_init == "median" else writes.mean(dim=0)


def geometric_median(
    x: Float[Tensor, "batch layer d_model"], *, steps: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, "layer d_model"]:
    """The point of each layer with the least sum of distances to all vectors, by Weiszfeld's iteration.

    Unlike the mean it is not moved by a few huge vectors. Source of the use: Bricken et al. 2023.
    """
    median = x.mean(dim=0)
    for _ in range(steps):
        weight = 1 / (x - median).norm(dim=-1).clamp(min=1e-12)
        new = torch.einsum("bl,bld->ld", weight, x) / weight.sum(dim=0)[:, None]
        moved = (new - median).norm(dim=-1).max()
        median = new
        if moved <= tolerance * x.norm(dim=-1).mean():
            break
    return median


@torch.no_grad()
def centre_bias(weights: TrainingParameters, mean: Float[Tensor, "layer d_model"]) -> None:
    """Biases such that the mean read has pre-activations zero."""
    weights.b_enc.sub_(weights.pre_activations(mean.unsqueeze(1)).squeeze(1))


@torch.no_grad()
def calibrate_bias(weights: TrainingParameters, reads: Float[Tensor, "layer batch d_model"], l0: float) -> None:
    """Biases such that every feature is over its threshold on the same share `l0 / features` of the tokens.

    Halfway between two tokens: none lies on the threshold, where rounding would decide.
    """
    h = weights.pre_activations(reads)
    rank = max(1, round(l0 / h.shape[2] * h.shape[1]))
    for layer in range(weights.n_layers):
        cut = h[layer].topk(min(rank + 1, h.shape[1]), dim=0).values[-2:].mean(dim=0)
        if isinstance(weights.activation, JumpReLU):
            cut = cut - weights.activation.threshold[layer]
        weights.b_enc[layer] -= cut
        if isinstance(weights.activation, Gated):
            weights.activation.b_mag[layer] -= cut


def _activation(config: TrainConfig, b_enc: Float[Tensor, "layer feature"]) -> Activation:
    over_layers = config.kind == "clt"
    if config.activation == "jumprelu":
        return JumpReLU(torch.full_like(b_enc, config.threshold), config.bandwidth)
    if config.activation == "topk":
        return TopK(config.k, over_layers=over_layers)
    if config.activation == "batchtopk":
        return BatchTopK(config.k, len(b_enc), over_layers=over_layers).to(b_enc.device)
    return Gated(b_enc) if config.activation == "gated" else ReLU()


def _decoder_norm(config: TrainConfig, d_model: int) -> float:
    if config.decoder_norm is not None:
        return config.decoder_norm
    # Half of an SAE's features are active at first: this makes their sum about as large as the input.
    return min(1.0, 2 * d_model / config.features) if config.kind == "sae" else _DECODER_NORM
