"""The cross-layer transcoders of clt-training, EleutherAI's fork of sparsify, in sparsify's folders.

Layer l has the folder of its hookpoint, such as `layers.5.mlp`. `n_targets` of its cfg.json says how many layers from
its own on its features write to, J = 0 … n_targets − 1; sae.safetensors holds, beside encoder.weight and encoder.bias:

    untied                      W_decs.J [feature, d_in], b_decs.J, W_skips.J, of the target l + J
    per_source_tied             W_dec [feature, d_in], for all of them, b_decs.J, W_skips.J
    coalesce_topk concat        W_dec [feature, d_in], b_dec, W_skip of the target l: row i for feature i of any source
    coalesce_topk per-layer     W_dec [sources · feature, d_in], b_dec, W_skip of the target l, the sources in order
    all                         post_encs.J, post_enc_scales.J [feature], in_norm, out_norm [1], as in `sparsify`

    a_l = TopK(x̂_l W_lᵀ + b_l)      x̂ = x √d / in_norm_l
    y_t = (out_norm_t / √d) · Σ_{l ≤ t} g_lt (a_l D_lt + b_decs_l.J + x̂_l W_skips_l.Jᵀ)        J = t − l

with the decoder D_lt of the table, whose rows are multiplied by post_enc_scales_l.J, and g_lt = 1, or, with
`divide_cross_layer`, one over the number of other sources for l < t. With `coalesce_topk` bias and skip term are those
of t alone, once. TopK ranks the features of each layer by themselves. Files may hold W_dec, b_dec and W_skip beside
W_decs, as copies of W_decs.0.

Features that `post_encs` raise by the same θ ≥ 0 for all targets are those of a `JumpTopK`: JumpReLU is written so.
What is no cross-layer transcoder of this package is refused by name: features raised otherwise, skip terms from one
layer to another, a second TopK over sources (`topk_coalesced`), `secondary_target_tied`, and k that differ.

Source: EleutherAI/clt-training cf9821f (sparse_coder.py, runner.py, trainer.py), which EleutherAI/attribute reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.dictionaries import (
    Activation,
    CrossLayerTranscoder,
    DictionaryProvenance,
    DictionarySet,
    JumpReLU,
    JumpTopK,
    ReLU,
    TopK,
)
from transcoders.errors import DictionaryError, FileFormatError
from transcoders.formats.building import assemble_cross_layer
from transcoders.formats.coders import (
    SETTINGS,
    WEIGHTS,
    Coder,
    Shapes,
    activation_of,
    coder_settings,
    coders,
    folders,
    hookpoint,
    inside,
    opened,
    post_encoder_shapes,
    post_scale,
    raised,
    read_coder,
    scales,
    write_run,
)
from transcoders.formats.files import read_json
from transcoders.formats.format import Format
from transcoders.formats.offers import Offer
from transcoders.formats.source import Source, fetch_one
from transcoders.formats.weights import Reading
from transcoders.sites import Site

_TIES = ("none", "concat", "per-layer")


def is_clt_training(source: Source) -> bool:
    every = folders(source)
    if not every:
        return False
    settings = read_json(fetch_one(source, inside(every[0], SETTINGS)))
    n_targets = settings.get("n_targets")
    return settings.get("transcode") is True and isinstance(n_targets, int) and n_targets > 0


def offers(source: Source) -> list[Offer]:
    found = []
    for variant, layers in _sets(source).items():
        first = layers[0]
        read = None if (sites := first.sites()) is None else sites[0].kind
        files = tuple(name for coder in layers for name in coder.files)
        found.append(Offer(id=variant, files=files, kind="clt", site=read, width=first.width, variant=variant or None))
    return found


def _sets(source: Source) -> dict[str, list[Coder]]:
    """The layers of each variant."""
    every = sorted(coders(source), key=lambda coder: coder.variant or "")
    return {variant: list(group) for variant, group in groupby(every, key=lambda coder: coder.variant or "")}


def load(source: Source, chosen: Sequence[Offer], reading: Reading) -> CrossLayerTranscoder:
    """The cross-layer transcoder of all hookpoints."""
    layers, sites = _ordered(source, _sets(source)[chosen[0].id])
    _require_alike(source, layers)
    parts = [_read(source, coder, layer, reading) for layer, coder in enumerate(layers)]
    raises = [part.raised for part in parts]
    threshold = torch.stack([part.b_enc * 0 if part.raised is None else part.raised for part in parts])
    activation = activation_of(
        fetch_one(source, layers[0].files[0]), layers[0], None if raises == [None] * len(raises) else threshold
    )
    last = len(layers) - 1
    W_dec, b_dec = [], [part.b_dec for part in parts]
    for layer, part in enumerate(parts):
        W = part.W_enc.new_zeros(part.W_enc.shape[1], last + 1 - layer, part.W_enc.shape[0])
        for target in range(layer, min(last, layer + part.n_targets - 1) + 1):
            weight = parts[target].weight_of(layer, parts)
            W[:, target - layer] = part.decoder(parts[target], parts) * (weight * parts[target].out)
            if target > layer and part.b_decs is not None:
                b_dec[target] = b_dec[target] + part.b_decs[target - layer] * (weight * parts[target].out)
        W_dec.append(W)
    first = layers[0]
    config = {**first.run.settings, "sae": dict(first.settings)}
    return assemble_cross_layer(
        source.label,
        W_enc=[part.W_enc for part in parts],
        b_enc=list(torch.stack([part.b_enc for part in parts]) + threshold),
        W_dec=W_dec,
        b_dec=b_dec,
        activation=activation,
        provenance=DictionaryProvenance(model=first.run.model, corpus=first.run.corpus, config=config),
        reads=[read for read, _ in sites],
        writes=[write for _, write in sites],
        W_skip=None if parts[0].W_skip is None else [part.W_skip for part in parts if part.W_skip is not None],
    )


@dataclass(frozen=True)
class _Part:
    """One layer as its file has it, of which the encoder, bias and skip term are in the model's units."""

    layer: int
    n_targets: int
    divided: bool
    coalesce: str
    out: float
    W_enc: Float[Tensor, "d_model feature"]
    b_enc: Float[Tensor, "feature"]
    decoders: Sequence[Float[Tensor, "_ d_model"]]
    """By target; one where they are tied."""
    scales: Sequence[Float[Tensor, "feature 1"] | float]
    b_decs: Sequence[Float[Tensor, "d_model"]] | None
    b_dec: Float[Tensor, "d_model"]
    W_skip: Float[Tensor, "d_model d_model"] | None
    raised: Float[Tensor, "feature"] | None
    """What its active features are raised by."""

    def sources(self, parts: "Sequence[_Part]") -> "list[_Part]":
        """The layers that write to this one, with itself."""
        return [part for part in parts[: self.layer + 1] if part.layer + part.n_targets > self.layer]

    def weight_of(self, source: int, parts: "Sequence[_Part]") -> float:
        """What a source's part of this layer's output is multiplied by."""
        others = len(self.sources(parts)) - 1
        return 1 / others if self.divided and self.coalesce == "none" and source != self.layer else 1.0

    def decoder(self, target: "_Part", parts: "Sequence[_Part]") -> Float[Tensor, "feature d_model"]:
        """What an activation of 1 adds at a target, in the target's units."""
        n_features, by_target = self.W_enc.shape[1], target.layer - self.layer
        if target.coalesce == "none":
            W = self.decoders[by_target] if len(self.decoders) > 1 else self.decoders[0]
        elif target.coalesce == "concat":
            W = target.decoders[0]
        else:
            at = target.sources(parts).index(self) * n_features
            W = target.decoders[0][at : at + n_features]
        return W * self.scales[by_target]


