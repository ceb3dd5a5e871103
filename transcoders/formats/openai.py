"""OpenAI's autoencoders of GPT-2 small, as `sparse-autoencoder/gpt2-small/LOCATION[_VERSION]/autoencoders/LAYER.pt`.

A file is torch's, of a dictionary with `pre_bias [d]`, `latent_bias [feature]`, `encoder.weight [feature, d]`,
`decoder.weight [d, feature]` (absent where it is tied: the encoder transposed), `activation`, the name of a class (ReLU
where it is absent), with TopK its `activation_state_dict`: `k` and `postact_fn`; statistics of training beside them are
not read. `h = (x̃ − pre_bias) W_encᵀ + latent_bias`, `a = ReLU(h)` or the k largest of h through `postact_fn`,
`ỹ = a W_decᵀ + pre_bias`. TopK stands for an input normalised for each token, `x̃ = (x − mean) / (std + 1e−5)` with
Bessel's correction, and `y = ỹ std + mean`; ReLU (the versions before `v5`) for x̃ = x.
Location and layer are in the path alone: `mlp_post_act` the MLP's neurons, `resid_delta_mlp` and `resid_delta_attn`
what MLP and attention add, `resid_post_attn` and `resid_post_mlp` the stream after them. The model's writing weights
were not centred, so that all of them are places of the raw model.

Sources: Gao et al. 2024, *Scaling and Evaluating Sparse Autoencoders*; github.com/openai/sparse_autoencoder, its
`model.py`, `paths.py` and README.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from transcoders.dictionaries import Activation, DictionaryProvenance, DictionarySet, ReLU, SAESet, TopK
from transcoders.dictionaries.token_norm import TokenNorm
from transcoders.errors import DictionaryError, FileFormatError
from transcoders.files import new_files
from transcoders.formats.building import LayerWeights, assemble, centred_bias, present
from transcoders.formats.format import Format
from transcoders.formats.offers import Offer, width_of
from transcoders.formats.source import LocalFolder, Source, full_name, names_in
from transcoders.formats.weights import Reading, Weights, as_stored, open_weights, write_torch
from transcoders.sites import Site, SiteKind

_COMMUNITY = "OpenAI's format"
_SITES: dict[str, SiteKind] = {
    "mlp_post_act": "mlp_neurons",
    "resid_delta_mlp": "mlp_added",
    "resid_delta_attn": "attn_added",
    "resid_post_attn": "resid_mid",
    "resid_post_mlp": "resid_post",
}
_WRITTEN: dict[SiteKind, str] = {
    **{site: place for place, site in _SITES.items()},
    "mlp_out": "resid_delta_mlp",  # the same in GPT-2
    "attn_out": "resid_delta_attn",
}
_FILE = re.compile(r"(\d{1,5})\.pt")
_PLACE = re.compile(rf"(?P<place>{'|'.join(_SITES)})(?:_(?P<version>v\d+(?:_(?P<width>[1-9]\d*k))?))?/autoencoders/$")
_SHAPES: dict[str, tuple[int | str, ...]] = {
    "pre_bias": ("d",),
    "latent_bias": ("feature",),
    "encoder.weight": ("feature", "d"),
}


def is_openai(source: Source) -> bool:
    if any(_is_file(source, name) for name in source.names):
        return True
    return isinstance(source, LocalFolder) and len(source.names) == 1 and _is_renamed(source)


def _is_file(source: Source, name: str) -> bool:
    path = PurePosixPath(full_name(source, name))
    return _FILE.fullmatch(path.name) is not None and path.parent.name == "autoencoders"


def _is_renamed(source: LocalFolder) -> bool:
    """Whether one file by another name holds these tensors."""
    path = source.folder / source.names[0]
    return path.suffix == ".pt" and set(_SHAPES) <= set(open_weights(path).shapes)


def offers_of(source: Source) -> list[Offer]:
    """One for each file, by its path."""
    return [_offer(source, name) for name in source.names if _is_file(source, name)] or [
        Offer(id="", files=tuple(source.names), kind="sae", asks=("site", "layer"))
    ]


def _offer(source: Source, name: str) -> Offer:
    full = full_name(source, name)
    number, found = _FILE.search(full), _PLACE.search(full.removesuffix(PurePosixPath(full).name))
    return Offer(
        id=name,
        files=(name,),
        kind="sae",
        layer=None if number is None else int(PurePosixPath(full).stem),
        site=None if found is None else _SITES[found["place"]],
        width=width_of(found["width"]) if found is not None and found["width"] else None,
        variant=None if found is None else found["version"],
        asks=("site",) if found is None else (),
    )


def load_openai(source: Source, offers: Sequence[Offer], reading: Reading) -> DictionarySet:
    layers = []
    for offer, path in zip(offers, source.fetch([offer.files[0] for offer in offers]), strict=True):
        layers.append(_read(path, reading, offer.read))
    model = "gpt2" if "gpt2-small" in full_name(source, offers[0].files[0]) else "unknown"
    config = {"files": [offer.files[0] for offer in offers]}
    return assemble(layers, DictionaryProvenance(model=model, config=config), source.label)


def _read(path: Path, reading: Reading, site: Site) -> LayerWeights:
    weights = open_weights(path)
    tied = "decoder.weight" not in weights.shapes
    shapes = _SHAPES if tied else _SHAPES | {"decoder.weight": ("d", "feature")}
    weights.require(shapes)
    tensors = weights.floating(shapes, reading)
    W_enc = tensors["encoder.weight"].T
    activation = _activation(weights)
    return LayerWeights(
        W_enc=W_enc,
        b_enc=tensors["latent_bias"],
        W_dec=W_enc.T.clone() if tied else tensors["decoder.weight"].T,
        b_dec=tensors["pre_bias"],
        activation=activation,
        read=site,
        write=site,
        centred=True,
        norm=TokenNorm("layer_norm") if isinstance(activation, TopK) else None,
    )


def _activation(weights: Weights) -> Activation:
    name = weights.extra.get("activation", "ReLU")
    if name == "ReLU":
        return ReLU()
    k, after = (weights.extra.get(f"activation_state_dict.{key}") for key in ("k", "postact_fn"))
    if name != "TopK" or after not in ("ReLU", None) or isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise FileFormatError(
            f"{weights.path} has the activation {str(name)[:40]!r} with k={str(k)[:40]} and "
            f"postact_fn={str(after)[:40]!r}; expected 'ReLU', or 'TopK' with a positive k and 'ReLU'."
        )
    return TopK(k)


def save_openai(dictionaries: DictionarySet, folder: Path, *, storage_dtype: torch.dtype | None = None) -> None:
    """Write `LOCATION/autoencoders/LAYER.pt` of every layer that has a dictionary.

    Raises `DictionaryError` for what the files cannot hold: transcoders, other sites, JumpReLU, and TopK without the
    norm of each token that goes with it there.
    """
    every = present(dictionaries, _COMMUNITY)
    if not isinstance(dictionaries, SAESet) or (place := _WRITTEN.get(every[0].read.kind)) is None:
        raise DictionaryError(
            f"{_COMMUNITY} holds SAEs of {', '.join(_WRITTEN)}, not dictionaries that read {every[0].read.kind} and "
            f"write {every[0].writes[0].kind}; use the native format."
        )
    files: dict[str, dict[str, Any]] = {}
    for sae in every:
        norm = None if sae.norm is None else sae.norm.name
        if (type(sae.activation), norm) not in ((TopK, "layer_norm"), (ReLU, None)):
            raise DictionaryError(
                f"{_COMMUNITY} holds ReLU without a norm of each token and TopK with 'layer_norm', not "
                f"{type(sae.activation).__name__} with {sae.norm}; use the native format."
            )
        n, W = sae.n_features, {"encoder.weight": sae.W_enc.T, "decoder.weight": sae.W_dec.T}
        files[f"{place}/autoencoders/{sae.read.layer}.pt"] = {
            "pre_bias": sae.b_dec,
            "latent_bias": centred_bias(sae),
            **as_stored(W, storage_dtype),
            "stats_last_nonzero": torch.zeros(n, dtype=torch.long),
            "latents_activation_frequency": torch.ones(n),
            "latents_mean_square": torch.zeros(n),
            **_described(sae.activation),
        }
    target = LocalFolder(folder)
    stale = [name for name in names_in(folder) if _is_file(target, name) and name not in files]
    with new_files(folder, without=stale) as temporary:
        for name, content in files.items():
            write_torch(temporary / name, content)


def _described(activation: Activation) -> Mapping[str, Any]:
    if isinstance(activation, TopK):
        return {"activation": "TopK", "activation_state_dict": {"k": activation.k, "postact_fn": "ReLU"}}
    return {"activation": "ReLU", "activation_state_dict": {}}


FORMAT = Format(
    name="openai",
    community="OpenAI",
    marker="LOCATION/autoencoders/LAYER.pt",
    recognises=is_openai,
    offers=offers_of,
    load=load_openai,
    save=save_openai,
)
