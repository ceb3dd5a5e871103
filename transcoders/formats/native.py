"""The format of this package: a folder with `config.json` and `weights.safetensors`.

The weights have the names and shapes of the classes in `transcoders.dictionaries`; per-layer sets prefix theirs with
the layer's number. A cross-layer transcoder whose decoders have a rank (`decoder_rank`) is stored as its factors: each
layer's own decoder `W_dec.l`, and `W_code.l` and `W_later.l`, whose product is what it writes to later layers. The two
files carry the same id, so that a folder overwritten halfway is noticed.
"""

import logging
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from jsonschema import Draft202012Validator
from torch import Tensor

from transcoders.dictionaries import (
    SAE,
    Activation,
    CrossLayerTranscoder,
    DictionaryProvenance,
    DictionarySet,
    GroupMax,
    JumpReLU,
    JumpTopK,
    MappedDictionaries,
    MixedSet,
    ReLU,
    SAESet,
    SparseDictionary,
    TopK,
    Transcoder,
    TranscoderSet,
)
from transcoders.dictionaries.low_rank import Factors, factors
from transcoders.dictionaries.provenance import AGREEMENT
from transcoders.dictionaries.token_norm import TokenNorm, TokenNormName
from transcoders.errors import DictionaryError, FileFormatError, InputError
from transcoders.files import new_files, write_json
from transcoders.formats.files import (
    MOST_LAYERS,
    SOME_SIZE,
    is_decoder,
    read_json,
    read_site,
    read_tensors,
    require_settings,
    require_shapes,
    take_decoders,
    tensor_shapes,
    write_tensors,
)
from transcoders.formats.format import Format
from transcoders.formats.offers import Offer
from transcoders.formats.source import Source, fetch_one
from transcoders.formats.weights import Reading, as_stored
from transcoders.hub import first_line
from transcoders.sites import Site

logger = logging.getLogger(__name__)

ACTIVATION = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"enum": ["relu", "jumprelu", "topk", "groupmax", "jumptopk"]},
        "bandwidth": {"type": "number", "exclusiveMinimum": 0, "maximum": 1e6},
        "k": {"type": "integer", "minimum": 1, "maximum": 2**31},
        "over_layers": {"type": "boolean"},
    },
    "allOf": [
        {"if": {"properties": {"name": {"const": name}}}, "then": {"required": needed}}
        for name, needed in (
            ("jumprelu", ["bandwidth"]),
            ("topk", ["k", "over_layers"]),
            ("groupmax", ["k"]),
            ("jumptopk", ["k"]),
        )
    ],
}
SITES = {"type": "array", "minItems": 1, "maxItems": MOST_LAYERS, "items": {"type": "string", "maxLength": 40}}
_FACTORS = {"type": "array", "maxItems": MOST_LAYERS, "items": {"type": "number", "minimum": -1e30, "maximum": 1e30}}
PROVENANCE = {
    "type": "object",
    "required": ["model"],
    "properties": {
        "model": {"type": "string"},
        "model_origin": {"type": "object", "additionalProperties": {"type": "string"}},
        "fingerprint": {"type": ["string", "null"]},
        "frame": {"type": "object", "properties": {"name": {"enum": ["raw", "folded"]}}, "additionalProperties": False},
        "corpus": {"type": ["string", "null"]},
        "tokens": {"type": "integer", "minimum": 0},
        "d_vocab": {"type": ["integer", "null"], "minimum": 1},
        "first": {"type": "integer", "minimum": 0, "maximum": 2**31},
        "limits": {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}},
        "seed": {"type": ["integer", "null"]},
        "versions": {"type": "object", "additionalProperties": {"type": "string"}},
        "config": {"type": "object"},
        "normalisation": {"type": "object", "additionalProperties": _FACTORS},
        "agreement": {"type": "object", "additionalProperties": {"type": ["number", "null"]}},
    },
}
_SETTINGS = Draft202012Validator(
    {
        "type": "object",
        "required": ["kind", "n_layers", "reads", "writes", "activation", "provenance"],
        "properties": {
            "kind": {"enum": ["plt", "clt", "sae", "mixed"]},
            "n_layers": {"type": "integer", "minimum": 1, "maximum": MOST_LAYERS},
            "reads": SITES,
            "writes": SITES,
            "provenance": PROVENANCE,
        },
        "if": {"properties": {"kind": {"const": "clt"}}},
        "then": {"properties": {"activation": ACTIVATION, "decoder_rank": SOME_SIZE}},
        "else": {
            "properties": {
                "activation": {"type": "array", "items": ACTIVATION},
                "kinds": {"type": "array", "items": {"enum": ["plt", "sae"]}},
                "centred": {"type": "array", "items": {"type": "boolean"}},
                "norm": {"type": "array", "items": {"enum": [None, *get_args(TokenNormName)]}},
            }
        },
    }
)

