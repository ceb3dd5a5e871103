"""A safetensors file written one tensor after the other, so that they need not all be in memory.

Source of the layout: https://huggingface.co/docs/safetensors#format: eight bytes for the header's length, the header in
JSON, the data without gaps.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from transcoders.errors import InputError
from transcoders.files import new_file
from transcoders.formats.files import CHECKSUMS, checksum

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_UNKNOWN = "0" * 8
"""As long as a checksum."""


def write_one_by_one(path: Path, shapes: Mapping[str, Tensor], tensors: Iterable[Tensor]) -> None:
    """Write the file, whole or not at all, with a checksum of each tensor, as `write_tensors` does.

    `shapes`: by name, of each tensor its shape and type, for which tensors without data will do. `tensors`: the same
    ones in the same order. Raises `InputError` where they do not agree.
    """
    sums = dict.fromkeys(shapes, _UNKNOWN)
    places, offset = {}, 0
    # The widest types first, so that every tensor is aligned, as the library has them.
    for name, like in sorted(shapes.items(), key=lambda item: (-item[1].element_size(), item[0])):
        places[name], offset = offset, offset + like.numel() * like.element_size()
    start = len(_header(shapes, places, sums))
    with new_file(path) as temporary, temporary.open("wb") as file:
        for (name, like), tensor in zip(shapes.items(), tensors, strict=True):
            if tensor.shape != like.shape or tensor.dtype != like.dtype:
                raise InputError(
                    f"{name} was to be {list(like.shape)} of {like.dtype}; got {list(tensor.shape)} of {tensor.dtype}."
                )
            stored = tensor.detach().cpu().contiguous()
            sums[name] = checksum(stored)
            file.seek(start + places[name])
            file.write(stored.reshape(-1).view(torch.uint8).numpy().data)
        file.seek(0)
        file.write(_header(shapes, places, sums))


def _header(shapes: Mapping[str, Tensor], places: Mapping[str, int], sums: Mapping[str, str]) -> bytes:
    """Of the same length whatever the checksums are."""
    entries: dict[str, object] = {"__metadata__": {CHECKSUMS: json.dumps(sums)}}
    for name, first in places.items():
        like = shapes[name]
        last = first + like.numel() * like.element_size()
        entries[name] = {"dtype": _NAMES[like.dtype], "shape": list(like.shape), "data_offsets": [first, last]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
