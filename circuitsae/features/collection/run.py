"""`collect`: the pass itself, from rows of tokens to a set of feature cards."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from operator import eq
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from circuitsae.features.cards import FeatureCards
from circuitsae.features.collection.assemble import assemble
from circuitsae.features.collection.config import CollectConfig
from circuitsae.features.collection.examples import Chunk
from circuitsae.features.collection.state import STATE, Collected
from circuitsae.features.connections import Connections
from circuitsae.features.reading import encode_rows, open_reading, rows_at_once
from circuitsae.replacement import ReplacementModel
from transcoders.data.corpora import CorpusSource
from transcoders.dictionaries import DictionarySet, fitted
from transcoders.dictionaries.fingerprint import dictionary_fingerprint
from transcoders.errors import DictionaryError, InputError
from transcoders.language_model import LanguageModel
from transcoders.progress import progress_bar
from transcoders.training.stopping import stop_requests

logger = logging.getLogger(__name__)

CONNECTED_OVER = 20_000
"""Tokens of the corpus, its first, over which inputs and outputs are found: a second pass, of seconds."""
CONNECTED_UP_TO = 8192
"""Features of all layers together up to which they are found: 67 million pairs, 2.4 GB were all active together."""


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
    token ids are read as they are. `bos`: whether each row of text begins with BOS; default, as in training. Inputs and
    outputs of transcoders' features (up to 8,192) are the largest by TWERA over the first 20,000 tokens, read again.

    `out` gets the cards (`<dictionary>/cards` is where everything looks for them), and every `save_every` tokens the
    state: a run that was killed goes on from there, one that Ctrl-C or SIGTERM ended (`Stopped`) from where it was, and
    ends with the same numbers to the last bit.

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
                **{k: v for k, v in asdict(config).items() if k not in ("save_every", "connections")}}  # fmt: skip
    folder = None if out is None else Path(out)
    if folder is not None and resume and (folder / STATE).is_file():
        collected.restore(folder, identity)
        logger.info("going on at token %d", collected.tokens)
    _read(model, dictionaries, rows, collected, config, context, folder, identity, progress)
    cards = assemble(model, dictionaries, collected, config, reading.name)
    if config.connections and (replacement := _connectable(model, dictionaries)) is not None:
        found = Connections.collect(
            replacement, corpus, tokens=min(config.tokens, CONNECTED_OVER), context=context, separator=separator,
            progress=progress,
        )  # fmt: skip
        cards = cards.with_connections(found, config.connections)
    if folder is not None:
        cards.save(folder)
        (folder / STATE).unlink(missing_ok=True)
    return cards


def _connectable(model: LanguageModel, dictionaries: DictionarySet) -> ReplacementModel | None:
    """The model with its transcoders; None for dictionaries without virtual weights, and for more than few features."""
    n = sum(dictionaries.n_features(layer) for layer in range(dictionaries.n_layers))
    if n > CONNECTED_UP_TO or any(map(eq, dictionaries.reads, dictionaries.writes)):
        return None
    try:
        return ReplacementModel(model, dictionaries, bos=model.adds_bos)
    except DictionaryError:  # sites that a card may be of, but no graph
        return None


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
    with stop_requests(folder is not None) as stop, progress_bar(shown=progress) as bar:
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
            if folder is not None and stop.number is not None:
                collected.save(folder, identity)
                raise stop.stopped(f"Stopped after {collected.tokens:,} tokens; the same command goes on.")
    if collected.rows == 0:
        raise InputError(f"The corpus does not fill a single row of {context} tokens; give more text.")
    if collected.rows < n_rows:
        logger.warning("the corpus ended after %d of %d tokens", collected.tokens, config.tokens)
