"""What the settings of dictionaries and the tensors in their files must be: judged before anything is loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from transcoders.errors import FileFormatError

LARGEST_WEIGHT = 1e15
"""No network has a larger weight; its square, summed, stays finite in float32."""
_LAYERS = 10_000

_ACTIVATION = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"enum": ["relu", "jumprelu", "topk"]},
        "bandwidth": {"type": "number", "exclusiveMinimum": 0, "maximum": 1e6},
        "k": {"type": "integer", "minimum": 1, "maximum": 2**31},
        "over_layers": {"type": "boolean"},
    },
    "allOf": [
        {"if": {"properties": {"name": {"const": name}}}, "then": {"required": needed}}
        for name, needed in (("jumprelu", ["bandwidth"]), ("topk", ["k", "over_layers"]))
    ],
}
_SITES = {"type": "array", "minItems": 1, "maxItems": _LAYERS, "items": {"type": "string", "maxLength": 40}}
_FACTORS = {"type": "array", "maxItems": _LAYERS, "items": {"type": "number", "minimum": -1e30, "maximum": 1e30}}
_PROVENANCE = {
    "type": "object",
    "required": ["model"],
    "properties": {
        "model": {"type": "string"},
        "fingerprint": {"type": ["string", "null"]},
        "frame": {"type": "object", "properties": {"name": {"enum": ["raw", "folded"]}}, "additionalProperties": False},
        "corpus": {"type": ["string", "null"]},
        "tokens": {"type": "integer", "minimum": 0},
        "seed": {"type": ["integer", "null"]},
        "versions": {"type": "object", "additionalProperties": {"type": "string"}},
        "config": {"type": "object"},
        "normalisation": {"type": "object", "additionalProperties": _FACTORS},
    },
}
NATIVE = Draft202012Validator(
    {
        "type": "object",
        "required": ["kind", "n_layers", "reads", "writes", "activation", "provenance"],
        "properties": {
            "kind": {"enum": ["plt", "clt", "sae"]},
            "n_layers": {"type": "integer", "minimum": 1, "maximum": _LAYERS},
            "reads": _SITES,
            "writes": _SITES,
            "provenance": _PROVENANCE,
        },
        "if": {"properties": {"kind": {"const": "clt"}}},
        "then": {"properties": {"activation": _ACTIVATION}},
        "else": {
            "properties": {
                "activation": {"type": "array", "items": _ACTIVATION},
                "centred": {"type": "array", "items": {"type": "boolean"}},
            }
        },
    }
)
_LOCAL_NAME = r"^(?![/\\])(?!.*\.\.)[^\x00]+$"


def circuit_tracer(kinds: list[str], hooks: list[str]) -> Draft202012Validator:
    """The schema of `config.yaml`; files are named inside of its folder."""
    return Draft202012Validator(
        {
            "type": "object",
            "required": ["model_kind", "feature_input_hook", "feature_output_hook"],
            "properties": {
                "model_kind": {"enum": kinds},
                "feature_input_hook": {"enum": hooks},
                "feature_output_hook": {"enum": hooks},
                "transcoders": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": _LAYERS,
                    "items": {"type": "string", "pattern": _LOCAL_NAME, "maxLength": 255},
                },
            },
        }
    )


def require_settings(path: Path, settings: Mapping[str, Any], schema: Draft202012Validator) -> None:
    """Raises `FileFormatError` unless the settings in a file are what the schema asks for."""
    error = next(iter(sorted(schema.iter_errors(settings), key=lambda e: (len(e.absolute_path), str(e.message)))), None)
    if error is not None:
        where = ".".join(map(str, error.absolute_path))
        said = error.message if len(error.message) <= 200 else f"{error.message[:100]} … {error.message[-99:]}"
        raise FileFormatError(
            f"{path} does not describe dictionaries ({where + ': ' if where else ''}{' '.join(said.split())}); "
            "download or save them again."
        )


def require_shapes(
    path: Path,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int | str, ...]],
    sizes: dict[str, int] | None = None,
) -> None:
    """Raises `FileFormatError` unless tensors have the expected shapes; a name in a shape stands for one size.

    `sizes`: those that the names stand for, as far as known; the others are added.
    """
    if missing := [name for name in expected if name not in found]:
        raise FileFormatError(
            f"{path} lacks {_listed(missing)}: expected the tensors {_listed(expected)}, "
            f"found {_listed(found) or 'none'}; check that this is the right file."
        )
    sizes = {} if sizes is None else sizes
    for name, shape in expected.items():
        fits = len(found[name]) == len(shape)
        for size, wanted in zip(found[name], shape, strict=False):
            fits &= size > 0 and size == (wanted if isinstance(wanted, int) else sizes.setdefault(wanted, size))
        if not fits:
            known = ", ".join(str(sizes.get(n, n)) if isinstance(n, str) else str(n) for n in shape)
            raise FileFormatError(
                f"{path} has {name} {list(found[name])}, but its other tensors ask for [{known}] "
                f"([{', '.join(map(str, shape))}]); download or save it again."
            )


def _listed(names: Mapping[str, Any] | list[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
