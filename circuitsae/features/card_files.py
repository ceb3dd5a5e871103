"""Feature cards on disk: a folder with `cards.json`, what they are and of what, and `cards.npz`, the numbers.

Neither needs torch. A set of cards beside a dictionary (`<dictionary>/cards`) is tied to the weights it was made with.
"""

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from circuitsae.graph.files import write_atomically
from transcoders.errors import DictionaryError, FileFormatError

FORMAT = "circuitsae-cards/1"
FOLDER = "cards"
"""Name of the folder of cards inside that of a dictionary."""
MANIFEST, ARRAYS = "cards.json", "cards.npz"
_BLOCK, _BLOCKS = 4096, 256
_LARGEST = 8 * 2**30
"""Bytes that the arrays of a set of cards may take in memory."""


def cards_folder(path: str | Path) -> Path:
    """Where the cards are: `path` itself, or its folder `cards`."""
    path = Path(path)
    return path if (path / MANIFEST).is_file() else path / FOLDER


def has_cards(path: str | Path) -> bool:
    """Whether a folder, or the dictionary in it, has cards."""
    return (cards_folder(path) / MANIFEST).is_file()


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], *, compressed: bool) -> str:
    """Write arrays as npz, whole or not at all; returns the SHA-256 of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            (np.savez_compressed if compressed else np.savez)(file, allow_pickle=False, **dict(arrays))
        digest = _sha256(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return digest


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file. Raises `FileFormatError` for anything else, and before it allocates too much."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _LARGEST:
            raise ValueError(f"it would take {size / 2**30:.0f} GB")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise FileFormatError(f"There is no file {path}; collect the cards again.") from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise FileFormatError(f"{path} is no whole set of arrays ({error}); collect the cards again.") from error


def write_cards(folder: Path, manifest: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write both files; the manifest names the weights of the dictionary that the folder lies in, if there is one."""
    digest = write_arrays(folder / ARRAYS, arrays, compressed=True)
    record = {"format": FORMAT, "arrays": digest, "dictionary_files": files_fingerprint(folder.parent), **manifest}
    write_atomically(folder / MANIFEST, json.dumps(record, ensure_ascii=True, allow_nan=False, indent=1).encode())


def read_cards(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Manifest and arrays. Raises `FileFormatError` for files that are no cards, `DictionaryError` for another's."""
    folder = cards_folder(path)
    manifest = _read_manifest(folder / MANIFEST)
    made_with, found = manifest.get("dictionary_files"), files_fingerprint(folder.parent)
    if made_with is not None and found is not None and made_with != found:
        raise DictionaryError(
            f"The cards in {folder} were collected with dictionary {made_with}, but {folder.parent} holds {found}; "
            "collect them again: circuitsae features collect."
        )
    arrays = folder / ARRAYS
    if arrays.is_file() and _sha256(arrays) != manifest.get("arrays"):
        raise FileFormatError(f"{arrays} and {folder / MANIFEST} were not written together; collect the cards again.")
    return manifest, read_arrays(arrays)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
            raise ValueError(f"its format is {found!r}, expected {FORMAT!r}")
        return manifest
    except FileNotFoundError:
        raise FileFormatError(
            f"There are no feature cards at {path.parent}; make them with: circuitsae features collect."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} does not describe feature cards ({error}); collect them again.") from error


def files_fingerprint(folder: Path) -> str | None:
    """A short hash of the weights in a folder: sizes, and 256 evenly spaced blocks of each file. None without any."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(_BLOCK, size // _BLOCKS)):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
