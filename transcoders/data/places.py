"""Passes over data that know their place: what they say of it is JSON, and another pass goes on from there."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

from transcoders.errors import FileFormatError

T_co = TypeVar("T_co", covariant=True)


@runtime_checkable
class Pass(Protocol[T_co]):
    """An iterator that can be left and gone on with."""

    def __iter__(self) -> Iterator[T_co]: ...

    def __next__(self) -> T_co: ...

    def state(self) -> dict[str, Any]:
        """Where the next item comes from, for who opened the pass: JSON."""
        ...


def whole_number(state: Mapping[str, Any], key: str) -> int:
    """A count that a place in the data holds; `FileFormatError` where there is none."""
    value = state.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise damaged(key, value, "a whole number")
    return value


def damaged(key: str, value: Any, expected: str) -> FileFormatError:
    return FileFormatError(
        f"The place in the data has {key} = {str(value)[:60]!r}; expected {expected}. It cannot be gone on from; start "
        "anew."
    )
