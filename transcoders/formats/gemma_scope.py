"""Gemma Scope: JumpReLU dictionaries of Gemma 2, as repositories `google/gemma-scope-{2b,9b,27b}-{pt,it}-…` hold them.

    layer_L/width_W/average_l0_K/params.npz     W is 16k, 65k, …, 1m, K the mean L0
    layer_L/width_W/canonical/params.npz        in some revisions: a copy of the one whose L0 is nearest to 100
    embedding/width_W/average_l0_K/params.npz   of the token's embedding (in `-res`)

`W_enc [d, feature]`, `b_enc`, `W_dec [feature, d]`, `b_dec`, `threshold [feature]`: `h = x W_enc + b_enc`,
`a = h · 1[h > threshold]`, `y = a W_dec + b_dec`; nothing is centred or scaled. Where they read is not in the files
but in the repository's name: `res` the stream after a block, `mlp` what the MLP adds to it (after its post-norm), `att`
what W_O reads (heads side by side), `transcoders` the normalised MLP input before the norm applies its weight, of which
they predict what the MLP adds. A folder that is called so (`res/`, …) says it as well.
An embedding's dictionary was trained on rows of the embedding matrix, which Gemma multiplies by √d: with x = √d e,
`h = x (W_enc / √d) + b_enc` and `y = a (√d W_dec) + √d b_dec`.

Sources: Lieberum et al. 2024, *Gemma Scope* (arXiv:2408.05147), sections 3.1 and 4 and the technical details of the
transcoders; the model cards; SAELens 6 and circuit-tracer 0.5, which read these files.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import torch

from transcoders.dictionaries import DictionaryProvenance, DictionarySet
from transcoders.errors import DictionaryError, FileFormatError
from transcoders.files import new_files
from transcoders.formats.building import LayerWeights, assemble, jump, present, threshold_of, without
from transcoders.formats.format import Format
from transcoders.formats.offers import Offer, unsaid, width_of, width_text
from transcoders.formats.source import Source, folder_of, full_name, names_in
from transcoders.formats.weights import Reading, as_stored, open_weights, write_npz
from transcoders.sites import Site, SiteKind

_COMMUNITY = "Gemma Scope"
_FILE = "params.npz"
_PLACE = re.compile(
    r"(?:^|/)(?:layer_(?P<layer>\d{1,5})|(?P<embedding>embedding))/width_(?P<width>[1-9]\d{0,8}[km]?)"
    r"/(?:average_l0_(?P<l0>\d{1,9})|(?P<canonical>canonical))/params\.npz$"
)
_REPOSITORY = re.compile(r"gemma-scope-(?P<size>\d{1,3}b)-(?P<stage>pt|it)-(?P<place>res|mlp|att|transcoders)(?![a-z])")
_SITES: dict[str, tuple[SiteKind, SiteKind]] = {
    "res": ("resid_post", "resid_post"),
    "mlp": ("mlp_added", "mlp_added"),
    "att": ("attn_z", "attn_z"),
    "transcoders": ("mlp_normed", "mlp_added"),
}
_CANONICAL_L0 = 100.0
"""What the L0 of the canonical ones is near to."""
_SHAPES: dict[str, tuple[int | str, ...]] = {
    "W_enc": ("d", "feature"),
    "b_enc": ("feature",),
    "W_dec": ("feature", "d"),
    "b_dec": ("d",),
    "threshold": ("feature",),
}


def is_gemma_scope(source: Source) -> bool:
    alone = len(source.names) == 1 and source.names[0].endswith(".npz")
    return alone or any(PurePosixPath(name).name == _FILE for name in source.names)


def offers_of(source: Source) -> list[Offer]:
    """One for each file, by its path."""
    names = [name for name in source.names if name.endswith(_FILE)] or list(source.names)
    several = {str(PurePosixPath(name).parent.parent) for name in names if "/average_l0_" in f"/{name}"}
    return [_offer(source, name, several) for name in names]


def _offer(source: Source, name: str, several: set[str]) -> Offer:
    full = full_name(source, name)
    found = _PLACE.search(full)
    place = _place(full, str(PurePosixPath(full).parent) if found is None else full[: found.start()])
    site: SiteKind | None = None if place is None else _SITES[place][0]
    folder = PurePosixPath(name).parent
    if found is None:
        layer, width, l0 = None, None, None
    else:
        layer = 0 if found["embedding"] else int(found["layer"])
        width = width_of(found["width"])
        l0 = float(found["l0"]) if found["l0"] else None
        site = "resid_pre" if found["embedding"] else site
        if found["canonical"] and str(folder.parent) in several:
            l0 = _CANONICAL_L0
    return Offer(
        id=folder_of(name),
        files=(name,),
        kind=None if site is None else _kind(site),
        layer=layer,
        site=site,
        width=width,
        l0=l0,
        variant="embedding" if found is not None and found["embedding"] else None,
        asks=unsaid(site, layer),
    )


def _place(full: str, tree: str) -> str | None:
    """Where the dictionaries read, in the words of the repositories' names: of one, or of the tree's own folder."""
    if found := list(_REPOSITORY.finditer(full)):
        return found[-1]["place"]
    name = PurePosixPath(tree).name
    return name if name in _SITES else None


def _kind(site: str) -> str:
    return "plt" if site == "mlp_normed" else "sae"


def load_gemma_scope(source: Source, offers: Sequence[Offer], reading: Reading) -> DictionarySet:
    layers = []
    for offer, path in zip(offers, source.fetch([offer.files[0] for offer in offers]), strict=True):
        weights = read_params(path, reading, offer.read)
        layers.append(_of_stream(weights) if offer.variant == "embedding" else weights)
    full = full_name(source, offers[0].files[0])
    repository = list(_REPOSITORY.finditer(full))
    model = "unknown"
    if repository:
        model = f"google/gemma-2-{repository[-1]['size']}" + ("-it" if repository[-1]["stage"] == "it" else "")
    config = {"files": [offer.files[0] for offer in offers]}
    provenance = DictionaryProvenance(model=model, bos=True if repository else None, config=config)
    return assemble(layers, provenance, source.label)


def read_params(path: Path, reading: Reading, read: Site, write: Site | None = None) -> LayerWeights:
    """The dictionary in one `params.npz`, which reads `read`; by default a transcoder's write is what the MLP adds."""
    weights = open_weights(path)
    names = {name if name in weights.shapes else name.replace("W_", "w_"): name for name in _SHAPES}
    weights.require({stored: _SHAPES[name] for stored, name in names.items()})
    found = weights.floating(names, reading)
    tensors = {name: found[stored] for stored, name in names.items()}
    if "scaling_factor" in weights.shapes:
        factor = weights.floating(["scaling_factor"], reading)["scaling_factor"]
        if not torch.allclose(factor, torch.ones_like(factor)):
            raise FileFormatError(
                f"{path} has a scaling_factor beside 1, of whose meaning nothing is published; expected ones."
            )
    if write is None:
        write = Site(read.layer, "mlp_added") if read.kind == "mlp_normed" else read
    return LayerWeights(
        W_enc=tensors["W_enc"], b_enc=tensors["b_enc"], W_dec=tensors["W_dec"], b_dec=tensors["b_dec"],
        activation=jump(tensors["threshold"], tensors["b_enc"]), read=read, write=write,
    )  # fmt: skip


