"""dictionary_learning (saprmarks, and forks of it): folders with `ae.pt`, torch's state dict, and `config.json` beside.

    resid_post_layer_8/trainer_0/ae.pt, config.json          checkpoints/ae_STEP.pt as well

`config.json`: `trainer` with `dict_class`, `activation_dim`, `dict_size`, `k`, `layer`, `lm_name` and `submodule_name`,
a free text; `buffer` with `io`: what of the module is read, `out`, `in`, or `in_and_out` of a transcoder. With W
`encoder.weight [feature, d]`, D `decoder.weight [d, feature]`:

    AutoEncoder              a = ReLU(W (x − bias) + encoder.bias), y = D a + bias, with D's columns brought to norm 1
    AutoEncoderNew           a = ReLU(W x + encoder.bias), y = D a + decoder.bias
    GatedAutoEncoder         u = W (x − decoder_bias), a = 1[u + gate_bias > 0] · ReLU(u e^r_mag + mag_bias),
                             y = D a + decoder_bias
    JumpReluAutoEncoder      h = x W_enc + b_enc, a = ReLU(h) · 1[h > threshold], y = a W_dec + b_dec
    AutoEncoderTopK          the k largest of ReLU(W (x − b_dec) + encoder.bias), y = D a + b_dec
    BatchTopKSAE             the same h, a = ReLU(h) · 1[h > threshold] of one threshold, −1 before one was estimated
    MatryoshkaBatchTopKSAE   the same with W_enc [d, feature] and W_dec [feature, d]

Sources: github.com/saprmarks/dictionary_learning and its package 0.1.0 (`dictionary.py`, `trainers/`, `utils.py`).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from jsonschema import Draft202012Validator
from torch import Tensor

from transcoders.dictionaries import (
    SAE,
    DictionaryProvenance,
    DictionarySet,
    JumpReLU,
    ReLU,
    TopK,
    Transcoder,
)
from transcoders.errors import DictionaryError, FileFormatError, InputError
from transcoders.files import new_files, write_json
from transcoders.formats.building import (
    LayerWeights,
    assemble,
    called,
    centred_bias,
    gated,
    jump,
    present,
    rescaled,
    without,
)
from transcoders.formats.files import MOST_LAYERS, SOME_SIZE, SOME_TEXT, read_json, require_settings
from transcoders.formats.format import Format
from transcoders.formats.hooks import site_of_module
from transcoders.formats.offers import Offer, unsaid
from transcoders.formats.source import LocalFolder, Source, above, around, full_name
from transcoders.formats.weights import Reading, Weights, as_stored, open_weights, write_torch
from transcoders.sites import Site, SiteKind

_COMMUNITY = "dictionary_learning"
_CONFIG, _FILE, _CHECKPOINTS = "config.json", "ae.pt", "checkpoints"
_CHECKPOINT = re.compile(r"ae_\d+\.pt")
_MOST_SETTINGS = 1000
"""Files of settings that are read to say what there is."""
_SETTINGS = Draft202012Validator(
    {
        "type": "object",
        "properties": {
            "trainer": {
                "type": "object",
                "properties": {
                    **dict.fromkeys(("dict_class", "lm_name", "submodule_name"), SOME_TEXT),
                    **dict.fromkeys(("activation_dim", "dict_size", "k"), SOME_SIZE),
                    "layer": {"type": ["integer", "null"], "minimum": 0, "maximum": MOST_LAYERS},
                },
            },
            "buffer": {
                "type": ["object", "null"],
                "properties": {"io": {"enum": ["in", "out", "in_and_out", None]}},
            },
        },
    }
)
_WORDS: tuple[tuple[str, SiteKind | None, SiteKind | None], ...] = (
    (r"resid(ual)?_pre", "resid_pre", "resid_pre"),
    (r"resid(ual)?_mid", "resid_mid", "resid_mid"),
    (r"resid", "resid_pre", "resid_post"),
    (r"mlp", "mlp_in", "mlp_out"),
    (r"att(n|ention)", None, "attn_out"),
)
"""What authors call modules, and the sites of their inputs and outputs."""
_LAYER = re.compile(r"layer_?(\d{1,5})(?!\d)", re.IGNORECASE)
_WRITES: dict[SiteKind, SiteKind] = {
    "mlp_in": "mlp_out",
    "mlp_normed": "mlp_added",
    "resid_mid": "mlp_added",
    "resid_pre": "resid_post",
}
"""Of a transcoder, by what it reads."""
_NAMES: dict[tuple[SiteKind, SiteKind], tuple[str, str]] = {
    ("resid_post", "resid_post"): ("resid_post", "out"),
    ("resid_mid", "resid_mid"): ("resid_mid", "out"),
    ("resid_pre", "resid_pre"): ("resid_pre", "in"),
    ("mlp_out", "mlp_out"): ("mlp_out", "out"),
    ("mlp_in", "mlp_in"): ("mlp", "in"),
    ("attn_out", "attn_out"): ("attn_out", "out"),
    ("mlp_in", "mlp_out"): ("mlp", "in_and_out"),
    ("resid_pre", "resid_post"): ("resid", "in_and_out"),
}
"""`submodule_name` and `io` of the sites that are read and written."""


def is_dictionary_learning(source: Source) -> bool:
    return bool(_files(source))


def _files(source: Source) -> list[str]:
    """The finished dictionaries, or the checkpoints where there are no others."""
    named = {name: PurePosixPath(name).name for name in source.names}
    finished = [name for name, last in named.items() if last == _FILE]
    return finished or [name for name, last in named.items() if _CHECKPOINT.fullmatch(last)]


# what there is


def offers_of(source: Source) -> list[Offer]:
    """One for each file, by its settings and path."""
    names = _files(source)
    settings = _settings(source, names)
    return [_offer(source, name, settings.get(name, {})) for name in names]


def _settings(source: Source, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The settings beside each of some files, where there are any."""
    whole, within = around(source), ""
    if PurePosixPath(full_name(whole, _FILE)).parent.name == _CHECKPOINTS:  # settings lie above
        whole, within = above(whole), f"{_CHECKPOINTS}/"
    places = {name: _place(whole, within + name) for name in names}
    there = {name: place for name, place in places.items() if place is not None}
    if not there or len(there) > _MOST_SETTINGS:
        return {}
    found = {}
    for name, path in zip(there, whole.fetch(there.values()), strict=True):
        found[name] = read_json(path)
        require_settings(path, found[name], _SETTINGS)
    return found


