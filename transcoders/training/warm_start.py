"""Dictionaries as the first values of training: the weights of a run, such that what it exports at once is the same.

Training holds all layers of a kind in one stack, with an activation function that `TrainConfig` has a name for. What
fits in no such stack is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.dictionaries import (
    SAE,
    Activation,
    CrossLayerTranscoder,
    DictionarySet,
    JumpReLU,
    SAESet,
    SparseDictionary,
    TopK,
    TranscoderSet,
)
from transcoders.errors import DictionaryError, InputError
from transcoders.files import short_hash
from transcoders.training.config import CLTConfig, MLPConfig, TrainConfig
from transcoders.training.export import Scales
from transcoders.training.parameters import TrainingParameters
from transcoders.training.split import WHOLE, Split

Trainable = TranscoderSet | CrossLayerTranscoder | SAESet
_ACTIVATIONS = ("relu", "jumprelu", "topk")


@dataclass(frozen=True)
class Start:
    """Dictionaries that training starts from; `DictionaryError` where it cannot hold them."""

    dictionaries: Trainable

    @classmethod
    def of(cls, dictionaries: DictionarySet) -> "Start":
        if not isinstance(dictionaries, Trainable):
            raise DictionaryError(
                f"Training cannot start from a {type(dictionaries).__name__}; load the dictionaries with "
                "decoders='memory'."
            )
        if (reason := untrainable(dictionaries)) is not None:
            raise DictionaryError(f"Training cannot start from these dictionaries: {reason}.")
        return cls(dictionaries)

    @property
    def settings(self) -> dict[str, Any]:
        """Those of `TrainConfig` that the weights settle."""
        d, activation = self.dictionaries, _activations(self.dictionaries)[0]
        found: dict[str, Any] = {"features": d.n_features(0), "activation": activation.name}
        found |= {"first": d.provenance.first, "decoders": "free"}
        if isinstance(activation, TopK):
            found["k"] = activation.k
        if d.provenance.bos is not None:
            found["bos"] = d.provenance.bos
        if isinstance(d, SAESet):
            return found | {"site": d.reads[0].kind, "centred": d[0].centred}
        return found | {"skip": True} if any(d.skip(layer) is not None for layer in range(d.n_layers)) else found

    def config(self, asked: TrainConfig) -> TrainConfig:
        """What was asked with what the weights settle; `InputError` where it asks for something else.

        A setting at its default is none that was asked for. A skip term may be asked for where there is none yet.
        """
        if asked.kind != self.dictionaries.kind:
            raise InputError(
                f"The dictionaries to start from are of kind {self.dictionaries.kind!r}; got kind {asked.kind!r}. Give "
                "the configuration of their kind."
            )
        if asked.aligned:
            raise InputError(
                "aligned=True changes encoders, so training with it cannot start from given ones; leave it out."
            )
        if isinstance(asked, CLTConfig) and asked.decoder_rank is not None:
            raise InputError(
                f"Training that starts from dictionaries holds a decoder for each pair of layers; got "
                f"decoder_rank={asked.decoder_rank}. Leave it out, or train from new weights."
            )
        defaults = {field.name: field.default for field in fields(asked)}
        for name, value in self.settings.items():
            given = getattr(asked, name)
            if given not in (defaults[name], value):
                raise InputError(
                    f"The dictionaries to start from have {name}={value!r}; got {name}={given!r}. Leave it out, or "
                    "train from new weights."
                )
        return replace(asked, **self.settings)

    def require_sites(self, sites: tuple[Sequence[Any], Sequence[Any]], d_model: int) -> None:
        """`InputError` unless they read and write at these sites, of this width."""
        own = self.dictionaries.reads, self.dictionaries.writes
        if tuple(map(tuple, sites)) != own or self.dictionaries.d_model != d_model:
            (reads, writes), d = sites, self.dictionaries
            raise InputError(
                f"Training reads {reads[0]} … {reads[-1]} and writes {writes[0]} … {writes[-1]} of width {d_model}; "
                f"the dictionaries to start from read {d.reads[0]} … {d.reads[-1]} and write {d.writes[0]} … "
                f"{d.writes[-1]} of width {d.d_model}. Start from dictionaries of these sites."
            )

    @cached_property
    def hash(self) -> str:
        """Of all weights."""
        state = self.dictionaries.state_dict()
        return short_hash(part for name, tensor in state.items() for part in (name, _bytes(tensor)))

    def record(self) -> Mapping[str, Any]:
        """What the provenance of what is trained keeps."""
        own = self.dictionaries.provenance
        return {"model": own.model, "corpus": own.corpus, "tokens": own.tokens, "weights": self.hash}

    @torch.no_grad()
    def weights(
        self, config: TrainConfig, scales: Scales, *, split: Split = WHOLE, dtype: torch.dtype = torch.float32
    ) -> TrainingParameters:
        """On activations that `scales` brought to size: `W_enc / s`, `t W_dec`, `t b_dec`, `t W_skip / s`.

        `config`: as `config` made it. `scales`: of the layers of `split`, whose share of the weights it is.
        """
        d, s, t = self.dictionaries, scales.read, scales.write
        like = {"dtype": dtype, "device": s.device}
        layers, chosen = split.layers_of(d.n_layers), split.features_of(config.features)
        own = slice(chosen.start, chosen.stop)
        encoders, biases, decoders, b_dec = _tensors(d)
        W_enc = torch.stack([encoders[i].T[own].to(**like) for i in layers]) / s[:, None, None]
        W_dec = [_write_scaled(decoders[i][own].to(**like), t, place) for place, i in enumerate(layers)]
        activation = _trained(_activations(d), layers, own, config, like)
        W_skip = W_skip_out = None
        if isinstance(config, MLPConfig) and config.skip:
            W_skip = _skips(d, layers, s, t, like)
            if config.skip_rank is not None:
                W_skip, W_skip_out = factors(W_skip, config.skip_rank, config.seed)
        return TrainingParameters(
            W_enc=W_enc.to(dtype).contiguous(),
            b_enc=torch.stack([biases[i][own].to(**like) for i in layers]),
            W_dec=W_dec,
            b_dec=torch.stack([b_dec[i].to(**like) for i in layers]) * t[:, None].to(dtype),
            activation=activation,
            W_skip=W_skip,
            W_skip_out=W_skip_out,
            centred=getattr(config, "centred", False),
            unit_decoders=config.unit_decoders,
            side_by_side=getattr(config, "side_by_side", 1),
            bf16=config.precision == "bf16",
            ranks=split.features,
        )


def untrainable(dictionaries: Trainable) -> str | None:
    """Why training cannot hold these weights; None where it can."""
    sigmas = _activations(dictionaries)
    sizes = sorted({dictionaries.n_features(layer) for layer in range(dictionaries.n_layers)})
    if sizes[0] == 0:
        return "a layer is absent, and training has features in every layer"
    if len(sizes) > 1:
        return f"layers have different numbers of features ({', '.join(map(str, sizes))})"
    if unknown := [sigma.name for sigma in sigmas if sigma.name not in _ACTIVATIONS]:
        return f"the activation {unknown[0]!r} cannot be trained; there are {', '.join(map(repr, _ACTIVATIONS))}"
    if len({(sigma.name, getattr(sigma, "k", None)) for sigma in sigmas}) > 1:
        return "layers have different activations, or different k"
    if any(isinstance(sigma, JumpReLU) and bool((sigma.threshold < 0).any()) for sigma in sigmas):
        return "a threshold is below zero"
    if isinstance(dictionaries, CrossLayerTranscoder):
        layerwise = isinstance(sigma := sigmas[0], TopK) and not sigma.over_layers
        return "their TopK ranks each layer by itself, and that of training all layers together" if layerwise else None
    if any(d.norm is not None for d in dictionaries.layers):
        return "they norm each token, which training does not"
    if isinstance(dictionaries, SAESet):
        if any(sae.W_skip is not None for sae in dictionaries.layers):
            return "an autoencoder with a skip term cannot be trained"
        if len({(sae.centred, sae.read.kind) for sae in dictionaries.layers}) > 1:
            return "layers read different sites, or only some are centred"
    return None


def _activations(d: Trainable) -> list[Activation]:
    """Of each layer; a cross-layer transcoder's only one."""
    return [d.activation] if isinstance(d, CrossLayerTranscoder) else [each.activation for each in d.layers]


