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
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from jaxtyping import Float
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
from transcoders.errors import DictionaryError, FileFormatError, InputError
from transcoders.files import new_files, write_file
from transcoders.formats.building import LayerWeights, assemble
from transcoders.formats.files import (
    MOST_LAYERS,
    read_tensors,
    read_yaml,
    require_settings,
    take_decoders,
    tensor_shapes,
    write_tensors,
)
from transcoders.formats.format import Format
from transcoders.formats.hooks import hook_of_site, site_of_hook
from transcoders.formats.offers import Offer, width_of
from transcoders.formats.source import HubFolder, Source, fetch_one, hub_source
from transcoders.formats.weights import Reading, Weights, open_weights
from transcoders.sites import Site, SiteKind

logger = logging.getLogger(__name__)

_CONFIG = "config.yaml"
_KINDS = {"transcoder_set": "plt", "cross_layer_transcoder": "clt"}
_SCHEMA = Draft202012Validator(
    {
        "type": "object",
        "required": ["model_kind", "feature_input_hook", "feature_output_hook"],
        "properties": {
            "model_kind": {"enum": list(_KINDS)},
            "feature_input_hook": {"type": "string", "maxLength": 200},
            "feature_output_hook": {"type": "string", "maxLength": 200},
            "transcoders": {"type": ["array", "object"], "minItems": 1, "maxItems": MOST_LAYERS},
            "activation": {"enum": ["topk", "relu", "jumprelu", "jump_relu", None]},
            "k": {"type": ["integer", "null"], "minimum": 1, "maximum": 2**31},
            "zero_positions": {"type": "integer", "minimum": 0, "maximum": 2**31},
        },
    }
)
_UNSAID = {
    "model_kind": "cross_layer_transcoder",
    "feature_input_hook": "hook_resid_mid",
    "feature_output_hook": "hook_mlp_out",
}
"""What circuit-tracer takes a cross-layer transcoder without settings for."""
_K_UNSAID = {"facebook/crv-8b-instruct-transcoders": 128}
"""The k of a TopK whose settings leave it out."""
_CHAT_PREFIX = 4
"""`<bos><start_of_turn>user⏎`, before every prompt of an instruction-tuned Gemma 3."""
_HOOKS: tuple[SiteKind, ...] = ("mlp_in", "mlp_normed", "mlp_out", "mlp_added", "resid_pre", "resid_mid", "resid_post")
"""Sites that TransformerLens 2 has hooks for, with vectors of the model's width."""

Shapes = dict[str, tuple[int | str, ...]]


# what there is