def _ordered(source: Source, layers: Sequence[Coder]) -> tuple[list[Coder], list[tuple[Site, Site]]]:
    """The layers from 0 on with what they read and write; `FileFormatError` unless they are those of one set."""
    with_sites = [(coder, coder.sites()) for coder in layers]
    if unknown := next((coder for coder, sites in with_sites if sites is None), None):
        raise FileFormatError(
            f"The folder {unknown.folder or source.label} names no module this package reads; expected one such as "
            "layers.5.mlp for each layer of a cross-layer transcoder."
        )
    found = sorted(((coder, sites) for coder, sites in with_sites if sites), key=lambda pair: pair[1][0].layer)
    numbers = [read.layer for _, (read, _) in found]
    if numbers != list(range(len(found))):
        raise FileFormatError(
            f"{source.label} holds a cross-layer transcoder of the layers {numbers[:12]}; expected every layer from 0 "
            "on, once, so download it again."
        )
    for coder, (read, _) in found:
        if coder.settings.get("n_targets", 0) > len(found) - read.layer or not coder.is_cross_layer:
            raise FileFormatError(
                f"Layer {read.layer} in {source.label} has n_targets {coder.settings.get('n_targets', 0)}, but there "
                f"are {len(found)} layers; expected 1 to {len(found) - read.layer}, so download it again."
            )
    return [coder for coder, _ in found], [sites for _, sites in found]


def _require_alike(source: Source, layers: Sequence[Coder]) -> None:
    """Raises `FileFormatError` unless the settings of all layers agree and are supported."""
    first = layers[0]
    path = fetch_one(source, first.files[0])
    alike = ("k", "activation", "coalesce_topk", "divide_cross_layer", "skip_connection", "d_in")
    for coder in layers:
        if odd := [name for name in alike if coder.settings.get(name) != first.settings.get(name)]:
            raise FileFormatError(
                f"{fetch_one(source, coder.files[0])} has {odd[0]} {coder.settings.get(odd[0])!r}, but {path} has "
                f"{first.settings.get(odd[0])!r}; supported are cross-layer transcoders whose layers agree."
            )
        for name in ("topk_coalesced", "secondary_target_tied"):
            if coder.settings.get(name):
                raise FileFormatError(f"{fetch_one(source, coder.files[0])} has {name} true; supported is false.")
    if (tie := first.settings.get("coalesce_topk", "none")) not in _TIES:
        raise FileFormatError(f"{path} has coalesce_topk {tie[:40]!r}; supported are {', '.join(_TIES)}.")


