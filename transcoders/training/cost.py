"""What a training costs: bytes on each rank, floating-point operations of a token, bytes on the network of a step.

Everything follows from the configuration and the model's shape; `plan` and docs/scaling.md print it.
"""

from dataclasses import dataclass, replace

import torch

from transcoders.training.config import CLTConfig, MLPConfig, TrainConfig
from transcoders.training.part import CODES, layers_at_once

_NUMBER = 4
"""Bytes of a float32, which weights, gradients, moments and sums are in."""
_MORE_CODES = {"relu": 1.7, "jumprelu": 2.0, "batchtopk": 1.4, "gated": 4.5}
"""Tensors of the size of all pre-activations beyond `CODES`, which are TopK's: measured at the height of a step."""


@dataclass(frozen=True)
class TrainingCost:
    """Of one dictionary (an SAE or a transcoder for every layer, or a cross-layer transcoder). Bytes are one rank's."""

    parameters: int
    """Numbers that are learned, on all ranks together, each counted once."""
    free: int
    """Of these, the coordinates that constraints leave: one less for each feature of a layer with decoders of norm one,
    and one less with aligned training, where d − 1 of an encoder's d numbers make a difference. All d are stored."""
    weights: int
    moments: int
    """Adam's two."""
    averaged: int
    """The running mean of the weights; 0 where `ema` is 0."""
    gradients: int
    """Of the layers that take a step together."""
    activations: int
    """Of the same: pre-activations, activations and their gradients, inputs, outputs and errors. An upper bound where
    only active features are touched, and they are few."""
    counters: int
    """Since when each feature has not fired."""
    dense_flops: float
    """Of a token, on all ranks together: forward and backward, a product and a sum counted as two."""
    sparse_flops: float
    """The same where only active features are touched; every pre-activation is computed all the same."""
    network: int
    """Bytes that a rank sends in a step; 0 for a single process."""

    @property
    def memory(self) -> int:
        """Bytes at the height of a step, besides the model and the buffer of activations, and what an allocator keeps
        of what was freed, of which only a trial (`plan`) can tell.
        """
        return self.weights + self.moments + self.averaged + self.gradients + self.activations + self.counters

    @property
    def update(self) -> int:
        """Bytes that a step's update moves: Adam reads weights, gradients and two moments, and writes all but one."""
        return 7 * self.weights

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint on the disk: the weights, Adam's moments and the running mean, of all ranks."""
        return (4 if self.averaged else 3) * _NUMBER * self.parameters


