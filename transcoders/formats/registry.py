"""Which format a folder is in, and the way to each format's reader and writer."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from transcoders.dictionaries import DictionarySet, MappedDictionaries
from transcoders.errors import DictionaryError, FileFormatError, InputError
from transcoders.formats import circuit_tracer, native
from transcoders.formats.files import DecoderPlace
from transcoders.hub import first_line, folder_or_name
from transcoders.precision import Precision, as_dtype

FormatName = Literal["native", "circuit-tracer"]


@dataclass(frozen=True)
class Format:
    """One way to store dictionaries."""

    recognises: Callable[[Path], bool]
    """Whether a folder claims to be in this format."""
    marker: str
    """What it is recognised by, for messages."""
    load: Callable[..., DictionarySet]
    save: Callable[..., None]


FORMATS: dict[FormatName, Format] = {
    "native": Format(
        native.is_native, 'config.json with "format": "transcoders"', native.load_native, native.save_native
    ),
    "circuit-tracer": Format(
        circuit_tracer.is_circuit_tracer,
        "config.yaml with model_kind",
        circuit_tracer.load_circuit_tracer,
        circuit_tracer.save_circuit_tracer,
    ),
}


def load_dictionaries(
    path: Path | str,
    *,
    dtype: Precision | None = None,
    device: str | torch.device = "cpu",
    decoders: DecoderPlace = "memory",
) -> DictionarySet:
    """The dictionaries in a local folder, or in a repository of the Hugging Face hub.

    `dtype`: precision of the loaded weights, whatever that of the file; float32 by default. `decoders`: with
    `"mapped"` they stay in the file, and only the rows of active features are read, for decoders larger than memory.
    Raises `FileFormatError` where the folder is in no known format, or is not what it claims to be.
    """
    if decoders not in ("memory", "mapped"):
        raise InputError(
            f"Unknown place for decoders {decoders!r}; they are kept in 'memory', or 'mapped' to the file."
        )
    precision = None if dtype is None else as_dtype(dtype)
    folder = _local_folder(path)
    for name, form in FORMATS.items():
        if form.recognises(folder):
            logging.getLogger(__name__).info("loading %s dictionaries from %s", name, folder)
            return form.load(folder, dtype=precision, device=device, decoders=decoders)
    expected = "; ".join(f"{name}: {form.marker}" for name, form in FORMATS.items())
    raise FileFormatError(f"{folder} holds no dictionaries in a known format; expected one of ({expected}).")


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
    for name, other in FORMATS.items():
        if name != format and folder.is_dir() and other.recognises(folder):
            raise InputError(f"{folder} holds dictionaries in the format {name!r}; save these to another folder.")
    FORMATS[format].save(dictionaries, folder, storage_dtype=precision)


def _local_folder(path: Path | str) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise FileFormatError(f"{folder} is a file; give the folder of the dictionaries that holds it.")
    if isinstance(path, Path) or str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
        raise FileFormatError(f"There is no folder {folder}; give a folder of dictionaries, or a hub name OWNER/NAME.")
    return _download(str(path))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    instead = "check the name and the network, or give a local folder"
    found = folder_or_name(name, f"The dictionaries {name!r}", FileFormatError, instead)
    if isinstance(found, Path):
        return found
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.yaml", "*.safetensors"]))
    except Exception as error:  # the hub client raises many kinds, of its own and of its HTTP library
        raise FileFormatError(f"Could not download {name!r} from the hub ({first_line(error)}); {instead}.") from error
