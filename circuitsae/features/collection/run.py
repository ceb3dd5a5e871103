"""`collect`: the pass itself, from rows of tokens to a set of feature cards."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int
from torch import Tensor

from circuitsae.features.cards import FeatureCards
from circuitsae.features.collection.assemble import assemble
from circuitsae.features.collection.config import CollectConfig
from circuitsae.features.collection.examples import Chunk
from circuitsae.features.collection.state import STATE, Collected
from circuitsae.features.collection.statistics import Firing
from transcoders.data import massive_tokens, pack_rows
from transcoders.data.corpora import CorpusSource, open_corpus
from transcoders.dictionaries import DictionarySet, SparseFeatures, fitted
from transcoders.dictionaries.fingerprint import dictionary_fingerprint
from transcoders.dictionaries.provenance import reading_as_trained
from transcoders.errors import DictionaryError, InputError
from transcoders.files import short_hash
from transcoders.language_model import LanguageModel
from transcoders.progress import progress_bar

logger = logging.getLogger(__name__)

_TOKENS_AT_ONCE = 4096
_BYTES_AT_ONCE = 128 * 2**20
_FIRST_ROWS = 64
"""Rows by which a corpus that is read as it comes is told from others."""


@torch.no_grad()
def collect(
    model: LanguageModel,
    dictionaries: DictionarySet,
    corpus: CorpusSource | Int[Tensor, "row pos"],
    config: CollectConfig = CollectConfig(),
    *,
    out: str | Path | None = None,
    separator: str | None = None,
    bos: bool | None = None,
    resume: bool = True,
    progress: bool = False,
) -> FeatureCards:
    """Feature cards of all layers, from one pass over a corpus.

    Rates, means, histograms, top and stratified examples and (up to 8,192 features) co-firing are exact: what a dense
    pass that keeps every activation would say. Of more features, co-firing comes from sketches. Memory does not grow
    with the number of tokens. Positions before the first with features are left out, as everywhere. Of a corpus, the
    documents that `train` holds out are not read, so that labels read off the cards can be tested on them; rows of
    token ids are read as they are. `bos`: whether each row of text begins with BOS; default, as in training.

    `out` gets the cards (`<dictionary>/cards` is where everything looks for them), and every `save_every` tokens the
    state: a run that was killed goes on from there, and ends with the same numbers to the last bit.

    Raises `DictionaryError` for dictionaries of another model, and for those with active features whose activations
    are not above 0; `InputError` for a corpus without a single row, for token ids that the model does not have, and
    where `out` holds the state of a run with other settings or of another corpus.
    """
    dictionaries = fitted(dictionaries, model)
    reading = open_reading(model, dictionaries, corpus, config.tokens, config.context, separator=separator, bos=bos)
    model, rows, context = reading.model, reading.rows, reading.context
    n = sum(dictionaries.n_features(layer) for layer in range(dictionaries.n_layers))
    window = config.before + 1 + config.after
    collected = Collected(
        n, top=config.top, strata=config.strata, per_stratum=config.per_stratum, window=window, seed=config.seed
    )
    identity = {"model": model.fingerprint(), "dictionary": dictionary_fingerprint(dictionaries),
                "corpus": reading.source, "context": context,
                **{k: v for k, v in asdict(config).items() if k != "save_every"}}  # fmt: skip
    folder = None if out is None else Path(out)
    if folder is not None and resume and (folder / STATE).is_file():
        collected.restore(folder, identity)
        logger.info("going on at token %d", collected.tokens)
    _read(model, dictionaries, rows, collected, config, context, folder, identity, progress)
    cards = assemble(model, dictionaries, collected, config, reading.name)
    if folder is not None:
        cards.save(folder)
        (folder / STATE).unlink(missing_ok=True)
    return cards


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


def _read(
    model: LanguageModel,
    dictionaries: DictionarySet,
    rows: Iterator[Sequence[int]],
    collected: Collected,
    config: CollectConfig,
    context: int,
    folder: Path | None,
    identity: dict[str, Any],
    progress: bool,
) -> None:
    """Count the corpus chunk by chunk, from where `collected` stands."""
    first = dictionaries.provenance.first
    with_features = context - first
    n_rows = math.ceil(config.tokens / with_features)
    at_once = rows_at_once(len(collected.statistics.count), context)
    rows = islice(rows, collected.rows, n_rows)
    saved = collected.tokens
    with progress_bar(shown=progress) as bar:
        task = bar.add_task("collecting", total=n_rows, completed=collected.rows)
        while batch := list(islice(rows, at_once)):
            tokens = torch.tensor(batch, device=model.device)
            firing = encode_rows(model, dictionaries, tokens)
            chunk = Chunk(tokens.cpu().numpy(), collected.rows, firing, config.before, config.after, first)
            collected.update(chunk, len(batch) * with_features)
            bar.update(task, completed=collected.rows)
            if folder is not None and collected.tokens - saved >= config.save_every and collected.rows < n_rows:
                collected.save(folder, identity)
                saved = collected.tokens
    if collected.rows == 0:
        raise InputError(f"The corpus does not fill a single row of {context} tokens; give more text.")
    if collected.rows < n_rows:
        logger.warning("the corpus ended after %d of %d tokens", collected.tokens, config.tokens)


def encode_rows(model: LanguageModel, dictionaries: DictionarySet, rows: Int[Tensor, "row pos"]) -> Firing:
    """What fires where on rows of tokens, all layers together; nothing at positions without features."""
    start = dictionaries.provenance.first
    found = model.activations(rows, dict.fromkeys(dictionaries.reads))
    reads = torch.stack([found[site][:, start:].flatten(0, 1) for site in dictionaries.reads])
    massive = massive_tokens(model, rows, dictionaries.provenance.site_limits)[:, start:].flatten()
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
