"""CLT-Forge's checkpoints: cross-layer or per-layer transcoders with JumpReLU, in one folder.

    clt_cfg.json                    d_in, d_latent, n_layers, cross_layer_decoders, model_name, feature_sharding, …
    clt_weights.safetensors         W_enc [layer, d_in, feature], b_enc, log_threshold [layer, feature];
                                    W_dec [pair, feature, d_in], b_dec [pair, d_in], the pairs source ≤ target in order
                                    (0, 0), (0, 1), …, or, without cross_layer_decoders, one for each layer;
                                    estimated_norm_scaling_factor_in, estimated_norm_scaling_factor_out [layer]
    rank0_clt_weights.safetensors   in the place of that file, with feature_sharding: each with some of the features

    a_l = h · 1[h > exp(log_threshold)]     h = (s_in x_l) W_enc + b_enc
    y_t = Σ_{l ≤ t} (a_l W_dec[l, t] + b_dec[l, t]) / s_out_t

Here the scales are folded into the weights and the biases of a target added up. The transcoders read
`ln2.hook_normalized` and write `hook_mlp_out` of a TransformerLens model whose weights are not folded, loaded by
SAELens' `load_model`; texts begin with BOS, which is left out of training. Files also hold what training counts:
`feature_count` and `layer_mask`. A threshold is stored as its logarithm, by which it is rounded.

Source: LLM-Interp/CLT-Forge dcf4cc8 (clt.py, config/clt_config.py, training/activations_store.py and
attribution/loading.py).
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonschema import Draft202012Validator
from torch import Tensor

from transcoders.dictionaries import (
    CrossLayerTranscoder,
    DictionaryProvenance,
    DictionarySet,
    JumpReLU,
    TranscoderSet,
)
from transcoders.errors import DictionaryError, FileFormatError
from transcoders.files import new_files, write_json
from transcoders.formats.building import LayerWeights, assemble, assemble_cross_layer, threshold_of, without
from transcoders.formats.files import MOST_LAYERS, read_json, require_settings, write_tensors
from transcoders.formats.format import Format
from transcoders.formats.hooks import added_site, normalised_site
from transcoders.formats.offers import Offer
from transcoders.formats.source import Source, fetch_one, names_in
from transcoders.formats.weights import Reading, as_stored, open_weights
from transcoders.sites import Site

_SETTINGS, _WEIGHTS = "clt_cfg.json", "clt_weights.safetensors"
_RANK = re.compile(r"rank([0-9]{1,4})_clt_weights\.safetensors")
_INTO, _OUT = "estimated_norm_scaling_factor_in", "estimated_norm_scaling_factor_out"
_COMMUNITY = "CLT-Forge's layout"
_LARGEST_LOG = math.log(1e15)
_SCHEMA = Draft202012Validator(
    {
        "type": "object",
        "required": ["d_in", "d_latent", "n_layers", "cross_layer_decoders"],
        "properties": {
            "d_in": {"type": "integer", "minimum": 1, "maximum": 2**31},
            "d_latent": {"type": "integer", "minimum": 1, "maximum": 2**31},
            "n_layers": {"type": "integer", "minimum": 1, "maximum": MOST_LAYERS},
            "cross_layer_decoders": {"type": "boolean"},
            "feature_sharding": {"type": "boolean"},
            "model_name": {"type": "string"},
        },
    }
)


def is_clt_forge(source: Source) -> bool:
    return _SETTINGS in source.names


def _settings(source: Source) -> dict[str, Any]:
    settings = read_json(path := fetch_one(source, _SETTINGS))
    require_settings(path, settings, _SCHEMA)
    return settings


def _shards(source: Source, settings: dict[str, Any]) -> list[str]:
    """The files of weights, in the order of their features."""
    if not settings.get("feature_sharding"):
        return [_WEIGHTS]
    ranks = sorted(int(found[1]) for name in source.names if (found := _RANK.fullmatch(name)))
    if not ranks or ranks != list(range(len(ranks))):
        raise FileFormatError(
            f"{source.label} has feature_sharding true and files of the ranks {ranks[:12]}; expected all from 0 on, so "
            "download it again."
        )
    return [f"rank{rank}_{_WEIGHTS}" for rank in ranks]


def offers(source: Source) -> list[Offer]:
    settings = _settings(source)
    return [
        Offer(
            id="",
            files=(_SETTINGS, *_shards(source, settings)),
            kind="clt" if settings["cross_layer_decoders"] else "plt",
            site=normalised_site(settings.get("model_name", "")),
            width=settings["d_latent"],
        )
    ]


def load(source: Source, chosen: Sequence[Offer], reading: Reading) -> DictionarySet:
    """The cross-layer transcoder, or the transcoders."""
    settings, model = (found := _settings(source)), found.get("model_name", "unknown")
    paths = source.fetch(_shards(source, settings))
    tensors = _read(paths, settings, reading)
    layers = range(settings["n_layers"])
    into, out = (_scales(paths[0], name, tensors[name]) for name in (_INTO, _OUT))
    threshold = tensors["log_threshold"].clamp(max=_LARGEST_LOG).exp()
    threshold = threshold.where(threshold > 2 * torch.finfo(threshold.dtype).tiny, 0.0)
    W_enc = [tensors["W_enc"][i] * into[i] for i in layers]
    reads = [Site(i, normalised_site(model)) for i in layers]
    writes = [Site(i, added_site(model)) for i in layers]
    provenance = DictionaryProvenance(model=model, bos=True, config=settings)
    if not settings["cross_layer_decoders"]:
        return assemble(
            [
                LayerWeights(
                    W_enc=W_enc[i], b_enc=tensors["b_enc"][i], W_dec=tensors["W_dec"][i] / out[i],
                    b_dec=tensors["b_dec"][i] / out[i], activation=JumpReLU(threshold[i].clone()), read=reads[i],
                    write=writes[i],
                )
                for i in layers
            ],
            provenance,
            source.label,
        )  # fmt: skip
    source_of, target_of = _pairs(len(layers))
    by_target = tensors["W_enc"].new_zeros(len(layers), settings["d_in"])
    return assemble_cross_layer(
        source.label,
        W_enc=W_enc,
        b_enc=list(tensors["b_enc"]),
        W_dec=[(tensors["W_dec"][source_of == i] / out[i:, None, None]).transpose(0, 1).contiguous() for i in layers],
        b_dec=list(by_target.index_add(0, target_of.to(by_target.device), tensors["b_dec"]) / out[:, None]),
        activation=JumpReLU(threshold),
        provenance=provenance,
        reads=reads,
        writes=writes,
    )


def _pairs(n_layers: int) -> tuple[Tensor, Tensor]:
    """Source and target of each decoder."""
    pairs = torch.triu_indices(n_layers, n_layers)
    return pairs[0], pairs[1]


def _read(paths: Sequence[Path], settings: dict[str, Any], reading: Reading) -> dict[str, Tensor]:
    """The tensors of all files, whose features follow each other."""
    n, wanted = settings["n_layers"], settings["d_latent"]
    pairs = n * (n + 1) // 2 if settings["cross_layer_decoders"] else n
    shards, width = [], 0
    for path in paths:
        sizes = {"d_in": settings["d_in"]}
        shapes: dict[str, tuple[int | str, ...]] = {
            "W_enc": (n, "d_in", "feature"), "b_enc": (n, "feature"), "log_threshold": (n, "feature"),
            "W_dec": (pairs, "feature", "d_in"), "b_dec": (pairs, "d_in"), _INTO: (n,), _OUT: (n,),
        }  # fmt: skip
        width += (weights := open_weights(path)).require(shapes, sizes)["feature"]
        shards.append((weights, shapes))
    if width != wanted:
        raise FileFormatError(f"{paths[0]} and the files of other ranks hold {width} features; expected {wanted}.")
    read = [weights.floating(shapes, reading) for weights, shapes in shards]
    if len(read) == 1:
        return read[0]
    axes = {"W_enc": 2, "b_enc": 1, "log_threshold": 1, "W_dec": 1}
    return read[0] | {name: torch.cat([shard[name] for shard in read], axis) for name, axis in axes.items()}


def _scales(path: Path, name: str, scale: Tensor) -> Tensor:
    if not bool(((scale > 1e-15) & (scale < 1e15)).all()):
        raise FileFormatError(f"{path} has a {name} that is not positive; download it again.")
    return scale


# writing


def save(dictionaries: DictionarySet, folder: Path, *, storage_dtype: torch.dtype | None = None) -> None:
    """Write transcoders or a cross-layer transcoder in one file; `DictionaryError` for what the layout cannot hold."""
    tensors = _tensors(dictionaries)
    dtype = storage_dtype or tensors["W_enc"].dtype
    n_layers, d_in, n_features = tensors["W_enc"].shape
    settings = {
        "device": "cpu", "dtype": str(dtype).removeprefix("torch."), "seed": dictionaries.provenance.seed or 0,
        "model_name": dictionaries.provenance.model, "d_in": d_in, "d_latent": n_features, "n_layers": n_layers,
        "jumprelu_bandwidth": 1.0, "jumprelu_init_threshold": 0.03, "normalize_decoder": False,
        "dead_feature_window": 250, "cross_layer_decoders": dictionaries.kind == "clt", "context_size": 16,
        "l0_coefficient": 0.0, "feature_sharding": False,
    }  # fmt: skip
    with new_files(folder, [name for name in names_in(folder) if _RANK.fullmatch(name)]) as temporary:
        write_tensors(temporary / _WEIGHTS, as_stored(tensors, storage_dtype))
        write_json(temporary / _SETTINGS, settings)


def _tensors(dictionaries: DictionarySet) -> dict[str, Tensor]:
    if isinstance(dictionaries, CrossLayerTranscoder):
        tensors = _cross_layer(dictionaries)
    elif isinstance(dictionaries, TranscoderSet):
        tensors = _per_layer(dictionaries)
    else:
        raise DictionaryError(f"{_COMMUNITY} holds transcoders, not {dictionaries.kind!r} dictionaries.")
    model = dictionaries.provenance.model
    expected = normalised_site(model), added_site(model)
    found = dictionaries.reads[0].kind, dictionaries.writes[0].kind
    if found != expected:
        raise DictionaryError(
            f"{_COMMUNITY} holds transcoders that read {expected[0]} and write {expected[1]} in {model}, not ones that "
            f"read {found[0]} and write {found[1]}; use the native format."
        )
    n_layers, _, n_features = tensors["W_enc"].shape
    tiny = torch.finfo(tensors["threshold"].dtype).tiny
    tensors["log_threshold"] = tensors.pop("threshold").clamp(min=tiny).log()
    ones = torch.ones(n_layers)
    return tensors | {
        _INTO: ones,
        _OUT: ones.clone(),
        "feature_count": torch.zeros(n_layers, n_features, dtype=torch.long),
    }


def _cross_layer(clt: CrossLayerTranscoder) -> dict[str, Tensor]:
    without(clt, _COMMUNITY)
    source_of, target_of = _pairs(clt.n_layers)
    own = (source_of == target_of).to(clt.b_dec.device)
    b_dec = clt.b_dec.new_zeros(len(source_of), clt.d_model)
    b_dec[own] = clt.b_dec
    return {
        "W_enc": clt.W_enc, "b_enc": clt.b_enc, "W_dec": torch.cat([W.transpose(0, 1) for W in clt.W_dec]),
        "b_dec": b_dec, "threshold": threshold_of(clt, _COMMUNITY),
        "layer_mask": (source_of == torch.arange(clt.n_layers)[:, None]).to(clt.W_enc.dtype),
    }  # fmt: skip


def _per_layer(transcoders: TranscoderSet) -> dict[str, Tensor]:
    layers = transcoders.layers
    if len({layer.n_features for layer in layers}) > 1:
        raise DictionaryError(
            f"{_COMMUNITY} holds as many features in every layer; these transcoders have "
            f"{', '.join(str(layer.n_features) for layer in layers[:8])}; use the native format."
        )
    for layer in layers:
        without(layer, _COMMUNITY)
    stacked = {
        name: torch.stack([getattr(layer, name) for layer in layers]) for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    }
    return stacked | {"threshold": torch.stack([threshold_of(layer, _COMMUNITY) for layer in layers])}


FORMAT = Format(
    name="clt-forge",
    community="CLT-Forge",
    marker=_SETTINGS,
    recognises=is_clt_forge,
    offers=offers,
    load=load,
    save=save,
)