@dataclass(frozen=True)
class _Set:
    """One set of a source: its folder there and its settings."""

    source: Source
    folder: str
    path: Path | None
    """Of the settings; None where there are none."""
    config: Mapping[str, Any]

    @property
    def label(self) -> str:
        return f"{self.source.label}/{self.folder}" if self.folder else self.source.label

    @property
    def kind(self) -> str:
        return _KINDS[self.config["model_kind"]]

    @property
    def sites(self) -> tuple[SiteKind, SiteKind]:
        """The kinds of site that are read and written."""
        return self._site("feature_input_hook"), self._site("feature_output_hook")

    def _site(self, key: str) -> SiteKind:
        try:
            return site_of_hook(self.config[key], 0).kind
        except FileFormatError as error:
            raise FileFormatError(
                f"{self.path or self.label} has the {key} {self.config[key][:60]!r}, which is no place in a block that "
                "this package reads; such places are hook_resid_mid, ln2.hook_normalized, mlp.hook_in, mlp.hook_out "
                "and hook_mlp_out."
            ) from error

    def numbered(self, pattern: str) -> dict[int, str]:
        """Files of this folder by the number in their name, in its order."""
        names = (name.removeprefix(f"{self.folder}/") if self.folder else name for name in self.source.names)
        found = ((re.fullmatch(pattern, name), name) for name in names)
        numbers = dict(sorted((int(match[1]), name) for match, name in found if match))
        if numbers and max(numbers) >= MOST_LAYERS:
            raise FileFormatError(f"{self.label} has a file {numbers[max(numbers)]}; no model has that many layers.")
        return numbers

    def entries(self) -> dict[int, str]:
        """The file of each layer, in this folder or as `hf://…`: as listed, or by their names."""
        listed = self.config.get("transcoders")
        entries = self.numbered(r"layer_([0-9]{1,5})\.safetensors") if listed is None else self._listed(listed)
        if not entries:
            raise FileFormatError(
                f"{self.label} holds no layer_0.safetensors, and its {_CONFIG} lists no files under 'transcoders'; "
                "download the folder again."
            )
        return entries

    def _listed(self, listed: Any) -> dict[int, str]:
        items = list(listed.items()) if isinstance(listed, dict) else [_numbered(i, e) for i, e in enumerate(listed)]
        entries = {int(layer): entry for layer, entry in items if _is_layer(layer) and _is_entry(entry)}
        if len(entries) < len(items):
            wrong = next((item for item in items if not (_is_layer(item[0]) and _is_entry(item[1]))), items[-1])
            raise FileFormatError(
                f"{self.path} lists {str(wrong[1])[:60]!r} for layer {str(wrong[0])[:20]}; expected for each layer "
                "one file inside of the folder, or hf://OWNER/NAME/FILE."
            )
        return dict(sorted(entries.items()))

    def fetched(self, entries: Mapping[int, str]) -> dict[int, Path]:
        """Where the files of layers lie on this machine; each repository is asked once, for these files alone."""
        places: dict[Source, dict[int, str]] = {}
        for layer, entry in entries.items():
            place, name = self._place(entry)
            places.setdefault(place, {})[layer] = name
        paths: dict[int, Path] = {}
        for place, named in places.items():
            paths |= dict(zip(named, place.fetch(named.values()), strict=True))
        return paths

    def across(self) -> list[str]:
        """The files of a cross-layer transcoder: as listed, or by their names."""
        if self.config.get("transcoders") is not None:
            return list(self.entries().values())
        return [name for kind in ("enc", "dec") for name in self.numbered(_across(kind)).values()]

    def within(self, entry: str) -> str:
        """The name that a file of this folder has in the source."""
        return (PurePosixPath(self.folder) / entry).as_posix()

    def _place(self, entry: str) -> tuple[Source, str]:
        if not entry.startswith("hf://"):
            return self.source, self.within(entry)
        hub = hub_source(entry)
        if not hub.path:
            raise FileFormatError(f"{self.path} lists {entry}, which names no file; expected hf://OWNER/NAME/FILE.")
        return HubFolder(hub.repo, hub.revision), hub.path

    def provenance(self) -> DictionaryProvenance:
        model = str(self.config.get("model_name", "unknown"))
        bos = self.config.get("prepend_bos")
        return DictionaryProvenance(
            model=model,
            bos=bos if isinstance(bos, bool) else True,  # circuit-tracer puts a special token before every prompt
            config=_plain(dict(self.config)),
            first=int(self.config.get("zero_positions", _first(model))),
        )


def _across(kind: str) -> str:
    """The names of files of encoders or decoders."""
    return rf"W_{kind}_([0-9]{{1,5}})\.safetensors"


def _first(model: str) -> int:
    """The first position with features."""
    return _CHAT_PREFIX if "gemma-3" in model and model.endswith("-it") else 1


def _numbered(position: int, entry: Any) -> tuple[Any, Any]:
    """Layer and file of an entry: its place in the list, unless it says so itself."""
    if isinstance(entry, dict):
        return entry.get("layer", position), entry.get("filepath", entry.get("path"))
    return position, entry


def _is_layer(value: Any) -> bool:
    text = str(value)
    return not isinstance(value, bool) and re.fullmatch(r"[0-9]{1,5}", text) is not None and int(text) < MOST_LAYERS


def _is_entry(value: Any) -> bool:
    """Whether it names a file inside of the folder or on the hub."""
    if not isinstance(value, str) or not 0 < len(value) <= 1000 or not value.isprintable():
        return False
    inside = not value.startswith(("/", "\\")) and ".." not in value and "://" not in value
    return value.startswith("hf://") or inside


