"""Feature cards on disk: a folder with `cards.json`, what they are and of what, and `cards.npz`, the numbers.

Neither needs torch. A set of cards beside a dictionary (`<dictionary>/cards`) is tied to the weights it was made with.

What the parts of a set of cards must have in common, checked once, so that no card of the set can fail.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from circuitsae.graph.checking import (
    LARGEST_NUMBER,
    Limits,
    MalformedError,
    array_header,
    array_names,
    mapping,
    opened_archive,
    parse_json,
    plain,
    read_bytes,
    sequence,
    shown,
    text,
    unpacked,
    whole,
)
from transcoders.errors import DictionaryError, FileFormatError
from transcoders.files import file_hash, new_files, short_hash, undisturbed, write_file

TOP = -1
"""The stratum of an example that is there because it is among the strongest."""
PARTS = (1, 2, 4, 8, 16, 32)
"""Into how many parts the range of activations may be cut: bins of a histogram, strata of examples."""
_PER_FEATURE = {"count": 1, "mean": 1, "max": 1, "histogram": 2} | {
    f"{kind}_{part}": 2
    for kind, part in [
        *product(("top", "bottom"), ("token", "value")),
        *product(("neighbour", "nearest"), ("index", "score")),
    ]
}
"""Arrays with a row per feature, and how many dimensions they have."""
_PER_EXAMPLE = {"example_tokens": 2, "example_share": 2, "example_stratum": 1}
_WHOLE = ("count", "histogram", "top_token", "bottom_token", "neighbour_index", "nearest_index", "example_start",
          "example_tokens", "example_stratum")  # fmt: skip
_SAME_SHAPE = (("top_token", "top_value"), ("bottom_token", "bottom_value"), ("neighbour_index", "neighbour_score"),
               ("nearest_index", "nearest_score"), ("example_tokens", "example_share"))  # fmt: skip

_CONNECTED = {f"{side}_{part}" for side, part in product(("input", "output"), ("index", "twera", "weight"))}
"""Arrays of some sets of cards only, all or none of them: what adds to a feature, and to what it adds."""

Arrays = Mapping[str, np.ndarray]


def check_cards(manifest: Mapping[str, Any], arrays: Arrays) -> None:
    """Raises `MalformedError` unless manifest and arrays, and the arrays among themselves, agree."""
    n, n_words, before, strata, seen = _check_manifest(manifest)
    _check_shapes(arrays, n)
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise MalformedError(f"{shown(name)} holds something that is no number")
    for name in ("example_tokens", "top_token", "bottom_token"):
        _check_range(arrays, name, 0, n_words, f"names tokens beyond the vocabulary of {n_words}")
    for name in ("neighbour_index", "nearest_index"):
        _check_range(arrays, name, -1, n - 1, f"names features beyond the {n} there are")
    _check_activations(arrays, seen)
    _check_examples(arrays, before, strata)
    if not _CONNECTED.isdisjoint(arrays):
        _check_connections(arrays, np.array(manifest["widths"]))


def _check_manifest(manifest: Mapping[str, Any]) -> tuple[int, int, int, int, int]:
    """Features, words, tokens of an example before its peak, strata, and tokens seen."""
    widths = [whole(width, "a width") for width in _numbers(manifest, "widths")]
    if not widths:
        raise MalformedError("it has no layers")
    vocabulary = sequence(manifest.get("vocabulary"), "the vocabulary")
    for word in vocabulary:
        text(word, "a word of the vocabulary")
    settings = mapping(manifest.get("settings"), "settings")
    before, strata = (_number(settings.get(name), f"settings.{name}") for name in ("before", "strata"))
    if strata not in PARTS:
        raise MalformedError(f"settings.strata is {strata}; expected one of {', '.join(map(str, PARTS))}")
    for dead in _numbers(manifest, "dead") if manifest.get("dead") is not None else ():
        whole(dead, "a number of dead features")
    return sum(widths), len(vocabulary), before, strata, _number(manifest.get("tokens_seen"), "tokens_seen")


def _numbers(manifest: Mapping[str, Any], name: str) -> list[int]:
    return [_number(value, f"one of {name}") for value in sequence(manifest.get(name), name)]


def _number(value: Any, what: str) -> int:
    """As `whole`, but nothing that would have to be converted."""
    if not isinstance(value, int):
        raise MalformedError(f"{what} is {shown(value)}; expected a whole number")
    return whole(value, what)


def _check_shapes(arrays: Arrays, n: int) -> None:
    for name in ("example_start", *_PER_FEATURE, *_PER_EXAMPLE):
        if name not in arrays:
            raise MalformedError(f"there is no {name}")
        if name in _WHOLE and arrays[name].dtype.kind not in "iu":
            raise MalformedError(f"{name} holds {arrays[name].dtype.name}; expected whole numbers")
    start = arrays["example_start"]
    if start.shape != (n + 1,):
        raise MalformedError(f"example_start has shape {start.shape}; expected ({n + 1},)")
    if start[0] != 0 or (start[1:] < start[:-1]).any():
        raise MalformedError("the examples are out of order")
    rows = dict.fromkeys(_PER_FEATURE, n) | dict.fromkeys(_PER_EXAMPLE, int(start[-1]))
    for name, n_dimensions in (_PER_FEATURE | _PER_EXAMPLE).items():
        if (array := arrays[name]).ndim != n_dimensions or len(array) != rows[name]:
            raise MalformedError(
                f"{name} has shape {shown(array.shape)}; expected {rows[name]} rows in {n_dimensions} dimensions"
            )
    for one, other in _SAME_SHAPE:
        if arrays[one].shape != arrays[other].shape:
            raise MalformedError(f"{one} has shape {arrays[one].shape}, but {other} {arrays[other].shape}")


def _check_range(arrays: Arrays, name: str, least: int, most: int, problem: str) -> None:
    array = arrays[name]
    if array.size and not least <= int(array.min()) <= int(array.max()) <= most:
        raise MalformedError(f"{name} {problem}")


def _check_activations(arrays: Arrays, seen: int) -> None:
    """Counts, maxima and histograms say the same: a feature has all of them or none."""
    count, largest, histogram = arrays["count"], arrays["max"], arrays["histogram"]
    _check_range(arrays, "count", 0, seen, f"is not from 0 to the {seen} tokens seen")
    if histogram.shape[1] not in PARTS:
        raise MalformedError(f"histogram has {histogram.shape[1]} bins; expected one of {', '.join(map(str, PARTS))}")
    _check_range(arrays, "histogram", 0, seen, f"counts what is not from 0 to the {seen} tokens seen")
    if (histogram.sum(1) != count).any():
        raise MalformedError("a histogram does not sum to its feature's count")
    if (largest[count > 0] <= 0).any() or np.abs(largest).max(initial=0.0) > LARGEST_NUMBER:
        raise MalformedError(f"the maximum of a feature that fires is not above 0 and below {LARGEST_NUMBER:g}")


def _check_examples(arrays: Arrays, before: int, strata: int) -> None:
    """Examples are of features that fire, in a stratum that there is, and have the token that they are of."""
    start, tokens = arrays["example_start"], arrays["example_tokens"]
    if ((start[1:] > start[:-1]) & (arrays["count"] == 0)).any():
        raise MalformedError("a feature that never fires has examples")
    _check_range(arrays, "example_stratum", TOP, strata - 1, f"names strata beyond the {strata} there are")
    if len(tokens) and (before >= tokens.shape[1] or (tokens[:, before] == 0).any()):
        raise MalformedError("an example lacks the token that it is an example of")


def _check_connections(arrays: Arrays, widths: np.ndarray) -> None:
    """Inputs are features of layers below, outputs of layers above; −1 is none."""
    n = int(widths.sum())
    for name in sorted(_CONNECTED):
        if name not in arrays:
            raise MalformedError(f"there is no {name}, but other arrays of inputs and outputs")
        if (array := arrays[name]).ndim != 2 or len(array) != n:
            raise MalformedError(f"{name} has shape {shown(array.shape)}; expected {n} rows in 2 dimensions")
        if array.shape != (shape := arrays[f"{name.partition('_')[0]}_index"].shape):
            raise MalformedError(f"{name} has shape {shown(array.shape)}, but the features that it is of {shape}")
    ends = np.cumsum(widths)
    below, above = (np.repeat(edge, widths)[:, None] for edge in (ends - widths, ends))
    sides = (("input", "below", lambda i: i >= below), ("output", "above", lambda i: (i < above) | (i >= n)))
    for side, where, wrong in sides:
        name, index = f"{side}_index", arrays[f"{side}_index"]
        if index.dtype.kind not in "iu":
            raise MalformedError(f"{name} holds {index.dtype.name}; expected whole numbers")
        if ((index < -1) | ((index >= 0) & wrong(index))).any():
            raise MalformedError(f"{name} names features that are in no layer {where}")


def narrow(name: str, array: np.ndarray) -> np.ndarray:
    """Integers in the smallest type that holds them; shares, scores and logit effects in half precision."""
    if array.dtype.kind == "f":
        return array if name in ("mean", "max") or np.abs(array).max(initial=0) > 6e4 else array.astype(np.float16)
    low, high = int(array.min(initial=0)), int(array.max(initial=0))
    kinds = (np.int8, np.int16, np.int32, np.int64) if low < 0 else (np.uint8, np.uint16, np.uint32, np.uint64)
    return array.astype(next(kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max))


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
