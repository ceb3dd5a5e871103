"""Reading and writing files of tensors, and reading JSON, with errors that say what to do."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from transcoders.errors import FileFormatError
from transcoders.files import new_file

DecoderPlace = Literal["memory", "mapped"]
"""`memory`: decoders are loaded. `mapped`: they stay in the file, and the rows asked for are read from there."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with new_file(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata=dict(metadata or {}))
        except SafetensorError as error:
            if number := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise


def read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileFormatError(f"Cannot read {path} as JSON ({error}); expected a JSON object.") from error
    if not isinstance(record, dict):
        raise FileFormatError(f"{path} holds a JSON {type(record).__name__}; expected an object.")
    return record


def read_tensors(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    mapped: Callable[[str], bool] = lambda name: False,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file (floating ones converted to `dtype`) and its metadata.

    Those whose names are `mapped` stay in the file, in its precision: reading them reads the file.
    """
    if not path.is_file():
        raise FileFormatError(f"There is no file {path}; the folder is incomplete, so download or save it again.")
    try:
        with safe_open(path, "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise FileFormatError(
            f"{path} is not a safetensors file ({error}); it may have been cut off, so download or save it again."
        ) from error
    tensors = {
        name: t if mapped(name) else t.to(device, dtype if t.is_floating_point() else None)
        for name, t in stored.items()
    }
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


def require_tensors(path: Path, tensors: Mapping[str, Tensor], names: list[str]) -> None:
    """Raises `FileFormatError` unless all `names` are there."""
    if missing := [name for name in names if name not in tensors]:
        raise FileFormatError(
            f"{path} lacks {', '.join(missing)}: expected the tensors {', '.join(names)}, "
            f"found {', '.join(tensors) or 'none'}; check that this is the right file."
        )
