"""Reading and writing single files: written beside their place and renamed, read with errors that say what to do."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from transcoders.errors import FileFormatError


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, temporary, metadata=dict(metadata or {}))
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileFormatError(f"Cannot read {path} as JSON ({error}); expected a JSON object.") from error
    if not isinstance(record, dict):
        raise FileFormatError(f"{path} holds a JSON {type(record).__name__}; expected an object.")
    return record


def read_tensors(
    path: Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file (floating ones converted to `dtype`) and its metadata."""
    if not path.is_file():
        raise FileFormatError(f"There is no file {path}; the folder is incomplete, so download or save it again.")
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise FileFormatError(
            f"{path} is not a safetensors file ({error}); it may have been cut off, so download or save it again."
        ) from error
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    return tensors, metadata


def require_tensors(path: Path, tensors: Mapping[str, Tensor], names: list[str]) -> None:
    """Raises `FileFormatError` unless all `names` are there."""
    if missing := [name for name in names if name not in tensors]:
        raise FileFormatError(
            f"{path} lacks {', '.join(missing)}: expected the tensors {', '.join(names)}, "
            f"found {', '.join(tensors) or 'none'}; check that this is the right file."
        )
