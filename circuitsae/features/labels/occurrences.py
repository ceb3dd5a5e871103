"""Where features fire on a text, in two parts: labels are searched on one and scored on the other."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import torch
from jaxtyping import Bool, Int
from scipy.sparse import csc_matrix
from torch import Tensor

from circuitsae.features.reading import encode_rows, open_reading, rows_at_once
from transcoders.data import held_out_rows, massive_tokens
from transcoders.data.corpora import CorpusSource
from transcoders.dictionaries import DictionarySet, fitted
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel
from transcoders.progress import progress_bar

logger = logging.getLogger(__name__)

MOST_ENTRIES = 60_000_000
"""Active features that a part holds, of eight bytes each; a text with more of them is read no further."""


@dataclass(frozen=True)
class Part:
    """Rows of a text, and what fires where."""

    tokens: Int[np.ndarray, "row pos"]
    counted: Bool[np.ndarray, "row pos"]
    """Positions that have features: not the first of a row (BOS), nor those that the dictionaries leave out."""
    fires: tuple[csc_matrix, ...]
    """Of each layer [row · pos, feature]: the activations above 0."""

    @property
    def n_counted(self) -> int:
        """Positions with features."""
        return int(self.counted.sum())

    def places(self, layer: int, feature: int) -> Int[np.ndarray, "n"]:
        """Where one feature fires, as row · length + position, from first to last."""
        fires = self.fires[layer]
        return fires.indices[fires.indptr[feature] : fires.indptr[feature + 1]]


@dataclass(frozen=True)
class Occurrences:
    """What fires where on a text, on the part that labels are searched on and on the part that is held out."""

    search: Part
    held_out: Part
    text_of: dict[int, str]
    """The text of each token id that occurs."""
    corpus: str
    """The name of the text."""

    def n_features(self, layer: int) -> int:
        """Features of a layer."""
        return len(self.search.fires[layer].indptr) - 1

    @property
    def n_layers(self) -> int:
        """Layers of the dictionaries."""
        return len(self.search.fires)


@torch.no_grad()
def read_occurrences(
    model: LanguageModel,
    dictionaries: DictionarySet,
    corpus: CorpusSource | Int[Tensor, "row pos"],
    *,
    tokens: int = 100_000,
    held_out: int = 50_000,
    context: int = 128,
    separator: str | None = None,
    bos: bool | None = None,
    progress: bool = False,
) -> Occurrences:
    """Run the model over a text and keep what fires where.

    Searched are `tokens` tokens of the documents that `train` trains on, held out as many as there are, and at most
    `held_out`, of those that it does not (every twentieth). Of rows of token ids the last third is held out.

    Raises `InputError` for a text that does not fill a row of each part.
    """
    dictionaries = fitted(dictionaries, model)
    reading = open_reading(model, dictionaries, corpus, tokens, context, separator=separator, bos=bos)
    with_features = reading.context - dictionaries.provenance.first
    n_search, n_held_out = math.ceil(tokens / with_features), math.ceil(held_out / with_features)
    rows: Iterable[Sequence[int]] = reading.rows
    if isinstance(corpus, Tensor):
        if len(corpus) < 2:
            raise InputError(f"One row of tokens cannot be searched and held out; got {list(corpus.shape)}, give more.")
        cut = len(corpus) - max(1, len(corpus) // 3)
        rows, others = corpus[:cut].tolist(), corpus[cut:].tolist()[:n_held_out]
    else:
        amount = {"tokens": n_held_out * reading.context, "context": reading.context}
        others = held_out_rows(reading.model, corpus, **amount, separator=separator).tolist()
    with progress_bar(shown=progress) as bar:
        task = bar.add_task("reading", total=n_search + len(others))

        def part(rows: Iterable[Sequence[int]], most: int) -> Part:
            reader = _Reader(reading.model, dictionaries)
            for batch in reader.batches(rows, most, reading.context):
                reader.read(torch.tensor(batch, device=model.device))
                bar.advance(task, len(batch))
            return reader.part()

        search, kept = part(rows, n_search), part(others, len(others))
    ids = np.union1d(search.tokens, kept.tokens).tolist()
    return Occurrences(search, kept, {token: reading.model.token_string(token) for token in ids}, reading.name)


class _Reader:
    """A part as it grows."""

    def __init__(self, model: LanguageModel, dictionaries: DictionarySet) -> None:
        self._model, self._dictionaries = model, dictionaries
        widths = [dictionaries.n_features(layer) for layer in range(dictionaries.n_layers)]
        self._first = np.concatenate([[0], np.cumsum(widths)])
        self._tokens: list[np.ndarray] = []
        self._counted: list[np.ndarray] = []
        self._found: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = [[] for _ in widths]
        self._entries = self._places = 0

    def batches(self, rows: Iterable[Sequence[int]], most: int, context: int) -> Iterator[list[Sequence[int]]]:
        """Rows to read at once, until there are `most`, or as many active features as memory is meant for."""
        rows, read = islice(rows, most), 0
        while batch := list(islice(rows, rows_at_once(int(self._first[-1]), context))):
            if self._entries > MOST_ENTRIES:
                logger.warning("%d of %d rows are read: more active features would not fit", read, most)
                return
            read += len(batch)
            yield batch

    def read(self, rows: Tensor) -> None:
        firing = encode_rows(self._model, self._dictionaries, rows)
        provenance = self._dictionaries.provenance
        counted = ~massive_tokens(self._model, rows, provenance.site_limits).cpu().numpy()
        counted[:, : provenance.first] = False
        cuts = np.searchsorted(firing.feature, self._first)  # sorted by layer, which is all that these bounds ask
        for layer, (start, end) in enumerate(pairwise(cuts)):
            feature = (firing.feature[start:end] - self._first[layer]).astype(np.int32)
            token = (firing.token[start:end] + self._places).astype(np.int32)
            self._found[layer].append((token, feature, firing.value[start:end]))
        self._tokens.append(rows.cpu().numpy().astype(np.int32))
        self._counted.append(counted)
        self._entries += len(firing.feature)
        self._places += rows.numel()

    def part(self) -> Part:
        if not self._tokens:
            raise InputError(
                "The text does not fill a row of the part to search on and of the held-out part; give more."
            )
        fires = []
        for layer, found in enumerate(self._found):
            token, feature, value = (np.concatenate(column) for column in zip(*found, strict=True))
            shape = (self._places, int(self._first[layer + 1] - self._first[layer]))
            fires.append(csc_matrix((value, (token, feature)), shape))
            found.clear()
        return Part(np.concatenate(self._tokens), np.concatenate(self._counted), tuple(fires))
