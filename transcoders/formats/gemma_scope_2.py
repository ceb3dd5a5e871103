"""Gemma Scope 2: JumpReLU dictionaries of Gemma 3, as `google/gemma-scope-2-{270m,1b,4b,12b,27b}-{pt,it}` hold them.

    {resid_post,attn_out,mlp_out,transcoder}[_all]/layer_L_width_W_l0_{small,medium,big}[_affine][_seed_S]/
        config.json, params.safetensors
    clt/width_W_l0_{medium,big}[_affine]/
        config.json, params_layer_0.safetensors … params_layer_{n-1}.safetensors       W counts all layers' features
    crosscoder/…                                                                     (refused: they read four layers)

`w_enc [d, feature]`, `b_enc`, `w_dec [feature, d]`, `b_dec`, `threshold [feature]`, and in affine ones
`affine_skip_connection [d, d]`: `h = x w_enc + b_enc`, `a = h · 1[h > threshold]`, `y = a w_dec + b_dec (+ x skip)`; in
`clt`, `w_dec [feature, layer, d]` over all layers, of which the features of layer l write those from l on.
`resid_post` is the stream after a block, `attn_out` what W_O reads, `mlp_out` what the MLP adds (after its post-norm);
transcoders read what the MLP reads, after the norm and its weight, and predict what the MLP adds. `config.json` says it
by modules of transformers (`hf_hook_point_in`: `model.layers.5.pre_feedforward_layernorm.output`, with `{all}` for the
layer of a `clt`), with `model_name`, `architecture: jump_relu`, `l0`, `width`, `affine_connection` and `type`.
Transcoders of instruction-tuned models have no features at a chat's first four tokens (circuit-tracer).

Sources: the model cards; SAELens 6 and circuit-tracer 0.5, which read these files.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from jsonschema import Draft202012Validator
from torch import Tensor

from transcoders.dictionaries import (
    CrossLayerTranscoder,
    DictionaryProvenance,
    DictionarySet,
    JumpReLU,
    MappedDictionaries,
    SAESet,
    Transcoder,
)
from transcoders.errors import DictionaryError, FileFormatError, InputError
from transcoders.files import new_files, write_json
from transcoders.formats.building import (
    LayerWeights,
    assemble,
    assemble_cross_layer,
    jump,
    present,
    threshold_of,
    without,
)
from transcoders.formats.files import MOST_LAYERS, SOME_TEXT, read_json, read_tensors, require_settings, write_tensors
from transcoders.formats.format import Format
from transcoders.formats.hooks import site_of_module
from transcoders.formats.offers import Offer, unsaid, width_of, width_text
from transcoders.formats.source import Source, around, fetch_one, folder_of, full_name, names_in
from transcoders.formats.weights import Reading, as_stored, open_weights
from transcoders.sites import Site, SiteKind

_COMMUNITY = "Gemma Scope 2"
_CONFIG, _FILE, _SKIP = "config.json", "params.safetensors", "affine_skip_connection"
_LAYER_FILE = re.compile(r"params_layer_(\d{1,5})\.safetensors")
_REPOSITORY = re.compile(r"gemma-scope-2-(?P<size>\d{1,3}[mb])-(?P<stage>pt|it)(?![a-z])")
_WIDTH = r"width_(?P<width>[1-9]\d{0,8}[km]?)(?:_l0_(?P<which>\w+))?"
_LEAF = re.compile(rf"layer_(?P<layer>\d{{1,5}})_{_WIDTH}")
_CLT_LEAF = re.compile(_WIDTH)
_GROUPS: dict[str, tuple[SiteKind, SiteKind]] = {
    "resid_post": ("resid_post", "resid_post"),
    "attn_out": ("attn_z", "attn_z"),
    "mlp_out": ("mlp_added", "mlp_added"),
    "transcoder": ("mlp_in", "mlp_added"),
    "clt": ("mlp_in", "mlp_added"),
}
_HOOKS: dict[SiteKind, str] = {
    "resid_post": "model.layers.{}.output",
    "attn_z": "model.layers.{}.self_attn.o_proj.input",
    "mlp_in": "model.layers.{}.pre_feedforward_layernorm.output",
    "mlp_added": "model.layers.{}.post_feedforward_layernorm.output",
    "mlp_out": "model.layers.{}.mlp.output",
}
_SETTINGS = Draft202012Validator(
    {
        "type": "object",
        "properties": {
            "architecture": {"const": "jump_relu"},
            "affine_connection": {"type": ["boolean", "null"]},
            **dict.fromkeys(("model_name", "hf_hook_point_in", "hf_hook_point_out", "type"), SOME_TEXT),
        },
    }
)
_CHAT_PREFIX = 4
"""Tokens of `<bos><start_of_turn>user\n`, at which transcoders of tuned models have no features."""
_VECTORS: dict[str, tuple[int | str, ...]] = {
    "w_enc": ("d", "feature"),
    "b_enc": ("feature",),
    "b_dec": ("d",),
    "threshold": ("feature",),
}


def is_gemma_scope_2(source: Source) -> bool:
    return any(_is_params(PurePosixPath(name).name) for name in source.names)


def _is_params(name: str) -> bool:
    return name == _FILE or _LAYER_FILE.fullmatch(name) is not None


# what there is


def offers_of(source: Source) -> list[Offer]:
    """One for each folder, by its path; settings are read where that does not tell."""
    names = [PurePosixPath(name) for name in source.names if _is_params(PurePosixPath(name).name)]
    folders = groupby(sorted(names, key=lambda n: (str(n.parent), n)), key=lambda n: n.parent)
    return [_offer(source, folder, [str(name) for name in files]) for folder, files in folders]


def _offer(source: Source, folder: PurePosixPath, files: list[str]) -> Offer:
    place = PurePosixPath(full_name(source, files[0])).parent
    group, leaf = place.parent.name, place.name
    within = group if len(folder.parts) > 1 else None
    identity = {"id": folder_of(files[0]), "files": tuple(files)}
    site = group.removesuffix("_all")
    if PurePosixPath(files[0]).name != _FILE:
        found = _CLT_LEAF.fullmatch(leaf)
        kind = _kind(source, folder, group)
        return Offer(
            **identity, kind=kind, site="mlp_in" if kind == "clt" else None,
            width=None if found is None else width_of(found["width"]), variant=_variant(within, found),
        )  # fmt: skip
    found = _LEAF.match(leaf)
    if found is not None and site in _GROUPS:
        layer, kind_read = int(found["layer"]), _GROUPS[site][0]
    elif (sites := _sites_of(_settings(source, folder))) is not None:
        layer, kind_read = sites[0].layer, sites[0].kind
    else:
        layer, kind_read = None if found is None else int(found["layer"]), None
    return Offer(
        **identity,
        kind=None if kind_read is None else "plt" if kind_read == "mlp_in" else "sae",
        layer=layer,
        site=kind_read,
        width=None if found is None else width_of(found["width"]),
        variant=_variant(within, found),
        asks=unsaid(kind_read, layer),
    )


def _variant(within: str | None, found: re.Match[str] | None) -> str | None:
    """`transcoder_all/small_affine`, or `small_affine` in the folder `transcoder_all`."""
    which = None if found is None else found["which"]
    return "/".join(part for part in (within, which) if part) or None


def _kind(source: Source, folder: PurePosixPath, group: str) -> str:
    """Of a folder with a file for each layer."""
    if group in ("clt", "crosscoder"):
        return group
    stated = _settings(source, folder).get("type")
    return stated if stated in ("clt", "crosscoder") else "clt"


def _settings(source: Source, folder: PurePosixPath) -> dict[str, Any]:
    """Those beside the weights; empty where there are none."""
    name = str(folder / _CONFIG)
    if name not in source.names:
        source = around(source)
        if name not in source.names:
            return {}
    path = fetch_one(source, name)
    require_settings(path, settings := read_json(path), _SETTINGS)
    return settings


def _sites_of(settings: dict[str, Any]) -> tuple[Site, Site] | None:
    """Where the settings say that is read and written; of a cross-layer transcoder, in layer 0."""
    stated = [settings.get(f"hf_hook_point_{side}") for side in ("in", "out")]
    if not stated[0]:
        return None
    read, write = (_site(str(text or stated[0]).replace("{all}", "0")) for text in stated)
    return read, Site(read.layer, "mlp_added") if read == write and read.kind == "mlp_in" else write


def _site(text: str) -> Site:
    module, _, side = text.rpartition(".")
    return site_of_module(module, "in" if side == "input" else "out")


# reading


@dataclass(frozen=True)
class _Read:
    """The tensors of one file; `W_dec` only has a shape where the decoder stays in the file."""

    weights: dict[str, Tensor]
    mapped: Tensor | None


def _read(path: Path, reading: Reading, decoder: tuple[int | str, ...], sizes: dict[str, int]) -> _Read:
    weights = open_weights(path)
    skip: dict[str, tuple[int | str, ...]] = {_SKIP: ("d", "d")} if _SKIP in weights.shapes else {}
    weights.require({**_VECTORS, **skip, "w_dec": decoder}, sizes)
    found = weights.floating([*_VECTORS, *skip], reading)
    if reading.decoders == "memory":
        return _Read(found | weights.floating(["w_dec"], reading), None)
    tensors, _ = read_tensors(path, mapped=lambda name: True, wanted=lambda name: name == "w_dec")
    stored = tensors["w_dec"]
    return _Read(found | {"w_dec": torch.empty(stored.shape, dtype=reading.dtype, device="meta")}, stored)


def load_gemma_scope_2(source: Source, offers: Sequence[Offer], reading: Reading) -> DictionarySet:
    kinds = {offer.kind for offer in offers}
    if "crosscoder" in kinds:
        raise InputError(
            f"{source.label} holds a crosscoder ({offers[0].id or 'this folder'}), which reads several layers at once; "
            "this package reads SAEs, transcoders and cross-layer transcoders."
        )
    if "clt" not in kinds:
        return _load_layers(source, offers, reading)
    if len(offers) > 1:
        raise InputError(f"{source.label} offers {len(offers)} sets of all layers; give the folder of one of them.")
    return _load_cross_layer(source, offers[0], reading)


def _load_layers(source: Source, offers: Sequence[Offer], reading: Reading) -> DictionarySet:
    layers, stay, config = [], [], {}
    for offer, path in zip(offers, source.fetch([offer.files[0] for offer in offers]), strict=True):
        config[offer.id] = settings = _settings(source, PurePosixPath(offer.files[0]).parent)
        read, write = _stated_sites(offer, settings, path)
        found = _read(path, reading, ("feature", "d"), {})
        weights, skip = found.weights, found.weights.get(_SKIP)
        _require_skip(path, settings, skip is not None)
        layers.append(
            LayerWeights(
                W_enc=weights["w_enc"], b_enc=weights["b_enc"], W_dec=weights["w_dec"], b_dec=weights["b_dec"],
                activation=jump(weights["threshold"], weights["b_enc"]), read=read, write=write, W_skip=skip,
            )
        )  # fmt: skip
        stay.append(found.mapped)
    loaded = assemble(layers, _provenance(source, offers[0], config, layers[0].read.kind == "mlp_in"), source.label)
    if reading.decoders == "memory":
        return loaded
    by_layer = {weights.read.layer: W_dec for weights, W_dec in zip(layers, stay, strict=True)}
    return MappedDictionaries(loaded, [by_layer.get(i, torch.zeros(0, loaded.d_model)) for i in range(loaded.n_layers)])


def _stated_sites(offer: Offer, settings: dict[str, Any], path: Path) -> tuple[Site, Site]:
    """Where a dictionary reads and writes: what the settings say, or else its folder."""
    read = offer.read
    if (sites := _sites_of(settings)) is None:
        return read, Site(read.layer, "mlp_added") if read.kind == "mlp_in" else read
    if sites[0] != read:
        raise FileFormatError(
            f"{path} lies in a folder of {read}, but its settings speak of {sites[0]}; download it again."
        )
    return sites


def _require_skip(path: Path, settings: dict[str, Any], there: bool) -> None:
    if settings.get("affine_connection") and not there:
        raise FileFormatError(f"{path} lacks {_SKIP}, of which its settings speak; download it again.")


def _load_cross_layer(source: Source, offer: Offer, reading: Reading) -> DictionarySet:
    numbered = {int(n): name for name in offer.files for n in _LAYER_FILE.findall(PurePosixPath(name).name)}
    n_layers = len(offer.files)
    if sorted(numbered) != list(range(n_layers)) or n_layers > MOST_LAYERS:
        missing = next(i for i in range(n_layers + 1) if i not in numbered)
        raise FileFormatError(
            f"{source.label} has {n_layers} files of a cross-layer transcoder, but no params_layer_{missing}; download "
            "it again."
        )
    settings = _settings(source, PurePosixPath(offer.files[0]).parent)
    paths, sizes = source.fetch([numbered[i] for i in range(n_layers)]), {}
    layers = []
    for i, path in enumerate(paths):
        layers.append(_read(path, reading, ("feature", n_layers, "d"), sizes))
        layers[i].weights["w_dec"] = layers[i].weights["w_dec"][:, i:].contiguous()  # the rest is not kept
    skips = [layer.weights[_SKIP] for layer in layers if _SKIP in layer.weights]
    if len(skips) not in (0, n_layers):
        raise FileFormatError(f"{source.label} has {_SKIP} in {len(skips)} of {n_layers} files; expected all or none.")
    _require_skip(paths[0], settings, bool(skips))
    read, write = _sites_of(settings) or (Site(0, "mlp_in"), Site(0, "mlp_added"))

    def of_each(name: str) -> list[Tensor]:
        return [layer.weights[name] for layer in layers]

    loaded = assemble_cross_layer(
        source.label,
        W_enc=of_each("w_enc"),
        b_enc=of_each("b_enc"),
        W_dec=of_each("w_dec"),
        b_dec=of_each("b_dec"),
        activation=JumpReLU(torch.stack(of_each("threshold")).clamp_min(0)),
        provenance=_provenance(source, offer, {offer.id: settings}, True),
        reads=[Site(i, read.kind) for i in range(n_layers)],
        writes=[Site(i, write.kind) for i in range(n_layers)],
        W_skip=skips or None,
    )
    stay = [layer.mapped[:, i:] for i, layer in enumerate(layers) if layer.mapped is not None]
    return MappedDictionaries(loaded, stay) if stay else loaded


def _provenance(source: Source, offer: Offer, config: dict[str, Any], of_mlp: bool) -> DictionaryProvenance:
    found = list(_REPOSITORY.finditer(full_name(source, offer.files[0])))
    stated = next(iter(config.values())).get("model_name")
    model = str(stated or (f"google/gemma-3-{found[-1]['size']}-{found[-1]['stage']}" if found else "unknown"))
    model = re.sub(r"^(google/)?gemma-v?3-", "google/gemma-3-", model)
    model = {"google/gemma-3-270m-pt": "google/gemma-3-270m"}.get(model, model)  # as the hub calls it
    bos = True if model.startswith("google/gemma-3-") else None
    first = _CHAT_PREFIX if of_mlp and bos and model.endswith("-it") else 1
    return DictionaryProvenance(model=model, bos=bos, first=first, config={"folders": config})


# writing


def save_gemma_scope_2(dictionaries: DictionarySet, folder: Path, *, storage_dtype: torch.dtype | None = None) -> None:
    """Write `GROUP_all/layer_L_width_W/` of every layer that has a dictionary, or `clt/width_W/`.

    Raises `DictionaryError` for what the files cannot hold: other sites, TopK, a norm.
    """
    is_clt = isinstance(dictionaries, CrossLayerTranscoder)
    written = _cross_layer(dictionaries) if is_clt else _layers(dictionaries)
    files, settings = {}, {}
    for place, kind, tensors in written:
        name = f"{place}/{kind}"
        files[name] = as_stored(tensors, storage_dtype)
        settings.setdefault(place, _config(dictionaries, place, tensors))
    stale = [name for name in names_in(folder) if _is_params(PurePosixPath(name).name) and name not in files]
    with new_files(folder, without=stale) as temporary:
        for name, tensors in files.items():
            write_tensors(temporary / name, tensors)
        for place, record in settings.items():
            write_json(temporary / place / _CONFIG, record)


def _layers(dictionaries: DictionarySet) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    for dictionary in present(dictionaries, _COMMUNITY):
        without(dictionary, _COMMUNITY, skip=False)
        group = _group(dictionary.read.kind, dictionary.writes[0].kind, "transcoder")
        width = width_text(dictionary.n_features)
        tensors = {
            "w_enc": dictionary.W_enc,
            "b_enc": dictionary.encoder_bias,
            "w_dec": dictionary.W_dec,
            "b_dec": dictionary.b_dec,
            "threshold": threshold_of(dictionary, _COMMUNITY),
        }
        if isinstance(dictionary, Transcoder) and dictionary.W_skip is not None:
            tensors[_SKIP] = dictionary.W_skip
        yield f"{group}_all/layer_{dictionary.read.layer}_width_{width}", _FILE, tensors


def _cross_layer(clt: CrossLayerTranscoder) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    place = f"{_group(clt.reads[0].kind, clt.writes[0].kind, 'clt')}/width_{width_text(clt.W_enc[:, 0].numel())}"
    threshold = threshold_of(clt, _COMMUNITY)
    for i in range(clt.n_layers):
        nothing = clt.W_dec[i].new_zeros(clt.n_features(i), i, clt.d_model)  # for the layers before it
        tensors = {
            "w_enc": clt.W_enc[i],
            "b_enc": clt.b_enc[i],
            "w_dec": torch.cat([nothing, clt.W_dec[i]], dim=1),
            "b_dec": clt.b_dec[i],
            "threshold": threshold[i],
        }
        if clt.W_skip is not None:
            tensors[_SKIP] = clt.W_skip[i]
        yield place, f"params_layer_{i}.safetensors", tensors


def _group(read: SiteKind, write: SiteKind, transcoder: str) -> str:
    """The folder for dictionaries of these sites; what an MLP writes may be meant before its post-norm."""
    if read == "mlp_in" and write in ("mlp_added", "mlp_out"):
        return transcoder
    group = next((name for name, sites in _GROUPS.items() if sites == (read, write)), None)
    if group is None:
        raise DictionaryError(
            f"{_COMMUNITY} has no place for dictionaries that read {read} and write {write}; it has SAEs of "
            "resid_post, attn_z and mlp_added, and transcoders that read mlp_in."
        )
    return group


def _config(dictionaries: DictionarySet, place: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    is_clt = isinstance(dictionaries, CrossLayerTranscoder)
    found = _LEAF.match(PurePosixPath(place).name)
    layer = "{all}" if found is None else found["layer"]
    return {
        "model_name": dictionaries.provenance.model,
        "architecture": "jump_relu",
        "type": "clt" if is_clt else "sae" if isinstance(dictionaries, SAESet) else "transcoder",
        "width": tensors["w_enc"].shape[1] * (dictionaries.n_layers if is_clt else 1),
        "affine_connection": _SKIP in tensors,
        "hf_hook_point_in": _HOOKS[dictionaries.reads[0].kind].format(layer),
        "hf_hook_point_out": _HOOKS[dictionaries.writes[0].kind].format(layer),
    }


FORMAT = Format(
    name="gemma-scope-2",
    community="Gemma Scope 2",
    marker="GROUP/layer_L_width_W_l0_…/params.safetensors",
    recognises=is_gemma_scope_2,
    offers=offers_of,
    load=load_gemma_scope_2,
    save=save_gemma_scope_2,
    maps_decoders=True,
)
