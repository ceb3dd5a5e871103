"""crosslayer-transcoder's folders: cross-layer or per-layer transcoders, with the statistics that standardise them.

    config.yaml                 `model`: {class_path, init_args}, with such a pair for encoder, decoder, nonlinearity,
                                input_standardizer and output_standardizer; a training's settings nest it once more
    checkpoint.safetensors      of `save_pretrained`; or a checkpoint of Lightning, *.ckpt, under `state_dict.model.`

    encoder.W [layer, d_model, feature], encoder.b [layer, feature]
    decoder.W_0, decoder.W_1, …     CrosslayerDecoder, by target: [sources, feature, d_model]
    decoder.W                       Decoder, of each layer alone: [layer, feature, d_model]
    decoder.b [layer, d_model]
    nonlinearity.theta [1, layer, feature]      JumpReLU
    nonlinearity.threshold          BatchTopK [1] and PerLayerBatchTopK [layer]
    input_standardizer.mean, .std, output_standardizer.mean, .std
                                    [layer, d_model] Dimensionwise…, [layer] Layerwise…

    a_l = σ(((x_l − μ_in) / σ_in) W + b)        y_t = (Σ_{l ≤ t} a_l W_t[l] + b_t) σ_out + μ_out

A folder that was saved with the statistics folded in has none (`is_folded`); here they are always folded in. σ is
JumpReLU, ReLU, PerLayerTopK, or BatchTopK at inference, a JumpReLU with the threshold it kept; classes are told by the
last part of their path and never imported. A standardisation by each token's own statistics (Samplewise…) is refused.

The package's transcoders read the input of GPT-2's `ln_2`, before the norm, and write the MLP's output; each text
begins with BOS. Its files name neither, and the model only where their settings are those of a training; other sites
and the model are written beside `model`, under `sites`, which the package leaves unread.

Source: Goreg12345/crosslayer-transcoder ae29e75 (model/clt.py, standardize.py, topk.py, jumprelu.py,
serializable_module.py, data/activation_sources.py, data/generation_loop.py).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
    ReLU,
    TopK,
    TranscoderSet,
)
from transcoders.errors import DictionaryError, FileFormatError
from transcoders.files import new_files, write_file
from transcoders.formats.building import LayerWeights, assemble, assemble_cross_layer, called, without
from transcoders.formats.files import read_site, read_yaml, require_settings, write_tensors
from transcoders.formats.format import Format
from transcoders.formats.offers import Offer
from transcoders.formats.source import Source, fetch_one
from transcoders.formats.weights import Reading, Weights, as_stored, open_weights
from transcoders.sites import Site, SiteKind

logger = logging.getLogger(__name__)

_SETTINGS, _WEIGHTS = "config.yaml", "checkpoint.safetensors"
_PACKAGE = "crosslayer_transcoder."
_COMMUNITY = "crosslayer-transcoder's layout"
_SITES: tuple[SiteKind, SiteKind] = ("resid_mid", "mlp_out")
_DECODERS = {"CrosslayerDecoder": "clt", "Decoder": "plt"}
_STANDARDISERS = {"Standardizer": (), "Dimensionwise": ("layer", "d_model"), "Layerwise": ("layer",)}
"""The shapes of what they hold, by the beginnings of their names."""
_PART = {
    "type": "object",
    "required": ["class_path"],
    "properties": {"class_path": {"type": "string"}, "init_args": {"type": ["object", "null"]}},
}
_SCHEMA = Draft202012Validator(
    _PART
    | {
        "required": ["class_path", "init_args"],
        "properties": {
            "init_args": {
                "type": "object",
                "required": ["encoder", "decoder", "nonlinearity"],
                "properties": {
                    **dict.fromkeys(("encoder", "decoder", "nonlinearity"), _PART),
                    **{f"{side}_standardizer": {"anyOf": [{"type": "null"}, _PART]} for side in ("input", "output")},
                },
            }
        },
    }
)
_K = Draft202012Validator(
    {"type": "object", "required": ["k"], "properties": {"k": {"type": "integer", "minimum": 1, "maximum": 2**31}}}
)


@dataclass(frozen=True)
class _Settings:
    """What a folder says of its transcoder."""

    path: Path
    parts: Mapping[str, Any]
    """encoder, decoder, nonlinearity and standardisers."""
    whole: Mapping[str, Any]

    def name(self, part: str) -> str | None:
        """The class of a part, by the last component of its path; None where there is none."""
        found = self.parts.get(part)
        return None if found is None else found["class_path"].rpartition(".")[2]

    def arguments(self, part: str) -> Mapping[str, Any]:
        return self.parts[part].get("init_args") or {}

    @property
    def kind(self) -> str:
        decoder = self.name("decoder")
        if decoder not in _DECODERS:
            raise self.unsupported("decoder", decoder, _DECODERS)
        return _DECODERS[decoder]

    @property
    def sites(self) -> tuple[SiteKind, SiteKind]:
        """What is read and written."""
        stated = self.whole.get("sites", {})
        if not isinstance(stated, Mapping):
            raise FileFormatError(f"{self.path} has sites that are no mapping; expected read and write.")
        read, write = stated.get("read", _SITES[0]), stated.get("write", _SITES[1])
        if not isinstance(read, str) or not isinstance(write, str):
            raise FileFormatError(f"{self.path} has sites that are no names; expected such as {' and '.join(_SITES)}.")
        return read_site(self.path, f"0.{read}").kind, read_site(self.path, f"0.{write}").kind

    @property
    def model(self) -> str:
        stated = self.whole.get("sites")
        if isinstance(stated, Mapping) and isinstance(stated.get("model"), str):
            return stated["model"]
        data = self.whole.get("data")
        arguments = data.get("init_args") if isinstance(data, Mapping) else None
        name = arguments.get("model_name") if isinstance(arguments, Mapping) else None
        return name if isinstance(name, str) else "unknown"

    def unsupported(
        self, part: str, found: str | None, supported: Sequence[str] | Mapping[str, Any]
    ) -> FileFormatError:
        return FileFormatError(f"{self.path} has the {part} {str(found)[:60]!r}; supported are {', '.join(supported)}.")


def is_crosslayer_transcoder(source: Source) -> bool:
    if _SETTINGS not in source.names:
        return False
    model = read_yaml(fetch_one(source, _SETTINGS)).get("model")
    return isinstance(model, Mapping) and str(model.get("class_path")).startswith(_PACKAGE)


def _settings(source: Source) -> _Settings:
    whole = read_yaml(path := fetch_one(source, _SETTINGS))
    model = whole.get("model")
    arguments = model.get("init_args") if isinstance(model, Mapping) else None
    if isinstance(arguments, Mapping) and isinstance(arguments.get("model"), Mapping):
        model = arguments["model"]  # of a training
    if not isinstance(model, Mapping):
        raise FileFormatError(f"{path} has no settings under 'model'; download it again.")
    if (name := str(model.get("class_path")).rpartition(".")[2]) != "CrossLayerTranscoder":
        raise FileFormatError(f"{path} is of a {name[:60]!r}; supported is CrossLayerTranscoder.")
    require_settings(path, model, _SCHEMA)
    return _Settings(path, model["init_args"], whole)


def _file(source: Source) -> str:
    """The file of weights."""
    checkpoints = [name for name in source.names if name.endswith(".ckpt") and "/" not in name]
    if _WEIGHTS in source.names or not checkpoints:
        return _WEIGHTS
    if len(checkpoints) > 1:
        raise FileFormatError(
            f"{source.label} holds {len(checkpoints)} checkpoints ({', '.join(checkpoints[:8])}); keep one beside "
            f"{_SETTINGS}."
        )
    return checkpoints[0]


def offers(source: Source) -> list[Offer]:
    settings = _settings(source)
    stated = settings.arguments("encoder").get("d_features")
    width = stated if isinstance(stated, int) and not isinstance(stated, bool) else None
    files = (_SETTINGS, _file(source))
    return [Offer(id="", files=files, kind=settings.kind, site=settings.sites[0], width=width)]


def load(source: Source, chosen: Sequence[Offer], reading: Reading) -> DictionarySet:
    """The cross-layer transcoder, or the transcoders."""
    settings = _settings(source)
    weights = _opened(fetch_one(source, _file(source)))
    sizes = weights.require({"encoder.W": ("layer", "d_model", "feature"), "encoder.b": ("layer", "feature")})
    n_layers, d_model = sizes["layer"], sizes["d_model"]
    weights.require(shapes := _shapes(settings, sizes))
    read = weights.floating(shapes, reading)
    layers = range(n_layers)
    read_by, written = (
        _statistics(settings, read, f"{side}put_standardizer", n_layers, d_model) for side in ("in", "out")
    )
    activations = _activations(settings, read, read["encoder.b"])
    encoders = [_standardised(read["encoder.W"][i], read["encoder.b"][i], *(s[i] for s in read_by)) for i in layers]
    b_dec = [read["decoder.b"][i] * written[1][i] + written[0][i] for i in layers]
    reads, writes = ([Site(i, kind) for i in layers] for kind in settings.sites)
    provenance = DictionaryProvenance(model=settings.model, bos=True, config=dict(settings.whole))
    if settings.kind == "plt":
        return assemble(
            [
                LayerWeights(
                    W_enc=encoders[i][0], b_enc=encoders[i][1], W_dec=read["decoder.W"][i] * written[1][i],
                    b_dec=b_dec[i], activation=activations[i], read=reads[i], write=writes[i],
                )
                for i in layers
            ],
            provenance,
            source.label,
        )  # fmt: skip
    W_dec = [
        torch.stack([read[f"decoder.W_{t}"][i] * written[1][t] for t in range(i, n_layers)], dim=1) for i in layers
    ]
    return assemble_cross_layer(
        source.label,
        W_enc=[W for W, _ in encoders],
        b_enc=[b for _, b in encoders],
        W_dec=W_dec,
        b_dec=b_dec,
        activation=_stacked(activations),
        provenance=provenance,
        reads=reads,
        writes=writes,
    )


def _opened(path: Path) -> Weights:
    """A file of weights, whose names may begin with where a training keeps its model."""
    weights, ending = open_weights(path), "encoder.W"
    found = [name for name in weights.shapes if name == ending or name.endswith(f".{ending}")]
    if len(found) != 1:
        raise FileFormatError(
            f"{path} holds {len(found)} tensors named {ending}; expected one, so check that this is the right file."
        )
    return weights.below(found[0].removesuffix(ending))


def _shapes(settings: _Settings, sizes: Mapping[str, int]) -> dict[str, tuple[int | str, ...]]:
    """Of the tensors that the settings speak of."""
    layer, d_model, feature = sizes["layer"], sizes["d_model"], sizes["feature"]
    shapes: dict[str, tuple[int | str, ...]] = {
        "encoder.W": (layer, d_model, feature), "encoder.b": (layer, feature), "decoder.b": (layer, d_model),
    }  # fmt: skip
    if settings.kind == "clt":
        shapes |= {f"decoder.W_{target}": (target + 1, feature, d_model) for target in range(layer)}
    else:
        shapes |= {"decoder.W": (layer, feature, d_model)}
    kept = {
        "JumpReLU": ("theta", (1, layer, feature)), "BatchTopK": ("threshold", (1,)),
        "PerLayerBatchTopK": ("threshold", (layer,)),
    }  # fmt: skip
    if (found := kept.get(settings.name("nonlinearity") or "")) is not None:
        shapes[f"nonlinearity.{found[0]}"] = found[1]
    for part in ("input_standardizer", "output_standardizer"):
        if shape := tuple(sizes[name] for name in _standardiser(settings, part)):
            shapes |= {f"{part}.mean": shape, f"{part}.std": shape}
    return shapes


def _standardiser(settings: _Settings, part: str) -> tuple[str, ...]:
    """The shape of the statistics of a standardiser."""
    if (name := settings.name(part)) is None:
        return ()
    side = part[0].upper() + part.removesuffix("_standardizer")[1:]
    supported = {f"{kind}{side}Standardizer" if shape else kind: shape for kind, shape in _STANDARDISERS.items()}
    if name not in supported:
        raise settings.unsupported(part, name, supported)
    return supported[name]


def _statistics(
    settings: _Settings, read: Mapping[str, Tensor], part: str, n_layers: int, d_model: int
) -> tuple[Float[Tensor, "layer d_model"], Float[Tensor, "layer d_model"]]:
    """Mean and standard deviation of each layer: 0 and 1 where nothing is standardised."""
    like = read["decoder.b"]
    if f"{part}.std" not in read:
        return torch.zeros_like(like), torch.ones_like(like)
    mean, std = (read[f"{part}.{name}"].reshape(n_layers, -1).expand(n_layers, d_model) for name in ("mean", "std"))
    if not bool((std > 1e-15).all()):
        raise FileFormatError(f"{settings.path} speaks of a {part} whose std are not all positive; download it again.")
    return mean, std


def _standardised(
    W: Float[Tensor, "d_model feature"],
    b: Float[Tensor, "feature"],
    mean: Float[Tensor, "d_model"],
    std: Float[Tensor, "d_model"],
) -> tuple[Float[Tensor, "d_model feature"], Float[Tensor, "feature"]]:
    """Encoder and bias that read x where these read (x − mean) / std."""
    return W / std[:, None], (b.double() - (mean / std).double() @ W.double()).to(b.dtype)


def _activations(
    settings: _Settings, read: Mapping[str, Tensor], like: Float[Tensor, "layer feature"]
) -> list[Activation]:
    """σ of each layer."""
    name = settings.name("nonlinearity")
    if name == "JumpReLU":
        return [JumpReLU(theta.clamp_min(0).clone()) for theta in read["nonlinearity.theta"][0]]
    if name in ("BatchTopK", "PerLayerBatchTopK"):
        thresholds = read["nonlinearity.threshold"].clamp_min(0)[:, None].expand_as(like)
        return [JumpReLU(threshold.clone()) for threshold in thresholds]
    if name == "PerLayerTopK":
        require_settings(settings.path, settings.arguments("nonlinearity"), _K)
        k = settings.arguments("nonlinearity")["k"]
        return [TopK(k) if k < like.shape[1] else ReLU() for _ in like]
    if name == "ReLU":
        return [ReLU() for _ in like]
    supported = ("JumpReLU", "ReLU", "PerLayerTopK", "BatchTopK", "PerLayerBatchTopK")
    raise settings.unsupported("nonlinearity", name, supported)


def _stacked(activations: Sequence[Activation]) -> Activation:
    """One σ for all layers."""
    thresholds = [each.threshold.detach() for each in activations if isinstance(each, JumpReLU)]
    return JumpReLU(torch.stack(thresholds)) if thresholds else activations[0]


# writing


def save(dictionaries: DictionarySet, folder: Path, *, storage_dtype: torch.dtype | None = None) -> None:
    """Write transcoders or a cross-layer transcoder; `DictionaryError` for what the layout cannot hold."""
    tensors, activation = _tensors(dictionaries)
    sites = {
        "read": dictionaries.reads[0].kind,
        "write": dictionaries.writes[0].kind,
        "model": dictionaries.provenance.model,
    }
    if tuple(sites.values())[:2] != _SITES:
        logger.warning(
            "These transcoders read %s and write %s, but crosslayer-transcoder itself runs all of its own as if they "
            "read %s and wrote %s.", sites["read"], sites["write"], *_SITES,
        )  # fmt: skip
    n_layers, d_model, n_features = tensors["encoder.W"].shape
    sizes = {"d_acts": d_model, "d_features": n_features, "n_layers": n_layers}
    decoder = "CrosslayerDecoder" if dictionaries.kind == "clt" else "Decoder"
    nonlinearity, kept = _nonlinearity(activation, n_layers, n_features)
    parts = {
        "encoder": _part("clt.Encoder", sizes), "decoder": _part(f"clt.{decoder}", sizes), "nonlinearity": nonlinearity,
        "input_standardizer": None, "output_standardizer": None,
    }  # fmt: skip
    import yaml

    model = {**_part("clt.CrossLayerTranscoder", parts), "is_folded": True}
    with new_files(folder) as temporary:
        write_tensors(temporary / _WEIGHTS, as_stored(tensors | kept, storage_dtype))
        write_file(temporary / _SETTINGS, yaml.safe_dump({"model": model, "sites": sites}))


def _part(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"class_path": f"{_PACKAGE}model.{name}", "init_args": dict(arguments)}


def _nonlinearity(activation: Activation, n_layers: int, n_features: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings of σ, and its tensors."""
    if isinstance(activation, JumpReLU):
        settings = {"theta": 0.0, "bandwidth": activation.bandwidth, "n_layers": n_layers, "d_features": n_features}
        kept = {"theta": activation.threshold.detach()[None], "bandwidth": torch.tensor(activation.bandwidth)}
        return _part("jumprelu.JumpReLU", settings), {f"nonlinearity.{name}": t for name, t in kept.items()}
    if isinstance(activation, TopK) and not activation.over_layers:
        k = min(activation.k, n_features)
        return _part("topk.PerLayerTopK", {"k": k, "e": None, "n_layers": n_layers}), {}
    if isinstance(activation, ReLU):
        return _part("jumprelu.ReLU", {}), {}
    raise DictionaryError(f"{_COMMUNITY} cannot hold the activation {called(activation)}; use the native format.")


