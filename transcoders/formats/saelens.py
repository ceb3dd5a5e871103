"""SAELens' format: a folder for each dictionary, with its settings and its weights.

    FOLDER/cfg.json                     settings; what they mean is in `saelens_settings`
    FOLDER/sae_weights.safetensors      the tensors below

FOLDER may be the root, or any folder of a repository; here it is named by the hook, `blocks.5.hook_resid_post`.

| tensor | shape | of |
|---|---|---|
| `W_enc`, `W_dec`, `b_dec` | [d_in, d_sae], [d_sae, d_out], [d_out] | all |
| `b_enc` | [d_sae] | all but gated ones |
| `b_gate`, `b_mag`, `r_mag` | [d_sae] | gated: `1[u + b_gate > 0] · ReLU(u e^r_mag + b_mag)`, `u = x W_enc` |
| `threshold` | [d_sae] | JumpReLU; `log_threshold` in early checkpoints |
| `topk_threshold` | [] | checkpoints of BatchTopK and its matryoshka: one JumpReLU threshold for all features |
| `W_skip` | [d_out, d_in] | skip transcoders: `+ x W_skipᵀ`, of x before any norm |
| `scaling_factor` | [d_sae] | up to version 5: decoded is `(a · scaling_factor) W_dec + b_dec` |

`sparsity.safetensors`, `runner_cfg.json` and whatever else lies beside them is left alone, but for the factor in
`activation_scaler.json` of a checkpoint.

Written is the layout of version 6. Gated dictionaries are written as the JumpReLU ones that they equal; those trained
with BatchTopK are JumpReLU in SAELens too.

Source: decoderesearch/SAELens, sae_lens/constants.py, sae_lens/saes/*.py and sae_lens/loading/pretrained_sae_loaders.py
(6.54).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonschema import Draft202012Validator
from torch import Tensor

from transcoders.dictionaries import (
    SAE,
    Activation,
    DictionaryProvenance,
    DictionarySet,
    JumpReLU,
    ReLU,
    TopK,
    Transcoder,
)
from transcoders.dictionaries.token_norm import TokenNorm
from transcoders.errors import DictionaryError, FileFormatError
from transcoders.files import new_files, write_json
from transcoders.formats.building import LayerWeights, assemble, gated, jump, present, rescaled
from transcoders.formats.files import read_json, require_finite, require_settings, tensor_shapes, write_tensors
from transcoders.formats.format import Format
from transcoders.formats.hooks import hook_in, hook_of_site, site_of_hook
from transcoders.formats.offers import Offer
from transcoders.formats.saelens_settings import ARCHITECTURES, Settings, UnsupportedError
from transcoders.formats.source import LocalFolder, Source
from transcoders.formats.weights import Reading, Weights, as_stored

logger = logging.getLogger(__name__)

_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_SCALER = "activation_scaler.json"
_MANY = 64
"""Folders whose settings are not all read to say what there is, where their names tell."""
_SCALING = ("scaling_factor", "finetuning_scaling_factor")
_SCALER_SETTINGS = Draft202012Validator(
    {"properties": {"scaling_factor": {"type": ["number", "null"], "exclusiveMinimum": 1e-10, "maximum": 1e10}}}
)
_VERSION = "6.54.12"
"""Whose layout is written, and whose TransformerLens names the hooks."""
_NORMALIZE: dict[str | None, str] = {
    None: "none",
    "centre": "none",
    "rescale": "constant_norm_rescale",
    "rescale_in": "constant_norm_rescale",
    "layer_norm": "layer_norm",
    "layer_norm_in": "layer_norm",
}
_FOLDED = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")


def is_saelens(source: Source) -> bool:
    return any(_file_of(name) == _WEIGHTS for name in source.names)


def offers(source: Source) -> list[Offer]:
    """A dictionary for each folder, by its settings; by their names where there are many and all tell.

    What is sound but not read is left out, with a line of the log, unless there is nothing else.
    """
    present = set(source.names)
    folders = [name.removesuffix(_WEIGHTS) for name in source.names if _file_of(name) == _WEIGHTS]
    if missing := [folder for folder in folders if folder + _CONFIG not in present]:
        raise FileFormatError(
            f"{source.label} has no {missing[0]}{_CONFIG} beside {_WEIGHTS}; download or save the folder again."
        )
    if isinstance(source, LocalFolder) and (lost := _without_weights(present)):
        raise FileFormatError(
            f"{source.label} has no {lost[0]}{_WEIGHTS} beside {_CONFIG}; download or save the folder again."
        )
    if len(folders) > _MANY and all(hook_in(folder) for folder in folders):
        return [_by_name(folder, present) for folder in folders]
    found, wrong = [], []
    for folder, path in zip(folders, source.fetch(folder + _CONFIG for folder in folders), strict=True):
        try:
            found.append(_by_settings(folder, Settings.of(path, read_json(path), {}), present))
        except UnsupportedError as error:
            wrong.append(error)
    if not found:
        raise wrong[0]
    for error in wrong:
        logger.warning("One dictionary of %s is left out: %s", source.label, error)
    return found


def load_saelens(source: Source, offers: Sequence[Offer], reading: Reading) -> DictionarySet:
    """The dictionaries of some folders, one a layer."""
    paths = iter(source.fetch(name for offer in offers for name in offer.files))
    layers, settings, written = [], [], {}
    for offer in offers:
        path = {_file_of(name): next(paths) for name in offer.files}
        written[offer.id] = read_json(path[_CONFIG])
        settings.append(Settings.of(path[_CONFIG], written[offer.id], {**_factor(path), **offer.stated}))
        layers.append(_read(path[_WEIGHTS], settings[-1], reading))
    first = settings[0]
    if unknown := [offer.id for offer, s in zip(offers, settings, strict=True) if s.lacks_factor]:
        logger.warning(
            "Of %d dictionaries of %s, such as %s, it is not known whether the factor of the activations in training "
            "(expected_average_only_in) is in the weights; they are used as if it were.",
            len(unknown), source.label, unknown[0] or "its only one",
        )  # fmt: skip
    if frames := sorted({s.frame.name for s in settings} - {first.frame.name}):
        raise FileFormatError(
            f"{source.label} holds dictionaries of the frames {first.frame.name} and {frames[0]}; give the folder of "
            "one of them."
        )
    provenance = DictionaryProvenance(
        model=first.model,
        frame=first.frame,
        corpus=first.corpus,
        bos=first.bos,
        config=next(iter(written.values())) if len(written) == 1 else {"folders": written},
    )
    return assemble(layers, provenance, source.label)


def save_saelens(dictionaries: DictionarySet, folder: Path, *, storage_dtype: torch.dtype | None = None) -> None:
    """Write a folder for each layer that has a dictionary; `DictionaryError` for what the format cannot hold."""
    files = {}
    for dictionary in present(dictionaries, "SAELens' format"):
        settings, tensors = _written(dictionary, dictionaries.provenance)
        files[hook_of_site(dictionary.read)] = settings, as_stored(tensors, storage_dtype)
    with new_files(folder, without=_earlier(folder, files)) as temporary:
        for name, (settings, tensors) in files.items():
            (temporary / name).mkdir()
            write_tensors(temporary / name / _WEIGHTS, tensors)
            write_json(temporary / name / _CONFIG, settings)


# offers


def _file_of(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _without_weights(present: set[str]) -> list[str]:
    """Folders named by a hook that have settings alone; in a cache of the hub it is what was not asked for."""
    folders = [name.removesuffix(_CONFIG) for name in present if _file_of(name) == _CONFIG]
    return sorted(folder for folder in folders if hook_in(folder) and folder + _WEIGHTS not in present)


def _by_settings(folder: str, settings: Settings, present: set[str]) -> Offer:
    return Offer(
        id=folder.rstrip("/"),
        files=_files(folder, present),
        kind=settings.kind,
        layer=settings.read.layer,
        site=settings.read.kind,
        width=settings.d_sae,
        variant=_above(folder),
    )


def _by_name(folder: str, present: set[str]) -> Offer:
    site = site_of_hook(hook_in(folder) or "")
    return Offer(
        id=folder.rstrip("/"), files=_files(folder, present), layer=site.layer, site=site.kind, variant=_above(folder)
    )


def _files(folder: str, present: set[str]) -> tuple[str, ...]:
    return tuple(folder + name for name in (_CONFIG, _WEIGHTS, _SCALER) if folder + name in present)


def _above(folder: str) -> str | None:
    """The folder that a dictionary's own folder lies in, by which authors tell kinds of training apart."""
    return folder.rstrip("/").rpartition("/")[0] or None


