"""Precision of weights, by torch's name for it or as torch's own value."""

import torch

from transcoders.errors import InputError

Precision = torch.dtype | str
"""`"float32"` or `torch.float32`."""

PRECISIONS = ("float32", "float64", "bfloat16", "float16")


def as_dtype(precision: Precision) -> torch.dtype:
    """Torch's value of a precision. Raises `InputError` for whatever is none."""
    name = str(precision).removeprefix("torch.")
    if name not in PRECISIONS:
        raise InputError(
            f"There is no precision {name!r} for weights; give {', '.join(map(repr, PRECISIONS[:-1]))} "
            f"or {PRECISIONS[-1]!r}."
        )
    return getattr(torch, name)
