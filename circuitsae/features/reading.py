"""A corpus as a pass over it reads it: rows of tokens, and which features are active where."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int
from torch import Tensor

from transcoders.data import pack_rows
from transcoders.data.corpora import CorpusSource, open_corpus
from transcoders.data.outliers import activations_and_massive
from transcoders.dictionaries import DictionarySet, SparseFeatures
from transcoders.dictionaries.provenance import reading_as_trained
from transcoders.errors import DictionaryError, InputError
from transcoders.files import short_hash
from transcoders.language_model import LanguageModel

_TOKENS_AT_ONCE = 4096
_BYTES_AT_ONCE = 128 * 2**20
_FIRST_ROWS = 64
"""Rows by which a corpus that is read as it comes is told from others."""


class Firing(NamedTuple):
    """The active features of a chunk of tokens, sorted by layer, token and feature."""

    feature: Int[np.ndarray, "n"]
    """Numbered through all layers."""
    token: Int[np.ndarray, "n"]
    """Row · context + position, within the chunk."""
    value: Float32[np.ndarray, "n"]
    """Activations, all above 0 and finite."""

    def take(self, which: np.ndarray) -> "Firing":
        """The rows `which`, by number or mask."""
        return Firing(self.feature[which], self.token[which], self.value[which])


class Reading(NamedTuple):
    """A corpus as a pass reads it."""

    model: LanguageModel
    """With BOS before each row of text, or without."""
    rows: Iterator[Sequence[int]]
    context: int
    """Tokens of a row."""
    name: str
    source: dict[str, Any]
    """What tells the rows from any others."""


def open_reading(
    model: LanguageModel,
    dictionaries: DictionarySet,
    corpus: CorpusSource | Int[Tensor, "row pos"],
    tokens: int,
    context: int,
    *,
    separator: str | None = None,
    bos: bool | None = None,
) -> Reading:
    """Rows of a corpus that hold `tokens` tokens with features; its held-out documents are not among them.

    Raises `InputError` for rows that the model cannot take, and for such as have no position with features.
    """
    first = dictionaries.provenance.first
    if not isinstance(corpus, Tensor):
        model = reading_as_trained(model, dictionaries.provenance, bos)
    context = min(context, model.context)
    if isinstance(corpus, Tensor):
        _check_rows(model, corpus)
        context = corpus.shape[1]
    if context <= first:
        raise InputError(
            f"Rows of {context} tokens have no position with features, which start at {first}; give longer ones."
        )
    rows, name, source = _rows(model, corpus, context, separator, math.ceil(tokens / (context - first)))
    return Reading(model, rows, context, name, source)


def encode_rows(model: LanguageModel, dictionaries: DictionarySet, rows: Int[Tensor, "row pos"]) -> Firing:
    """What fires where on rows of tokens, all layers together; nothing at positions without features."""
    start = dictionaries.provenance.first
    limits = dictionaries.provenance.site_limits
    found, massive = activations_and_massive(model, rows, dictionaries.reads, limits)
    reads = torch.stack([found[site][:, start:].flatten(0, 1) for site in dictionaries.reads])
    massive = massive[:, start:].flatten()
    features = dictionaries.encode(reads)
    with_features = ~massive[features.index[:, 1]]
    features = SparseFeatures(features.index[with_features], features.value[with_features])
    layer, place, feature = (column.cpu().numpy() for column in features.index.unbind(1))
    widths = [dictionaries.n_features(i) for i in range(dictionaries.n_layers)]
    first = np.concatenate([[0], np.cumsum(widths)])
    body = rows.shape[1] - start
    token = place // body * rows.shape[1] + place % body + start
    return Firing(first[layer] + feature, token, _positive(features))


def _positive(features: SparseFeatures) -> Float32[np.ndarray, "n"]:
    """The activations in single precision; raises `DictionaryError` unless all are above 0 and finite there."""
    value = features.value.float()
    wrong = ((features.value > 0) & value.isfinite()).logical_not().nonzero()
    if len(wrong):
        layer, _, feature = features.index[wrong[0, 0]].tolist()
        raise DictionaryError(
            f"Feature {layer}.{feature} has the activation {float(features.value[wrong[0, 0]]):g}, but cards are of "
            "finite activations above 0; check the weights, and raise thresholds below 0 (of a JumpReLU) to 0."
        )
    # What is active stays so where single precision has no number as small.
    return value.clamp(min=torch.finfo(torch.float32).tiny).cpu().numpy()


def rows_at_once(n_features: int, context: int) -> int:
    """Rows whose dense activations, three times over, fit the budget."""
    tokens = min(_TOKENS_AT_ONCE, _BYTES_AT_ONCE // (12 * max(1, n_features)))
    return max(1, tokens // context)


def _rows(
    model: LanguageModel, corpus: CorpusSource | Tensor, context: int, separator: str | None, n_rows: int
) -> tuple[Iterator[Sequence[int]], str, dict[str, Any]]:
    """Rows of tokens, the name of where they are from, and what tells that from any other."""
    if isinstance(corpus, Tensor):
        read = _hash(part.cpu() for part in corpus[:n_rows].split(1024))
        source = {"name": "tokens", "shape": list(corpus.shape), "rows": read}
        return (row.tolist() for row in corpus), "tokens", source
    opened = open_corpus(corpus)
    separator = opened.separator_or(separator)
    rows = iter(pack_rows(model, opened.training(), context=context, separator=separator))
    first = [list(row) for row in islice(rows, min(_FIRST_ROWS, n_rows))]
    source = {"name": opened.name, "bytes": _file_size(corpus), "rows": _hash([first])}
    return chain(first, rows), opened.name, source


def _check_rows(model: LanguageModel, rows: Tensor) -> None:
    """Raises `InputError` for rows of tokens that the model cannot take."""
    if rows.ndim != 2 or rows.shape[1] < 2 or rows.is_floating_point():
        raise InputError(
            f"Rows of tokens must be whole numbers [row, pos] with 2 or more positions; "
            f"got {rows.dtype} {list(rows.shape)}."
        )
    if len(rows):
        model.check_tokens(rows[0])
        model.check_tokens(torch.stack([rows.min(), rows.max()]))


def _hash(parts: Iterable[Tensor | list[list[int]]]) -> str:
    return short_hash(np.asarray(part, np.int64).tobytes() for part in parts)


def _file_size(corpus: CorpusSource) -> int | None:
    """Bytes of a text file; None for what is none."""
    if not isinstance(corpus, str | Path):
        return None
    path = Path(corpus).expanduser()
    return path.stat().st_size if path.is_file() else None