# reading


def _factor(path: Mapping[str, Path]) -> dict[str, float]:
    """The factor of the activations that a checkpoint of training keeps apart from its weights."""
    if _SCALER not in path:
        return {}
    record = read_json(path[_SCALER])
    require_settings(path[_SCALER], record, _SCALER_SETTINGS)
    factor = record.get("scaling_factor")
    return {} if factor is None else {"norm_scaling_factor": factor}


def _read(path: Path, settings: Settings, reading: Reading) -> LayerWeights:
    """The dictionary of one folder, as a dictionary of the published model."""
    weights = Weights(path, tensor_shapes(path))
    tensors = weights.read(_expected(weights, settings), reading)
    W_enc, b_enc, sigma = _encoder(tensors, settings)
    skip = tensors.get("W_skip")
    found = LayerWeights(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        activation=sigma,
        read=settings.read,
        write=settings.write,
        centred=settings.centred,
        W_skip=None if skip is None else skip.T.contiguous(),
        norm=None if settings.norm is None else TokenNorm(settings.norm),
    )
    for name in _SCALING:
        if name in tensors:
            found = replace(found, W_dec=found.W_dec * tensors[name][:, None])
    found = _for_raw_activations(found, settings)
    found = rescaled(found, path) if settings.by_decoder_norm else found
    _require_finite(path, found)
    return found