def _plain(value: Any) -> Any:
    """Settings as JSON has them: YAML knows dates, too."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def is_circuit_tracer(source: Source) -> bool:
    """By the settings of its root or of its first folder that has some; without settings, by the names of a CLT."""
    configs = _configs(source)
    if configs and "model_kind" in read_yaml(fetch_one(source, configs[0])):
        return True
    return {"W_enc_0.safetensors", "W_dec_0.safetensors"} <= set(source.names)


def offer_circuit_tracer(source: Source) -> list[Offer]:
    """Each layer of each set, and each cross-layer transcoder as a whole."""
    return [offer for found in _sets(source) for offer in _offers(found)]


def _offers(found: _Set) -> list[Offer]:
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


def _within(found: _Set, entries: Iterable[str]) -> list[str]:
    """Those of some files that lie in the source itself."""
    return [found.within(entry) for entry in entries if not entry.startswith("hf://")]


def _width(path: str) -> int | None:
    """As Gemma Scope's paths have it: `width_16k`."""
    stated = re.search(r"width_([1-9][0-9]{0,8}[km]?)(?![a-z0-9])", path)
    return None if stated is None else width_of(stated[1])


def _l0(path: str) -> float | None:
    stated = re.search(r"average_l0_([0-9]{1,9})(?![0-9])", path)
    return None if stated is None else float(stated[1])


def _configs(source: Source) -> list[str]:
    """The root's settings, or else those of folders inside."""
    found = [name for name in source.names if PurePosixPath(name).name == _CONFIG]
    return [_CONFIG] if _CONFIG in found else found


def _sets(source: Source) -> list[_Set]:
    configs = _configs(source)
    found = []
    for name, path in zip(configs, source.fetch(configs), strict=True):
        config = read_yaml(path)
        if "model_kind" in config:
            require_settings(path, config, _SCHEMA)
            folder = PurePosixPath(name).parent.as_posix()
            found.append(_Set(source, "" if folder == "." else folder, path, config))
    return found or [_Set(source, "", None, _UNSAID)]


# reading


def load_circuit_tracer(source: Source, offers: Sequence[Offer], reading: Reading) -> DictionarySet:
    """Transcoders of some layers of one set, or a cross-layer transcoder."""
    folders = {offer.id for offer in offers}
    chosen = [found for found in _sets(source) if found.folder in folders]
    if len(chosen) != 1:
        raise InputError(
            f"{source.label} holds {len(chosen)} sets in ({', '.join(sorted(folders))}); say which with sae_id=… "
            "(--sae-id)."
        )
    (found,) = chosen
    if found.path is None:
        logger.warning(
            "%s has no %s: it is taken for a cross-layer transcoder that reads %s and writes %s, as circuit-tracer "
            "takes it.", source.label, _CONFIG, _UNSAID["feature_input_hook"], _UNSAID["feature_output_hook"],
        )  # fmt: skip
    if found.kind == "clt":
        return _load_cross_layer(found, reading)
    return _load_layers(found, [offer.layer for offer in offers if offer.layer is not None], reading)


def _load_layers(found: _Set, layers: Sequence[int], reading: Reading) -> DictionarySet:
    entries = found.entries()
    paths = found.fetched({layer: entries[layer] for layer in layers})
    files, sizes = {}, {}
    for layer, path in paths.items():
        files[layer] = _LayerFile.of(path, reading)
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


@dataclass(frozen=True)
class _LayerFile:
    """The file of one layer, in whichever of the layouts: our names for its tensors."""

    weights: Weights
    names: dict[str, str]
    """Its name for each of our tensors."""
    by_column: bool
    """Gemma Scope: encoders as `[d_model, feature]`, skip terms as `x A`."""
    writes: int = 0
    """Layers that its decoder writes to, for cross-layer ones."""

    @classmethod
    def of(cls, path: Path, reading: Reading, writes: int = 0) -> "_LayerFile":
        if path.suffix == ".npz":
            if reading.decoders == "mapped":
                raise InputError(
                    f"The decoders of {path} cannot stay in an npz file; load them into memory (decoders='memory')."
                )
            weights = open_weights(path)
        else:
            weights = Weights(path, tensor_shapes(path))
        second = "w_enc" in weights.shapes
        names = {"W_enc": "w_enc", "W_dec": "w_dec"} if second else {"W_enc": "W_enc", "W_dec": "W_dec"}
        names |= {"b_enc": "b_enc", "b_dec": "b_dec"}
        skip = "affine_skip_connection" if second else "W_skip"
        by_column = second or path.suffix == ".npz"
        optional = [("threshold", "threshold"), ("threshold", "activation_function.threshold")]
        optional += [("W_skip", skip), ("k", "k")]
        names |= {ours: theirs for ours, theirs in optional if theirs in weights.shapes}
        if by_column:  # always JumpReLU
            names["threshold"] = "threshold"
        return cls(weights, names, by_column=by_column, writes=writes)

    @property
    def path(self) -> Path:
        return self.weights.path

    def require(self, sizes: dict[str, int]) -> None:
        """Raises `FileFormatError` unless the shapes are those of a layer; `sizes` are what all layers share."""
        encoder = ("d_model", "feature") if self.by_column else ("feature", "d_model")
        decoder = ("feature", self.writes, "d_model") if self.writes else ("feature", "d_model")
        shapes: Shapes = {
            "W_enc": encoder, "b_enc": ("feature",), "W_dec": decoder, "b_dec": ("d_model",),
            "W_skip": ("d_model", "d_model"),
        }  # fmt: skip
        self.weights.require({self.names[name]: shape for name, shape in shapes.items() if name in self.names}, sizes)
        _require_threshold(self.weights, self.names.get("threshold"), sizes["feature"])

    def read(self, reading: Reading) -> dict[str, Tensor]:
        """Our tensors, with encoders as `[d_model, feature]` and skip terms as `x W_skip`."""
        tensors = _read(self.weights, self.names, reading)
        if not self.by_column:
            tensors |= {name: tensors[name].T.contiguous() for name in ("W_enc", "W_skip") if name in tensors}
        return tensors


