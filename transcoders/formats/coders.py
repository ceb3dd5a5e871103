"""The folders of coders that EleutherAI's sparsify and its fork clt-training share: found, read and written.

A coder is a folder with `cfg.json` and `sae.safetensors`, named after a hookpoint; `config.json` above is of the run.
What the settings and tensors mean is said in `sparsify` and `clt_training`.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from jaxtyping import Float
from jsonschema import Draft202012Validator
from torch import Tensor

from transcoders.dictionaries import Activation, DictionarySet, GroupMax, JumpReLU, JumpTopK, ReLU, TopK
from transcoders.errors import DictionaryError, FileFormatError
from transcoders.files import new_files, write_json
from transcoders.formats.building import called
from transcoders.formats.files import read_json, require_settings, write_tensors
from transcoders.formats.hooks import module_of_site, site_of_module
from transcoders.formats.source import LocalFolder, Source, full_name
from transcoders.formats.weights import Reading, Weights, as_stored, open_weights
from transcoders.sites import Site

logger = logging.getLogger(__name__)

SETTINGS, WEIGHTS, RUN = "cfg.json", "sae.safetensors", "config.json"
_HOOKPOINT = re.compile(r"(.*\.)?(layers|h|blocks|block)\.[0-9]{1,3}(\..+)?")
Shapes = dict[str, tuple[int | str, ...]]
_COUNT = {"type": "integer", "maximum": 2**31}
_NUMBERS = ("n_targets", "n_sources", "num_latents", "d_in", "k", "expansion_factor")
_MAY_BE_NONE = ("n_targets", "n_sources", "num_latents")
_SWITCHES = (
    "transcode", "skip_connection", "normalize_io", "post_encoder_scale", "signed", "divide_cross_layer",
    "per_source_tied", "secondary_target_tied", "topk_coalesced",
)  # fmt: skip
_SCHEMA = Draft202012Validator(
    {
        "type": "object",
        "required": ["d_in", "k"],
        "properties": {
            **{name: _COUNT | {"minimum": 0 if name in _MAY_BE_NONE else 1} for name in _NUMBERS},
            **{name: {"type": "boolean"} for name in _SWITCHES},
            "activation": {"type": "string"},
            "coalesce_topk": {"type": "string"},
        },
    }
)


@dataclass(frozen=True)
class Run:
    """What the training that wrote a folder says of itself."""

    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        return self._text("model") or "unknown"

    @property
    def corpus(self) -> str | None:
        return self._text("dataset")

    def _text(self, name: str) -> str | None:
        value = self.settings.get(name)
        return value if isinstance(value, str) else None

    def input_of(self, module: str) -> str | None:
        """The module whose input is read in the place of a hookpoint's own."""
        every, inputs = self.settings.get("hookpoints"), self.settings.get("hookpoints_in")
        if isinstance(every, list) and isinstance(inputs, list) and module in every:
            at = every.index(module)
            return str(inputs[at]) if at < len(inputs) else None
        return None

    def sites(self, module: str, transcode: bool) -> tuple[Site, Site]:
        """What the coder of a module reads and writes; `FileFormatError` where that is no site of ours."""
        write = site_of_module(module, "out", model=self.model)
        if not transcode:
            return write, write
        return site_of_module(self.input_of(module) or module, "in", model=self.model), write


@dataclass(frozen=True)
class Coder:
    """One folder with settings and weights."""

    folder: str
    settings: Mapping[str, Any]
    run: Run
    module: str | None
    """The hookpoint that its path names."""
    variant: str | None

    @property
    def files(self) -> tuple[str, str]:
        return inside(self.folder, SETTINGS), inside(self.folder, WEIGHTS)

    @property
    def width(self) -> int:
        return self.settings.get("num_latents", 0) or self.settings["d_in"] * self.settings.get("expansion_factor", 32)

    @property
    def transcode(self) -> bool:
        return self.settings.get("transcode", False)

    @property
    def is_cross_layer(self) -> bool:
        return self.transcode and self.settings.get("n_targets", 0) > 0

    def sites(self) -> tuple[Site, Site] | None:
        """What it reads and writes; None where its path names no place of ours."""
        try:
            return None if self.module is None else self.run.sites(self.module, self.transcode)
        except FileFormatError as problem:
            logger.info("%s is left out: %s", self.folder, problem)
            return None