def training_cost(
    config: TrainConfig, *, n_layers: int, d_model: int, l0: float | None = None, ranks: int = 1, device: str = "cpu"
) -> TrainingCost:
    """Cost of a step of `config` for a model of so many layers and this width, on `ranks` processes.

    With features F and layers L, and S = L (SAEs, transcoders) or L (L + 1) / 2 (cross-layer), a token takes
    `4 L F d + 6 S F d` operations: two products with the encoder, as inputs need no gradient, and three with the
    decoders. Where only active features are touched it takes `2 L F d + 2 L l0 d + 6 S l0 d`. Decoders of rank r take
    `6 F (L d + (L − 1) r)` operations in the place of `6 S F d`, and `3 r d L (L − 1)` for the maps that are shared.

    `l0`: active features of a token and layer, where k and `target_l0` do not say; one in a hundred otherwise.
    `ranks`: how many processes share the work as `config.parallel` says. Network: of an all-reduce of n bytes a rank
    sends `2 n (N − 1) / N`, of an all-gather of n bytes in all `n (N − 1) / N`.

    Source of both: Thakur et al. 2005, *Optimization of Collective Communication Operations in MPICH*.
    """
    features, batch = config.features, config.batch
    by_features, by_layers, by_tokens = (config.parallel == how for how in ("features", "layers", "data"))
    own_features = -(-features // ranks) if by_features else features
    own_layers = -(-n_layers // ranks) if by_layers else n_layers
    own_tokens = -(-batch // ranks) if by_tokens else batch
    own = parameter_count(config, own_layers, d_model, own_features)
    at_once = layers_at_once(config, d_model, own_layers, torch.device(device))
    rank = decoder_rank(config)
    widths = round((CODES + _MORE_CODES.get(config.activation, 0.0)) * own_features) + 4 * d_model + 2 * rank
    l0 = _active(config, n_layers) if l0 is None else l0
    parameters = parameter_count(config, n_layers, d_model, features)
    encoder, skip = (2 * d_model * n for n in (n_layers, _skip(config, d_model) * n_layers))
    decoder, maps = (2 * n for n in _decoder_numbers(config, n_layers, d_model))
    return TrainingCost(
        parameters=parameters,
        free=parameters - n_layers * features * (config.aligned + config.unit_decoders),
        weights=_NUMBER * own,
        moments=2 * _NUMBER * own,
        averaged=_NUMBER * own * (config.ema > 0),
        gradients=_NUMBER * own * at_once // own_layers,
        activations=_NUMBER * own_tokens * at_once * widths,
        counters=8 * own_layers * own_features,
        dense_flops=float(features * (2 * encoder + 3 * decoder) + 3 * maps + 2 * skip),
        sparse_flops=float(encoder * (features + l0) + 3 * decoder * l0 + 3 * maps + 2 * skip),
        network=0 if ranks == 1 else _network(config, n_layers, d_model, ranks),
    )


def parameter_count(config: TrainConfig, n_layers: int, d_model: int, features: int) -> int:
    """Of so many features of so many layers: encoders, decoders, biases, thresholds, the skip term."""
    per_feature = {"jumprelu": 2, "gated": 3}.get(config.activation, 1)
    of_feature, of_all = _decoder_numbers(config, n_layers, d_model)
    weights = features * (d_model * n_layers + of_feature + per_feature * n_layers)
    return weights + of_all + n_layers * d_model * (1 + _skip(config, d_model))


def spans(config: TrainConfig, n_layers: int) -> int:
    """Pairs of a layer that is read and one that is written."""
    return n_layers * (n_layers + 1) // 2 if config.kind == "clt" else n_layers


def decoder_rank(config: TrainConfig) -> int:
    """Of what is written to later layers; 0 where each pair of layers has a decoder."""
    return (config.decoder_rank or 0) if isinstance(config, CLTConfig) else 0


def multiplied_out(config: TrainConfig) -> TrainConfig:
    """The configuration whose weights are those that are handed out: with a decoder for each pair of layers."""
    return replace(config, decoder_rank=None) if isinstance(config, CLTConfig) else config


def _decoder_numbers(config: TrainConfig, n_layers: int, d_model: int) -> tuple[int, int]:
    """How many each feature has, in all layers together, and how many all features share."""
    if not (rank := decoder_rank(config)):
        return d_model * spans(config, n_layers), 0
    later = n_layers * (n_layers - 1) // 2
    return d_model * n_layers + rank * (n_layers - 1), rank * d_model * later


def _active(config: TrainConfig, n_layers: int) -> float:
    if config.ranks:
        return config.k / (n_layers if config.kind == "clt" else 1)
    return config.target_l0 or config.features / 100


def _skip(config: TrainConfig, d_model: int) -> int:
    """How many numbers a skip term has for each that it reads."""
    if not (isinstance(config, MLPConfig) and config.skip):
        return 0
    return d_model if config.skip_rank is None else 2 * config.skip_rank


def _network(config: TrainConfig, n_layers: int, d_model: int, ranks: int) -> int:
    """Bytes that a rank sends in a step."""
    others = (ranks - 1) / ranks
    if config.parallel == "data":  # the gradients' sum
        return round(2 * others * _NUMBER * parameter_count(config, n_layers, d_model, config.features))
    sides = 1 if config.kind == "sae" else 2
    activations = _NUMBER * config.batch * n_layers * sides * d_model
    if config.parallel == "layers":  # each rank's tokens go to the owners of the layers
        return round(others * activations / ranks)
    writes = _NUMBER * config.batch * n_layers * d_model * (len(config.prefixes) + (config.activation == "gated"))
    maps = _NUMBER * _decoder_numbers(config, n_layers, d_model)[1]
    candidates = ranks * _NUMBER * _candidates(config, n_layers, ranks)
    return round(others * (activations + 2 * (writes + maps) + candidates))


def _candidates(config: TrainConfig, n_layers: int, ranks: int) -> int:
    """Values that a rank shows the others, so that all agree on the smallest that is kept."""
    if not config.ranks:
        return 0
    groups = 1 if config.kind == "clt" else n_layers
    return config.batch * groups * min(config.k, n_layers * config.features // (groups * ranks))
