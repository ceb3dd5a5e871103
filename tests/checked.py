"""Beartype for jaxtyping's import hook, applied once to what is defined many times.

The hook decorates closures too, each time that they are made: hundreds for one forward pass with hooks. Compiling their
checks anew took a third of the suite's time. What it hands on to be checked is no closure, but a function of the same
name and signature whose body does nothing; so one check serves all of the same name and signature.
"""

from collections.abc import Callable, Hashable
from typing import Any, get_args, get_origin

from beartype import beartype
from jaxtyping import AbstractArray

_CHECKED: dict[Hashable, Callable[..., Any]] = {}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its annotations checked at each call."""
    code, hints = function.__code__, function.__annotations__
    arguments = (code.co_varnames, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    key = (function.__module__, function.__qualname__, arguments, *zip(hints, map(_form, hints.values()), strict=True))
    if key not in _CHECKED:
        _CHECKED[key] = beartype(function)
    return _CHECKED[key]


def _form(hint: Any) -> Hashable:
    """What makes two hints the same: shapes are equal to none but themselves, however often one is written."""
    if isinstance(hint, list):
        return tuple(map(_form, hint))
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return (hint.dtype, hint.array_type, hint.dim_str)
    return (get_origin(hint), *map(_form, get_args(hint))) if get_args(hint) else hint
