"""The text that dictionaries are refined on: rows to fit on, rows held out, and the activations on them."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from transcoders.data import ActivationBatch, open_corpus, sites_of, take_rows
from transcoders.data.corpora import CorpusSource
from transcoders.data.outliers import SAMPLE_TOKENS, find_outliers
from transcoders.data.tokens import CorpusRows, Rows, TokenRows, stacked
from transcoders.dictionaries import DictionarySet
from transcoders.dictionaries.provenance import ROWS
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel
from transcoders.refining.config import RefineConfig
from transcoders.sites import Site

logger = logging.getLogger(__name__)

_CONTEXT = 128
_TOGETHER = 1024
"""Tokens whose activations are held together."""
_HELD_OUT = 10
"""Of rows of tokens that are given every tenth is held out."""

Text = CorpusSource | Int[Tensor, "row pos"]


@dataclass(frozen=True)
class Reading:
    """A model on its text, at the positions where some dictionaries have features."""

    model: LanguageModel
    dictionaries: DictionarySet
    name: str
    """Of the corpus."""
    rows: Rows
    """To fit on."""
    held_out: Int[Tensor, "row pos"]
    context: int
    limits: Mapping[Site, float]
    """Norms above which a token is left out of the fit: those of the dictionaries, or some found in the text."""

    @classmethod
    def of(cls, model: LanguageModel, dictionaries: DictionarySet, corpus: Text, config: RefineConfig) -> "Reading":
        """`model`: one that reads text as in the dictionaries' training. `InputError` where there is too little."""
        recorded = dictionaries.provenance.config
        context = config.context or _whole(recorded.get("context")) or _CONTEXT
        if isinstance(corpus, Tensor):
            name, rows, held_out, context = ROWS, *_split(corpus, config.held_out_tokens), corpus.shape[1]
        else:
            opened = open_corpus(corpus)
            name, context = opened.name, min(context, model.context)
            separator = opened.separator_or(config.separator or _text(recorded.get("separator")))
            rows = CorpusRows(model, opened, context, separator)
            count = -(-config.held_out_tokens // context)
            held_out = take_rows(model, opened.held_out(), rows=count, context=context, separator=separator)
        first = dictionaries.provenance.first
        if context <= first:
            raise InputError(
                f"Rows of {context} tokens have none after the first {first}, where the dictionaries have no features; "
                "give a longer context."
            )
        limits = dictionaries.provenance.site_limits
        if not limits and config.outliers:
            limits = _found_limits(model, dictionaries, rows, context, config)
        return cls(model, dictionaries, name, rows, held_out.to(model.device), context, limits)

    def batches(self, tokens: int) -> Iterator[ActivationBatch]:
        """One pass over the rows to fit on, until so many tokens have come."""
        passing, left = self.rows(), tokens
        while left > 0 and (some := list(islice(passing, max(1, _TOGETHER // self.context)))):
            rows, positions = (side.to(self.model.device) for side in stacked(some))
            batch = self._activations(rows, self.limits, positions)
            yield ActivationBatch(batch.reads[:left], batch.writes[:left])
            left -= len(batch.reads)

    def held_out_batches(self, limits: Mapping[Site, float]) -> Iterator[ActivationBatch]:
        for rows in self.held_out.split(max(1, _TOGETHER // self.context)):
            yield self._activations(rows, limits, None)

    def _activations(self, rows: Tensor, limits: Mapping[Site, float], positions: Tensor | None) -> ActivationBatch:
        d = self.dictionaries
        first = d.provenance.first
        return sites_of(self.model, rows, d.reads, d.writes, first=first, limits=limits, positions=positions)


def _split(rows: Int[Tensor, "row pos"], held_out_tokens: int) -> tuple[TokenRows, Int[Tensor, "_ pos"]]:
    if len(rows) < 2:
        raise InputError(f"{len(rows)} row of tokens leaves nothing to hold out; give at least 2.")
    held_out = torch.arange(len(rows)) % _HELD_OUT == 1
    return TokenRows(rows[~held_out]), rows[held_out][: -(-held_out_tokens // rows.shape[1])]


def _found_limits(
    model: LanguageModel, dictionaries: DictionarySet, rows: Rows, context: int, config: RefineConfig
) -> Mapping[Site, float]:
    if not (some := list(islice(rows(), -(-SAMPLE_TOKENS // context)))):
        return {}
    tokens, positions = (side.to(model.device) for side in stacked(some))
    sites, first = sorted({*dictionaries.reads, *dictionaries.writes}), dictionaries.provenance.first
    found = find_outliers(model, tokens, sites, times=config.outliers, first=first, positions=positions)
    if found.largest:
        logger.info("%s The fit is on the rest.", found.describe())
    return found.limits


def _whole(value: Any) -> int | None:
    """A setting as another tool may have written it."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 1 else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
