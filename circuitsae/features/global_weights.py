"""Virtual weights: how what one feature writes points along what another reads, whatever the prompt.

    V[s, t] = Σ_l' W_dec[s → l'] · P · W_enc[t],   l' the layers that s writes at, below the layer that t reads at

`P` is the residual stream, where nothing happens, or one attention head on the way, `W_V W_O`. Norms on the way are
linear but for their scale, which is another for every token: their centring and weights are in V, their scales are not.
On a prompt, `a_s V[s, t] / σ_t` is what s adds to t at its own position through the residual stream, and with the V of
a head `a_s V[s, t] · pattern[p, q] / (σ_head(q) σ_t(p))` what it adds from position q to p through the head. Skip terms
of the dictionaries are no part of it.

Source: Ameisen et al. 2025, *Circuit Tracing: Revealing Computational Graphs in Language Models*, Global Weights.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.replacement import ReplacementModel
from transcoders.errors import InputError
from transcoders.model_parts import NormPart

Place = tuple[int, int]
"""A feature, by its layer and its number there; or a head."""

_AT_ONCE = 4096
"""Features of a layer whose vectors are held together."""


class _Reads(NamedTuple):
    """How some features of a layer read the residual stream, of which they see what is written below a layer."""

    vectors: Float[Tensor, "target d_model"]
    below: int


@torch.no_grad()
def virtual_weights(
    model: ReplacementModel, sources: Sequence[Place], targets: Sequence[Place], *, head: Place | None = None
) -> Float[Tensor, "source target"]:
    """`V[s, t]` of some features, each a layer and a number, through the residual stream or one head (layer, head).

    0 where the source writes at no layer below the one that the target reads at; through a head, where it writes at
    none before the head or the target reads before the head writes. Raises `InputError` for a feature or a head that
    is not there.
    """
    for place in (*sources, *targets):
        check_feature(model, place)
    out = torch.zeros(len(sources), len(targets), dtype=_dtype(model), device=model.model.device)
    for t_layer, t_rows, t_index in _by_layer(targets, out.device):
        reads = _reads(model, t_layer, t_index, head)
        for s_layer, s_rows, s_index in _by_layer(sources, out.device):
            out[s_rows[:, None], t_rows] = _between(model, s_layer, s_index, reads)
    return out


@torch.no_grad()
def input_weights(model: ReplacementModel, target: Place, *, head: Place | None = None) -> Float[Tensor, "feature"]:
    """`V[s, target]` of all features s, numbered through the layers; never more than a block of decoders in memory."""
    check_feature(model, target)
    reads = _reads(model, target[0], torch.tensor([target[1]], device=model.model.device), head)
    found = [_between(model, layer, index, reads)[:, 0] for layer, index in _blocks(model)]
    return torch.cat(found)


@torch.no_grad()
def output_weights(model: ReplacementModel, source: Place, *, head: Place | None = None) -> Float[Tensor, "feature"]:
    """`V[source, t]` of all features t, numbered through the layers."""
    check_feature(model, source)
    layer, index = source[0], torch.tensor([source[1]], device=model.model.device)
    found = [_between(model, layer, index, _reads(model, *block, head))[0] for block in _blocks(model)]
    return torch.cat(found)


def check_feature(model: ReplacementModel, place: Place) -> None:
    """Raises `InputError` unless the dictionaries have the feature."""
    layer, index = place
    dictionaries = model.dictionaries
    if not 0 <= layer < dictionaries.n_layers:
        raise InputError(f"There is no feature {layer}.{index}; the layers are 0 to {dictionaries.n_layers - 1}.")
    if not 0 <= index < dictionaries.n_features(layer):
        raise InputError(
            f"There is no feature {layer}.{index}; layer {layer} has {dictionaries.n_features(layer):,} features, "
            "numbered from 0."
        )


def feature_widths(model: ReplacementModel) -> list[int]:
    """How many features each layer has."""
    return [model.dictionaries.n_features(layer) for layer in range(model.dictionaries.n_layers)]


def _by_layer(places: Sequence[Place], device: torch.device) -> Iterator[tuple[int, Tensor, Int[Tensor, "k"]]]:
    """Of each layer: which of the places are there, and their numbers in it."""
    layer, index = torch.tensor(places, device=device, dtype=torch.long).reshape(-1, 2).unbind(1)
    for here in layer.unique().tolist():
        rows = (layer == here).nonzero().squeeze(1)
        yield here, rows, index[rows]


def _blocks(model: ReplacementModel) -> Iterator[tuple[int, Int[Tensor, "k"]]]:
    """All features, a block of a layer at a time; nothing for a layer without features."""
    for layer, width in enumerate(feature_widths(model)):
        for index in torch.arange(width, device=model.model.device).split(_AT_ONCE):
            if len(index):
                yield layer, index


def _between(
    model: ReplacementModel, layer: int, index: Int[Tensor, "source"], reads: _Reads
) -> Float[Tensor, "source target"]:
    """V of features of one layer and of such as read alike."""
    out = reads.vectors.new_zeros(len(index), len(reads.vectors))
    for at in model.dictionaries.write_layers(layer):
        if at < reads.below:
            decoders = model.dictionaries.decoder_rows(layer, index, at).to(reads.vectors)
            out += decoders @ _before_write(model, at, reads.vectors).T
    return out


def _reads(model: ReplacementModel, layer: int, index: Int[Tensor, "k"], head: Place | None) -> _Reads:
    """Encoders of one layer, taken back through its norm, and through a head where there is one."""
    block = model.model.parts.blocks[layer]
    vectors, kind = (
        model.dictionaries.encoder_rows(layer, index).to(_dtype(model)),
        model.dictionaries.reads[layer].kind,
    )
    if kind != "resid_mid":
        vectors = _before_norm(vectors, block.norm(block.mlp_norm), weighted=kind == "mlp_in")
    if head is None:
        return _Reads(vectors, layer)
    vectors = _before_head(model, vectors, head)
    # Attention of a layer comes before its MLP reads, but in parallel blocks beside it.
    reached = head[0] < layer or (head[0] == layer and not block.parallel)
    return _Reads(vectors, head[0] if reached else 0)


def _before_write(model: ReplacementModel, layer: int, vectors: Tensor) -> Float[Tensor, "target d_model"]:
    """Vectors that read the stream, taken back to what the dictionary of a layer writes."""
    if model.dictionaries.writes[layer].kind == "mlp_added":
        return vectors
    block = model.model.parts.blocks[layer]
    return _before_added(vectors, block.norm("ln2_post"), block.residual_factor)


def _before_head(model: ReplacementModel, vectors: Tensor, head: Place) -> Float[Tensor, "target d_model"]:
    """Vectors that read the stream after a head, taken back to the stream before it: `g W_Oᵀ W_Vᵀ`, between norms."""
    (layer, number), blocks = head, model.model.parts.blocks
    if not 0 <= layer < len(blocks):
        raise InputError(f"There is no head {layer}.{number}; the layers are 0 to {len(blocks) - 1}.")
    block = blocks[layer]
    W_V, W_O = block.attention.weight("V").to(vectors), block.attention.weight("O").to(vectors)
    if not 0 <= number < len(W_O):
        raise InputError(f"There is no head {layer}.{number}; layer {layer} has {len(W_O)} heads, numbered from 0.")
    shared = len(W_O) // len(W_V)  # heads that have keys and values in common
    written = _before_added(vectors, block.norm("ln1_post"), block.residual_factor)
    return _before_norm(written @ W_O[number].T @ W_V[number // shared].T, block.norm("ln1"))


def _before_added(vectors: Tensor, norm: NormPart | None, factor: float | None) -> Tensor:
    """Taken back through the norm, or else the factor, by which a block's output passes on its way into the stream."""
    return vectors * (factor or 1.0) if norm is None else _before_norm(vectors, norm)


def _before_norm(vectors: Tensor, norm: NormPart | None, *, weighted: bool = True) -> Tensor:
    """Taken back through a norm of scale 1: times its weight, then centred where it centres."""
    if norm is None:
        return vectors
    out = vectors * norm.weight(vectors.dtype).to(vectors.device) if weighted else vectors
    return out - out.mean(-1, keepdim=True) if norm.centres else out


def _dtype(model: ReplacementModel) -> torch.dtype:
    """Of the weights, in float32 where the model is less precise."""
    return torch.promote_types(model.model.dtype, torch.float32)
