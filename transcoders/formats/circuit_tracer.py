"""circuit-tracer's format: a folder with `config.yaml` and safetensors files for each layer.

Transcoders: one file a layer with `W_enc [feature, d_model]`, `b_enc`, `W_dec [feature, d_model]`, `b_dec`; for
JumpReLU `activation_function.threshold` or `threshold`, for TopK `k`; `W_skip`, if any, is applied as `x @ W_skip.T`.
Cross-layer: `W_enc_{i}.safetensors` with `W_enc_{i} [feature, d_model]`, `b_enc_{i}`, `b_dec_{i}`, for JumpReLU
`threshold_{i}`, and `W_dec_{i}.safetensors` with `W_dec_{i} [feature, L − i, d_model]`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonschema import Draft202012Validator
from torch import Tensor

from transcoders.dictionaries import (
    Activation,
    CrossLayerTranscoder,
    DictionaryProvenance,
    DictionarySet,
    JumpReLU,
    MappedDictionaries,
    ReLU,
    TopK,
    Transcoder,
    TranscoderSet,
)
from transcoders.errors import DictionaryError, FileFormatError
from transcoders.files import new_files, write_file
from transcoders.formats.files import (
    MOST_LAYERS,
    DecoderPlace,
    is_decoder,
    read_tensors,
    read_yaml,
    require_settings,
    require_shapes,
    take_decoders,
    tensor_shapes,
    write_tensors,
)
from transcoders.formats.format import Format, whole
from transcoders.formats.offers import Offer
from transcoders.formats.source import Source, fetch_one
from transcoders.formats.weights import Reading
from transcoders.sites import Site, SiteKind

_CONFIG = "config.yaml"
_ENCODER: tuple[int | str, ...] = ("feature", "d_model")
_OPTIONAL: dict[str, tuple[int | str, ...]] = {"W_skip": ("d_model", "d_model")}
_KINDS = {"transcoder_set": "plt", "cross_layer_transcoder": "clt"}

# `ln2.hook_normalized` is not here: on a raw model it comes before the norm's weights, so it is no site of ours.
_SITES: dict[str, SiteKind] = {
    "mlp.hook_in": "mlp_in",
    "hook_mlp_in": "mlp_in",
    "mlp.hook_out": "mlp_out",
    "hook_mlp_out": "mlp_out",
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
}
_LOCAL_NAME = r"^(?![/\\])(?!.*\.\.)[^\x00-\x1f]+$"
"""Files are named inside of their folder."""
_SCHEMA = Draft202012Validator(
    {
        "type": "object",
        "required": ["model_kind", "feature_input_hook", "feature_output_hook"],
        "properties": {
            "model_kind": {"enum": list(_KINDS)},
            "feature_input_hook": {"enum": list(_SITES)},
            "feature_output_hook": {"enum": list(_SITES)},
            "transcoders": {
                "type": "array",
                "minItems": 1,
                "maxItems": MOST_LAYERS,
                "items": {"type": "string", "pattern": _LOCAL_NAME, "maxLength": 255},
            },
        },
    }
)
_HOOKS: dict[SiteKind, str] = {
    "mlp_in": "mlp.hook_in",
    "mlp_out": "mlp.hook_out",
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
}


def is_circuit_tracer(source: Source) -> bool:
    return _CONFIG in source.names and "model_kind" in read_yaml(fetch_one(source, _CONFIG))


def load_circuit_tracer(source: Source, offers: Sequence[Offer], reading: Reading) -> DictionarySet:
    """Transcoders or a cross-layer transcoder."""
    folder = source.fetch(name for name in source.names if name.endswith((".safetensors", ".yaml")))[0].parent
    config = read_yaml(folder / _CONFIG)
    require_settings(folder / _CONFIG, config, _SCHEMA)
    kind = _KINDS[config["model_kind"]]
    sites = _SITES[config["feature_input_hook"]], _SITES[config["feature_output_hook"]]
    provenance = DictionaryProvenance(model=str(config.get("model_name", "unknown")), config=config)
    reader = _Reader(folder, reading.dtype, reading.device, reading.decoders)
    if kind == "plt":
        loaded = _load_transcoders(reader, config, sites, provenance)
    else:
        loaded = _load_cross_layer(reader, sites, provenance)
    return MappedDictionaries(loaded, reader.W_dec) if reading.decoders == "mapped" else loaded


def save_circuit_tracer(dictionaries: DictionarySet, folder: Path, *, storage_dtype: torch.dtype | None = None) -> None:
    """Write transcoders or a cross-layer transcoder; `DictionaryError` for what the format cannot hold."""
    if isinstance(dictionaries, TranscoderSet):
        kind, files = "transcoder_set", _transcoder_files(dictionaries)
    elif isinstance(dictionaries, CrossLayerTranscoder):
        kind, files = "cross_layer_transcoder", _cross_layer_files(dictionaries)
    else:
        raise DictionaryError(
            f"circuit-tracer's format holds transcoders, not {dictionaries.kind!r} dictionaries; use the native format."
        )
    config: dict[str, Any] = {
        "model_name": dictionaries.provenance.model,
        "model_kind": kind,
        "feature_input_hook": _HOOKS[dictionaries.reads[0].kind],
        "feature_output_hook": _HOOKS[dictionaries.writes[0].kind],
        "scan": f"{dictionaries.provenance.model}-{dictionaries.kind}",
    }
    if kind == "transcoder_set":
        config["transcoders"] = list(files)
    if dictionaries.provenance.bos is not None:
        config["prepend_bos"] = dictionaries.provenance.bos
    import yaml

    with new_files(folder) as temporary:
        for name, tensors in files.items():
            stored = {key: t.to(storage_dtype) if storage_dtype and "W_" in key else t for key, t in tensors.items()}
            write_tensors(temporary / name, stored)
        write_file(temporary / _CONFIG, yaml.safe_dump(config, sort_keys=False))


# reading


class _Reader:
    """Tensors of one folder, in one precision, but for decoders that stay in their files."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str | torch.device, decoders: DecoderPlace) -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        self.mapped = decoders == "mapped"
        self.W_dec: list[Tensor] = []
        """Decoders that stay in their files, in the order of reading."""

    def read(self, name: str, expected: dict[str, tuple[int | str, ...]], sizes: dict[str, int]) -> dict[str, Tensor]:
        """The tensors of a file, once their shapes are those expected; `sizes` are what all files share."""
        path = self.folder / name
        shapes = tensor_shapes(path)
        optional = {key: shape for key, shape in _OPTIONAL.items() if key in shapes}
        require_shapes(path, shapes, expected | optional, sizes)
        tensors, _ = read_tensors(
            path,
            dtype=self.dtype,
            device=self.device,
            mapped=lambda name: self.mapped and is_decoder(name),
            weights=True,
        )
        if self.mapped:
            self.W_dec += take_decoders(tensors, self.dtype)
        return tensors