def _place(source: Source, name: str) -> str | None:
    folder = PurePosixPath(name).parent
    places = [folder, folder.parent] if folder.name == _CHECKPOINTS else [folder]
    return next((str(place / _CONFIG) for place in places if str(place / _CONFIG) in source.names), None)


def _offer(source: Source, name: str, settings: dict[str, Any]) -> Offer:
    trainer, io = settings.get("trainer", {}), (settings.get("buffer") or {}).get("io") or "out"
    path, full = PurePosixPath(name), PurePosixPath(full_name(source, name))
    texts = [trainer.get("submodule_name") or "", *(part for part in reversed(full.parent.parts) if _layer(part))]
    site = next((site for text in texts if (site := _site(text, io)) is not None), None)
    layer = trainer.get("layer")
    if layer is None:
        layer = next((int(number) for text in texts if (number := _layer(text))), None)
    folder = path.parent if path.name == _FILE else path.with_suffix("")
    varying = [part for part in folder.parts if not _layer(part)]
    return Offer(
        id="" if str(folder) == "." else str(folder),
        files=(name,),
        kind="plt" if io == "in_and_out" else "sae",
        layer=layer,
        site=site,
        width=trainer.get("dict_size"),
        l0=None if trainer.get("k") is None else float(trainer["k"]),
        variant="/".join(varying) or None,
        asks=unsaid(site, layer),
    )


def _site(text: str, io: str) -> SiteKind | None:
    """The site that an author's text names: of the input, unless only the output is read."""
    for word, read, write in _WORDS:
        if re.search(word, text, re.IGNORECASE):
            return write if io == "out" else read
    try:
        return site_of_module(text, "out" if io == "out" else "in").kind if "." in text else None
    except FileFormatError:
        return None


def _layer(text: str) -> str | None:
    """The digits of the layer that a text speaks of."""
    found = _LAYER.search(text) or re.search(r"(?:layers|h|blocks)\.(\d{1,5})(?!\d)", text)
    return None if found is None else found[1]


# reading