_NAME = "transcoders"
VERSION = 1
_CONFIG, _WEIGHTS, _EVALUATION = "config.json", "weights.safetensors", "evaluation.json"
THRESHOLD = "activation.threshold"
_WITH_THRESHOLD = ("jumprelu", "jumptopk")


def is_native(source: Source) -> bool:
    return _CONFIG in source.names and read_json(fetch_one(source, _CONFIG)).get("format") == _NAME


def save_native(dictionaries: DictionarySet, folder: Path | str, *, storage_dtype: torch.dtype | None = None) -> None:
    """Write a set to a folder; `storage_dtype`: precision of the stored weights, by default that of the set."""
    if isinstance(dictionaries, CrossLayerTranscoder):
        tensors, ranked = _stored_decoders(dictionaries)
        config: dict[str, Any] = {"activation": described(dictionaries.activation), **ranked}
    elif isinstance(dictionaries, TranscoderSet | SAESet | MixedSet):
        tensors = {f"{i}.{name}": t for i, d in enumerate(dictionaries.layers) for name, t in d.state_dict().items()}
        config = {"activation": [described(d.activation) for d in dictionaries.layers]}
        if isinstance(dictionaries, MixedSet):
            config["kinds"] = ["sae" if isinstance(d, SAE) else "plt" for d in dictionaries.layers]
        if isinstance(dictionaries, SAESet | MixedSet):
            config["centred"] = [isinstance(d, SAE) and d.centred for d in dictionaries.layers]
        if any(d.norm is not None for d in dictionaries.layers):
            config["norm"] = [None if d.norm is None else d.norm.name for d in dictionaries.layers]
    else:
        raise DictionaryError(
            f"A {type(dictionaries).__name__} has no native form; save a CLT, transcoders, SAEs, or a mixture of both."
        )
    identity = uuid.uuid4().hex
    record = {
        "format": _NAME,
        "version": VERSION,
        "id": identity,
        "kind": dictionaries.kind,
        "n_layers": dictionaries.n_layers,
        "reads": [str(site) for site in dictionaries.reads],
        "writes": [str(site) for site in dictionaries.writes],
        **config,
        "provenance": dictionaries.provenance.to_json(),
    }
    with new_files(Path(folder)) as temporary:
        write_tensors(temporary / _WEIGHTS, as_stored(tensors, storage_dtype), {"id": identity})
        write_json(temporary / _CONFIG, record)


def offers_native(source: Source) -> list[Offer]:
    """The one set that a folder holds."""
    path = fetch_one(source, _CONFIG)
    record = _settings(path)
    try:
        kinds = {Site.parse(site).kind for site in record["reads"]}
    except InputError as error:
        raise FileFormatError(f"{path} names no site: {error}") from error
    site = next(iter(kinds)) if len(kinds) == 1 else None
    return [Offer(id="", files=(_CONFIG, _WEIGHTS), kind=record["kind"], site=site)]


def load_native(source: Source, offers: Sequence[Offer], reading: Reading) -> DictionarySet:
    """The set that `save_native` wrote."""
    folder = source.fetch([_CONFIG, _WEIGHTS])[0].parent
    record = _settings(folder / _CONFIG)
    record["provenance"] |= _evaluated(source, record.get("id"))
    path = folder / _WEIGHTS
    shapes, expected = tensor_shapes(path), _expected(record)
    optional = {name: shape for name, shape in _skips(record).items() if name in shapes}
    # A layer without a dictionary has no features.
    empty = {_feature(i) for i in range(record["n_layers"])}
    require_shapes(path, shapes, expected | optional, may_be_empty=empty)
    if unknown := sorted(shapes.keys() - expected.keys() - optional.keys()):
        raise FileFormatError(
            f"{path} has {unknown[0]}, which its {_CONFIG} does not speak of; save the dictionaries again."
        )
    mapped = reading.decoders == "mapped"
    if mapped and record.get("decoder_rank"):
        raise InputError(
            f"The decoders in {path} are factors of rank {record['decoder_rank']}, which are multiplied out in memory; "
            "load them with decoders='memory'."
        )
    tensors, metadata = read_tensors(
        path, dtype=reading.dtype, device=reading.device, mapped=lambda name: mapped and is_decoder(name), weights=True
    )
    if metadata.get("id") != record.get("id"):
        raise FileFormatError(f"{path} and {folder / _CONFIG} were not saved together; save the dictionaries again.")
    try:
        if not mapped:
            return _build(record, tensors)
        names = [name for name in expected if is_decoder(name)]
        W_dec = take_decoders(in_order := {name: tensors[name] for name in names}, reading.dtype)
        return MappedDictionaries(_build(record, tensors | in_order), W_dec)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise FileFormatError(
            f"{folder / _CONFIG} does not describe {path} ({type(error).__name__}: {first_line(error)[:200]}); "
            "save the dictionaries again."
        ) from error


