"""Precision of weights, by torch's name for it or as torch's own value; whether a device can hold them; all finite?"""

import torch

from transcoders.errors import InputError
from transcoders.hub import first_line

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


def check_device(device: str | torch.device, error: type[InputError] = InputError) -> None:
    """Raises `error` for a device that torch cannot use here."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as refused:
        raise error(
            f"The device {str(device)!r} cannot be used here ({first_line(refused)}); give 'auto' or 'cpu'."
        ) from refused


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; without `isfinite`'s copies, several times as large as the tensor."""
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())  # NaN where anything is
