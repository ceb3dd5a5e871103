"""What a format is: how its files are recognised, what of them is offered, and how they are read and written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from transcoders.dictionaries import DictionarySet
from transcoders.formats.offers import Offer
from transcoders.formats.source import Source
from transcoders.formats.weights import Reading

FormatName = Literal[
    "native", "circuit-tracer", "saelens", "clt-training", "sparsify", "clt-forge", "crosslayer-transcoder",
    "gemma-scope", "gemma-scope-2", "openai", "dictionary-learning",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Format:
    """One community's way to store dictionaries."""

    name: FormatName
    community: str
    """Whose it is, for the table in docs."""
    marker: str
    """What it is recognised by, for messages."""
    recognises: Callable[[Source], bool]
    """Whether a source claims to be in this format; judged by names, and by settings where names do not tell."""
    offers: Callable[[Source], list[Offer]]
    """What there is; reads settings at most."""
    load: Callable[[Source, Sequence[Offer], Reading], DictionarySet]
    """The set of some offers, which are one set of all layers or one dictionary for each layer."""
    save: Callable[..., None]
    """`save(dictionaries, folder, *, storage_dtype)`; `DictionaryError` for what the format cannot hold."""
    keeps_frame: bool = False
    """Whether it can say that dictionaries are of a model whose weights were processed."""
    maps_decoders: bool = False
    """Whether decoders can stay in their files."""


def whole(source: Source, kind: str | None = None) -> list[Offer]:
    """The one offer of a source that holds one set."""
    return [Offer(id="", files=tuple(source.names), kind=kind)]
