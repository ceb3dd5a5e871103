"""Attention patterns that are recomputed when they are asked for, because those of all layers would take too much."""

import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.language_model import LanguageModel
from transcoders.sites import Site
from transcoders.starting import value_from

PATTERN_BYTES = 2**30
"""The patterns of a prompt are held up to this size: on GPT-2 small's sizes in float32, of 1,365 tokens."""


def pattern_hook(layer: int) -> str:
    """TransformerBridge's name of a layer's attention pattern."""
    return f"blocks.{layer}.attn.hook_pattern"


def pattern_bytes(model: LanguageModel, n_positions: int) -> int:
    """Of one layer's pattern."""
    return model.n_heads * n_positions**2 * model.dtype.itemsize


def stream_hooks(model: LanguageModel) -> dict[int, str]:
    """The hooks of the streams that patterns are recomputed from, by block; none where the model lacks one."""
    before = {layer: Site(layer - 1, "resid_post") for layer in range(1, model.n_layers)}
    if not all(map(model.has_site, before.values())):
        return {}
    return {layer: model.hook(site) for layer, site in before.items()}


class RecomputedPatterns(MutableMapping[str, Tensor]):
    """A prompt's constants by hook: scales, which are held, and patterns, each computed when it is asked for.

    A pattern comes from the model's own attention, run on the clean stream before its block, and is not held here.
    Where a run cannot begin at a block (the last position's in the last layer is not `last`, the clean run's, then), it
    begins at the embeddings, and not `within` another run, whose MLPs may be silent.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokens: Int[Tensor, "pos"],
        scales: Mapping[str, Tensor],
        streams: Mapping[int, Float[Tensor, "1 pos d_model"]],
        last: Float[Tensor, "1 head pos"],
    ) -> None:
        self._model, self._tokens, self._streams = model, tokens, dict(streams)
        self._held = dict(scales)
        self._layers = {pattern_hook(layer): layer for layer in range(model.n_layers)}
        self._given: tuple[str, weakref.ref[Tensor]] | None = None
        again = self[pattern_hook(model.n_layers - 1)][:, :, -1]
        if not torch.allclose(again, last, rtol=0, atol=torch.finfo(last.dtype).eps ** 0.5):
            self._streams = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._held:
            return self._held[name]
        layer = self._layers[name]
        stream = self._streams.get(layer)
        found = value_from(self._model, self._tokens[None], name, 0 if stream is None else layer, stream)
        self._given = name, weakref.ref(found)
        return found

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._held[name] = value

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name} is a constant of the prompt; set it to another value instead.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers | self._held)

    def __len__(self) -> int:
        return len(self._layers | self._held)

    @property
    def within(self) -> bool:
        """Whether patterns can be computed by a hook of another run."""
        return bool(self._streams) or len(self._layers) == 1

    def pack(self, saved: Tensor) -> Any:
        """What autograd keeps of a tensor: of the pattern given last, which one and which view of it."""
        if self._given is not None:
            name, pattern = self._given[0], self._given[1]()
            if pattern is not None and pattern.untyped_storage().data_ptr() == saved.untyped_storage().data_ptr():
                return name, saved.shape, saved.stride(), saved.storage_offset()
        return saved

    def unpack(self, kept: Any) -> Tensor:
        """The tensor of which `pack` kept this."""
        if isinstance(kept, Tensor):
            return kept
        name, *view = kept
        return torch.as_strided(self[name], *view)


def when_needed(constants: Mapping[str, Tensor], name: str) -> Callable[[], Tensor]:
    """A constant as hooks of a run take it: a pattern that is recomputed, not before the run comes to it."""
    if isinstance(constants, RecomputedPatterns) and constants.within:
        return partial(constants.__getitem__, name)
    value = constants[name]
    return lambda: value


def not_saved(constants: Mapping[str, Tensor]) -> AbstractContextManager[object]:
    """While it lasts, autograd saves no pattern that is recomputed; a backward pass asks for it again."""
    if isinstance(constants, RecomputedPatterns) and constants.within:
        return torch.autograd.graph.saved_tensors_hooks(constants.pack, constants.unpack)
    return nullcontext()