def _read(source: Source, coder: Coder, layer: int, reading: Reading) -> _Part:
    path = fetch_one(source, coder.files[1])
    weights, n_targets = opened(path, coder), coder.settings["n_targets"]
    coalesce, tied = coder.settings.get("coalesce_topk", "none"), coder.settings.get("per_source_tied", False)
    apart = coalesce == "none"
    targets = range(n_targets)
    decoders = ["W_dec"] if tied or not apart else [f"W_decs.{j}" for j in targets]
    biases = [f"b_decs.{j}" for j in targets] if apart else ["b_dec"]
    skips = (
        ([f"W_skips.{j}" for j in targets] if apart else ["W_skip"]) if coder.settings.get("skip_connection") else []
    )
    rows: int | str = coder.settings.get("n_sources", 0) * coder.width if coalesce == "per-layer" else "feature"
    shapes: Shapes = {}
    for names, shape in ((decoders, (rows, "d_in")), (biases, ("d_in",)), (skips, ("d_in", "d_in"))):
        shapes |= dict.fromkeys(names, shape)
    for j in targets:
        shapes |= post_encoder_shapes(weights, coder, f"post_encs.{j}")
    tensors = read_coder(weights, coder, shapes, reading)
    if across := next((name for name in skips[1:] if bool(tensors[name].any())), None):
        raise FileFormatError(
            f"{path} has a skip term from one layer to another ({across}), which no dictionary of this package has; "
            "expected skip terms of a layer's own, as with coalesce_topk concat."
        )
    into, out = scales(path, tensors, coder)
    return _Part(
        layer=layer, n_targets=n_targets, divided=coder.settings.get("divide_cross_layer", False), coalesce=coalesce,
        out=out, W_enc=tensors["encoder.weight"].T * into, b_enc=tensors["encoder.bias"],
        decoders=[tensors[name] for name in decoders],
        scales=[post_scale(tensors, f"post_encs.{j}") for j in targets],
        raised=raised(path, tensors, [f"post_encs.{j}" for j in targets]),
        b_decs=[tensors[name] for name in biases] if apart else None, b_dec=tensors[biases[0]] * out,
        W_skip=tensors[skips[0]].T * (into * out) if skips else None,
    )  # fmt: skip


# writing


def save(dictionaries: DictionarySet, folder: Path, *, storage_dtype: torch.dtype | None = None) -> None:
    """Write a cross-layer transcoder, a decoder for each target; `DictionaryError` for what the layout cannot hold."""
    if not isinstance(dictionaries, CrossLayerTranscoder):
        raise DictionaryError(
            f"clt-training's layout holds cross-layer transcoders, not {dictionaries.kind!r} dictionaries; save "
            "dictionaries of single layers as 'sparsify'."
        )
    model, files, settings = dictionaries.provenance.model, {}, {}
    for layer in range(dictionaries.n_layers):
        module = hookpoint(dictionaries.reads[layer], dictionaries.writes[layer], model)
        files[module] = _tensors(dictionaries, layer)
        skip = dictionaries.W_skip is not None
        settings[module] = {
            **coder_settings(_ranked(dictionaries), dictionaries.d_model, dictionaries.n_features(layer), skip),
            "transcode": True, "n_targets": dictionaries.n_layers - layer, "n_sources": layer + 1,
        }  # fmt: skip
    write_run(dictionaries, folder, files, settings, dictionaries.reads, storage_dtype)


def _ranked(clt: CrossLayerTranscoder) -> Activation:
    """σ without the thresholds that features are raised by."""
    if isinstance(clt.activation, JumpTopK):
        return TopK(clt.activation.k)
    return ReLU() if isinstance(clt.activation, JumpReLU) else clt.activation


def _tensors(clt: CrossLayerTranscoder, layer: int) -> Mapping[str, Tensor]:
    threshold = torch.zeros_like(clt.b_enc[layer])
    if isinstance(clt.activation, JumpReLU | JumpTopK):
        threshold = clt.activation.threshold[layer]
    tensors = {"encoder.weight": clt.W_enc[layer].T, "encoder.bias": clt.b_enc[layer] - threshold}
    for j in range(clt.n_layers - layer):
        tensors[f"W_decs.{j}"] = clt.W_dec[layer][:, j]
        tensors[f"b_decs.{j}"] = clt.b_dec[layer] if j == 0 else torch.zeros_like(clt.b_dec[layer])
        tensors[f"post_encs.{j}"] = threshold.clone()
        if clt.W_skip is not None:
            tensors[f"W_skips.{j}"] = clt.W_skip[layer].T if j == 0 else torch.zeros_like(clt.W_skip[layer])
    return tensors


FORMAT = Format(
    name="clt-training",
    community="EleutherAI's clt-training",
    marker=f"folders with {SETTINGS} that has n_targets, and {WEIGHTS}",
    recognises=is_clt_training,
    offers=offers,
    load=load,
    save=save,
)