def _read(weights: Weights, names: Mapping[str, str], reading: Reading) -> dict[str, Tensor]:
    """Tensors under our names; decoders may stay in the file."""
    if weights.path.suffix == ".npz":
        found = weights.read(names.values(), reading)
    else:
        W_dec = names.get("W_dec") if reading.decoders == "mapped" else None
        found, _ = read_tensors(
            weights.path,
            dtype=reading.dtype,
            device=reading.device,
            mapped=lambda name: name == W_dec,
            weights=True,
            wanted=set(names.values()).__contains__,
        )
    for name, tensor in found.items():
        if not tensor.is_floating_point() and name != "k":
            raise FileFormatError(
                f"{weights.path} has {name} in {tensor.dtype}; expected floating-point numbers, so download or save it "
                "again."
            )
    return {ours: found[theirs] for ours, theirs in names.items()}


def _require_threshold(weights: Weights, name: str | None, n_features: int) -> None:
    """One threshold for each feature, or one for all."""
    if name is None:
        return
    if name not in weights.shapes:
        raise FileFormatError(f"{weights.path} lacks {name}; check that this is the right file.")
    shape = weights.shapes[name]
    if not (shape in ((), (1,), (n_features,)) or shape == (1, n_features)):
        raise FileFormatError(
            f"{weights.path} has {name} {list(shape)}, but its other tensors ask for [{n_features}]; download or save "
            "it again."
        )


def _activation(found: _Set, path: Path, tensors: Mapping[str, Tensor]) -> Activation:
    """σ of one layer, by the settings or by its tensors."""
    stated = found.config.get("activation")
    if stated == "topk":
        return TopK(_k(found, path, tensors))
    if stated == "relu":
        return ReLU()
    if "threshold" in tensors:
        return JumpReLU(_thresholds(tensors))
    if stated is not None:
        raise FileFormatError(f"{path} lacks the thresholds of the activation {stated!r} that {found.path} speaks of.")
    return TopK(_k(found, path, tensors)) if "k" in tensors else ReLU()


def _k(found: _Set, path: Path, tensors: Mapping[str, Tensor]) -> int:
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


def _thresholds(tensors: Mapping[str, Tensor]) -> Float[Tensor, "feature"]:
    return tensors["threshold"].flatten().expand_as(tensors["b_enc"]).clone()


# reading: across layers


