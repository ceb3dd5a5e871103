"""Reading and writing files of tensors, and reading JSON and YAML, with errors that say what to do.

What is read is judged before anything is loaded: settings by a format's schema, tensors by their shapes.
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jsonschema import Draft202012Validator
from jsonschema.validators import extend
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from transcoders.errors import FileFormatError, InputError
from transcoders.files import new_file
from transcoders.hub import first_line
from transcoders.sites import Site

DecoderPlace = Literal["memory", "mapped"]
"""`memory`: decoders are loaded. `mapped`: they stay in the file, and the rows asked for are read from there."""

LARGEST_WEIGHT = 1e15
"""No network has a larger weight; its square, summed, stays finite in float32."""
MOST_LAYERS = 1000
"""No model has as many."""
SOME_TEXT = {"type": ["string", "null"], "maxLength": 400}
SOME_SIZE = {"type": ["integer", "null"], "minimum": 1, "maximum": 2**31}
"""What a format's schema says of a text or a number of features that may be null."""
_Strict = extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    ),
)
"""3.0 is no integer to Python."""
CHECKSUMS = "checksums"
_TEXT_BYTES = 2**26
_YAML_BYTES = 2**20
"""PyYAML reads about a megabyte a second."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all, with a checksum of each tensor in its metadata."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sums = json.dumps({name: checksum(tensor) for name, tensor in contiguous.items()})
    with new_file(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata={**(metadata or {}), CHECKSUMS: sums})
        except SafetensorError as error:
            if number := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise


def read_json(path: Path) -> dict[str, Any]:
    record = _parsed(path, "JSON", _TEXT_BYTES, json.loads)
    if not isinstance(record, dict):
        raise FileFormatError(f"{path} holds a JSON {type(record).__name__}; expected an object.")
    return record


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; without aliases, by which a short file becomes an endless one."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it has aliases, which are not read")
            return super().compose_node(parent, index)

    def parse(text: str) -> Any:
        try:
            return yaml.load(text, Loader)
        except yaml.YAMLError as error:
            raise ValueError(" ".join(str(error).split())) from error

    config = _parsed(path, "YAML", _YAML_BYTES, parse)
    if not isinstance(config, dict):
        raise FileFormatError(f"{path} holds {type(config).__name__} instead of settings; expected a YAML mapping.")
    return config


def _parsed(path: Path, language: str, largest: int, parse: Callable[[str], Any]) -> Any:
    try:
        if (size := path.stat().st_size) > largest:
            raise FileFormatError(
                f"{path} has {size:,} bytes, more than the {largest:,} that settings take; check that this is the "
                "right file."
            )
        return parse(path.read_text(encoding="utf-8"))
    except FileFormatError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason = "it nests too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise FileFormatError(f"Cannot read {path} as {language} ({reason}); download or save it again.") from error


def tensor_shapes(path: Path, *, integers: bool = False) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, by its header; all but `k` are floating, or `integers`."""
    with _opened(path) as file:
        shapes: dict[str, tuple[int, ...]] = {}
        for name in file.keys():  # noqa: SIM118 - not a mapping
            stored = file.get_slice(name)
            if not integers and not stored.get_dtype().startswith(("F", "BF")) and name != "k":
                raise FileFormatError(
                    f"{path} has {name} in {stored.get_dtype()}; expected floating-point numbers, so download or save "
                    "it again."
                )
            shapes[name] = tuple(stored.get_shape())
    return shapes