def _tensors(d: Trainable) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """`W_enc`, `b_enc`, `W_dec` and `b_dec` of each layer, decoders as `[feature, span, d_model]`."""
    if isinstance(d, CrossLayerTranscoder):
        return (
            list(d.W_enc.detach()),
            list(d.b_enc.detach()),
            [W.detach() for W in d.W_dec],
            list(d.b_dec.detach()),
        )
    layers: Sequence[SparseDictionary | SAE] = d.layers
    return (
        [each.W_enc.detach() for each in layers],
        [each.b_enc.detach() for each in layers],
        [each.W_dec.detach().unsqueeze(1) for each in layers],
        [each.b_dec.detach() for each in layers],
    )


def _write_scaled(
    W_dec: Float[Tensor, "feature span d_model"], t: Float[Tensor, "layer"], place: int
) -> Float[Tensor, "feature span d_model"]:
    return (W_dec * t[place : place + W_dec.shape[1]].to(W_dec)[:, None]).contiguous()


def _skips(d: Trainable, layers: range, s: Tensor, t: Tensor, like: Any) -> Float[Tensor, "layer d_model d_out"]:
    """Zeros for a layer without one."""
    zeros = torch.zeros(d.d_model, d.d_model, **like)
    skips = [zeros if (skip := d.skip(i)) is None else skip.detach().to(**like) for i in layers]
    return (torch.stack(skips) * (t / s)[:, None, None]).to(like["dtype"])


