"""circuit-tracer's layouts: a folder with `config.yaml` and files of weights, here or in other repositories.

config.yaml (circuit_tracer/utils/hf_utils.py of decoderesearch/circuit-tracer, 0.5.0 and after):
    model_kind                  `transcoder_set` or `cross_layer_transcoder`
    feature_input_hook          where features read, a hook of TransformerLens in a block: `hook_resid_mid` is before
                                the norm, `ln2.hook_normalized` after it but without its weight and bias (those of a
                                LayerNorm: since TransformerLens 3), `mlp.hook_in` with them
    feature_output_hook         where they write: `hook_mlp_out` is after a norm of the MLP's output, `mlp.hook_out`
                                before it
    transcoders                 one entry a layer, in order: a file of this folder, or `hf://OWNER/NAME/FILE?revision=…`;
                                also read: a map from layers, entries with `layer` and `filepath` (earlier versions)
    activation, k               `topk` with its k, or `relu`; without, the files tell
    model_name                  of `gemma-3…-it`, the first four positions have no features; of others the first
    zero_positions              says so otherwise (ours; circuit-tracer ignores it, and prepend_bos)
Without `transcoders`, a set is `layer_I.safetensors`, and a cross-layer transcoder its own files; these need no
config.yaml, and then read `hook_resid_mid` and write `hook_mlp_out`, as circuit-tracer's `load_clt` has it.
One repository may hold several sets, each in a folder of its own.

Files (transcoder/single_layer_transcoder.py, cross_layer_transcoder.py); n features, d = d_model, L layers:
    a layer                     W_enc [n, d], b_enc [n], W_dec [n, d], b_dec [d]; of a JumpReLU `h · 1[h > θ]`
                                activation_function.threshold [n] or threshold; of a TopK k; W_skip [d, d], applied as
                                `x W_skipᵀ`
    … of Gemma Scope (.npz)     the same with W_enc [d, n] and threshold [n]
    … of Gemma Scope 2          w_enc [d, n], b_enc, w_dec [n, d], b_dec, threshold, affine_skip_connection [d, d],
                                applied as `x A`
    cross-layer                 W_enc_I.safetensors with W_enc_I [n, d], b_enc_I, b_dec_I, threshold_I of a JumpReLU,
                                W_skip_I applied as `x W_skip_I`; W_dec_I.safetensors with W_dec_I [n, L − I, d]
    … of Gemma Scope 2          as a layer's, with w_dec [n, L, d], of which the layers before I are unused
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoders.dictionaries import (
    Activation,
    CrossLayerTranscoder,
    DictionarySet,
    JumpReLU,
    MappedDictionaries,
    ReLU,
    TopK,
)
from transcoders.errors import FileFormatError, InputError
from transcoders.formats.building import LayerWeights, assemble
from transcoders.formats.circuit_tracer_files import LayerFile, cross_layer_files, thresholds_of
from transcoders.formats.circuit_tracer_saving import save_circuit_tracer
from transcoders.formats.circuit_tracer_sets import CONFIG, UNSAID, TracerSet, configs_of, sets_of
from transcoders.formats.files import read_yaml, take_decoders
from transcoders.formats.format import Format
from transcoders.formats.offers import Offer, width_of
from transcoders.formats.source import HubFolder, Source, fetch_one
from transcoders.formats.weights import Reading
from transcoders.sites import Site

logger = logging.getLogger(__name__)

_K_UNSAID = {"facebook/crv-8b-instruct-transcoders": 128}
"""The k of a TopK whose settings leave it out."""


def is_circuit_tracer(source: Source) -> bool:
    """By the settings of its root or of its first folder that has some; without settings, by the names of a CLT."""
    configs = configs_of(source)
    if configs and "model_kind" in read_yaml(fetch_one(source, configs[0])):
        return True
    return {"W_enc_0.safetensors", "W_dec_0.safetensors"} <= set(source.names)


def offer_circuit_tracer(source: Source) -> list[Offer]:
    """Each layer of each set, and each cross-layer transcoder as a whole."""
    return [offer for found in sets_of(source) for offer in _offers(found)]


def _offers(found: TracerSet) -> list[Offer]:
    common: dict[str, Any] = {
        "id": found.folder, "kind": found.kind, "site": found.sites[0], "variant": found.folder or None,
    }  # fmt: skip
    if found.kind == "clt":
        return [Offer(files=tuple(_within(found, found.across())), width=_width(found.folder), **common)]
    return [
        Offer(
            files=tuple(_within(found, [entry])),
            layer=layer,
            width=_width(f"{found.folder}/{entry}"),
            l0=_l0(entry),
            **common,
        )
        for layer, entry in found.entries().items()
    ]


def _within(found: TracerSet, entries: Iterable[str]) -> list[str]:
    """Those of some files that lie in the source itself."""
    return [found.within(entry) for entry in entries if not entry.startswith("hf://")]


def _width(path: str) -> int | None:
    """As Gemma Scope's paths have it: `width_16k`."""
    stated = re.search(r"width_([1-9][0-9]{0,8}[km]?)(?![a-z0-9])", path)
    return None if stated is None else width_of(stated[1])