def _require_finite(path: Path, weights: LayerWeights) -> None:
    """Exponentials, products and quotients of finite numbers need not be finite."""
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        require_finite(path, name, getattr(weights, name))
    if isinstance(weights.activation, JumpReLU):
        require_finite(path, "threshold", weights.activation.threshold.detach())


def _expected(weights: Weights, settings: Settings) -> list[str]:
    """The names of the tensors, once they are those of the architecture and fit the settings."""
    kind, there = ARCHITECTURES[settings.architecture], weights.shapes
    sizes = {"d_in": settings.d_in} | ({} if settings.d_sae is None else {"d_sae": settings.d_sae})
    if settings.d_out is not None and kind.is_transcoder:
        sizes["d_out"] = settings.d_out
    d_out = "d_out" if kind.is_transcoder else "d_in"
    expected: dict[str, tuple[int | str, ...]] = {
        "W_enc": ("d_in", "d_sae"), "W_dec": ("d_sae", d_out), "b_dec": (d_out,),
    }  # fmt: skip
    expected |= dict.fromkeys(kind.tensors, ("d_sae",))
    if "threshold" in expected and "threshold" not in there and "log_threshold" in there:
        del expected["threshold"]
        expected["log_threshold"] = ("d_sae",)
    if kind.has_skip:
        expected["W_skip"] = (d_out, "d_in")
    if "batchtopk" in settings.architecture:
        expected["topk_threshold"] = ()
    expected |= {name: ("d_sae",) for name in _SCALING if name in there}
    weights.require(expected, sizes)
    if unknown := sorted(there.keys() - expected.keys()):
        raise FileFormatError(
            f"{weights.path} has {unknown[0][:80]!r}, which the architecture {settings.architecture!r} has not; check "
            "that its cfg.json belongs to it."
        )
    return list(expected)


def _encoder(tensors: Mapping[str, Tensor], settings: Settings) -> tuple[Tensor, Tensor, Activation]:
    """W_enc, b_enc and σ."""
    W_enc = tensors["W_enc"]
    if settings.architecture == "gated":
        return gated(W_enc, tensors["b_gate"], tensors["r_mag"], tensors["b_mag"])
    b_enc = tensors["b_enc"]
    if settings.k is not None:
        return W_enc, b_enc, TopK(settings.k)
    if "topk_threshold" in tensors:
        scale = 1.0 if settings.factor is None or not settings.by_decoder_norm else 1 / settings.factor
        return W_enc, b_enc, jump(tensors["topk_threshold"] * scale, b_enc)
    if "log_threshold" in tensors:
        return W_enc, b_enc, jump(tensors["log_threshold"].exp(), b_enc)
    return W_enc, b_enc, jump(tensors["threshold"], b_enc) if "threshold" in tensors else ReLU()


def _for_raw_activations(weights: LayerWeights, settings: Settings) -> LayerWeights:
    """A dictionary of factored or centred activations as one of the activations as they are."""
    if (s := settings.factor) is not None:
        weights = replace(weights, W_enc=weights.W_enc * s, W_dec=weights.W_dec / s, b_dec=weights.b_dec / s)
    if settings.centre_encoder:
        W_skip = weights.W_skip
        weights = replace(
            weights,
            W_enc=weights.W_enc if weights.norm is not None else _without_mean(weights.W_enc),
            W_skip=None if W_skip is None else _without_mean(W_skip),
        )
    return weights


