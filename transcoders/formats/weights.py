"""Tensors in a file of another community, whatever its container: safetensors, NumPy's npz, or torch's zip.

Nothing is unpickled but tensors (`weights_only`), nothing is allocated beyond what the file holds, and what is read
must be finite. Shapes are known before anything is loaded.
"""

import math
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoders.errors import DictionaryError, FileFormatError
from transcoders.files import new_file
from transcoders.formats.files import (
    DecoderPlace,
    read_tensors,
    require_finite,
    require_shapes,
    tensor_shapes,
)
from transcoders.hub import first_line

_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_MATRIX = re.compile(r"(^|\.)[Ww](_|$)|(encoder|decoder)\.weight$|^affine_skip_connection$")
_NUMPY = (torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How weights are wanted."""

    dtype: torch.dtype = torch.float32
    device: str | torch.device = "cpu"
    decoders: DecoderPlace = "memory"


@dataclass(frozen=True)
class Weights:
    """The tensors of one file, with their shapes; `values` are loaded when asked for."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    extra: dict[str, Any] = field(default_factory=dict)
    """What the file holds beside tensors: numbers and texts, by name."""
    _load: Callable[[str], Tensor] | None = None

    def require(
        self, expected: Mapping[str, tuple[int | str, ...]], sizes: dict[str, int] | None = None
    ) -> dict[str, int]:
        """The sizes that the names in `expected` shapes stand for; `FileFormatError` unless the shapes are these."""
        sizes = {} if sizes is None else sizes
        require_shapes(self.path, self.shapes, expected, sizes)
        return sizes

    def below(self, prefix: str) -> "Weights":
        """The tensors whose names begin so, by the rest of their names."""
        shapes = {name.removeprefix(prefix): s for name, s in self.shapes.items() if name.startswith(prefix)}
        return Weights(self.path, shapes, self.extra, lambda name: self._stored(prefix + name)) if prefix else self

    def _stored(self, name: str) -> Tensor:
        if self._load is not None:
            return self._load(name)
        return read_tensors(self.path, wanted=lambda other: other == name)[0][name]

    def read(self, names: Iterable[str], reading: Reading) -> dict[str, Tensor]:
        """Some of the tensors, floating ones as wanted; `FileFormatError` where one is missing or not finite."""
        names = list(names)
        if missing := [name for name in names if name not in self.shapes]:
            raise FileFormatError(f"{self.path} lacks {', '.join(missing)}; check that this is the right file.")
        if self._load is None:
            found, _ = read_tensors(
                self.path, dtype=reading.dtype, device=reading.device, weights=True, wanted=names.__contains__
            )
            return found
        return {name: self._converted(name, reading) for name in names}

    def floating(self, names: Iterable[str], reading: Reading) -> dict[str, Tensor]:
        """As `read`, of tensors that must be of floating point."""
        found = self.read(names, reading)
        if odd := next((name for name, value in found.items() if not value.is_floating_point()), None):
            raise FileFormatError(
                f"{self.path} has {odd} in {found[odd].dtype}; expected floating-point numbers, so download or save it "
                "again."
            )
        return found

    def _converted(self, name: str, reading: Reading) -> Tensor:
        assert self._load is not None
        try:
            value = self._load(name)
        except (ValueError, OSError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
            raise _damaged(self.path, error) from error
        value = value.to(reading.device, reading.dtype if value.is_floating_point() else None)
        require_finite(self.path, name, value)
        return value


def open_weights(path: Path) -> Weights:
    """The tensors of a file by its ending; `FileFormatError` for what it is not."""
    if path.suffix == ".npz":
        return _open_npz(path)
    if path.suffix in _TORCH:
        return _open_torch(path)
    return Weights(path, tensor_shapes(path, integers=True))


def as_stored(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Tensors as they are stored: matrices, by the communities' names, in `dtype` if it is not None.

    Rounding a threshold or a bias would move features on and off, and save nothing.
    """
    return {name: t.to(dtype) if dtype is not None and _MATRIX.search(name) else t for name, t in tensors.items()}


def write_npz(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write NumPy's archive of arrays, whole or not at all; `DictionaryError` for a precision that NumPy has not."""
    import numpy as np

    if odd := next((t.dtype for t in tensors.values() if t.dtype not in _NUMPY), None):
        raise DictionaryError(f"NumPy's files hold no {odd}; store the weights in float32 or float16.")
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
    with new_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def write_torch(path: Path, content: Mapping[str, Any]) -> None:
    """Write a state dict by `torch.save`, whole or not at all; views are written without what they are views of."""
    own = {name: v.detach().cpu().clone() if isinstance(v, Tensor) else v for name, v in content.items()}
    with new_file(path) as temporary, temporary.open("wb") as file:
        torch.save(own, file)


def _open_npz(path: Path) -> Weights:
    import numpy as np

    def load(name: str) -> Tensor:
        with np.load(path, allow_pickle=False) as arrays:
            return torch.from_numpy(np.ascontiguousarray(arrays[name]))

    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            shapes = {member.filename.removesuffix(".npy"): _npy_shape(archive, member) for member in members}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise _damaged(path, error) from error
    _require_size(path, (member.file_size for member in members))
    return Weights(path, shapes, _load=load)


def _npy_shape(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[int, ...]:
    """Of an array, by its header, which must agree with the bytes that follow it."""
    from numpy.lib import format as npy

    with archive.open(member) as file:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{member.filename} is of version {version}")
        shape, _, dtype = read(file)
        if (
            dtype.hasobject
            or dtype.kind not in "fiu"
            or math.prod(shape) * dtype.itemsize != member.file_size - file.tell()
        ):
            raise ValueError(f"{member.filename} is no array of {list(shape)} numbers")
    return tuple(int(size) for size in shape)


def _open_torch(path: Path) -> Weights:
    """Tensors of a file of torch's, at any depth (`a.b`), mapped and not loaded; numbers and texts beside them."""
    if not path.is_file():
        raise FileFormatError(f"There is no file {path}; the folder is incomplete, so download or save it again.")
    try:
        mapped = zipfile.is_zipfile(path)
        if mapped:
            with zipfile.ZipFile(path) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ValueError("its tensors are compressed, which torch never does")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file makes torch raise nearly anything
        raise _damaged(path, error) from error
    tensors: dict[str, Tensor] = {}
    extra: dict[str, Any] = {}
    _flatten(content, "", tensors, extra, depth=0)
    if not tensors:
        raise FileFormatError(f"{path} holds no tensors; check that this is the right file.")
    _require_size(path, (value.numel() * value.element_size() for value in tensors.values()))
    return Weights(path, {name: tuple(value.shape) for name, value in tensors.items()}, extra, tensors.__getitem__)


def _flatten(value: Any, name: str, tensors: dict[str, Tensor], extra: dict[str, Any], depth: int) -> None:
    if isinstance(value, Mapping) and depth < 8:
        for key, inner in value.items():
            _flatten(inner, f"{name}.{key}" if name else str(key), tensors, extra, depth + 1)
    elif isinstance(value, Tensor):
        if value.is_sparse or value.is_quantized or value.is_complex():
            raise FileFormatError(f"The tensor {name!r} is no dense tensor of numbers; download or save it again.")
        tensors[name] = value
    elif isinstance(value, str | int | float | bool):
        extra[name] = value


def _require_size(path: Path, sizes: Iterable[int]) -> None:
    """Views and compression can make a short file claim endless tensors."""
    if (claimed := sum(sizes)) > 2 * path.stat().st_size:
        raise FileFormatError(
            f"{path} claims tensors of {claimed:,} bytes in {path.stat().st_size:,}; download or save it again."
        )


def _damaged(path: Path, error: BaseException) -> FileFormatError:
    return FileFormatError(
        f"Cannot read {path} ({type(error).__name__}: {first_line(error)[:160]}); it may have been cut off, or hold "
        "more than tensors, so download or save it again."
    )