def inside(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def folders(source: Source) -> list[str]:
    """The folders that hold settings and weights."""
    names = set(source.names)
    holders = (name.removesuffix(WEIGHTS) for name in names if PurePosixPath(name).name == WEIGHTS)
    return sorted(holder.rstrip("/") for holder in holders if f"{holder}{SETTINGS}" in names)


def coders(source: Source) -> list[Coder]:
    """What the folders hold, by paths and settings; `FileFormatError` for settings that are none."""
    every = folders(source)
    runs = _runs(source, every)
    found = []
    for folder, path in zip(every, source.fetch(inside(folder, SETTINGS) for folder in every), strict=True):
        settings = read_json(path)
        require_settings(path, settings, _SCHEMA)
        module, variant = _named(source, folder)
        found.append(Coder(folder, settings, runs[folder], module, variant))
    return found


def _runs(source: Source, every: Sequence[str]) -> dict[str, Run]:
    """The run of each folder: that of the nearest folder at or above it that has one."""
    names = set(source.names)
    above = {
        folder: next((name for parent in _upwards(folder) if (name := inside(parent, RUN)) in names), None)
        for folder in every
    }
    wanted = sorted({name for name in above.values() if name is not None})
    read = (
        {name: Run(read_json(path)) for name, path in zip(wanted, source.fetch(wanted), strict=True)} if wanted else {}
    )
    return {folder: Run() if name is None else read[name] for folder, name in above.items()}


def _upwards(folder: str) -> list[str]:
    path = PurePosixPath(folder)
    return ["" if str(parent) == "." else str(parent) for parent in (path, *path.parents)]


def _named(source: Source, folder: str) -> tuple[str | None, str | None]:
    """The hookpoint that a folder's path names, or one of the two folders above, and what else it names."""
    parts = PurePosixPath(folder).parts
    for at in reversed(range(len(parts))):
        if _HOOKPOINT.fullmatch(parts[at]):
            return parts[at], "/".join(parts[:at] + parts[at + 1 :]) or None
    above = PurePosixPath(full_name(source, "x")).parent.parts[-2:]
    return next((part for part in reversed(above) if _HOOKPOINT.fullmatch(part)), None), "/".join(parts) or None


# weights


def opened(path: Path, coder: Coder) -> Weights:
    """The weights of a coder, once its encoder has the shape that its settings state."""
    weights = open_weights(path)
    weights.require({"encoder.weight": (coder.width, coder.settings["d_in"]), "encoder.bias": (coder.width,)})
    return weights


def read_coder(weights: Weights, coder: Coder, shapes: Shapes, reading: Reading) -> dict[str, Tensor]:
    """The encoder and the tensors of these shapes, with the norms that the settings speak of."""
    wanted = {"encoder.weight": ("feature", "d_in"), "encoder.bias": ("feature",)} | shapes
    if coder.settings.get("normalize_io"):
        wanted |= {"in_norm": (1,), "out_norm": (1,)}
    weights.require(wanted, {"d_in": coder.settings["d_in"], "feature": coder.width})
    return weights.floating(wanted, reading)


def scales(path: Path, tensors: Mapping[str, Tensor], coder: Coder) -> tuple[float, float]:
    """What x is multiplied by when it is read, and y when it is written."""
    if not coder.settings.get("normalize_io"):
        return 1.0, 1.0
    into, out = (float(tensors[name]) for name in ("in_norm", "out_norm"))
    if not (into > 1e-15 and out > 0):
        raise FileFormatError(f"{path} has the norms {into} and {out}, which are positive in trained files.")
    root = coder.settings["d_in"] ** 0.5
    return root / into, out / root


def post_encoder_shapes(weights: Weights, coder: Coder, name: str) -> Shapes:
    """`post_enc`, which early files lack, and the scale that the settings speak of."""
    shapes: Shapes = {name: ("feature",)} if name in weights.shapes else {}
    return shapes | ({_scale_of(name): ("feature",)} if coder.settings.get("post_encoder_scale") else {})


def raised(path: Path, tensors: Mapping[str, Tensor], names: Sequence[str]) -> Float[Tensor, "feature"] | None:
    """What each active feature is raised by, the same for all targets; None where it is not.

    Raises `FileFormatError` where it differs by target, or is negative: no dictionary of this package can do that.
    """
    found = [tensors[name] for name in names if name in tensors]
    if not any(bool(each.any()) for each in found):
        return None
    if odd := next((name for name in names if not torch.equal(tensors.get(name, found[0] * 0), found[0])), None):
        raise FileFormatError(
            f"{path} raises each active feature by another number for each target ({names[0]}, {odd}), which no "
            "dictionary of this package does; expected the same for all, as without train_post_encoder."
        )
    if (least := float(found[0].min())) < 0:
        raise FileFormatError(
            f"{path} lowers active features ({names[0]} down to {least:.3g}), perhaps below 0, which no dictionary of "
            "this package does; expected none below 0, as without train_post_encoder."
        )
    return found[0]


def post_scale(tensors: Mapping[str, Tensor], name: str) -> Float[Tensor, "feature 1"] | float:
    """What each feature is multiplied by before it is written."""
    scale = tensors.get(_scale_of(name))
    return 1.0 if scale is None else scale[:, None]


def _scale_of(name: str) -> str:
    """post_enc_scale of post_enc, post_enc_scales.2 of post_encs.2"""
    return re.sub(r"^post_enc", "post_enc_scale", name)


def activation_of(path: Path, coder: Coder, threshold: Float[Tensor, "*layer feature"] | None) -> Activation:
    """σ of a coder, or of all layers; where k takes all features it is a ReLU, or a JumpReLU where they are raised."""
    name, k = coder.settings.get("activation", "topk"), coder.settings["k"]
    if coder.settings.get("signed"):
        raise FileFormatError(f"{path} has signed true, with features below 0; supported are those with signed false.")
    if name not in ("topk", "groupmax"):
        why = ", whose threshold it does not store" if name == "batchtopk" else ""
        raise FileFormatError(f"{path} has the activation {name[:40]!r}{why}; supported are topk and groupmax.")
    if k >= coder.width:
        return ReLU() if threshold is None else JumpReLU(threshold)
    if threshold is None:
        return TopK(k) if name == "topk" else GroupMax(k)
    if name == "groupmax":
        raise FileFormatError(f"{path} has groupmax and raises active features by post_enc; supported is topk there.")
    return JumpTopK(k, threshold)


# writing


def hookpoint(read: Site, write: Site, model: str) -> str:
    """The module that a coder of these sites is named after."""
    module = module_of_site(write, model)
    if read.layer != write.layer:
        raise DictionaryError(f"sparsify's layout holds no dictionary that reads {read} and writes {write}.")
    return module


def write_run(
    dictionaries: DictionarySet,
    folder: Path,
    files: Mapping[str, Mapping[str, Tensor]],
    settings: Mapping[str, Mapping[str, Any]],
    reads: Sequence[Site],
    storage_dtype: torch.dtype | None,
) -> None:
    """Write the folders of all hookpoints, in the place of those that were there."""
    model, modules = dictionaries.provenance.model, list(files)
    run: dict[str, Any] = {"model": model, "hookpoints": modules}
    if dictionaries.kind != "sae":
        inputs = [module_of_site(read, model, "in") for read in reads]
        run |= {"hookpoints_in": inputs} if inputs != modules else {}
    if dictionaries.provenance.corpus is not None:
        run["dataset"] = dictionaries.provenance.corpus
    earlier = folders(LocalFolder(folder)) if folder.is_dir() else []
    stale = [inside(old, name) for old in earlier if old not in files for name in (SETTINGS, WEIGHTS)]
    with new_files(folder, stale) as temporary:
        for module, tensors in files.items():
            write_tensors(temporary / module / WEIGHTS, as_stored(tensors, storage_dtype))
            write_json(temporary / module / SETTINGS, settings[module])
        write_json(temporary / RUN, run)


def coder_settings(activation: Activation, d_in: int, n_features: int, skip: bool) -> dict[str, Any]:
    """cfg.json of a coder; a ReLU is TopK of all features. `DictionaryError` for an activation it cannot state."""
    if activation.over_layers or not isinstance(activation, ReLU | TopK | GroupMax):
        raise DictionaryError(
            f"sparsify's layout holds dictionaries with TopK of each layer, GroupMax or ReLU, not "
            f"{called(activation)}; use the native format."
        )
    return {
        "activation": "groupmax" if isinstance(activation, GroupMax) else "topk",
        "num_latents": n_features,
        "k": n_features if isinstance(activation, ReLU) else min(activation.k, n_features),
        "normalize_decoder": False,
        "skip_connection": skip,
        "d_in": d_in,
    }