def native_id(folder: Path) -> str | None:
    """Which files of this format a folder holds, as an evaluation of them says; None where it holds none."""
    path = folder / _CONFIG
    record = read_json(path) if path.is_file() else {}
    return record.get("id") if record.get("format") == _NAME else None


def _evaluated(source: Source, identity: Any) -> dict[str, Any]:
    """The Jacobian agreement that an evaluation of these very files, beside them, found.

    `identity`: as the settings have it, which may be anything.
    """
    if _EVALUATION not in source.names:
        return {}
    try:
        record = read_json(fetch_one(source, _EVALUATION))
    except FileFormatError as error:
        logger.warning("The evaluation beside the dictionaries is left out of account: %s", error)
        return {}
    found = record.get("agreement")
    if identity is None or record.get("dictionaries_id") != identity or not isinstance(found, dict):
        return {}
    figures = {name: found.get(name) for name in AGREEMENT}
    known = all(isinstance(value, int | float) for value in figures.values())
    return {"agreement": figures} if known else {}


def _settings(path: Path) -> dict[str, Any]:
    record = read_json(path)
    if record.get("version") != VERSION:
        raise FileFormatError(
            f"{path} is of version {repr(record.get('version'))[:40]}, but this release reads version {VERSION}; "
            "update the package."
        )
    require_settings(path, record, _SETTINGS)
    for text in (*record["reads"], *record["writes"]):
        read_site(path, text)
    return record


def _expected(record: dict[str, Any]) -> dict[str, tuple[int | str, ...]]:
    """The tensors that the settings speak of, and their shapes."""
    layers, sigma = range(record["n_layers"]), record["activation"]
    lists = {name: value for name, value in record.items() if isinstance(value, list)}
    if wrong := [name for name, values in lists.items() if len(values) != len(layers)]:
        raise FileFormatError(
            f"{_CONFIG} has {len(lists[wrong[0]])} entries under {wrong[0]!r} for {len(layers)} layers; "
            "save the dictionaries again."
        )
    if record["kind"] == "clt":
        n = len(layers)
        shapes = {"W_enc": (n, "d_model", "feature"), "b_enc": (n, "feature"), "b_dec": (n, "d_model")}
        factored = record.get("decoder_rank") is not None
        shapes |= {f"W_dec.{i}": ("feature", 1 if factored else n - i, "d_model") for i in layers}
        for i in layers[:-1] if factored else ():
            rank = f"rank of layer {i}"
            shapes |= {f"W_code.{i}": ("feature", rank), f"W_later.{i}": (rank, n - i - 1, "d_model")}
        return shapes | ({THRESHOLD: (n, "feature")} if sigma["name"] in _WITH_THRESHOLD else {})
    shapes = {}
    for i in layers:
        feature = _feature(i)
        shapes |= {f"{i}.W_enc": ("d_model", feature), f"{i}.b_enc": (feature,)}
        shapes |= {f"{i}.W_dec": (feature, "d_model"), f"{i}.b_dec": ("d_model",)}
        shapes |= {f"{i}.{THRESHOLD}": (feature,)} if sigma[i]["name"] in _WITH_THRESHOLD else {}
    return shapes


def _feature(layer: int) -> str:
    return f"feature of layer {layer}"