def _of_stream(weights: LayerWeights) -> LayerWeights:
    """A dictionary of rows of the embedding matrix, as one of the stream that they become."""
    root = weights.W_enc.shape[0] ** 0.5
    return replace(weights, W_enc=weights.W_enc / root, W_dec=weights.W_dec * root, b_dec=weights.b_dec * root)


def save_gemma_scope(dictionaries: DictionarySet, folder: Path, *, storage_dtype: torch.dtype | None = None) -> None:
    """Write `PLACE/layer_L/width_W/canonical/params.npz` of every layer that has a dictionary.

    Raises `DictionaryError` for what the files cannot hold: other sites, TopK, a norm, a skip term.
    """
    every = present(dictionaries, _COMMUNITY)
    sites = every[0].read.kind, every[0].writes[0].kind
    place = next((place for place, known in _SITES.items() if known == sites), None)
    if place is None:
        known = ", ".join(f"{name} ({read} → {write})" for name, (read, write) in _SITES.items())
        raise DictionaryError(
            f"{_COMMUNITY} has no place for dictionaries that read {sites[0]} and write {sites[1]}; it has {known}."
        )
    files = {}
    for dictionary in every:
        without(dictionary, _COMMUNITY)
        width = width_text(dictionary.n_features)
        files[f"{place}/layer_{dictionary.read.layer}/width_{width}/canonical/{_FILE}"] = {
            "W_enc": dictionary.W_enc,
            "b_enc": dictionary.encoder_bias,
            "W_dec": dictionary.W_dec,
            "b_dec": dictionary.b_dec,
            "threshold": threshold_of(dictionary, _COMMUNITY),
        }
    stale = [name for name in names_in(folder) if name.endswith(_FILE) and name not in files]
    with new_files(folder, without=stale) as temporary:
        for name, tensors in files.items():
            write_npz(temporary / name, as_stored(tensors, storage_dtype))


FORMAT = Format(
    name="gemma-scope",
    community="Gemma Scope",
    marker="layer_L/width_W/average_l0_K/params.npz",
    recognises=is_gemma_scope,
    offers=offers_of,
    load=load_gemma_scope,
    save=save_gemma_scope,
)
