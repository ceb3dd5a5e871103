"""A model reading text → an activation store, by any number of jobs that know nothing of each other but the folder.

A shard is the activations of some hundred rows of text, as many as fit the budget, shuffled. Each is a function of the
model, the text and the settings alone, so it does not matter which job writes it, or whether one was killed before:
what is there is kept, and whoever finds all shards there writes `store.json`. Every job reads all of the text, which
takes little time, and runs the model on its own share.
"""

import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from signal import SIGINT
from typing import cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.data.activations import sites_of
from transcoders.data.chunks import require_masked
from transcoders.data.corpora import CorpusSource, open_corpus
from transcoders.data.outliers import SAMPLE_TOKENS, find_outliers
from transcoders.data.shards import STORED, StoreDtype, write_shard
from transcoders.data.store import (
    SETTINGS_SCHEMA,
    SHARD_SCHEMA,
    STORE,
    ActivationStore,
    StoredShard,
    StoreSettings,
    read_record,
)
from transcoders.data.tokens import Boundaries, CorpusRows, Row, Rows, TokenRows, stacked
from transcoders.dictionaries.provenance import ROWS
from transcoders.errors import FileFormatError, InputError, NotFiniteError, Stopped
from transcoders.files import short_hash, write_json
from transcoders.language_model import LanguageModel
from transcoders.precision import all_finite
from transcoders.progress import progress_bar
from transcoders.sites import Site, SiteKind

logger = logging.getLogger(__name__)

_WRITING, _PARTS = "writing.json", "parts"
_BLOCK_BYTES, _MOST_IN_BLOCK = 2**24, 4096
_TOKENS_AT_ONCE = 4096


def write_activations(
    model: LanguageModel,
    corpus: CorpusSource | Int[Tensor, "row pos"],
    out: Path | str,
    *,
    sites: SiteKind | Iterable[Site | SiteKind],
    tokens: int | None = None,
    context: int = 128,
    documents: Boundaries = "packed",
    separator: str | None = None,
    bos: bool | None = None,
    first: int = 1,
    outliers: float = 20.0,
    dtype: StoreDtype = "float32",
    shard_mb: int = 512,
    seed: int = 0,
    job: tuple[int, int] = (1, 1),
    progress: bool = True,
) -> ActivationStore | None:
    """Write the activations of a model on a text to a folder, for `train(None, ActivationStore(folder), config)`.

    `corpus`: as `train` takes it; of documents every twentieth is held out. `sites`: places, or kinds of place of which
    every layer's is written; all of one width. `tokens`: as many rows of text as hold so many; None for all of it.
    `context`, `documents`, `separator`, `bos`: how text becomes rows, see `TrainConfig`.
    `first`: the first position of each row that is kept. `outliers`: of the others, a token is left out whose norm at
    one of the sites is more than this many times the site's median; 0 for none. `dtype`: `float32`, `bf16`, or `int8`
    with a bf16 scale for each 64 coordinates, compressed with zstd. `shard_mb`: memory for the activations that are
    shuffled together, in float32, and written as one file.

    `job`: (2, 8) writes the second of eight shares. The store of all jobs together is returned by the one that ends
    last, None by the others. A job that was stopped goes on after its last whole shard when it is called again.

    Raises `InputError` where the folder holds activations of other settings, or the text changed meanwhile, and
    `NotFiniteError` for activations that are not finite; no shard is half-written.
    """
    out = Path(out)
    number, of = _require_job(job)
    text = _Text.of(model.with_bos(bos), corpus, context=context, separator=separator, documents=documents)
    settings = _settings(
        text, _all_sites(model, sites), first=first, outliers=outliers, dtype=dtype, seed=seed, shard_mb=shard_mb,
        most=tokens,
    )  # fmt: skip
    if (out / STORE).is_file():
        return _there_already(out, settings)
    writer = _Writer(text, settings, out)
    writer.begin()
    with progress_bar(shown=progress) as bar:
        task = bar.add_task(
            f"activations, job {number} of {of}",
            total=settings.most_tokens and -(-settings.most_tokens // settings.shard_tokens),
        )
        shards = 0
        try:
            for shard, part in enumerate(writer.parts()):
                writer.take(shard, part, mine=shard % of == number - 1)
                shards += 1
                bar.update(task, completed=shards)
        except KeyboardInterrupt as stopped:
            raise Stopped(f"Stopped after {shards:,} shards; the same command goes on after them.", SIGINT) from stopped
    return writer.finish(shards)


@dataclass(frozen=True)
class _Text:
    """Rows of tokens, and the model that reads them."""

    model: LanguageModel
    name: str
    context: int
    separator: str | None
    documents: Boundaries
    bos: bool
    rows: Rows

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        corpus: CorpusSource | Tensor,
        *,
        context: int,
        separator: str | None,
        documents: Boundaries,
    ) -> "_Text":
        if isinstance(corpus, Tensor):
            if documents != "packed":
                raise InputError(f"documents={documents!r} is of text; rows of tokens are read as they are given.")
            begins = model.bos is not None and bool((corpus[:, 0] == model.bos).all())
            return cls(model, ROWS, corpus.shape[1], None, documents, begins, TokenRows(corpus))
        opened = open_corpus(corpus)
        context = min(context, model.context)
        if documents == "masked":
            require_masked(model, context)
        between = opened.separator_or(separator)
        rows = CorpusRows(model, opened, context, between, documents)
        return cls(model, opened.name, context, between, documents, model.adds_bos, rows)