def _load_cross_layer(found: _Set, reading: Reading) -> DictionarySet:
    if (stated := found.config.get("activation")) == "topk":
        raise FileFormatError(
            f"{found.path} has the activation {stated!r}, which circuit-tracer's cross-layer transcoders do not have; "
            "expected 'relu' or 'jumprelu'."
        )
    files = _cross_layer_files(found, reading)
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
            thresholds[layer] = _thresholds(tensors)
        if "W_skip" in tensors:
            skips[layer] = tensors["W_skip"]
    for what, some in (("thresholds", thresholds), ("skip terms", skips)):
        if len(some) not in (0, n_layers):
            raise FileFormatError(
                f"{found.label} has {what} for {len(some)} of {n_layers} layers; expected all or none."
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


@dataclass(frozen=True)
class _CrossLayerFile:
    """The two files of one layer in circuit-tracer's own layout."""

    layer: int
    encoder: Weights
    decoder: Weights
    writes: int

    @property
    def _names(self) -> dict[str, str]:
        optional = [name for name in ("threshold", "W_skip") if f"{name}_{self.layer}" in self.encoder.shapes]
        return {name: f"{name}_{self.layer}" for name in ("W_enc", "b_enc", "b_dec", *optional)}

    def require(self, sizes: dict[str, int]) -> None:
        shapes: Shapes = {
            "W_enc": ("feature", "d_model"), "b_enc": ("feature",), "b_dec": ("d_model",),
            "W_skip": ("d_model", "d_model"),
        }  # fmt: skip
        names = self._names
        self.encoder.require({names[name]: shape for name, shape in shapes.items() if name in names}, sizes)
        _require_threshold(self.encoder, names.get("threshold"), sizes["feature"])
        self.decoder.require({f"W_dec_{self.layer}": ("feature", self.writes, "d_model")}, sizes)

    def read(self, reading: Reading) -> dict[str, Tensor]:
        tensors = _read(self.encoder, self._names, reading)
        tensors |= _read(self.decoder, {"W_dec": f"W_dec_{self.layer}"}, reading)
        return tensors | {"W_enc": tensors["W_enc"].T}


def _cross_layer_files(found: _Set, reading: Reading) -> Sequence[_CrossLayerFile | _LayerFile]:
    """The files of all layers, their headers read."""
    if found.config.get("transcoders") is not None:
        entries = found.entries()
        layers = _all_layers(found, entries, "under 'transcoders'")
        paths = found.fetched(entries)
        return [_LayerFile.of(paths[layer], reading, writes=len(layers)) for layer in layers]
    names = found.numbered(_across("enc")), found.numbered(_across("dec"))
    layers = _all_layers(found, names[0], "as W_enc_I.safetensors")
    _all_layers(found, names[1], "as W_dec_I.safetensors", len(layers))
    encoders, decoders = (found.fetched(of_layer) for of_layer in names)
    opened = [
        [Weights(paths[layer], tensor_shapes(paths[layer])) for layer in layers] for paths in (encoders, decoders)
    ]
    return [_CrossLayerFile(layer, opened[0][layer], opened[1][layer], len(layers) - layer) for layer in layers]


def _all_layers(found: _Set, files: Mapping[int, str], how: str, n_layers: int | None = None) -> range:
    """The layers that have files, which must be all of them: a decoder's shape speaks of the layers after its own."""
    layers = range((max(files) + 1 if files else 1) if n_layers is None else n_layers)
    missing = next((layer for layer in layers if layer not in files), None)
    if missing is not None or len(files) > len(layers):
        raise FileFormatError(
            f"{found.label} has {len(files)} files {how} and none for layer {missing}; a cross-layer transcoder has "
            "W_enc_I.safetensors and W_dec_I.safetensors for every layer I, so download the folder again."
        )
    return layers


# writing


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
            stored = {key: t.to(storage_dtype) if storage_dtype and "W_" in key else t for key, t in tensors.items()}
            write_tensors(temporary / name, stored)
        write_file(temporary / _CONFIG, yaml.safe_dump(config, sort_keys=False))


def _settings_of(dictionaries: TranscoderSet | CrossLayerTranscoder, kind: str) -> dict[str, Any]:
    provenance = dictionaries.provenance
    if provenance.frame.name != "raw":
        raise DictionaryError(
            f"circuit-tracer runs models as published, but these dictionaries were trained in the "
            f"{provenance.frame.name!r} frame; use the native format."
        )
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
    if provenance.first != _first(provenance.model):
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
            f"circuit-tracer's format cannot hold the activation {type(activation).__name__}; use the native format."
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


FORMAT = Format(
    name="circuit-tracer",
    community="circuit-tracer",
    marker="config.yaml with model_kind, or W_enc_0.safetensors and W_dec_0.safetensors",
    recognises=is_circuit_tracer,
    offers=offer_circuit_tracer,
    load=load_circuit_tracer,
    save=save_circuit_tracer,
    maps_decoders=True,
)