def _without_mean(matrix: Tensor) -> Tensor:
    """P W with `P = 1 − 11ᵀ/d`, so that `x (P W) = (x − mean(x)) W`."""
    return matrix - matrix.mean(0)


# writing


def _written(
    dictionary: SAE | Transcoder, provenance: DictionaryProvenance
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors of one dictionary."""
    norm = _NORMALIZE.get(None if dictionary.norm is None else dictionary.norm.name)
    is_transcoder = isinstance(dictionary, Transcoder)
    if norm is None or (dictionary.norm is not None and dictionary.norm.is_undone == is_transcoder):
        raise DictionaryError(
            f"SAELens' format cannot hold the norm {dictionary.norm} of the dictionary of {dictionary.read}; use the "
            "native format."
        )
    name, tensors, more = _architecture(dictionary)
    tensors |= {key: getattr(dictionary, key) for key in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if dictionary.W_skip is not None:
        if not is_transcoder:
            raise DictionaryError(
                f"SAELens' format has no autoencoder with a skip term ({dictionary.read}); use the native format."
            )
        name, tensors["W_skip"] = name.replace("transcoder", "skip_transcoder"), dictionary.W_skip.T
    if is_transcoder:
        more["d_out"] = dictionary.d_out
    return {
        "architecture": name,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.n_features,
        **more,
        "dtype": "float64" if dictionary.W_enc.dtype == torch.float64 else "float32",
        "device": "cpu",
        "apply_b_dec_to_input": isinstance(dictionary, SAE) and dictionary.centred,
        "normalize_activations": norm,
        "reshape_activations": "hook_z" if dictionary.read.kind == "attn_z" else "none",
        "metadata": _metadata(dictionary, provenance),
    }, tensors


def _architecture(dictionary: SAE | Transcoder) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Its name, and the tensors and settings of its own."""
    sigma, suffix = dictionary.activation, "transcoder" if isinstance(dictionary, Transcoder) else ""
    if isinstance(sigma, JumpReLU):
        return "_".join(filter(None, ("jumprelu", suffix))), {"threshold": sigma.threshold}, {}
    if isinstance(sigma, ReLU):
        return suffix or "standard", {}, {}
    if isinstance(sigma, TopK) and not suffix:
        return "topk", {}, {"k": sigma.k}
    raise DictionaryError(
        f"SAELens' format has no {suffix or 'autoencoder'} with the activation {sigma.name!r} ({dictionary.read}); use "
        "the native format, or replace TopK by a JumpReLU with `transcoders.training.fold_topk`."
    )


def _metadata(dictionary: SAE | Transcoder, provenance: DictionaryProvenance) -> dict[str, Any]:
    context = provenance.config.get("context")
    processing = dict.fromkeys(_FOLDED, True) if provenance.frame.name == "folded" else {}
    if dictionary.norm is not None and dictionary.norm.name == "centre":
        processing["center_writing_weights"] = True
    known = {
        "sae_lens_version": _VERSION,
        "model_name": provenance.model,
        "hook_name": hook_of_site(dictionary.read),
        "hook_name_out": hook_of_site(dictionary.writes[0]) if isinstance(dictionary, Transcoder) else None,
        "prepend_bos": provenance.bos,
        "context_size": context if isinstance(context, int) else None,
        "dataset_path": provenance.corpus,
        "model_from_pretrained_kwargs": processing or None,
    }
    return {name: value for name, value in known.items() if value is not None}


def _earlier(folder: Path, files: Mapping[str, Any]) -> list[str]:
    """What an earlier, longer set left in folders that are named by hooks."""
    left = [path.parent.name for path in folder.glob(f"*/{_WEIGHTS}") if hook_in(path.parent.name) == path.parent.name]
    return [f"{name}/{file}" for name in left if name not in files for file in (_CONFIG, _WEIGHTS)]


FORMAT = Format(
    name="saelens",
    community="SAELens",
    marker=f"folders with {_CONFIG} and {_WEIGHTS}",
    recognises=is_saelens,
    offers=offers,
    load=load_saelens,
    save=save_saelens,
    keeps_frame=True,
)
