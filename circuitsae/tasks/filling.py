"""Templates filled with words, keeping where each word went."""

from collections.abc import Mapping
from functools import lru_cache
from string import Formatter

Span = tuple[int, int]
"""First character and the one after the last."""


@lru_cache(maxsize=512)
def _parts(template: str) -> tuple[tuple[str, str | None], ...]:
    return tuple((text, slot) for text, slot, _, _ in Formatter().parse(template))


def slots(template: str) -> list[str]:
    """The names of a template's slots, in order."""
    return [slot for _, slot in _parts(template) if slot is not None]


def fill(template: str, values: Mapping[str, str]) -> tuple[str, dict[str, list[Span]]]:
    """The filled text, and the span of every occurrence of every slot in it."""
    text, spans = "", {}
    for before, slot in _parts(template):
        text += before
        if slot is not None:
            word = values[slot]
            spans.setdefault(slot, []).append((len(text), len(text) + len(word)))
            text += word
    return text, spans
