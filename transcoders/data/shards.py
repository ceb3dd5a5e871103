"""One shard of an activation store: a safetensors file with the activations of some thousand tokens at some sites.

float32 and bf16 are a tensor `[token, d_model]` for each site, read through a memory map. int8 goes by blocks of
tokens: each group of coordinates of a token has a scale, its largest magnitude over 127, rounded up to bf16,

    x ≈ scale · q,    |x − scale · q| ≤ scale / 2,    q in −127 … 127,

and what is so found is compressed with zstd, coordinate after coordinate, since those differ more than tokens do.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import zstandard
from jaxtyping import Float, Float32, Int8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from transcoders.errors import FileFormatError
from transcoders.files import file_hash, new_file
from transcoders.sites import Site

StoreDtype = Literal["float32", "bf16", "int8"]
STORED: dict[StoreDtype, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}
"""What activations are held as until a shard of them is written."""

GROUP = 64
"""Coordinates that share a scale: one that is much larger than the others costs only these their precision."""
_LARGEST = 127
_LEVEL = 3
"""zstd's own default; higher ones take longer and gain nothing on quantised activations."""


def quantise(
    x: Float[Tensor, "token d_model"],
) -> tuple[Int8[Tensor, "d_model token"], Float[Tensor, "group token"]]:
    """Whole numbers from −127 to 127 and the bf16 scales of the groups of `GROUP` coordinates, of which the last may be
    smaller.
    """
    columns = x.float().T
    groups = pad(columns, (0, 0, 0, -len(columns) % GROUP)).unflatten(0, (-1, GROUP))
    largest = groups.abs().amax(dim=1)
    scale = (largest / _LARGEST).bfloat16()
    above = torch.nextafter(scale, torch.full_like(scale, torch.inf))
    scale = torch.where(scale.float() * _LARGEST < largest, above, scale)
    divisor = torch.where(scale > 0, scale.float(), 1.0).unsqueeze(1)
    q = (groups / divisor).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
    return q.flatten(0, 1)[: len(columns)].contiguous(), scale


def dequantise(
    q: Int8[Tensor, "d_model token"], scale: Float[Tensor, "group token"]
) -> Float32[Tensor, "token d_model"]:
    return (q.float() * scale.float().repeat_interleave(GROUP, dim=0)[: len(q)]).T


def compress(x: Float[Tensor, "token d_model"]) -> bytes:
    """Quantised activations as one zstd frame: the numbers, then the upper and the lower bytes of the scales."""
    q, scale = quantise(x)
    bytes_of_scales = scale.contiguous().view(torch.uint8).reshape(-1, 2).T
    whole = torch.cat([q.flatten().view(torch.uint8), bytes_of_scales.flatten()])
    return zstandard.ZstdCompressor(level=_LEVEL).compress(whole.numpy().data)


def decompress(frame: Any, tokens: int, d_model: int) -> Float32[Tensor, "token d_model"]:
    """The activations of a frame that `compress` made; `ValueError` for anything else."""
    n_q, n_scales = d_model * tokens, -(-d_model // GROUP) * tokens
    expected = n_q + 2 * n_scales
    try:
        found = zstandard.ZstdDecompressor().decompress(frame, max_output_size=expected)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if len(found) != expected:
        raise ValueError(f"{len(found)} bytes instead of {expected}")
    whole = torch.frombuffer(bytearray(found), dtype=torch.uint8)
    q = whole[:n_q].view(torch.int8).view(d_model, tokens)
    scale = whole[n_q:].view(2, n_scales).T.contiguous().view(torch.bfloat16).view(-1, tokens)
    return dequantise(q, scale)


def write_shard(
    path: Path, activations: Mapping[Site, Float[Tensor, "token d_model"]], dtype: StoreDtype, block: int
) -> str:
    """Write a shard, whole or not at all, in blocks of `block` tokens; the SHA-256 of what was to be written."""
    tensors: dict[str, Tensor] = {}
    for site, x in activations.items():
        if dtype == "int8":
            frames = [compress(part) for part in x.split(block)]
            tensors[str(site)] = torch.frombuffer(bytearray(b"".join(frames)), dtype=torch.uint8)
            tensors[f"{site}.ends"] = torch.tensor([len(frame) for frame in frames]).cumsum(0)
        else:
            tensors[str(site)] = x.to(STORED[dtype]).contiguous()
    with new_file(path) as temporary:
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:
            if number := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise
        return file_hash(temporary)


class Shard:
    """A shard that is open for reading; its file stays mapped until this object is gone."""

    def __init__(self, path: Path, sites: Sequence[Site], *, dtype: StoreDtype, tokens: int, d_model: int) -> None:
        """Raises `FileFormatError` where the file does not hold these sites, so stored, of so many tokens."""
        self.path, self.dtype, self.tokens, self.d_model = path, dtype, tokens, d_model
        try:
            with safe_open(path, "pt") as file:
                names = set(file.keys())
                wanted = [name for site in sites for name in self._names(site)]
                if missing := [name for name in wanted if name not in names]:
                    raise ValueError(f"it lacks {missing[0]}")
                self._tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in wanted}
        except (SafetensorError, OSError, ValueError) as error:
            raise damaged(path, str(error)) from error
        for site in sites:
            found = self._tensors[str(site)]
            if dtype != "int8" and (tuple(found.shape), found.dtype) != ((tokens, d_model), STORED[dtype]):
                raise damaged(path, f"{site} is {list(found.shape)} of {found.dtype}")

    def _names(self, site: Site) -> list[str]:
        return [str(site), f"{site}.ends"] if self.dtype == "int8" else [str(site)]

    def read(self, site: Site, start: int, end: int, block: int) -> Float[Tensor, "token d_model"]:
        """The activations of a block's tokens at a site."""
        stored = self._tensors[str(site)]
        if self.dtype != "int8":
            return stored[start:end]
        ends = self._tensors[f"{site}.ends"]
        try:
            first, last = (0, *ends.tolist())[start // block : start // block + 2]
            return decompress(stored[first:last].numpy().data, end - start, self.d_model)
        except ValueError as error:
            raise damaged(self.path, f"tokens {start} to {end} of {site} cannot be decompressed: {error}") from error


def damaged(path: Path, reason: str) -> FileFormatError:
    return FileFormatError(
        f"{path} is not the shard that was written ({' '.join(reason.split())[:200]}); copy the store anew, or write "
        "it again."
    )