def _load_transcoders(
    reader: _Reader, config: dict[str, Any], sites: tuple[SiteKind, SiteKind], provenance: DictionaryProvenance
) -> TranscoderSet:
    names = config.get("transcoders")
    if not isinstance(names, list) or not names:
        raise FileFormatError(
            f"{reader.folder / _CONFIG} lists no files under 'transcoders'; expected one file name for each layer."
        )
    layers, d_model = [], {}
    for i, name in enumerate(names):
        expected = {"W_enc": _ENCODER, "b_enc": ("feature",), "W_dec": _ENCODER, "b_dec": ("d_model",)}
        sizes = {**d_model}
        tensors = reader.read(str(name), expected, sizes)
        d_model = {"d_model": sizes["d_model"]}
        skip = tensors.get("W_skip")
        try:
            layers.append(
                Transcoder(
                    W_enc=tensors["W_enc"].T.contiguous(),
                    b_enc=tensors["b_enc"],
                    W_dec=tensors["W_dec"],
                    b_dec=tensors["b_dec"],
                    activation=_activation(tensors),
                    read=Site(i, sites[0]),
                    write=Site(i, sites[1]),
                    W_skip=None if skip is None else skip.T.contiguous(),
                )
            )
        except (ValueError, RuntimeError) as error:
            raise FileFormatError(f"{reader.folder / str(name)} is no transcoder of this format: {error}") from error
    return TranscoderSet(layers, provenance).requires_grad_(False)


