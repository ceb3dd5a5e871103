"""What the parts of a set of cards must have in common, checked once, so that no card of the set can fail."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np

from circuitsae.graph.checking import LARGEST_NUMBER, MalformedError, mapping, sequence, shown, text, whole

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