def _tensors(dictionaries: DictionarySet) -> tuple[dict[str, Tensor], Activation]:
    """Encoder and decoder, and the activation of all layers."""
    if isinstance(dictionaries, CrossLayerTranscoder):
        without(clt := dictionaries, _COMMUNITY)
        tensors = {"encoder.W": clt.W_enc, "encoder.b": clt.b_enc, "decoder.b": clt.b_dec}
        for target in range(clt.n_layers):
            sources = range(target + 1)
            tensors[f"decoder.W_{target}"] = torch.stack([clt.W_dec[source][:, target - source] for source in sources])
        return tensors, clt.activation
    if not isinstance(dictionaries, TranscoderSet):
        raise DictionaryError(f"{_COMMUNITY} holds transcoders, not {dictionaries.kind!r} dictionaries.")
    layers = dictionaries.layers
    alike = {(layer.n_features, type(layer.activation), getattr(layer.activation, "k", None)) for layer in layers}
    if len(alike) > 1:
        raise DictionaryError(
            f"{_COMMUNITY} holds transcoders with as many features and the same activation in every layer, and these "
            "differ; use the native format."
        )
    for layer in layers:
        without(layer, _COMMUNITY)
    names = {"encoder.W": "W_enc", "encoder.b": "b_enc", "decoder.W": "W_dec", "decoder.b": "b_dec"}
    tensors = {name: torch.stack([getattr(layer, own) for layer in layers]) for name, own in names.items()}
    return tensors, _stacked([layer.activation for layer in layers])


FORMAT = Format(
    name="crosslayer-transcoder",
    community="crosslayer-transcoder",
    marker=f"{_SETTINGS} with model.class_path of {_PACKAGE.rstrip('.')}",
    recognises=is_crosslayer_transcoder,
    offers=offers,
    load=load,
    save=save,
)
