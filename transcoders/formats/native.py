"""The format of this package: a folder with `config.json` and `weights.safetensors`.

The weights have the names and shapes of the classes in `transcoders.dictionaries`; per-layer sets prefix theirs with
the layer's number. The two files carry the same id, so that a folder overwritten halfway is noticed.
"""

import uuid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoders.dictionaries import (
    SAE,
    Activation,
    CrossLayerTranscoder,
    DictionaryProvenance,
    DictionarySet,
    JumpReLU,
    MappedDictionaries,
    ReLU,
    SAESet,
    SparseDictionary,
    TopK,
    Transcoder,
    TranscoderSet,
)
from transcoders.errors import DictionaryError, FileFormatError
from transcoders.files import new_files, write_json
from transcoders.formats.files import (
    DecoderPlace,
    is_decoder,
    read_json,
    read_tensors,
    require_tensors,
    take_decoders,
    write_tensors,
)
from transcoders.sites import Site

FORMAT = "transcoders"
VERSION = 1
_CONFIG, _WEIGHTS = "config.json", "weights.safetensors"


def is_native(folder: Path) -> bool:
    path = folder / _CONFIG
    return path.is_file() and read_json(path).get("format") == FORMAT


def save_native(dictionaries: DictionarySet, folder: Path | str, *, storage_dtype: torch.dtype | None = None) -> None:
    """Write a set to a folder; `storage_dtype`: precision of the stored weights, by default that of the set."""
    if isinstance(dictionaries, CrossLayerTranscoder):
        tensors = dict(dictionaries.state_dict())
        config: dict[str, Any] = {"activation": _describe(dictionaries.activation)}
    elif isinstance(dictionaries, TranscoderSet | SAESet):
        tensors = {f"{i}.{name}": t for i, d in enumerate(dictionaries.layers) for name, t in d.state_dict().items()}
        config = {"activation": [_describe(d.activation) for d in dictionaries.layers]}
        if isinstance(dictionaries, SAESet):
            config["centred"] = [sae.centred for sae in dictionaries.layers]
    else:
        raise DictionaryError(f"A {type(dictionaries).__name__} has no native form; save a CLT, transcoders or SAEs.")
    if storage_dtype is not None:
        tensors = {name: _stored(name, tensor, storage_dtype) for name, tensor in tensors.items()}
    identity = uuid.uuid4().hex
    record = {
        "format": FORMAT,
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
        write_tensors(temporary / _WEIGHTS, tensors, {"id": identity})
        write_json(temporary / _CONFIG, record)


def load_native(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    decoders: DecoderPlace = "memory",
) -> DictionarySet:
    """The set that `save_native` wrote, in `dtype` or, by default, in float32."""
    record = read_json(folder / _CONFIG)
    if record.get("version") != VERSION:
        raise FileFormatError(
            f"{folder / _CONFIG} is of version {record.get('version')!r}, but this release reads version {VERSION}; "
            "update the package."
        )
    dtype, mapped = dtype or torch.float32, decoders == "mapped"
    tensors, metadata = read_tensors(
        folder / _WEIGHTS, dtype=dtype, device=device, mapped=lambda name: mapped and is_decoder(name)
    )
    if metadata.get("id") != record.get("id"):
        raise FileFormatError(
            f"{folder / _WEIGHTS} and {folder / _CONFIG} were not saved together; save the dictionaries again."
        )
    try:
        if not mapped:
            return _build(folder, record, tensors)
        layers = range(int(record["n_layers"]))
        names = [f"W_dec.{i}" if record["kind"] == "clt" else f"{i}.W_dec" for i in layers]
        require_tensors(folder / _WEIGHTS, tensors, names)
        W_dec = take_decoders(in_order := {name: tensors[name] for name in names}, dtype)
        return MappedDictionaries(_build(folder, record, tensors | in_order), W_dec)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(
            f"{folder / _CONFIG} does not describe {folder / _WEIGHTS} ({type(error).__name__}: {error}); "
            "save the dictionaries again."
        ) from error


def _build(
    folder: Path, record: dict[str, Any], tensors: dict[str, Tensor]
) -> TranscoderSet | SAESet | CrossLayerTranscoder:
    n_layers, kind = int(record["n_layers"]), record["kind"]
    provenance = DictionaryProvenance.from_json(record["provenance"])
    reads, writes = ([Site.parse(site) for site in record[side]] for side in ("reads", "writes"))
    path = folder / _WEIGHTS
    if kind == "clt":
        require_tensors(path, tensors, ["W_enc", "b_enc", *(f"W_dec.{i}" for i in range(n_layers)), "b_dec"])
        return CrossLayerTranscoder(
            W_enc=tensors["W_enc"],
            b_enc=tensors["b_enc"],
            W_dec=[tensors[f"W_dec.{i}"] for i in range(n_layers)],
            b_dec=tensors["b_dec"],
            activation=_activation(record["activation"], tensors, ""),
            provenance=provenance,
            reads=reads,
            writes=writes,
            W_skip=tensors.get("W_skip"),
        ).requires_grad_(False)
    if kind not in ("plt", "sae"):
        raise FileFormatError(f"{folder / _CONFIG} names the kind {kind!r}; expected 'plt', 'clt' or 'sae'.")
    layers: list[SparseDictionary] = []
    for i in range(n_layers):
        names = [f"{i}.{name}" for name in ("W_enc", "b_enc", "W_dec", "b_dec")]
        require_tensors(path, tensors, names)
        weights = {name.partition(".")[2]: tensors[name] for name in names}
        sigma = _activation(record["activation"][i], tensors, f"{i}.")
        if kind == "sae":
            layers.append(SAE(**weights, activation=sigma, site=reads[i], centred=record["centred"][i]))
        else:
            skip = tensors.get(f"{i}.W_skip")
            layers.append(Transcoder(**weights, activation=sigma, read=reads[i], write=writes[i], W_skip=skip))
    if kind == "sae":
        return SAESet(layers, provenance).requires_grad_(False)  # pyright: ignore[reportArgumentType]
    return TranscoderSet(layers, provenance).requires_grad_(False)  # pyright: ignore[reportArgumentType]


def _describe(activation: Activation) -> dict[str, Any]:
    """All of an activation function but its tensors."""
    if isinstance(activation, JumpReLU):
        return {"name": "jumprelu", "bandwidth": activation.bandwidth}
    if isinstance(activation, TopK):
        return {"name": "topk", "k": activation.k, "over_layers": activation.over_layers}
    return {"name": activation.name}


def _activation(record: dict[str, Any], tensors: dict[str, Tensor], prefix: str) -> Activation:
    name = record["name"]
    if name == "jumprelu":
        return JumpReLU(tensors[f"{prefix}activation.threshold"], record["bandwidth"])
    if name == "topk":
        return TopK(record["k"], over_layers=record["over_layers"])
    if name == "relu":
        return ReLU()
    raise FileFormatError(f"The activation {name!r} is unknown; this release knows relu, jumprelu and topk.")


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Matrices only: rounding a threshold or a bias moves features on and off, and saves nothing.
    return tensor.to(dtype) if "W_" in name else tensor
