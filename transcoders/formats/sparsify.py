"""sparsify's layout: a folder for each hookpoint, named as a module of transformers' base model is.

    config.json                     of the run, which may be missing: `model`, `dataset`, `hookpoints`
    layers.5.mlp/cfg.json           d_in, num_latents (0: d_in · expansion_factor), k, activation, transcode,
                                    skip_connection
    layers.5.mlp/sae.safetensors    encoder.weight [feature, d_in], encoder.bias, W_dec [feature, d_in], b_dec;
                                    W_skip [d_in, d_in] with a skip connection

Folders below one (`layers.5.mlp/seed1`) or above it (`best/layers.5.mlp`) are variants. An autoencoder reads and writes
its module's output, a transcoder (`transcode`) reads the module's input and writes its output:

    a = σ((x − b_dec) Wᵀ + b)       of an autoencoder; a transcoder reads x itself
    y = a W_dec + b_dec + x W_skipᵀ

σ is `topk`, the k largest of ReLU(h), or `groupmax`, the largest of each of k groups of consecutive features. The other
settings are of training. EleutherAI's fork clt-training writes dictionaries of one layer in the same folders and adds
`normalize_io` (buffers in_norm, out_norm [1]: x √d / in_norm is read, y out_norm / √d written), `post_enc`, a number
that each active feature is raised by, and `post_enc_scale`, one that it is then multiplied by; its cross-layer
transcoders are `clt_training`'s. Features raised by θ ≥ 0 are those of a `JumpTopK`: h + θ where that exceeds θ. The
fork's `hookpoints_in` name modules whose input is read in the place of the hookpoint's own.

Transcoders that sparsify trained before February 2025 (pull request 49) had b_dec subtracted from their input; their
files do not say so, and sparsify itself now reads them without.

Source: EleutherAI/sparsify 1.3.3 (sparse_coder.py, config.py, fused_encoder.py, trainer.py), clt-training cf9821f.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoders.dictionaries import SAE, DictionaryProvenance, DictionarySet, Transcoder
from transcoders.errors import FileFormatError
from transcoders.formats.building import LayerWeights, assemble, centred_bias, present, without
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
    opened,
    post_encoder_shapes,
    post_scale,
    raised,
    read_coder,
    scales,
    write_run,
)
from transcoders.formats.format import Format
from transcoders.formats.offers import Offer
from transcoders.formats.source import Source
from transcoders.formats.weights import Reading, Weights
from transcoders.sites import Site, SiteKind


def is_sparsify(source: Source) -> bool:
    return bool(folders(source))


def offers(source: Source) -> list[Offer]:
    found, asking = [], []
    for coder in coders(source):
        kind, width = "plt" if coder.transcode else "sae", coder.width
        common: dict[str, Any] = {"id": coder.folder, "files": coder.files, "kind": kind, "width": width}
        if (sites := coder.sites()) is None:
            asking.append(Offer(**common, asks=("site", "layer")))
        else:
            found.append(Offer(**common, layer=sites[0].layer, site=sites[0].kind, variant=coder.variant))
    return found or asking


_WRITTEN: dict[str, SiteKind] = {"mlp_in": "mlp_out", "resid_mid": "mlp_out", "resid_pre": "resid_post"}
"""What a transcoder whose path does not say its module writes, by what it is said to read."""


def load(source: Source, chosen: Sequence[Offer], reading: Reading) -> DictionarySet:
    """The autoencoders or transcoders of some hookpoints."""
    by_folder = {coder.folder: coder for coder in coders(source)}
    layers = [_layer(source, by_folder[offer.id], offer, reading) for offer in chosen]
    first = by_folder[chosen[0].id]
    config = {**first.run.settings, "sae": dict(first.settings)}
    provenance = DictionaryProvenance(model=first.run.model, corpus=first.run.corpus, config=config)
    return assemble(layers, provenance, source.label)


def _layer(source: Source, coder: Coder, offer: Offer, reading: Reading) -> LayerWeights:
    settings_path, path = source.fetch(coder.files)
    if coder.is_cross_layer:
        raise FileFormatError(
            f"{settings_path} is of a cross-layer transcoder (n_targets {coder.settings['n_targets']}), but others "
            "beside it are not; give the folder of one kind."
        )
    if (sites := coder.sites()) is None:
        read = offer.read
        if coder.transcode and read.kind not in _WRITTEN:
            raise FileFormatError(
                f"{settings_path} is of a transcoder, and none is known that reads {read.kind}; expected one of "
                f"{', '.join(_WRITTEN)}, or a folder named after the module, such as layers.5.mlp."
            )
        sites = read, Site(read.layer, _WRITTEN[read.kind]) if coder.transcode else read
    weights = opened(path, coder)
    tensors = read_coder(weights, coder, _shapes(weights, coder), reading)
    into, out = scales(path, tensors, coder)
    W_enc, b_enc, b_dec = tensors["encoder.weight"].T, tensors["encoder.bias"], tensors["b_dec"]
    W_dec, threshold = tensors["W_dec"] * post_scale(tensors, "post_enc"), raised(path, tensors, ["post_enc"])
    centred = not coder.transcode
    if (into, out) != (1.0, 1.0):
        b_enc = b_enc - b_dec @ W_enc if centred else b_enc
        W_enc, W_dec, b_dec, centred = W_enc * into, W_dec * out, b_dec * out, False
    skip = tensors["W_skip"].T * (into * out) if "W_skip" in tensors else None
    b_enc = b_enc if threshold is None else b_enc + threshold
    return LayerWeights(
        W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, activation=activation_of(settings_path, coder, threshold),
        read=sites[0], write=sites[1], centred=centred, W_skip=skip,
    )  # fmt: skip


def _shapes(weights: Weights, coder: Coder) -> Shapes:
    shapes: Shapes = {"W_dec": ("feature", "d_in"), "b_dec": ("d_in",)}
    shapes |= {"W_skip": ("d_in", "d_in")} if coder.settings.get("skip_connection") else {}
    return shapes | post_encoder_shapes(weights, coder, "post_enc")


# writing


def save(dictionaries: DictionarySet, folder: Path, *, storage_dtype: torch.dtype | None = None) -> None:
    """Write autoencoders or transcoders; `DictionaryError` for what the layout cannot hold."""
    model, files, settings = dictionaries.provenance.model, {}, {}
    layers = present(dictionaries, "sparsify's layout")
    for layer in layers:
        without(layer, "sparsify's layout", skip=False)
        module = hookpoint(layer.read, layer.writes[0], model)
        files[module], settings[module] = _tensors(layer), _settings(layer)
    write_run(dictionaries, folder, files, settings, [layer.read for layer in layers], storage_dtype)


def _tensors(layer: SAE | Transcoder) -> dict[str, Tensor]:
    b_enc = layer.b_enc
    if isinstance(layer, SAE) and not layer.centred:
        b_enc = centred_bias(layer)  # sparsify's always reads x − b_dec
    tensors = {"encoder.weight": layer.W_enc.T, "encoder.bias": b_enc, "W_dec": layer.W_dec, "b_dec": layer.b_dec}
    return tensors if layer.W_skip is None else tensors | {"W_skip": layer.W_skip.T}


def _settings(layer: SAE | Transcoder) -> dict[str, Any]:
    return coder_settings(layer.activation, layer.d_in, layer.n_features, layer.W_skip is not None) | {
        "transcode": isinstance(layer, Transcoder)
    }


FORMAT = Format(
    name="sparsify",
    community="EleutherAI's sparsify",
    marker=f"folders with {SETTINGS} and {WEIGHTS}",
    recognises=is_sparsify,
    offers=offers,
    load=load,
    save=save,
)
