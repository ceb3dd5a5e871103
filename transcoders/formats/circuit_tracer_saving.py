"""Writing circuit-tracer's layout, and what it cannot hold.

The layout is described in `circuit_tracer`.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoders.dictionaries import (
    Activation,
    CrossLayerTranscoder,
    DictionarySet,
    JumpReLU,
    ReLU,
    TopK,
    Transcoder,
    TranscoderSet,
)
from transcoders.errors import DictionaryError
from transcoders.files import new_files, write_file
from transcoders.formats.building import called
from transcoders.formats.circuit_tracer_sets import CONFIG, first_position
from transcoders.formats.files import write_tensors
from transcoders.formats.hooks import hook_of_site
from transcoders.formats.weights import as_stored
from transcoders.sites import Site, SiteKind

logger = logging.getLogger(__name__)

_HOOKS: tuple[SiteKind, ...] = ("mlp_in", "mlp_normed", "mlp_out", "mlp_added", "resid_pre", "resid_mid", "resid_post")
"""Sites that TransformerLens 2 has hooks for, with vectors of the model's width."""


def save_circuit_tracer(dictionaries: DictionarySet, folder: Path, *, storage_dtype: torch.dtype | None = None) -> None:
    """Write transcoders or a cross-layer transcoder; `DictionaryError` for what the format cannot hold."""
    if isinstance(dictionaries, TranscoderSet):
        kind, files = "transcoder_set", _transcoder_files(dictionaries)
    elif isinstance(dictionaries, CrossLayerTranscoder):
        kind, files = "cross_layer_transcoder", _written_across(dictionaries)
    else:
        raise DictionaryError(
            f"circuit-tracer's format holds transcoders, not {dictionaries.kind!r} dictionaries; use the native format."
        )
    config = _settings_of(dictionaries, kind)
    import yaml

    earlier = {
        path.name for pattern in ("layer_*", "W_enc_*", "W_dec_*") for path in folder.glob(f"{pattern}.safetensors")
    }
    with new_files(folder, without=sorted(earlier - files.keys())) as temporary:
        for name, tensors in files.items():
            write_tensors(temporary / name, as_stored(tensors, storage_dtype))
        write_file(temporary / CONFIG, yaml.safe_dump(config, sort_keys=False))


def _settings_of(dictionaries: TranscoderSet | CrossLayerTranscoder, kind: str) -> dict[str, Any]:
    provenance = dictionaries.provenance
    read, write = (_hook(dictionaries, sites) for sites in (dictionaries.reads, dictionaries.writes))
    config: dict[str, Any] = {
        "model_name": provenance.model,
        "model_kind": kind,
        "feature_input_hook": read,
        "feature_output_hook": write,
        "scan": f"{provenance.model}-{dictionaries.kind}",
    }
    if provenance.bos is not None:
        config["prepend_bos"] = provenance.bos
    if provenance.first != first_position(provenance.model):
        config["zero_positions"] = provenance.first
    if (k := _shared_k(dictionaries)) is not None:
        config |= {"activation": "topk", "k": k}
        logger.warning("circuit-tracer 0.5.0 takes TopK transcoders for ReLU ones; read these with a later version.")
    return config


def _hook(dictionaries: DictionarySet, sites: Sequence[Site]) -> str:
    kind = sites[0].kind
    if list(sites) != [Site(layer, kind) for layer in range(dictionaries.n_layers)] or kind not in _HOOKS:
        other = next((site for layer, site in enumerate(sites) if site != Site(layer, kind)), sites[0])
        raise DictionaryError(
            f"circuit-tracer's format has one place in the block for all layers ({', '.join(_HOOKS)}); these "
            f"dictionaries have {sites[0]} and {other}, so use the native format."
        )
    return hook_of_site(kind)


def _shared_k(dictionaries: TranscoderSet | CrossLayerTranscoder) -> int | None:
    """The k of TopK transcoders; None where they are of another kind."""
    if isinstance(dictionaries, CrossLayerTranscoder):
        return None
    found = [transcoder.activation for transcoder in dictionaries.layers if not transcoder.is_absent]
    ks = {sigma.k if isinstance(sigma, TopK) else None for sigma in found}
    if len(ks) > 1:
        kept = ", ".join(sorted("no TopK" if k is None else f"k = {k}" for k in ks))
        raise DictionaryError(
            f"circuit-tracer's format has one k for all layers; these transcoders have {kept}; use the native format."
        )
    return next(iter(ks), None)


def _require_known(activation: Activation) -> None:
    if not isinstance(activation, ReLU | JumpReLU | TopK):
        raise DictionaryError(
            f"circuit-tracer's format cannot hold the activation {called(activation)}; use the native format."
        )


def _transcoder_files(dictionaries: TranscoderSet) -> dict[str, dict[str, Tensor]]:
    present = {layer: transcoder for layer, transcoder in enumerate(dictionaries.layers) if not transcoder.is_absent}
    _require_alike(dictionaries, present)
    any_skip = any(transcoder.W_skip is not None for transcoder in present.values())
    files = {}
    for layer, transcoder in present.items():
        _require_known(transcoder.activation)
        tensors = {
            "W_enc": transcoder.W_enc.T,
            "b_enc": transcoder.b_enc,
            "W_dec": transcoder.W_dec,
            "b_dec": transcoder.b_dec,
        }
        if any_skip:  # circuit-tracer asks the first layer whether there are any
            skip = transcoder.W_skip
            tensors["W_skip"] = transcoder.W_dec.new_zeros(2 * [transcoder.d_in]) if skip is None else skip.T
        if isinstance(transcoder.activation, JumpReLU):
            tensors["activation_function.threshold"] = transcoder.activation.threshold
        files[f"layer_{layer}.safetensors"] = tensors
    return files


def _require_alike(dictionaries: TranscoderSet, present: Mapping[int, Transcoder]) -> None:
    widths = sorted({transcoder.n_features for transcoder in present.values()})
    normed = next((transcoder for transcoder in present.values() if transcoder.norm is not None), None)
    if len(widths) != 1 or normed is not None:
        what = f"{normed.norm}" if normed is not None else f"layers of {', '.join(map(str, widths)) or 'no'} features"
        raise DictionaryError(
            f"circuit-tracer's format cannot hold {what}: its layers have as many features as each other, and read the "
            "model's own units; use the native format."
        )
    if len(present) < dictionaries.n_layers:
        missing = [layer for layer in range(dictionaries.n_layers) if layer not in present]
        logger.warning(
            "Layers %s have no transcoder and get no file; circuit-tracer itself wants a file for every layer.",
            ", ".join(map(str, missing)),
        )


def _written_across(clt: CrossLayerTranscoder) -> dict[str, dict[str, Tensor]]:
    if clt.W_skip is not None or isinstance(clt.activation, TopK):
        what = "a skip term" if clt.W_skip is not None else "TopK over layers"
        raise DictionaryError(f"circuit-tracer's cross-layer format cannot hold {what}; use the native format.")
    _require_known(clt.activation)
    files: dict[str, dict[str, Tensor]] = {}
    for i in range(clt.n_layers):
        files[f"W_enc_{i}.safetensors"] = {
            f"W_enc_{i}": clt.W_enc[i].T,
            f"b_enc_{i}": clt.b_enc[i],
            f"b_dec_{i}": clt.b_dec[i],
        }
        if isinstance(clt.activation, JumpReLU):
            files[f"W_enc_{i}.safetensors"][f"threshold_{i}"] = clt.activation.threshold[i]
        files[f"W_dec_{i}.safetensors"] = {f"W_dec_{i}": clt.W_dec[i]}
    return files
