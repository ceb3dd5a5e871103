"""A configuration of a kind by name: from settings, or from the JSON that one was saved as or a user wrote."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from transcoders.errors import InputError
from transcoders.training.config import CLTConfig, SAEConfig, TrainConfig, TranscoderConfig

_KINDS: dict[str, type[TrainConfig]] = {c.kind: c for c in (SAEConfig, TranscoderConfig, CLTConfig)}


def config_of(kind: str, **settings: Any) -> TrainConfig:
    """The configuration of a kind: its dataclass, called; `InputError` for a setting that it does not have."""
    made = _of_kind(kind)
    known = [field.name for field in fields(made)]
    for key in settings:
        if key not in known:
            raise InputError(f"A configuration of kind {kind!r} has no setting {key!r}; {_hint(key, known)}")
    return made(**settings)


def config_from_json(record: Mapping[str, Any]) -> TrainConfig:
    """The configuration that `to_json` wrote, or a user did; `InputError` for what it cannot mean.

    A setting that is not there has its default, so files of earlier releases are read as well.
    """
    settings = dict(record)
    kind = settings.pop("kind", None)
    hints = {field.name: field.type for field in fields(_of_kind(kind))}
    return config_of(kind, **{key: _as(hints[key], key, v) if key in hints else v for key, v in settings.items()})


def _of_kind(kind: Any) -> type[TrainConfig]:
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InputError(f"Unknown kind of dictionary {kind!r}; there are {', '.join(map(repr, _KINDS))}.")
    return _KINDS[kind]


def _hint(key: str, known: list[str]) -> str:
    """What was meant by a setting that a kind does not have."""
    if others := [repr(c.kind) for c in _KINDS.values() if key in {field.name for field in fields(c)}]:
        return f"kind {' and '.join(others)} {'has' if len(others) == 1 else 'have'} it."
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"the settings are {', '.join(known)}."


def _as(hint: Any, key: str, value: Any) -> Any:
    """A value from JSON as a field has it: lists become tuples and integers floats where the field says so."""
    if isinstance(hint, UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        hint = next(option for option in get_args(hint) if option is not type(None))
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{key} must be a list of numbers; got {value!r}.")
        return tuple(value)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise InputError(f"{key} cannot be {value!r}; there are {', '.join(map(repr, get_args(hint)))}.")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and not isinstance(value, hint):
        raise InputError(f"{key} must be of type {hint.__name__}; got {value!r}.")
    return value