def _activation(tensors: dict[str, Tensor]) -> Activation:
    """σ of one layer; a threshold may be one number for all features."""
    for key in ("activation_function.threshold", "threshold"):
        if key in tensors:
            return JumpReLU(tensors[key].flatten().expand_as(tensors["b_enc"]).clone())
    return TopK(int(tensors["k"])) if "k" in tensors else ReLU()


def _load_cross_layer(
    reader: _Reader, sites: tuple[SiteKind, SiteKind], provenance: DictionaryProvenance
) -> CrossLayerTranscoder:
    numbers = [re.fullmatch(r"W_enc_(\d{1,5})\.safetensors", path.name) for path in reader.folder.iterdir()]
    n_layers = max((int(found[1]) + 1 for found in numbers if found), default=0)
    if n_layers == 0:
        raise FileFormatError(
            f"{reader.folder} holds no W_enc_0.safetensors; a cross-layer transcoder has W_enc_i and W_dec_i files "
            "for every layer i, so download the folder again."
        )
    encoders, decoders = [], []
    sizes: dict[str, int] = {}
    for i in range(n_layers):
        expected = {f"W_enc_{i}": _ENCODER, f"b_enc_{i}": ("feature",), f"b_dec_{i}": ("d_model",)}
        encoders.append(reader.read(f"W_enc_{i}.safetensors", expected, sizes))
        expected = {f"W_dec_{i}": ("feature", n_layers - i, "d_model")}
        decoders.append(reader.read(f"W_dec_{i}.safetensors", expected, sizes)[f"W_dec_{i}"])
    thresholds = [e[f"threshold_{i}"].flatten() for i, e in enumerate(encoders) if f"threshold_{i}" in e]
    if len(thresholds) not in (0, n_layers):
        raise FileFormatError(
            f"{reader.folder} has thresholds for {len(thresholds)} of {n_layers} layers; expected all or none."
        )
    try:
        b_enc = torch.stack([e[f"b_enc_{i}"] for i, e in enumerate(encoders)])
        return CrossLayerTranscoder(
            W_enc=torch.stack([e[f"W_enc_{i}"].T for i, e in enumerate(encoders)]),
            b_enc=b_enc,
            W_dec=decoders,
            b_dec=torch.stack([e[f"b_dec_{i}"] for i, e in enumerate(encoders)]),
            activation=JumpReLU(torch.stack(thresholds).expand_as(b_enc).clone()) if thresholds else ReLU(),
            provenance=provenance,
            reads=[Site(i, sites[0]) for i in range(n_layers)],
            writes=[Site(i, sites[1]) for i in range(n_layers)],
        ).requires_grad_(False)
    except (ValueError, RuntimeError) as error:
        raise FileFormatError(f"{reader.folder} is no cross-layer transcoder of this format: {error}") from error


# writing


def _require_known(activation: Activation) -> None:
    if not isinstance(activation, ReLU | JumpReLU | TopK):
        raise DictionaryError(
            f"circuit-tracer's format cannot hold the activation {type(activation).__name__}; use the native format."
        )


def _transcoder_files(dictionaries: TranscoderSet) -> dict[str, dict[str, Tensor]]:
    files = {}
    for i, transcoder in enumerate(dictionaries.layers):
        _require_known(transcoder.activation)
        tensors = {
            "W_enc": transcoder.W_enc.T,
            "b_enc": transcoder.b_enc,
            "W_dec": transcoder.W_dec,
            "b_dec": transcoder.b_dec,
        }
        if transcoder.W_skip is not None:
            tensors["W_skip"] = transcoder.W_skip.T
        if isinstance(transcoder.activation, JumpReLU):
            tensors["activation_function.threshold"] = transcoder.activation.threshold
        elif isinstance(transcoder.activation, TopK):
            tensors["k"] = torch.tensor(transcoder.activation.k)
        files[f"layer_{i}.safetensors"] = tensors
    return files


def _cross_layer_files(clt: CrossLayerTranscoder) -> dict[str, dict[str, Tensor]]:
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


FORMAT = Format(
    name="circuit-tracer",
    community="circuit-tracer",
    marker="config.yaml with model_kind",
    recognises=is_circuit_tracer,
    offers=whole,
    load=load_circuit_tracer,
    save=save_circuit_tracer,
    maps_decoders=True,
)