def load_dictionary_learning(source: Source, offers: Sequence[Offer], reading: Reading) -> DictionarySet:
    names = [offer.files[0] for offer in offers]
    settings = _settings(source, names)
    layers = []
    for offer, path in zip(offers, source.fetch(names), strict=True):
        trainer = settings.get(offer.files[0], {}).get("trainer", {})
        layers.append(_read(open_weights(path), trainer, reading, offer.read, _written(offer, offer.read)))
    stated = {s["trainer"]["lm_name"] for s in settings.values() if s.get("trainer", {}).get("lm_name")}
    model = stated.pop() if len(stated) == 1 else "unknown"
    config = {"folders": {offer.id: settings.get(offer.files[0], {}) for offer in offers}}
    return assemble(layers, DictionaryProvenance(model=model, config=config), source.label)


def _written(offer: Offer, read: Site) -> Site:
    if offer.kind == "sae":
        return read
    if read.kind not in _WRITES:
        raise InputError(
            f"The dictionary {offer.id or 'in this folder'} reads a module's input and writes its output, but "
            f"{read.kind} is no module's input; give one of {', '.join(_WRITES)}."
        )
    return Site(read.layer, _WRITES[read.kind])


_Shapes = dict[str, tuple[int | str, ...]]
_Tensors = Mapping[str, Tensor]
_LINEAR: _Shapes = {"encoder.weight": ("feature", "d"), "decoder.weight": ("d", "feature")}
_MATRICES: _Shapes = {"W_enc": ("d", "feature"), "b_enc": ("feature",), "W_dec": ("feature", "d"), "b_dec": ("d",)}
_BIASED: _Shapes = _LINEAR | {"encoder.bias": ("feature",)}
_GATED = ("r_mag", "gate_bias", "mag_bias")
_CLASSES: dict[str, _Shapes] = {
    "AutoEncoder": _BIASED | {"bias": ("d",)},
    "AutoEncoderNew": _BIASED | {"decoder.bias": ("d",)},
    "GatedAutoEncoder": _LINEAR | {"decoder_bias": ("d",), **dict.fromkeys(_GATED, ("feature",))},
    "JumpReluAutoEncoder": _MATRICES | {"threshold": ("feature",)},
    "AutoEncoderTopK": _BIASED | {"b_dec": ("d",)},
    "BatchTopKSAE": _BIASED | {"b_dec": ("d",), "threshold": ()},
    "MatryoshkaBatchTopKSAE": _MATRICES | {"threshold": ()},
}  # fmt: skip
_CENTRED = ("AutoEncoder", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
_DECODER_BIAS = ("bias", "decoder.bias", "decoder_bias", "b_dec")


def _read(weights: Weights, trainer: dict[str, Any], reading: Reading, read: Site, write: Site) -> LayerWeights:
    name = _class_of(weights, trainer)
    shapes = _CLASSES[name]
    sizes = weights.require(shapes)
    tensors = weights.floating(shapes, reading)
    linear = "encoder.weight" in shapes
    W_enc, W_dec = (tensors[k].T if linear else tensors[w] for k, w in
                    (("encoder.weight", "W_enc"), ("decoder.weight", "W_dec")))  # fmt: skip
    b_enc = tensors[next(bias for bias in ("encoder.bias", "b_enc", "mag_bias") if bias in tensors)]
    if name == "GatedAutoEncoder":
        W_enc, b_enc, activation = gated(W_enc, tensors["gate_bias"], tensors["r_mag"], tensors["mag_bias"])
    elif name == "AutoEncoderTopK":
        activation = TopK(_k(weights, trainer, sizes["feature"]))
    elif "threshold" in shapes:
        activation = jump(tensors["threshold"], b_enc)
    else:
        activation = ReLU()
    b_dec = next(tensors[bias] for bias in _DECODER_BIAS if bias in tensors)
    found = LayerWeights(
        W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, activation=activation, read=read, write=write,
        centred=name in _CENTRED,
    )  # fmt: skip
    return _normalised(weights.path, found) if name == "AutoEncoder" else found


def _class_of(weights: Weights, trainer: dict[str, Any]) -> str:
    """As the settings say, or as the tensors do."""
    if (stated := trainer.get("dict_class")) is not None:
        if stated not in _CLASSES:
            raise FileFormatError(
                f"{weights.path} is of the dict_class {stated[:60]!r}, which is not read; those that are: "
                f"{', '.join(_CLASSES)}."
            )
        return stated
    fitting = [name for name, shapes in _CLASSES.items() if _fits(weights, shapes)]
    if len(fitting) == 1:
        return fitting[0]
    if "BatchTopKSAE" in fitting:
        raise FileFormatError(
            f"{weights.path} holds the tensors of AutoEncoderTopK and of BatchTopKSAE alike, and nothing says which of "
            "them it is; download its config.json too."
        )
    raise FileFormatError(
        f"{weights.path} holds the tensors {', '.join(weights.shapes)[:200]}, which are of no dictionary class that is "
        f"read ({', '.join(_CLASSES)})."
    )


def _fits(weights: Weights, shapes: _Shapes) -> bool:
    return all(len(weights.shapes.get(name, (0,) * 9)) == len(shape) for name, shape in shapes.items())


def _k(weights: Weights, trainer: dict[str, Any], most: int) -> int:
    stored = weights.shapes.get("k")
    k = trainer.get("k") if stored is None else None
    if stored == ():
        k = weights.read(["k"], Reading())["k"].item()
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= most:
        raise FileFormatError(f"{weights.path} has k = {str(k)[:40]} of {most} features; expected a number from 1.")
    return k


def _normalised(path: Path, weights: LayerWeights) -> LayerWeights:
    """As the peer's loader does: features scaled so that every column of the decoder has norm 1."""
    norm = weights.W_dec.norm(dim=1)
    return weights if torch.allclose(norm, torch.ones_like(norm)) else rescaled(weights, path)


# writing


def save_dictionary_learning(
    dictionaries: DictionarySet, folder: Path, *, storage_dtype: torch.dtype | None = None
) -> None:
    """Write `MODULE_layer_L/trainer_0/` of every layer that has a dictionary.

    ReLU is written as AutoEncoderNew, JumpReLU as JumpReluAutoEncoder, TopK as AutoEncoderTopK. Raises
    `DictionaryError` for what the files cannot hold: other sites, a norm, a skip term.
    """
    every = present(dictionaries, _COMMUNITY)
    sites = every[0].read.kind, every[0].writes[0].kind
    if sites not in _NAMES:
        raise DictionaryError(
            f"{_COMMUNITY} reads the inputs and outputs of modules, not {sites[0]} to write {sites[1]}; use the native "
            "format."
        )
    module, io = _NAMES[sites]
    files: dict[str, dict[str, Tensor]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for dictionary in every:
        without(dictionary, _COMMUNITY)
        name, tensors = _described(dictionary, storage_dtype)
        layer = dictionary.read.layer
        place = f"{module}_layer_{layer}/trainer_0"
        files[f"{place}/{_FILE}"] = tensors
        trainer = {
            "dict_class": name,
            "activation_dim": dictionary.d_in,
            "dict_size": dictionary.n_features,
            "layer": layer,
            "lm_name": dictionaries.provenance.model,
            "submodule_name": f"{module}_layer_{layer}",
        }
        if isinstance(dictionary.activation, TopK):
            trainer["k"] = dictionary.activation.k
        settings[f"{place}/{_CONFIG}"] = {"trainer": trainer, "buffer": {"d_submodule": dictionary.d_in, "io": io}}
    earlier = _files(LocalFolder(folder)) if folder.is_dir() else []
    with new_files(folder, without=[name for name in earlier if name not in files]) as temporary:
        for name, tensors in files.items():
            write_torch(temporary / name, tensors)
        for name, record in settings.items():
            write_json(temporary / name, record)


def _described(d: SAE | Transcoder, dtype: torch.dtype | None) -> tuple[str, dict[str, Tensor]]:
    """The class and tensors of a dictionary."""
    linear = as_stored({"encoder.weight": d.W_enc.T, "decoder.weight": d.W_dec.T}, dtype)
    match d.activation:
        case ReLU():
            return "AutoEncoderNew", linear | {"encoder.bias": d.encoder_bias, "decoder.bias": d.b_dec}
        case JumpReLU():
            vectors = {"b_enc": d.encoder_bias, "b_dec": d.b_dec, "threshold": d.activation.threshold}
            return "JumpReluAutoEncoder", as_stored({"W_enc": d.W_enc, "W_dec": d.W_dec}, dtype) | vectors
        case TopK():
            k = {"k": torch.tensor(d.activation.k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
            return "AutoEncoderTopK", linear | {"encoder.bias": centred_bias(d), "b_dec": d.b_dec} | k
        case other:
            raise DictionaryError(f"{_COMMUNITY} cannot hold {called(other)}; use the native format.")


FORMAT = Format(
    name="dictionary-learning",
    community="dictionary_learning",
    marker="ae.pt, beside config.json",
    recognises=is_dictionary_learning,
    offers=offers_of,
    load=load_dictionary_learning,
    save=save_dictionary_learning,
)
