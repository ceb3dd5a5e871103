"""Feature cards on disk: a folder with `cards.json`, what they are and of what, and `cards.npz`, the numbers.

Neither needs torch. A set of cards beside a dictionary (`<dictionary>/cards`) is tied to the weights it was made with.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from circuitsae.graph.archives import array_header, array_names, opened_archive, unpacked
from circuitsae.graph.checking import Limits, MalformedError, parse_json, plain, read_bytes, shown
from transcoders.errors import DictionaryError, FileFormatError
from transcoders.files import file_hash, new_files, short_hash, undisturbed, write_file

FORMAT = "circuitsae-cards/1"
FOLDER = "cards"
"""Name of the folder of cards inside that of a dictionary."""
MANIFEST, ARRAYS = "cards.json", "cards.npz"
_BLOCK, _BLOCKS = 4096, 256
_LARGEST = 8 * 2**30
"""Bytes that the arrays of a set of cards may take, on disk and in memory."""
_MANIFEST_LIMITS = Limits(file_bytes=2**26)


def cards_folder(path: str | Path) -> Path:
    """Where the cards are: `path` itself, or its folder `cards`."""
    path = Path(path)
    return path if _is_file(path / MANIFEST) else path / FOLDER


def has_cards(path: str | Path) -> bool:
    """Whether a folder, or the dictionary in it, has cards; False for a name that no folder can have."""
    return _is_file(cards_folder(path) / MANIFEST)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long, a folder that may not be read
        return False


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], *, compressed: bool) -> str:
    """Write arrays as npz, whole or not at all; returns the SHA-256 of the file."""
    write = np.savez_compressed if compressed else np.savez
    write_file(path, lambda file: write(file, allow_pickle=False, **dict(arrays)))
    return file_hash(path)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file. Raises `FileFormatError` for anything else, and before it allocates too much."""
    if not _is_file(path):
        raise FileFormatError(f"There is no file {path}; collect the cards again.")
    try:
        with opened_archive(path, largest=_LARGEST) as archive:
            headers = {name: array_header(archive, name) for name in array_names(archive)}
            for name, header in headers.items():
                if header.dtype.kind not in "iuf":
                    raise MalformedError(f"{shown(name)} holds {shown(header.dtype.name)}; expected numbers")
                header.check_size(shown(name))
            if (size := sum(header.size for header in headers.values())) > _LARGEST:
                raise MalformedError(f"it would take {size / 2**30:.0f} GB")
            return {name: unpacked(archive, name) for name in headers}
    except MalformedError as error:
        raise FileFormatError(f"{path} is no whole set of arrays ({error}); collect the cards again.") from error


def write_cards(folder: Path, manifest: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write both files; the manifest names the weights of the dictionary that the folder lies in, if there is one."""
    with new_files(folder) as temporary:
        digest = write_arrays(temporary / ARRAYS, arrays, compressed=True)
        record = {"format": FORMAT, "arrays": digest, "dictionary_files": files_fingerprint(folder.parent), **manifest}
        write_file(temporary / MANIFEST, json.dumps(record, ensure_ascii=True, allow_nan=False, indent=1))


def read_cards(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Manifest and arrays. Raises `FileFormatError` for files that are no cards, `DictionaryError` for another's."""
    folder = cards_folder(path)
    require_cards(folder)
    with undisturbed(folder):
        return _read_cards(folder)


def _read_cards(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    manifest = _read_manifest(folder / MANIFEST)
    arrays = folder / ARRAYS
    try:
        made_with, found = manifest.get("dictionary_files"), files_fingerprint(folder.parent)
        together = not arrays.is_file() or file_hash(arrays) == manifest.get("arrays")
    except OSError as error:
        raise FileFormatError(f"The cards in {folder} cannot be read ({error}); collect them again.") from error
    if made_with is not None and found is not None and made_with != found:
        raise DictionaryError(
            f"The cards in {folder} were collected with dictionary {shown(made_with)}, but {folder.parent} holds "
            f"{found}; collect them again: circuitsae features collect."
        )
    if not together:
        raise FileFormatError(f"{arrays} and {folder / MANIFEST} were not written together; collect the cards again.")
    return manifest, read_arrays(arrays)


def require_cards(folder: Path) -> None:
    """Raises `FileFormatError` where there are no cards in the folder."""
    if not _is_file(folder / MANIFEST):
        raise FileFormatError(f"There are no feature cards at {folder}; make them with: circuitsae features collect.")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = plain(parse_json(read_bytes(path, _MANIFEST_LIMITS), _MANIFEST_LIMITS))
        if (form := manifest.get("format")) != FORMAT:
            raise MalformedError(f"its format is {shown(form)}, expected {FORMAT!r}")
    except MalformedError as error:
        raise FileFormatError(f"{path} does not describe feature cards ({error}); collect them again.") from error
    return manifest


def files_fingerprint(folder: Path) -> str | None:
    """A short hash of the weights in a folder: sizes, and 256 evenly spaced blocks of each file. None without any."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    return short_hash(part for path in files for part in _sample(path))


def _sample(path: Path) -> Iterator[bytes | str]:
    size = path.stat().st_size
    yield f"{path.name} {size}"
    with path.open("rb") as file:
        for start in range(0, size, max(_BLOCK, size // _BLOCKS)):
            file.seek(start)
            yield file.read(_BLOCK)