def _l0(path: str) -> float | None:
    stated = re.search(r"average_l0_([0-9]{1,9})(?![0-9])", path)
    return None if stated is None else float(stated[1])


def load_circuit_tracer(source: Source, offers: Sequence[Offer], reading: Reading) -> DictionarySet:
    """Transcoders of some layers of one set, or a cross-layer transcoder."""
    folders = {offer.id for offer in offers}
    chosen = [found for found in sets_of(source) if found.folder in folders]
    if len(chosen) != 1:
        raise InputError(
            f"{source.label} holds {len(chosen)} sets in ({', '.join(sorted(folders))}); say which with sae_id=… "
            "(--sae-id)."
        )
    (found,) = chosen
    if found.path is None:
        logger.warning(
            "%s has no %s: it is taken for a cross-layer transcoder that reads %s and writes %s, as circuit-tracer "
            "takes it.", source.label, CONFIG, UNSAID["feature_input_hook"], UNSAID["feature_output_hook"],
        )  # fmt: skip
    if found.kind == "clt":
        return _load_cross_layer(found, reading)
    return _load_layers(found, [offer.layer for offer in offers if offer.layer is not None], reading)


def _load_layers(found: TracerSet, layers: Sequence[int], reading: Reading) -> DictionarySet:
    entries = found.entries()
    paths = found.fetched({layer: entries[layer] for layer in layers})
    files, sizes = {}, {}
    for layer, path in paths.items():
        files[layer] = LayerFile.of(path, reading)
        files[layer].require(sizes := {"d_model": sizes["d_model"]} if sizes else {})
    built, W_dec = [], {}
    for layer, file in files.items():
        tensors = file.read(reading)
        if reading.decoders == "mapped":
            (W_dec[layer],) = take_decoders(tensors, reading.dtype)
        read, write = (Site(layer, kind) for kind in found.sites)
        built.append(
            LayerWeights(
                W_enc=tensors["W_enc"],
                b_enc=tensors["b_enc"],
                W_dec=tensors["W_dec"],
                b_dec=tensors["b_dec"],
                activation=_activation(found, file.path, tensors),
                read=read,
                write=write,
                W_skip=tensors.get("W_skip"),
            )
        )
    loaded = assemble(built, found.provenance(), found.label)
    if reading.decoders != "mapped":
        return loaded
    nothing = torch.zeros(0, loaded.d_model, dtype=reading.dtype)
    return MappedDictionaries(loaded, [W_dec.get(layer, nothing) for layer in range(loaded.n_layers)])


