"""A model reading text → an activation store, by any number of jobs that know nothing of each other but the folder.

A shard is the activations of some hundred rows of text, as many as fit the budget, shuffled. Each is a function of the
model, the text and the settings alone, so it does not matter which job writes it, or whether one was killed before:
what is there is kept, and whoever finds all shards there writes `store.json`. Every job reads all of the text, which
takes little time, and runs the model on its own share.
"""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import cast, get_args

import torch
from jaxtyping import Float, Int
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from transcoders.data.activations import sites_of
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
from transcoders.data.tokens import pack_rows
from transcoders.errors import FileFormatError, InputError, NotFiniteError
from transcoders.files import short_hash, write_json
from transcoders.language_model import LanguageModel
from transcoders.progress import progress_bar
from transcoders.sites import Site, SiteKind

logger = logging.getLogger(__name__)

_WRITING, _PARTS = "writing.json", "parts"
_BLOCK_BYTES, _MOST_IN_BLOCK = 2**24, 4096
_TOKENS_AT_ONCE = 4096
_CORPUS_OF_ROWS = "rows of tokens"


def write_activations(
    model: LanguageModel,
    corpus: CorpusSource | Int[Tensor, "row pos"],
    out: Path | str,
    *,
    sites: SiteKind | Iterable[Site | SiteKind],
    tokens: int | None = None,
    context: int = 128,
    separator: str | None = None,
    bos: bool | None = None,
    first: int = 1,
    outliers: float = 30.0,
    dtype: StoreDtype = "float32",
    shard_mb: int = 512,
    seed: int = 0,
    job: tuple[int, int] = (1, 1),
    progress: bool = True,
) -> ActivationStore | None:
    """Write the activations of a model on a text to a folder, for `train(None, ActivationStore(folder), config)`.

    `corpus`: as `train` takes it; of documents every twentieth is held out. `sites`: places, or kinds of place of which
    every layer's is written; all of one width. `tokens`: as many rows of text as hold so many; None for all of it.
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
    rows = _Rows.of(model.with_bos(bos), corpus, context=context, separator=separator, first=first)
    settings = _settings(rows, _all_sites(model, sites), first=first, outliers=outliers, dtype=dtype, seed=seed)
    writer = _Writer(rows, settings, out, shard_mb, _row_count(tokens, rows.context - first))
    number, of = _require_job(job)
    if (out / STORE).is_file():
        return _require_same(ActivationStore(out), settings)
    writer.begin()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with progress_bar(*columns, shown=progress) as bar:
        task = bar.add_task(f"activations, job {number} of {of}", total=writer.expected)
        shards = 0
        for shard, part in enumerate(writer.parts()):
            writer.take(shard, part, mine=shard % of == number - 1)
            shards += 1
            bar.update(task, completed=shards)
    return writer.finish(shards)


@dataclass(frozen=True)
class _Rows:
    """Rows of tokens, and the model that reads them."""

    model: LanguageModel
    corpus: str
    context: int
    separator: str | None
    bos: bool
    open: Callable[[], Iterator[Sequence[int]]]

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        corpus: CorpusSource | Tensor,
        *,
        context: int,
        separator: str | None,
        first: int,
    ) -> "_Rows":
        if isinstance(corpus, Tensor):
            begins = model.bos is not None and bool((corpus[:, 0] == model.bos).all())
            rows = cls(model, _CORPUS_OF_ROWS, corpus.shape[1], None, begins, lambda: iter(corpus.tolist()))
        else:
            opened = open_corpus(corpus)
            context = min(context, model.context)
            between = opened.separator_or(separator)

            def passes() -> Iterator[Sequence[int]]:
                return pack_rows(model, opened.training(), context=context, separator=between)

            rows = cls(model, opened.name, context, between, model.adds_bos, passes)
        if not 0 <= first < rows.context:
            raise InputError(f"first={first} leaves nothing of rows of {rows.context} tokens; give 0, 1 or a few more.")
        return rows


class _Writer:
    """One job: the shards that it writes, and the others that it knows to be there."""

    def __init__(self, rows: _Rows, settings: StoreSettings, out: Path, shard_mb: int, most_rows: int | None) -> None:
        self.rows, self.settings, self.out, self.most_rows = rows, settings, out, most_rows
        per_row = (rows.context - settings.first) * len(settings.sites) * settings.d_model * 4
        self.rows_per_shard = shard_mb * 2**20 // per_row
        if self.rows_per_shard < 1:
            raise InputError(
                f"shard_mb={shard_mb} does not hold one row of text, whose activations take {per_row / 2**20:.1f} MB; "
                "give more, or a shorter context."
            )
        self.expected = None if most_rows is None else -(-most_rows // self.rows_per_shard)
        self._seen: list[str] = []

    def begin(self) -> None:
        """Say in the folder what is written there; `InputError` where something else is."""
        path = self.out / _WRITING
        sizes = {"rows_per_shard": self.rows_per_shard, "most_rows": self.most_rows}
        if not path.is_file():
            write_json(path, replace(self.settings, limits=self._limits()).to_json() | sizes)
        found = read_record(path, SETTINGS_SCHEMA)
        _require_equal(self.out, found, self.settings.to_json() | sizes)
        self.settings = StoreSettings.from_json(path, found)  # with the limits that all jobs share

    def parts(self) -> Iterator[list[Sequence[int]]]:
        """The rows of each shard."""
        rows = islice(self.rows.open(), self.most_rows)
        while part := list(islice(rows, self.rows_per_shard)):
            yield part

    def take(self, shard: int, rows: list[Sequence[int]], *, mine: bool) -> None:
        """Write a shard where it is this job's and not there yet."""
        seen = short_hash(f"{row}" for row in rows)
        self._seen.append(seen)
        if (self.out / STORE).is_file():  # another job has just ended it
            return
        if (found := self._written(shard)) is not None:
            self._require_rows(shard, found)
        elif mine:
            name = f"shard-{shard:05d}.safetensors"
            activations = self._shuffled(shard, torch.tensor(rows, device=self.rows.model.device))
            digest = write_shard(self.out / name, activations, self.settings.dtype, self.settings.block)
            tokens = len(next(iter(activations.values())))
            stored = StoredShard(name, tokens, (self.out / name).stat().st_size, digest, seen)
            write_json(self._part(shard), stored.to_json())

    def finish(self, shards: int) -> ActivationStore | None:
        """Write `store.json` where all shards are there."""
        if shards == 0:
            raise InputError(f"{self.rows.corpus} does not fill a row of {self.rows.context} tokens; give more text.")
        found = [self._written(shard) for shard in range(shards)]
        if (self.out / STORE).is_file():  # by another job that ended at the same time
            return ActivationStore(self.out)
        written = [shard for shard in found if shard is not None]
        if len(written) < shards:
            logger.info("%d of %d shards are written; other jobs have the rest", len(written), shards)
            return None
        for shard, stored in enumerate(written):
            self._require_rows(shard, stored)
        write_json(self.out / STORE, self.settings.to_json() | {"shards": [s.to_json() for s in written]})
        (self.out / _WRITING).unlink(missing_ok=True)
        shutil.rmtree(self.out / _PARTS, ignore_errors=True)
        return ActivationStore(self.out)

    def _limits(self) -> Mapping[Site, float]:
        """Norms above which a token is left out, by a sample from the start of the text."""
        kept = self.settings
        sample = list(islice(self.rows.open(), -(-SAMPLE_TOKENS // self.rows.context))) if kept.outliers else []
        if not sample:
            return {}
        rows = torch.tensor(sample, device=self.rows.model.device)
        found = find_outliers(self.rows.model, rows, kept.sites, times=kept.outliers, first=kept.first)
        if found.largest:
            logger.info("%s They are left out.", found.describe())
        return found.limits

    @torch.no_grad()
    def _shuffled(self, shard: int, rows: Int[Tensor, "row pos"]) -> dict[Site, Float[Tensor, "token d_model"]]:
        """The activations of some rows at each site, in the order of the shard."""
        kept = self.settings
        most = len(rows) * (rows.shape[1] - kept.first)
        found = {site: torch.empty(most, kept.d_model, dtype=STORED[kept.dtype]) for site in kept.sites}
        at_once = max(1, _TOKENS_AT_ONCE // rows.shape[1])
        tokens = 0
        for start in range(0, len(rows), at_once):
            group = rows[start : start + at_once]
            reads = sites_of(self.rows.model, group, kept.sites, (), first=kept.first, limits=kept.limits).reads
            if not bool(reads.isfinite().all()):
                raise self._not_finite(group, shard * self.rows_per_shard + start)
            for i, site in enumerate(kept.sites):
                found[site][tokens : tokens + len(reads)] = reads[:, i]
            tokens += len(reads)
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(kept.seed * 1_000_003 + shard))
        for site in kept.sites:  # one after the other: a second copy of one site at most
            found[site] = found[site][order]
        return found

    def _not_finite(self, group: Int[Tensor, "row pos"], first_row: int) -> NotFiniteError:
        kept = self.settings
        reads = sites_of(self.rows.model, group, kept.sites, (), first=kept.first).reads
        token, site = (~reads.isfinite().all(dim=2)).nonzero()[0].tolist()
        row, position = divmod(token, group.shape[1] - kept.first)
        return NotFiniteError(
            f"The activations at {kept.sites[site]} are not finite at position {position + kept.first} of row "
            f"{first_row + row} of the text; mend or leave out what they come from."
        )

    def _part(self, shard: int) -> Path:
        return self.out / _PARTS / f"{shard:05d}.json"

    def _written(self, shard: int) -> StoredShard | None:
        """A shard that is there in full; None for one that is not, or no longer: of a store that is complete."""
        path = self._part(shard)
        try:
            stored = StoredShard.from_json(read_record(path, SHARD_SCHEMA))
        except FileFormatError:
            if path.is_file():
                raise
            return None
        file = self.out / stored.file
        return stored if file.is_file() and file.stat().st_size == stored.bytes else None

    def _require_rows(self, shard: int, stored: StoredShard) -> None:
        if stored.rows != self._seen[shard]:
            raise InputError(
                f"{self.out / stored.file} was written from another text than {self.rows.corpus} is now; write to "
                "another folder, or remove this one."
            )


def _settings(
    rows: _Rows, sites: tuple[Site, ...], *, first: int, outliers: float, dtype: StoreDtype, seed: int
) -> StoreSettings:
    model = rows.model
    if dtype not in get_args(StoreDtype):
        raise InputError(f"dtype cannot be {dtype!r}; there are {', '.join(map(repr, get_args(StoreDtype)))}.")
    if outliers and not outliers > 1:
        raise InputError(f"outliers is how many times the median norm is too much, above 1, or 0; got {outliers}.")
    widths = {model.width(site) for site in sites}
    if len(widths) > 1:
        raise InputError(f"Sites of one store have one width; got widths {sorted(widths)}. Write a store for each.")
    d_model = widths.pop()
    block = max(1, min(_MOST_IN_BLOCK, _BLOCK_BYTES // (4 * d_model * len(sites))))
    return StoreSettings(
        model=model.name,
        origin=model.origin,
        fingerprint=model.fingerprint(),
        frame=model.frame,
        n_layers=model.n_layers,
        d_model=d_model,
        d_vocab=model.d_vocab,
        corpus=rows.corpus,
        bos=rows.bos,
        context=rows.context,
        separator=rows.separator,
        first=first,
        outliers=outliers,
        limits={},
        sites=sites,
        dtype=dtype,
        seed=seed,
        block=block,
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


def _row_count(tokens: int | None, per_row: int) -> int | None:
    if tokens is not None and tokens < 1:
        raise InputError(f"tokens must be at least 1; got {tokens}.")
    return None if tokens is None else -(-tokens // per_row)


def _require_job(job: tuple[int, int]) -> tuple[int, int]:
    number, of = job
    if not 1 <= number <= of:
        raise InputError(f"There is no job {number} of {of}; the first is 1, the last {of}.")
    return number, of


def _require_same(store: ActivationStore, settings: StoreSettings) -> ActivationStore:
    _require_equal(store.folder, store.settings.to_json(), settings.to_json())
    return store


def _require_equal(out: Path, found: dict[str, object], mine: dict[str, object]) -> None:
    differ = [key for key in mine if key != "limits" and found.get(key) != mine[key]]
    if differ:
        each = "; ".join(f"its {key} is {found.get(key)!r}, not {mine[key]!r}" for key in differ)
        raise InputError(
            f"{out} holds other activations: {each}. Give those settings, write to another folder, or remove this one."
        )