def factors(
    W: Float[Tensor, "layer d_model d_out"], rank: int, seed: int
) -> tuple[Float[Tensor, "layer d_model rank"], Float[Tensor, "layer rank d_out"]]:
    """`W = U V` with columns of norm one in U, random ones where W is zero, so that V has a gradient.

    Raises `InputError` for a W of a higher rank.
    """
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    rest, tiny = S[:, rank:], W.shape[-1] * torch.finfo(W.dtype).eps
    if bool((rest > tiny * S[:, :1]).any()):
        raise InputError(
            f"The skip terms to start from have a rank above skip_rank={rank}; give a higher one, or leave it out."
        )
    drawn = torch.randn(*W.shape[:2], rank, generator=torch.Generator().manual_seed(seed)).to(W) / W.shape[1] ** 0.5
    found = torch.nn.functional.pad(U[:, :, :rank], (0, max(0, rank - U.shape[2])))
    used = torch.nn.functional.pad(S[:, :rank], (0, max(0, rank - S.shape[1]))) > tiny * S[:, :1]
    V = torch.nn.functional.pad(S[:, :rank, None] * Vh[:, :rank], (0, 0, 0, max(0, rank - S.shape[1])))
    return torch.where(used[:, None], found, drawn).contiguous(), (V * used[:, :, None]).contiguous()


def _trained(
    sigmas: Sequence[Activation], layers: range, features: slice, config: TrainConfig, like: Any
) -> Activation:
    """The activation function as training has it, of some layers and features."""
    first = sigmas[0]
    if isinstance(first, TopK):
        return TopK(first.k, over_layers=first.over_layers)
    if not isinstance(first, JumpReLU):
        return first
    thresholds = list(first.threshold) if first.threshold.ndim == 2 else [_threshold(sigma) for sigma in sigmas]
    held = torch.stack([thresholds[i].detach()[features].to(**like) for i in layers])
    return JumpReLU(held, config.bandwidth)


def _threshold(sigma: Activation) -> Tensor:
    assert isinstance(sigma, JumpReLU)  # as all layers are alike
    return sigma.threshold


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