def _activation(found: TracerSet, path: Path, tensors: Mapping[str, Tensor]) -> Activation:
    """σ of one layer, by the settings or by its tensors."""
    stated = found.config.get("activation")
    if stated == "topk":
        return TopK(_k(found, path, tensors))
    if stated == "relu":
        return ReLU()
    if "threshold" in tensors:
        return JumpReLU(thresholds_of(tensors))
    if stated is not None:
        raise FileFormatError(f"{path} lacks the thresholds of the activation {stated!r} that {found.path} speaks of.")
    return TopK(_k(found, path, tensors)) if "k" in tensors else ReLU()


def _k(found: TracerSet, path: Path, tensors: Mapping[str, Tensor]) -> int:
    stated = found.config.get("k")
    if stated is None and "k" in tensors:
        numbers = tensors["k"].flatten().tolist()
        stated = numbers[0] if len(numbers) == 1 and 1 <= numbers[0] < 2**31 else None
        if stated is None:
            raise FileFormatError(f"{path} has k = {str(numbers)[:60]}; expected one number of features, at least 1.")
    if stated is None and isinstance(found.source, HubFolder):
        stated = _K_UNSAID.get(found.source.repo)
    if stated is None:
        raise FileFormatError(f"{found.path} has the activation 'topk' without its k; add a line such as 'k: 64'.")
    return int(stated)


def _load_cross_layer(found: TracerSet, reading: Reading) -> DictionarySet:
    if (stated := found.config.get("activation")) == "topk":
        raise FileFormatError(
            f"{found.path} has the activation {stated!r}, which circuit-tracer's cross-layer transcoders do not have; "
            "expected 'relu' or 'jumprelu'."
        )
    files = cross_layer_files(found, reading)
    sizes: dict[str, int] = {}
    for file in files:
        file.require(sizes)
    n_layers, n_features, d_model = len(files), sizes["feature"], sizes["d_model"]
    of = {"dtype": reading.dtype, "device": reading.device}
    W_enc, b_enc = torch.empty(n_layers, d_model, n_features, **of), torch.empty(n_layers, n_features, **of)
    b_dec = torch.empty(n_layers, d_model, **of)
    decoders, mapped, thresholds, skips = [], [], {}, {}
    for layer, file in enumerate(files):
        tensors = file.read(reading)
        W_enc[layer], b_enc[layer], b_dec[layer] = tensors["W_enc"], tensors["b_enc"], tensors["b_dec"]
        tensors["W_dec"] = tensors["W_dec"][:, -(n_layers - layer) :]
        if reading.decoders == "mapped":
            mapped += take_decoders(tensors, reading.dtype)
        decoders.append(tensors["W_dec"].contiguous())
        if "threshold" in tensors:
            thresholds[layer] = thresholds_of(tensors)
        if "W_skip" in tensors:
            skips[layer] = tensors["W_skip"]
    for what, some in (("thresholds", thresholds), ("skip terms", skips)):
        if len(some) not in (0, n_layers):
            raise FileFormatError(
                f"{found.label} has {what} for {len(some)} of {n_layers} layers; expected all or none."
            )
    if stated not in (None, "relu") and not thresholds:
        raise FileFormatError(
            f"{files[0].path} lacks the thresholds of the activation {stated!r} that {found.path} speaks of."
        )
    relu = stated == "relu" or not thresholds
    read, write = found.sites
    held = CrossLayerTranscoder(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=decoders,
        b_dec=b_dec,
        activation=ReLU() if relu else JumpReLU(torch.stack(list(thresholds.values()))),
        provenance=found.provenance(),
        reads=[Site(layer, read) for layer in range(n_layers)],
        writes=[Site(layer, write) for layer in range(n_layers)],
        W_skip=torch.stack(list(skips.values())) if skips else None,
    ).requires_grad_(False)
    return MappedDictionaries(held, mapped) if reading.decoders == "mapped" else held


FORMAT = Format(
    name="circuit-tracer",
    community="circuit-tracer",
    marker="config.yaml with model_kind, or W_enc_0.safetensors",
    recognises=is_circuit_tracer,
    offers=offer_circuit_tracer,
    load=load_circuit_tracer,
    save=save_circuit_tracer,
    maps_decoders=True,
)