def read_tensors(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    mapped: Callable[[str], bool] = lambda name: False,
    weights: bool = False,
    wanted: Callable[[str], bool] = lambda name: True,
    part: Callable[[str, Tensor], Tensor] = lambda name, stored: stored,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file (floating ones converted to `dtype`) and its metadata.

    Those whose names are `mapped` stay in the file, in its precision: reading them reads the file. The others must be
    what their checksums say, where the file has them. `weights`: they must be finite, and of a size that weights have.
    `wanted`: names of the tensors to read, if not all. `part`: what of each is kept.
    """
    tensors: dict[str, Tensor] = {}
    with _opened(path) as file:
        metadata = file.metadata() or {}
        sums = _checksums(path, metadata)
        for name in filter(wanted, file.keys()):
            stored = file.get_tensor(name)
            if mapped(name):
                tensors[name] = stored
                continue
            if name in sums and sums[name] != checksum(stored):
                raise FileFormatError(f"{path} is damaged: {name} is not what was saved; download or save it again.")
            tensors[name] = part(name, stored).to(device, dtype if stored.is_floating_point() else None)
            if weights:
                require_finite(path, name, tensors[name])
    return tensors, metadata


def is_decoder(name: str) -> bool:
    """Whether a tensor of this name, in any of our formats, is a decoder."""
    return "W_dec" in name


def take_decoders(tensors: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The decoders among `tensors`, in their order; shapes without data are left in their place."""
    names = [name for name in tensors if is_decoder(name)]
    taken = [tensors[name] for name in names]
    tensors |= {name: torch.empty(t.shape, dtype=dtype, device="meta") for name, t in zip(names, taken, strict=True)}
    return taken


def require_settings(path: Path, settings: Mapping[str, Any], schema: Draft202012Validator) -> None:
    """Raises `FileFormatError` unless the settings in a file are what the schema asks for.

    Whole numbers that are written as 3.0 become what the schema says they are.
    """
    _whole_numbers(settings, schema.schema)
    error = next(
        iter(
            sorted(_Strict(schema.schema).iter_errors(settings), key=lambda e: (len(e.absolute_path), str(e.message)))
        ),
        None,
    )
    if error is not None:
        where = ".".join(map(str, error.absolute_path))
        said = error.message if len(error.message) <= 200 else f"{error.message[:100]} … {error.message[-99:]}"
        raise FileFormatError(
            f"{path} does not describe dictionaries ({where + ': ' if where else ''}{' '.join(said.split())}); "
            "download or save them again."
        )


def read_site(path: Path, text: str) -> Site:
    """`Site.parse` of what a file says; `FileFormatError`, naming the file, for what is no site."""
    try:
        return Site.parse(text)
    except InputError as error:
        raise FileFormatError(f"{path} names a site that is none: {error}") from error


def _whole_numbers(value: Any, schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return value
    if isinstance(value, dict):
        for name, rule in schema.get("properties", {}).items():
            if name in value:
                value[name] = _whole_numbers(value[name], rule)
    elif isinstance(value, list):
        value[:] = [_whole_numbers(each, schema.get("items")) for each in value]
    elif isinstance(value, float) and value.is_integer():
        types = schema.get("type", ())
        return int(value) if "integer" in ([types] if isinstance(types, str) else types) else value
    return value


def require_shapes(
    path: Path,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int | str, ...]],
    sizes: dict[str, int] | None = None,
    may_be_empty: Container[int | str] = (),
) -> None:
    """Raises `FileFormatError` unless tensors have the expected shapes; a name in a shape stands for one size.

    `sizes`: those that the names stand for, as far as known; the others are added. `may_be_empty`: names of sizes that
    may be 0.
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
            is_filled = size > 0 or wanted in may_be_empty
            fits &= is_filled and size == (wanted if isinstance(wanted, int) else sizes.setdefault(wanted, size))
        if not fits:
            known = ", ".join(str(sizes.get(n, n)) if isinstance(n, str) else str(n) for n in shape)
            raise FileFormatError(
                f"{path} has {name} {list(found[name])}, but its other tensors ask for [{known}] "
                f"([{', '.join(map(str, shape))}]); download or save it again."
            )


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise FileFormatError(f"There is no file {path}; the folder is incomplete, so download or save it again.")
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise FileFormatError(
            f"{path} is not a safetensors file ({first_line(error)[:200]}); it may have been cut off, so download or "
            "save it again."
        ) from error


def checksum(tensor: Tensor) -> str:
    """Of shape, type and bytes."""
    head = zlib.crc32(f"{tensor.dtype}{list(tensor.shape)}".encode())
    return f"{zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, head):08x}"


def _checksums(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    try:
        return {str(name): str(found) for name, found in json.loads(metadata.get(CHECKSUMS, "{}")).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise FileFormatError(f"{path} is damaged: its checksums cannot be read; download or save it again.") from error


def require_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Raises `FileFormatError` for NaN, infinity and what no network has."""
    if tensor.numel() and tensor.is_floating_point():
        least, most = (float(value) for value in tensor.aminmax())
        if not (least >= -LARGEST_WEIGHT and most <= LARGEST_WEIGHT):  # NaN is neither
            raise FileFormatError(
                f"{path} has a weight in {name} that is not a finite number below {LARGEST_WEIGHT:g}; train the "
                "dictionaries again, or download them again."
            )


def _listed(names: Mapping[str, Any] | list[str]) -> str:
    names = [" ".join(name.split())[:80] or "''" for name in names]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
