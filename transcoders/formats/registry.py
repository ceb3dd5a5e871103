"""Which format a folder or repository is in, and the way to each format's reader and writer."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypedDict

import torch

from transcoders.devices import AUTO
from transcoders.dictionaries import DictionarySet, MappedDictionaries, MixedSet, SAESet, TranscoderSet
from transcoders.errors import DictionaryError, FileFormatError, InputError
from transcoders.formats import (
    circuit_tracer,
    clt_forge,
    clt_training,
    crosslayer_transcoder,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    native,
    openai,
    saelens,
    sparsify,
)
from transcoders.formats.files import DecoderPlace
from transcoders.formats.format import Format, FormatName
from transcoders.formats.left_out import save_left_out, with_left_out
from transcoders.formats.offers import Choice, Offer, choose
from transcoders.formats.source import LocalFolder, ReleaseFolder, Source, open_source, some
from transcoders.formats.weights import Reading
from transcoders.precision import Precision, as_dtype, check_device

logger = logging.getLogger(__name__)

FORMATS: dict[FormatName, Format] = {
    form.name: form
    for form in (
        native.FORMAT, circuit_tracer.FORMAT, saelens.FORMAT, clt_training.FORMAT, sparsify.FORMAT, clt_forge.FORMAT,
        crosslayer_transcoder.FORMAT, gemma_scope.FORMAT, gemma_scope_2.FORMAT,
        dictionary_learning.FORMAT, openai.FORMAT,
    )
}  # fmt: skip
"""In the order in which a source is asked."""


class Wanted(TypedDict, total=False):
    """The arguments of `load_dictionaries`, for those who pass them on."""

    sae_id: str | None
    """The folder or file inside of the source."""
    layers: int | Iterable[int] | None
    site: str | None
    """A kind of site that is read, such as `resid_post`."""
    width: int | str | None
    """Features of a layer: 16384 or "16k"."""
    l0: float | int | None
    """Active features of a token; the nearest is taken."""
    variant: str | None
    """What else tells dictionaries apart, as their author calls it; "none" where it is nothing."""
    revision: str | None
    """Of a repository of the hub."""
    dtype: Precision | None
    """Precision of the loaded weights, whatever that of the file."""
    device: str | torch.device
    decoders: DecoderPlace
    """`mapped`: they stay in the file, and only the rows of active features are read."""


def load_dictionaries(
    path: Path | str,
    *,
    sae_id: str | None = None,
    layers: int | Iterable[int] | None = None,
    site: str | None = None,
    width: int | str | None = None,
    l0: float | int | None = None,
    variant: str | None = None,
    revision: str | None = None,
    dtype: Precision | None = None,
    device: str | torch.device = "auto",
    decoders: DecoderPlace = "memory",
) -> DictionarySet:
    """Dictionaries of any community: from a local folder or file, or from a repository of the Hugging Face hub.

    `path`: a folder, a file, `OWNER/NAME[@REVISION][/SUB/FOLDER]`, `hf://…`, circuit-tracer's short names (`gemma`,
    `llama`) or a release of SAELens'. Where it offers more than one dictionary for a layer, `sae_id` (its folder),
    `layers`, `site`, `width` (16384 or "16k"), `l0` (the nearest is taken) and `variant` say which is meant, and
    `revision` which version of a repository. `dtype`: precision of the loaded weights, whatever that of the file;
    float32 by default. `device`: by default `"auto"`, in memory until a model takes them to its
    own. `decoders`: with `"mapped"` they stay in the file, and only the rows of active features are read, for decoders
    larger than memory.
    Raises `FileFormatError` where nothing is there, where it is in no known format, or is not what it claims to be,
    and `InputError` with the options where a choice is missing, and for a device that cannot be used.
    """
    if decoders not in ("memory", "mapped"):
        raise InputError(
            f"Unknown place for decoders {decoders!r}; they are kept in 'memory', or 'mapped' to the file."
        )
    device = "cpu" if device == AUTO else device
    check_device(device)
    reading = Reading(
        dtype=torch.float32 if dtype is None else as_dtype(dtype),
        device=device,
        decoders=decoders,
    )
    choice = Choice.of(id=sae_id, layers=layers, site=site, width=width, l0=l0, variant=variant)
    source = open_source(path, revision)
    if isinstance(source, ReleaseFolder) and choice.id is not None:
        source = source.only(choice.id)
    form = format_of(source)
    if decoders == "mapped" and not form.maps_decoders:
        able = ", ".join(name for name, other in FORMATS.items() if other.maps_decoders)
        raise InputError(
            f"Decoders of {source.label} cannot stay in their files, which are in the format {form.name!r}; load them "
            f"into memory, or convert them to one of ({able}) first."
        )
    offers = form.offers(source)
    by_release = isinstance(source, ReleaseFolder)
    chosen = (source.release.choose if by_release else choose)(offers, choice, source.label)
    logger.info("loading %s dictionaries from %s", form.name, source.label)
    loaded = form.load(source, chosen, reading)
    if form is not native.FORMAT:
        loaded = with_left_out(loaded, source)
    is_whole = any(offer.layer is None for offer in chosen)
    return loaded if choice.layers is None or not is_whole else _layers_of(loaded, choice.layers, source.label)


def list_dictionaries(path: Path | str, *, revision: str | None = None) -> tuple[str, list[Offer]]:
    """The format, and what a folder or repository offers, by names and settings: no weights are read or downloaded.

    Of a release of SAELens' it is what SAELens' list of releases tells, and the hub is not asked; the format is then
    SAELens' name for it.
    """
    source = open_source(path, revision)
    if isinstance(source, ReleaseFolder):
        return source.release.conversion or "saelens", source.release.offers()
    form = format_of(source)
    return form.name, form.offers(source)


def save_dictionaries(
    dictionaries: DictionarySet,
    path: Path | str,
    *,
    format: FormatName = "native",
    storage_dtype: Precision | None = None,
) -> None:
    """Write dictionaries to a folder; `storage_dtype`: precision of the stored weights, by default their own."""
    if format not in FORMATS:
        raise InputError(f"Unknown format {format!r}; dictionaries are saved as {', '.join(map(repr, FORMATS))}.")
    if isinstance(dictionaries, MappedDictionaries):
        raise DictionaryError(
            "The decoders of these dictionaries are mapped to their file and cannot be saved from there; "
            "load them with decoders='memory'."
        )
    precision, folder = None if storage_dtype is None else as_dtype(storage_dtype), Path(path).expanduser()
    there = LocalFolder(folder) if folder.is_dir() else None
    held = None if there is None else next((name for name, other in FORMATS.items() if other.recognises(there)), format)
    if held not in (None, format):
        raise InputError(f"{folder} holds dictionaries in the format {held!r}; save these to another folder.")
    if (frame := dictionaries.provenance.frame.name) != "raw" and not FORMATS[format].keeps_frame:
        raise DictionaryError(
            f"The format {format!r} is of models as they are published, but these dictionaries were trained in the "
            f"{frame!r} frame; use one of ({', '.join(name for name, other in FORMATS.items() if other.keeps_frame)})."
        )
    FORMATS[format].save(dictionaries, folder, storage_dtype=precision)
    if format != "native":
        save_left_out(dictionaries, folder)


def _layers_of(dictionaries: DictionarySet, layers: Sequence[int], label: str) -> DictionarySet:
    """Some layers of a set that is stored as one; the others have no features."""
    if set(layers) == set(range(dictionaries.n_layers)):
        return dictionaries
    if not isinstance(dictionaries, TranscoderSet | SAESet | MixedSet):
        raise InputError(
            f"{label} holds one set whose layers cannot be taken apart ({type(dictionaries).__name__}); leave out "
            "layers=… (--layers)."
        )
    if max(layers) >= dictionaries.n_layers:
        raise InputError(f"{label} has layers 0 to {dictionaries.n_layers - 1}, not {max(layers)}.")
    return dictionaries.only(layers)


def format_of(source: Source) -> Format:
    """The first format that a source claims to be in."""
    for form in FORMATS.values():
        if form.recognises(source):
            return form
    if isinstance(source, ReleaseFolder) and (conversion := source.release.conversion) is not None:
        raise FileFormatError(
            f"{source.label} is in a layout that SAELens converts by {conversion!r} and this package does not read; "
            "load it with SAELens, save it as SAELens does, and load that folder."
        )
    if any(name.endswith("state.safetensors") for name in source.names):
        raise FileFormatError(
            f"{source.label} holds checkpoints of training, and no dictionaries yet; `transcoders.from_checkpoint` "
            "makes some of them, and `train` with `resume` goes on."
        )
    raise FileFormatError(
        f"{source.label} holds no dictionaries in a known format ({', '.join(FORMATS)}); its files are "
        f"({some(source.names, 3)[:200] or 'none'}), those of each format are named in docs/dictionaries.md."
    )