class _Writer:
    """One job: the shards that it writes, and the others that it knows to be there."""

    def __init__(self, text: _Text, settings: StoreSettings, out: Path) -> None:
        self.text, self.settings, self.out = text, settings, out
        self._seen: list[str] = []
        self._n_rows = 0

    def begin(self) -> None:
        """Say in the folder what is written there; `InputError` where something else is."""
        path = self.out / _WRITING
        if not path.is_file():
            write_json(path, replace(self.settings, limits=self._limits()).to_json())
        found = read_record(path, SETTINGS_SCHEMA)
        _require_equal(self.out, found, self.settings.to_json())
        self.settings = StoreSettings.from_json(path, found)  # with the limits that all jobs share

    def parts(self) -> Iterator[list[Row]]:
        """The rows of each shard: as many as its memory holds."""
        kept = self.settings
        part, room, left = [], kept.shard_tokens, kept.most_tokens
        for row in self.text.rows():
            if left is not None and left <= 0:
                break
            tokens = sum(max(0, length - kept.first) for length in row.lengths)
            left = None if left is None else left - tokens
            if tokens > room:
                yield part
                part, room = [], kept.shard_tokens
            part.append(row)
            room -= tokens
        if part:
            yield part

    def take(self, shard: int, rows: list[Row], *, mine: bool) -> None:
        """Write a shard where it is this job's and not there yet."""
        seen = short_hash(f"{row.ids}{row.lengths}" for row in rows)
        self._seen.append(seen)
        self._n_rows += len(rows)
        if (self.out / STORE).is_file():  # another job has just ended it
            return
        if (found := self._written(shard)) is not None:
            self._require_rows(shard, found)
        elif mine:
            name = f"shard-{shard:05d}.safetensors"
            activations = self._shuffled(shard, *(side.to(self.text.model.device) for side in stacked(rows)))
            digest = write_shard(self.out / name, activations, self.settings.dtype, self.settings.block)
            tokens = len(next(iter(activations.values())))
            stored = StoredShard(name, tokens, (self.out / name).stat().st_size, digest, seen)
            write_json(self._part(shard), stored.to_json())

    def finish(self, shards: int) -> ActivationStore | None:
        """Write `store.json` where all shards are there."""
        if shards == 0:
            (self.out / _WRITING).unlink(missing_ok=True)
            raise InputError(f"{self.text.name} does not fill a row of {self.text.context} tokens; give more text.")
        found = [self._written(shard) for shard in range(shards)]
        if (self.out / STORE).is_file():  # by another job that ended at the same time
            return _there_already(self.out, self.settings)
        written = [shard for shard in found if shard is not None]
        if len(written) < shards:
            logger.info("%d of %d shards are written; other jobs have the rest", len(written), shards)
            return None
        for shard, stored in enumerate(written):
            self._require_rows(shard, stored)
        write_json(self.out / STORE, self.settings.to_json() | {"shards": [s.to_json() for s in written]})
        return _there_already(self.out, self.settings)

    def _limits(self) -> Mapping[Site, float]:
        """Norms above which a token is left out, by a sample from the start of the text."""
        kept = self.settings
        sample = list(islice(self.text.rows(), -(-SAMPLE_TOKENS // self.text.context))) if kept.outliers else []
        if not sample:
            return {}
        rows, positions = (side.to(self.text.model.device) for side in stacked(sample))
        found = find_outliers(
            self.text.model, rows, kept.sites, times=kept.outliers, first=kept.first, positions=positions
        )
        if found.largest:
            logger.info("%s They are left out.", found.describe())
        return found.limits

    @torch.no_grad()
    def _shuffled(
        self, shard: int, rows: Int[Tensor, "row pos"], positions: Int[Tensor, "row pos"]
    ) -> dict[Site, Float[Tensor, "token d_model"]]:
        """The activations of some rows at each site, in the order of the shard."""
        kept = self.settings
        most = int((positions >= kept.first).sum())
        found = {site: torch.empty(most, kept.d_model, dtype=STORED[kept.dtype]) for site in kept.sites}
        at_once = max(1, _TOKENS_AT_ONCE // rows.shape[1])
        tokens = 0
        for start in range(0, len(rows), at_once):
            group, places = rows[start : start + at_once], positions[start : start + at_once]
            reads = self._activations(group, places, kept.limits)
            if not all_finite(reads):
                raise self._not_finite(group, places, self._n_rows - len(rows) + start)
            for i, site in enumerate(kept.sites):
                found[site][tokens : tokens + len(reads)] = reads[:, i]
            tokens += len(reads)
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(kept.seed * 1_000_003 + shard))
        for site in kept.sites:  # one after the other: a second copy of one site at most
            found[site] = found[site][order]
        return found

    def _activations(
        self, rows: Int[Tensor, "row pos"], positions: Int[Tensor, "row pos"], limits: Mapping[Site, float]
    ) -> Float[Tensor, "token site d_model"]:
        kept = self.settings
        return sites_of(
            self.text.model, rows, kept.sites, (), first=kept.first, limits=limits, positions=positions
        ).reads

    def _not_finite(
        self, rows: Int[Tensor, "row pos"], positions: Int[Tensor, "row pos"], first_row: int
    ) -> NotFiniteError:
        token, site = (~self._activations(rows, positions, {}).isfinite().all(dim=2)).nonzero()[0].tolist()
        row, column = (positions >= self.settings.first).nonzero()[token].tolist()
        return NotFiniteError(
            f"The activations at {self.settings.sites[site]} are not finite at position {column} of row "
            f"{first_row + row} of the text; mend or leave out what they come from."
        )

    def _part(self, shard: int) -> Path:
        return self.out / _PARTS / f"{shard:05d}.json"

    def _written(self, shard: int) -> StoredShard | None:
        """A shard that is there in full; None for one that is not, or no longer: of a store that is complete."""
        path = self._part(shard)
        if not path.is_file():
            return None
        try:
            stored = StoredShard.from_json(read_record(path, SHARD_SCHEMA))
        except FileFormatError:
            if path.is_file():
                raise
            return None  # the job that ended the store has just removed it
        file = self.out / stored.file
        return stored if file.is_file() and file.stat().st_size == stored.bytes else None

    def _require_rows(self, shard: int, stored: StoredShard) -> None:
        if stored.rows != self._seen[shard]:
            raise InputError(
                f"{self.out / stored.file} was written from another text than {self.text.name} is now; write to "
                "another folder, or remove this one."
            )


def _settings(
    text: _Text,
    sites: tuple[Site, ...],
    *,
    first: int,
    outliers: float,
    dtype: StoreDtype,
    seed: int,
    shard_mb: int,
    most: int | None,
) -> StoreSettings:
    model = text.model
    if dtype not in get_args(StoreDtype):
        raise InputError(f"dtype cannot be {dtype!r}; there are {', '.join(map(repr, get_args(StoreDtype)))}.")
    if outliers and not outliers > 1:
        raise InputError(f"outliers is how many times the median norm is too much, above 1, or 0; got {outliers}.")
    if not 0 <= first < text.context:
        raise InputError(f"first={first} leaves nothing of rows of {text.context} tokens; give 0, 1 or a few more.")
    if most is not None and most < 1:
        raise InputError(f"tokens must be at least 1; got {most}.")
    widths = {model.width(site) for site in sites}
    if len(widths) > 1:
        raise InputError(f"Sites of one store have one width; got widths {sorted(widths)}. Write a store for each.")
    d_model = widths.pop()
    per_token = 4 * d_model * len(sites)
    if shard_mb * 2**20 < text.context * per_token:
        raise InputError(
            f"shard_mb={shard_mb} does not hold one row of text, whose activations take "
            f"{text.context * per_token / 2**20:.1f} MB; give more, or a shorter context."
        )
    return StoreSettings(
        model=model.name,
        origin=model.origin,
        fingerprint=model.fingerprint(),
        frame=model.frame,
        n_layers=model.n_layers,
        d_model=d_model,
        d_vocab=model.d_vocab,
        corpus=text.name,
        bos=text.bos,
        context=text.context,
        documents=text.documents,
        separator=text.separator,
        first=first,
        outliers=outliers,
        limits={},
        sites=sites,
        dtype=dtype,
        seed=seed,
        most_tokens=most,
        shard_tokens=shard_mb * 2**20 // per_token,
        block=max(1, min(_MOST_IN_BLOCK, _BLOCK_BYTES // per_token)),
    )


def _all_sites(model: LanguageModel, sites: SiteKind | Iterable[Site | SiteKind]) -> tuple[Site, ...]:
    """Each site once; a kind stands for that of every layer."""
    places = cast("Iterable[Site | SiteKind]", (sites,) if isinstance(sites, str) else sites)
    named: list[Site] = []
    for place in places:
        named += [place] if isinstance(place, Site) else [Site(layer, place) for layer in range(model.n_layers)]
    if not named:
        raise InputError("There is nothing to write; give at least one site, such as 'resid_post'.")
    if odd := [site for site in named if site.layer >= model.n_layers]:
        raise InputError(f"{model.name} has no site {odd[0]}; its layers are 0 to {model.n_layers - 1}.")
    return tuple(sorted(set(named)))


def _require_job(job: tuple[int, int]) -> tuple[int, int]:
    number, of = job
    if not 1 <= number <= of:
        raise InputError(f"There is no job {number} of {of}; the first is 1, the last {of}.")
    return number, of


def _there_already(out: Path, settings: StoreSettings) -> ActivationStore:
    """A store that is complete, without what was needed to write it."""
    store = ActivationStore(out)
    _require_equal(out, store.settings.to_json(), settings.to_json())
    (out / _WRITING).unlink(missing_ok=True)
    shutil.rmtree(out / _PARTS, ignore_errors=True)
    return store


def _require_equal(out: Path, found: dict[str, object], mine: dict[str, object]) -> None:
    differ = [key for key in mine if key != "limits" and found.get(key) != mine[key]]
    if differ:
        each = "; ".join(f"its {key} is {found.get(key)!r}, not {mine[key]!r}" for key in differ)
        raise InputError(
            f"{out} holds other activations: {each}. Give those settings, write to another folder, or remove this one."
        )
