"""What stands behind `from_pretrained` of the kinds of dictionaries, the name that users of SAELens type."""

from pathlib import Path
from typing import Any, TypeVar

from transcoders._lazy import public
from transcoders.errors import DictionaryError

Kind = TypeVar("Kind")
"""A class of dictionaries, or of sets of them."""


def load_set(kind: type[Kind], name: str | Path, how: dict[str, Any]) -> Kind:
    """`load_dictionaries(name, **how)`, which must be of this kind."""
    found = public("transcoders.load_dictionaries")(name, **how)
    if not isinstance(found, kind):
        raise DictionaryError(
            f"{name} holds a {type(found).__name__}, not a {kind.__name__}; load_dictionaries takes either."
        )
    return found


def load_one(kind: type[Kind], release: str | Path, sae_id: str | None, how: dict[str, Any]) -> Kind:
    """The only dictionary of what `load_dictionaries(release, sae_id=sae_id)` finds, which must be of this kind."""
    found: Any = public("transcoders.load_dictionaries")(
        release, **(how if sae_id is None else {**how, "sae_id": sae_id})
    )
    held = [each for each in getattr(found, "layers", (found,)) if not getattr(each, "is_absent", False)]
    if len(held) != 1:
        raise DictionaryError(
            f"{release} holds {len(held)} dictionaries; name one with sae_id, or load all: load_dictionaries."
        )
    if not isinstance(held[0], kind):
        raise DictionaryError(
            f"{release} holds a {type(held[0]).__name__}, not a {kind.__name__}; load_dictionaries takes either."
        )
    return held[0]
