"""Seeded random dictionaries, for tests and examples."""

from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from transcoders.dictionaries.activations import Activation, GroupMax, JumpReLU, JumpTopK, ReLU, TopK
from transcoders.dictionaries.cross_layer import CrossLayerTranscoder
from transcoders.dictionaries.per_layer import SAESet, TranscoderSet
from transcoders.dictionaries.provenance import DictionaryProvenance
from transcoders.dictionaries.sparse_dictionary import SAE, Transcoder
from transcoders.errors import DictionaryError
from transcoders.precision import Precision, as_dtype
from transcoders.sites import Site, SiteKind

ActivationName = Literal["relu", "jumprelu", "topk", "groupmax", "jumptopk"]


class Options(TypedDict, total=False):
    """Sizes and choices of `random_dictionaries`, with their defaults beside."""

    n_layers: int  # 2
    d_model: int  # 32
    features: int  # 64
    activation: ActivationName  # relu
    k: int  # 8
    skip: bool  # False
    centred: bool  # False; sae
    read: SiteKind  # mlp_in; an sae's site, resid_post
    write: SiteKind  # mlp_out; plt and clt
    seed: int  # 0
    dtype: Precision  # float32


@overload
def random_dictionaries(kind: Literal["plt"], **options: Unpack[Options]) -> TranscoderSet: ...
@overload
def random_dictionaries(kind: Literal["clt"], **options: Unpack[Options]) -> CrossLayerTranscoder: ...
@overload
def random_dictionaries(kind: Literal["sae"], **options: Unpack[Options]) -> SAESet: ...
def random_dictionaries(
    kind: Literal["plt", "clt", "sae"],
    *,
    n_layers: int = 2,
    d_model: int = 32,
    features: int = 64,
    activation: ActivationName = "relu",
    k: int = 8,
    skip: bool = False,
    centred: bool = False,
    read: SiteKind | None = None,
    write: SiteKind = "mlp_out",
    seed: int = 0,
    dtype: Precision = torch.float32,
) -> TranscoderSet | CrossLayerTranscoder | SAESet:
    """Dictionaries of a kind with random weights, biases and thresholds; nothing is zero, so that no term can hide."""
    generator, to = torch.Generator().manual_seed(seed), as_dtype(dtype)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(to)

    def sigma(*shape: int) -> Activation:
        if activation == "jumprelu":
            return JumpReLU(0.2 + draw(*shape, scale=0.2).abs())
        if activation == "jumptopk":
            return JumpTopK(k, 0.2 + draw(*shape, scale=0.2).abs())
        if activation == "topk":
            return TopK(k, over_layers=len(shape) == 2)
        return GroupMax(k) if activation == "groupmax" else ReLU()

    def encoder() -> dict[str, Tensor]:
        return {"W_enc": draw(d_model, features, scale=d_model**-0.5), "b_enc": draw(features, scale=0.3)}

    def decoder() -> dict[str, Tensor]:
        return {"W_dec": draw(features, d_model, scale=features**-0.5), "b_dec": draw(d_model, scale=0.3)}

    provenance = DictionaryProvenance(model="random", seed=seed)
    layers = range(n_layers)
    if kind == "sae":
        saes = [
            SAE(
                **encoder(),
                **decoder(),
                activation=sigma(features),
                site=Site(i, read or "resid_post"),
                centred=centred,
                W_skip=draw(d_model, d_model, scale=d_model**-0.5) if skip else None,
                norm=None,
            )
            for i in layers
        ]
        return SAESet(saes, provenance)
    if kind == "plt":
        transcoders = [
            Transcoder(
                **encoder(),
                **decoder(),
                activation=sigma(features),
                read=Site(i, read or "mlp_in"),
                write=Site(i, write),
                W_skip=draw(d_model, d_model, scale=d_model**-0.5) if skip else None,
                norm=None,
            )
            for i in layers
        ]
        return TranscoderSet(transcoders, provenance)
    if kind == "clt":
        return CrossLayerTranscoder(
            W_enc=draw(n_layers, d_model, features, scale=d_model**-0.5),
            b_enc=draw(n_layers, features, scale=0.3),
            W_dec=[draw(features, n_layers - i, d_model, scale=features**-0.5) for i in layers],
            b_dec=draw(n_layers, d_model, scale=0.3),
            activation=sigma(n_layers, features),
            provenance=provenance,
            reads=[Site(i, read or "mlp_in") for i in layers],
            writes=[Site(i, write) for i in layers],
            W_skip=draw(n_layers, d_model, d_model, scale=d_model**-0.5) if skip else None,
        )
    raise DictionaryError(f"Unknown kind {kind!r}; dictionaries come as 'plt', 'clt' or 'sae'.")