def _skips(record: dict[str, Any]) -> dict[str, tuple[int | str, ...]]:
    """The tensors that may be there."""
    n = record["n_layers"]
    if record["kind"] == "clt":
        return {"W_skip": (n, "d_model", "d_model")}
    return {f"{i}.W_skip": ("d_model", "d_model") for i in range(n)}


def _build(
    record: dict[str, Any], tensors: dict[str, Tensor]
) -> TranscoderSet | SAESet | MixedSet | CrossLayerTranscoder:
    n_layers, kind = record["n_layers"], record["kind"]
    provenance = DictionaryProvenance.from_json(record["provenance"])
    reads, writes = ([Site.parse(site) for site in record[side]] for side in ("reads", "writes"))
    if kind == "clt":
        return CrossLayerTranscoder(
            W_enc=tensors["W_enc"],
            b_enc=tensors["b_enc"],
            W_dec=[_decoder(tensors, i) for i in range(n_layers)],
            b_dec=tensors["b_dec"],
            activation=activation_of(record["activation"], tensors, ""),
            provenance=provenance,
            reads=reads,
            writes=writes,
            W_skip=tensors.get("W_skip"),
        ).requires_grad_(False)
    layers: list[SparseDictionary] = []
    kinds = record["kinds"] if kind == "mixed" else [kind] * n_layers
    norms = [None if name is None else TokenNorm(name) for name in record.get("norm", [None] * n_layers)]
    for i in range(n_layers):
        weights = {name: tensors[f"{i}.{name}"] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        sigma = activation_of(record["activation"][i], tensors, f"{i}.")
        common: dict[str, Any] = weights | {"activation": sigma, "W_skip": tensors.get(f"{i}.W_skip"), "norm": norms[i]}
        if kinds[i] == "sae":
            layers.append(SAE(**common, site=reads[i], centred=record["centred"][i]))
        else:
            layers.append(Transcoder(**common, read=reads[i], write=writes[i]))
    of_layers: Any = {"plt": TranscoderSet, "sae": SAESet, "mixed": MixedSet}[kind]
    return of_layers(layers, provenance).requires_grad_(False)


def _stored_decoders(clt: CrossLayerTranscoder) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and what the settings say of them: where training or truncation gave decoders a rank, factors."""
    tensors, rank = dict(clt.state_dict()), clt.provenance.config.get("decoder_rank")
    if not isinstance(rank, int) or rank < 1 or (found := factors(list(clt.W_dec), rank)) is None:
        return tensors, {}  # changed since, if it ever had one
    for i, (codes, maps) in enumerate(found):
        tensors |= {f"W_dec.{i}": clt.W_dec[i][:, :1], f"W_code.{i}": codes, f"W_later.{i}": maps}
    return tensors, {"decoder_rank": rank}


def _decoder(tensors: dict[str, Tensor], layer: int) -> Tensor:
    if (codes := tensors.get(f"W_code.{layer}")) is None:
        return tensors[f"W_dec.{layer}"]
    return torch.cat([tensors[f"W_dec.{layer}"], Factors(codes, tensors[f"W_later.{layer}"]).expanded()], dim=1)


def described(activation: Activation) -> dict[str, Any]:
    """All of an activation function but its tensors."""
    if isinstance(activation, JumpReLU):
        return {"name": "jumprelu", "bandwidth": activation.bandwidth}
    if isinstance(activation, TopK):
        return {"name": "topk", "k": activation.k, "over_layers": activation.over_layers}
    if isinstance(activation, GroupMax | JumpTopK):
        return {"name": activation.name, "k": activation.k}
    return {"name": activation.name}


def activation_of(record: dict[str, Any], tensors: dict[str, Tensor], prefix: str) -> Activation:
    name = record["name"]
    if name == "jumprelu":
        return JumpReLU(tensors[f"{prefix}{THRESHOLD}"], record["bandwidth"])
    if name == "topk":
        return TopK(record["k"], over_layers=record["over_layers"])
    if name == "jumptopk":
        return JumpTopK(record["k"], tensors[f"{prefix}{THRESHOLD}"])
    if name == "groupmax":
        return GroupMax(record["k"])
    if name == "relu":
        return ReLU()
    raise FileFormatError(f"The dictionary has the activation {name!r}, which this release cannot read.")


FORMAT = Format(
    name="native",
    community="this package",
    marker='config.json with "format": "transcoders"',
    recognises=is_native,
    offers=offers_native,
    load=load_native,
    save=save_native,
    keeps_frame=True,
    maps_decoders=True,
)
