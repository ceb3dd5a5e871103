"""Training data from an activation store."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.data.store import ActivationStore
from transcoders.data.store_stream import StoreStream
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel
from transcoders.sites import Site
from transcoders.training.batches import Stream, own_tokens, sites_of_kind
from transcoders.training.config import TrainConfig
from transcoders.training.split import WHOLE, Split
from transcoders.training.trained_on import trained_on


class StoreSource:
    """`Source` of what a store holds; it says of the model what the store does, and runs none."""

    def __init__(self, store: ActivationStore, model: LanguageModel | None, config: TrainConfig) -> None:
        """`model`: checked against the store, and trained on its device."""
        if model is not None:
            store.require_model(model)
        kept = store.settings
        self.store, self.config = store, config
        self.name, self.origin, self.frame, self.corpus = kept.model, kept.origin, kept.frame, kept.corpus
        self.n_layers, self.d_model = kept.n_layers, kept.d_model
        self.d_vocab: int | None = kept.d_vocab
        self.bos: bool | None = kept.bos
        self.first, self.limits = kept.first, kept.limits
        self.device = torch.device("cpu") if model is None else model.device
        names = None if model is None else trained_on(model.place, model.origin)
        self.trained_on: Mapping[str, str] | None = names

    def fingerprint(self) -> str:
        return self.store.settings.fingerprint

    def sites(self, config: TrainConfig) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        """As everywhere; `InputError` where the store lacks one of them."""
        reads, writes = sites_of_kind(config, self.n_layers)
        self.store.require_sites([*reads, *writes])
        return reads, writes

    def open(
        self, sites: Sequence[Site], *, batch: int, state: Mapping[str, Any] | None = None, split: Split = WHOLE
    ) -> Stream:
        own = [sites[place] for place in split.sites_of(sites, self.n_layers)]
        return own_tokens(self._stream(own, batch=batch, buffer_mb=self.config.buffer_mb, state=state), split)

    def sample(self, sites: Sequence[Site], tokens: int) -> Float[Tensor, "token site d_model"]:
        """No more than half of the buffer holds, as those who normalise it make a copy."""
        fit = self.config.buffer_mb * 2**19 // (4 * len(sites) * self.d_model)
        batch = min(max(self.config.batch, min(tokens, fit)), self.store.tokens)
        return next(iter(self._stream(sites, batch=batch, buffer_mb=0, state=None))).reads

    def buffer_bytes(self, sites: Sequence[Site], batch: int, split: Split = WHOLE) -> int:
        """What `open` keeps in memory: the batches that are read ahead."""
        own = [sites[place] for place in split.sites_of(sites, self.n_layers)]
        return self._stream(own, batch=batch, buffer_mb=self.config.buffer_mb, state=None).ahead_bytes

    def _stream(
        self, sites: Sequence[Site], *, batch: int, buffer_mb: int, state: Mapping[str, Any] | None
    ) -> StoreStream:
        return StoreStream(
            self.store,
            sites,
            batch=batch,
            seed=self.config.seed,
            device=self.device,
            buffer_mb=buffer_mb,
            state=state,
        )


_READ_AS = ("context", "documents", "separator", "bos", "first", "outliers")
"""Settings of how text was read, which a store has settled."""


def as_stored(config: TrainConfig, store: ActivationStore) -> TrainConfig:
    """A configuration with what the store says of the text; `InputError` where it asks for something else."""
    settled = {name: getattr(store.settings, name) for name in _READ_AS}
    defaults = {field.name: field.default for field in fields(config)}
    for name, value in settled.items():
        asked = getattr(config, name)
        if asked not in (defaults[name], value):
            raise InputError(
                f"{store.folder} was written with {name}={value!r}; got {name}={asked!r}. Leave it out, or write "
                "another store."
            )
    return replace(config, **settled)
