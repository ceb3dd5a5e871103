"""Where training data come from: a language model reading text, or vectors that are there already."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.data.activations import ActivationBatch, ActivationStream
from transcoders.data.chunks import no_row, require_masked
from transcoders.data.corpora import Corpus, CorpusSource, open_corpus
from transcoders.data.outliers import SAMPLE_TOKENS, TokenOutliers, find_outliers
from transcoders.data.tokens import CorpusRows, Rows, TokenRows, stacked
from transcoders.dictionaries.provenance import ROWS, VECTORS
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel
from transcoders.sites import Frame, Site
from transcoders.training.config import MLPConfig, SAEConfig, TrainConfig
from transcoders.training.dealing import SharedStream
from transcoders.training.derivative import Nudges
from transcoders.training.distributed import World
from transcoders.training.split import WHOLE, Split
from transcoders.training.trained_on import trained_on

logger = logging.getLogger(__name__)

FIRST_BATCHES = 8
"""Batches from which first values are taken."""
_TIMES = 20.0
"""Median norms above which a token is named, where none is left out."""
_SPARE = 1.1
"""Rows for a batch, in multiples of what it needs where no token is left out as an outlier."""

Vectors = Tensor | Callable[[int], Tensor]
"""`[token, d_model]` or `[token, layer, d_model]`, or a function from a chunk's number to such a tensor."""


@runtime_checkable
class Stream(Protocol):
    """Endless batches, each of which lasts until the next one is asked for."""

    def __iter__(self) -> Iterator[ActivationBatch]: ...

    def state(self) -> dict[str, Any]:
        """Where the next batch comes from, as JSON: `chunk`, `batch_in_chunk` and what else `Source.open` needs."""
        ...

    def place(self, row: int) -> str:
        """Where a row of the last batch comes from, for messages."""
        ...


@runtime_checkable
class Source(Protocol):
    """Everything a run needs to know of its data."""

    name: str
    origin: Mapping[str, str]
    """`LanguageModel.origin`."""
    corpus: str
    bos: bool | None
    """Whether rows of tokens begin with BOS; None where there are none."""
    first: int
    """Positions left out at the start of every row of tokens."""
    limits: Mapping[Site, float]
    """Norms of activations above which a token is left out; known once the first values were sampled."""
    frame: Frame
    n_layers: int
    d_model: int
    d_vocab: int | None
    device: torch.device
    trained_on: Mapping[str, str] | None
    """Under which names model and text are found again (`transcoders.training.trained_on`), where they are."""

    def fingerprint(self) -> str | None:
        """Of the model's weights."""
        ...

    def sites(self, config: TrainConfig) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        """What a dictionary of each layer reads and writes."""
        ...

    def open(
        self, sites: Sequence[Site], *, batch: int, state: Mapping[str, Any] | None = None, split: Split = WHOLE
    ) -> Stream:
        """Batches with all `sites` as reads `[batch, site, d_model]`, from the first one or from a stream's `state`.

        `split`: what of each batch this rank trains on, its own tokens or the sites of its own layers.
        """
        ...

    def sample(self, sites: Sequence[Site], tokens: int) -> Float[Tensor, "token site d_model"]:
        """For first values: that many, or fewer where memory is bounded."""
        ...


class Places(NamedTuple):
    """Which columns of a batch each dictionary reads and writes."""

    sites: list[Site]
    """Of the columns: all that any of them reads or writes."""
    of_each: list[tuple[list[int] | slice, list[int] | slice]]
    """Among the columns that this rank trains on."""

    @classmethod
    def of(cls, source: Source, configs: Sequence[TrainConfig], split: Split = WHOLE) -> "Places":
        sides = [source.sites(config) for config in configs]
        sites = sorted({site for reads, writes in sides for site in (*reads, *writes)})
        place = {sites[column]: i for i, column in enumerate(split.sites_of(sites, source.n_layers))}
        own = [[[place[site] for site in side if site in place] for side in pair] for pair in sides]
        return cls(sites, [tuple(evenly(side) for side in pair) for pair in own])  # pyright: ignore[reportArgumentType]


def evenly(places: list[int]) -> list[int] | slice:
    """Places at even distances as a slice, by which a tensor is seen and not copied."""
    step = places[1] - places[0] if len(places) > 1 else 1
    even = slice(places[0], places[-1] + 1, step) if step > 0 else None
    return even if even and list(range(*even.indices(places[-1] + 1))) == places else places


class ModelSource:
    """The activations of a language model on a corpus: all sites from one pass."""

    def __init__(
        self, model: LanguageModel, corpus: CorpusSource | Int[Tensor, "row pos"], config: TrainConfig
    ) -> None:
        self.model = model = model.with_bos(config.bos)
        self.config = config
        self.name, self.origin, self.frame, self.device = model.name, model.origin, model.frame, model.device
        self.n_layers, self.fingerprint = model.n_layers, model.fingerprint
        self.d_model = model.width(self.sites(config)[0][0])
        self.d_vocab: int | None = model.d_vocab
        opened = corpus if isinstance(corpus, Tensor) else open_corpus(corpus)
        self.corpus, self._rows, self.context = open_rows(model, opened, config)
        place = opened.place if isinstance(opened, Corpus) else None
        names = None if place is None else trained_on(model.place, model.origin, place)
        self.trained_on: Mapping[str, str] | None = names
        self.first = config.first
        self.limits: Mapping[Site, float] = {}
        if self.context <= self.first:
            raise InputError(
                f"Rows of {self.context} tokens have none after the first {self.first}; give a longer context, or a "
                "smaller `first`."
            )
        self.bos: bool | None = model.adds_bos
        if isinstance(corpus, Tensor):
            self.bos = model.bos is not None and bool((corpus[:, 0] == model.bos).all())

    def sites(self, config: TrainConfig) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        return sites_of_kind(config, self.n_layers)

    def sample(self, sites: Sequence[Site], tokens: int) -> Float[Tensor, "token site d_model"]:
        """No more than half of the buffer holds, as those who normalise it make a copy."""
        fit = self.config.buffer_mb * 2**19 // self._bytes_per_token(sites)
        tokens = max(min(tokens, self.config.batch), min(tokens, fit))
        return next(iter(self._stream(sites, batch=tokens, buffer_mb=0, limits=self._limits(sites), state=None))).reads

    def open(
        self, sites: Sequence[Site], *, batch: int, state: Mapping[str, Any] | None = None, split: Split = WHOLE
    ) -> ActivationStream:
        if state is None:
            limits = self._limits(sites)
        else:  # an older run had none
            limits = {Site.parse(site): limit for site, limit in state.get("limits", {}).items()}
            self.limits = limits
        buffer_mb = self.config.buffer_mb
        return self._stream(sites, batch=batch, buffer_mb=buffer_mb, limits=limits, state=state, split=split)

    def _limits(self, sites: Sequence[Site]) -> Mapping[Site, float]:
        """Norms above which a token is left out; found once, and named in the log."""
        if self.config.outliers and not self.limits:
            found = self.outliers(sites)
            if found.largest:
                logger.info("%s Features are trained on the rest.", found.describe())
            self.limits = found.limits
        return self.limits

    def outliers(self, sites: Sequence[Site]) -> TokenOutliers:
        """What the first rows say of the tokens to leave out."""
        rows, positions = self.first_rows(SAMPLE_TOKENS)
        times = self.config.outliers or _TIMES
        return find_outliers(self.model, rows, sites, times=times, first=self.first, positions=positions)

    def first_rows(self, tokens: int) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
        """Rows of so many tokens or a few more, and the positions of their tokens, which restart at every text."""
        if not (some := list(islice(self._rows(), -(-tokens // self.context)))):
            raise no_row()
        rows, positions = (side.to(self.device) for side in stacked(some))
        return rows, positions

    def buffer_bytes(self, sites: Sequence[Site], batch: int, split: Split = WHOLE) -> int:
        """What `open` keeps in memory; on a GPU a second chunk, where there are several.

        A rank that shares no tokens has the rows that it ran, what the others sent it of all of them at its own sites,
        and the same once more while it is put together.
        """
        limits = dict.fromkeys(sites, 0.0) if self.config.outliers else {}
        tokens = self._chunk_tokens(sites, batch, self.config.buffer_mb, limits)
        several = self.device.type == "cuda" and self._foreseen(tokens, batch) > 1
        chunk = tokens * self._bytes_per_token(sites)
        if (ranks := split.world.size) > 1:
            own = len(split.sites_of(sites, self.n_layers)) / len(sites)
            return round(chunk / ranks + (0 if split.by == "data" else 2 * own * chunk))
        return (1 + several) * chunk

    def _foreseen(self, chunk_tokens: int, batch: int) -> int:
        """Chunks of so many tokens in all steps, where no token is left out."""
        return math.ceil(self.config.steps / max(1, chunk_tokens // batch))

    def _stream(
        self,
        sites: Sequence[Site],
        *,
        batch: int,
        buffer_mb: int,
        limits: Mapping[Site, float],
        state: Mapping[str, Any] | None,
        split: Split = WHOLE,
    ) -> ActivationStream:
        shared = {} if split.world.size == 1 else {"split": split, "n_layers": self.n_layers}
        chunk_tokens = self._chunk_tokens(sites, batch, buffer_mb, limits)
        return (SharedStream if shared else ActivationStream)(
            self.model,
            self._rows,
            reads=sites,
            writes=(),
            batch=batch,
            chunk_tokens=chunk_tokens,
            seed=self.config.seed,
            first=self.first,
            limits=limits,
            state=state,
            foreseen=self._foreseen(chunk_tokens, batch) if buffer_mb else 0,
            **shared,
        )

    def _chunk_tokens(self, sites: Sequence[Site], batch: int, buffer_mb: int, limits: Mapping[Site, float]) -> int:
        """As many as fit the buffer or are trained on, and enough for a batch; of whole rows of one length."""
        spare = _SPARE if limits else 1.0
        positions = self.context - self.first
        rows = buffer_mb * 2**20 // (positions * self._bytes_per_token(sites))
        rows = min(rows, math.ceil(spare * self.config.steps * self.config.batch / positions))
        return max(math.ceil(spare * batch / positions), rows) * positions

    def _bytes_per_token(self, sites: Sequence[Site]) -> int:
        return len(sites) * self.d_model * self.model.W_U.element_size()


class VectorSource:
    """Vectors without a language model: `reads`, and `writes` where a transcoder is to map the ones to the others."""

    name, corpus, frame = "vectors", VECTORS, Frame()
    origin: Mapping[str, str]
    trained_on: Mapping[str, str] | None = None
    bos: bool | None = None
    first = 1
    limits: Mapping[Site, float] = MappingProxyType({})
    d_vocab: int | None = None

    def __init__(self, reads: Vectors, writes: Vectors | None, *, seed: int) -> None:
        self._reads, self._writes, self.seed, self.origin = reads, writes, seed, {}
        first, written = self._chunk(0)
        if writes is not None and first.shape != written.shape:
            raise InputError(
                f"Reads and writes must have one shape; got {list(first.shape)} and {list(written.shape)}."
            )
        self.n_layers, self.d_model, self.device = first.shape[1], first.shape[2], first.device

    def fingerprint(self) -> None:
        return None

    def sites(self, config: TrainConfig) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        if (config.kind == "sae") != (self._writes is None):
            raise InputError(
                f"A configuration of kind {config.kind!r} takes "
                f"{'vectors alone' if config.kind == 'sae' else 'reads and writes'}; "
                f"got {'vectors alone' if self._writes is None else 'reads and writes'}."
            )
        return sites_of_kind(config, self.n_layers)

    def sample(self, sites: Sequence[Site], tokens: int) -> Float[Tensor, "token site d_model"]:
        vectors = self._at(self._chunk(0), sites)
        return vectors[self._order(0, len(vectors))[:tokens].to(vectors.device)]

    def open(
        self, sites: Sequence[Site], *, batch: int, state: Mapping[str, Any] | None = None, split: Split = WHOLE
    ) -> Stream:
        own = [sites[place] for place in split.sites_of(sites, self.n_layers)]
        return own_tokens(VectorStream(self, own, batch=batch, state=state), split)

    def shuffled(self, chunk: int, sites: Sequence[Site], batch: int) -> Iterable[Float[Tensor, "batch site d_model"]]:
        """The whole batches of a chunk, in its own order."""
        reads, writes = self._chunk(chunk)
        if len(reads) < batch:
            raise InputError(f"{len(reads)} vectors do not fill one batch of {batch}; give more, or a smaller batch.")
        order = self._order(chunk, len(reads)).to(reads.device)
        for picked in order.split(batch)[: len(order) // batch]:
            yield self._at((reads[picked], writes[picked]), sites)

    def row(self, chunk: int, place: int) -> str:
        """Which of a chunk's vectors is at a place in its order, and the chunk where they are many."""
        of = "" if isinstance(self._reads, Tensor) else f" of chunk {chunk}"
        return f"{int(self._order(chunk, len(self._chunk(chunk)[0]))[place])}{of}"

    def _chunk(self, chunk: int) -> tuple[Tensor, Tensor]:
        sides = [v if isinstance(v, Tensor) or v is None else v(chunk) for v in (self._reads, self._writes)]
        reads, writes = (None if side is None else _by_layer(side) for side in sides)
        assert reads is not None
        return reads, reads if writes is None else writes

    def _at(self, vectors: tuple[Tensor, Tensor], sites: Sequence[Site]) -> Tensor:
        reads, writes = vectors
        if self._writes is None:
            return reads[:, evenly([site.layer for site in sites])]
        return torch.stack([(writes if s.kind == "mlp_out" else reads)[:, s.layer] for s in sites], dim=1)

    def _order(self, chunk: int, n: int) -> Int[Tensor, "token"]:
        return torch.randperm(n, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + chunk))


class VectorStream:
    """`Stream` of a `VectorSource`: chunk after chunk; a plain tensor is one chunk, read in a new order each time."""

    def __init__(
        self, source: VectorSource, sites: Sequence[Site], *, batch: int, state: Mapping[str, Any] | None
    ) -> None:
        self.source, self.sites, self.batch = source, sites, batch
        self.chunk, self.batch_in_chunk = (0, 0) if state is None else (state["chunk"], state["batch_in_chunk"])

    def state(self) -> dict[str, Any]:
        return {"chunk": self.chunk, "batch_in_chunk": self.batch_in_chunk}

    def __iter__(self) -> Iterator[ActivationBatch]:
        while True:
            skip = self.batch_in_chunk
            for number, vectors in enumerate(self.source.shuffled(self.chunk, self.sites, self.batch)):
                if number >= skip:
                    self.batch_in_chunk += 1
                    yield ActivationBatch(vectors, vectors[:, :0])
            self.chunk, self.batch_in_chunk = self.chunk + 1, 0

    def place(self, row: int) -> str:
        """Where a row of the last batch comes from, for messages."""
        return f"row {self.source.row(self.chunk, (self.batch_in_chunk - 1) * self.batch + row)} of the vectors"


class OwnTokens:
    """`Stream` of this rank's tokens of one that every rank reads alike."""

    def __init__(self, whole: Stream, ranks: World) -> None:
        self.whole, self.ranks = whole, ranks

    def __iter__(self) -> Iterator[ActivationBatch]:
        mine = slice(self.ranks.rank, None, self.ranks.size)
        for batch in self.whole:
            yield ActivationBatch(batch.reads[mine], batch.writes[mine])

    def state(self) -> dict[str, Any]:
        return self.whole.state()

    def place(self, row: int) -> str:
        return self.whole.place(self.ranks.rank + row * self.ranks.size)


def own_tokens(whole: Stream, split: Split) -> Stream:
    """What of the batches this rank trains on."""
    return whole if split.tokens.size == 1 else OwnTokens(whole, split.tokens)


def nudges_of(source: Source, configs: Sequence[TrainConfig]) -> Nudges | None:
    """The changes that are compared where the derivative is in a loss; `InputError` without a model that reads text."""
    comparing = [config for config in configs if isinstance(config, MLPConfig) and config.derivative]
    if not comparing:
        return None
    if not isinstance(source, ModelSource):
        raise InputError(
            f"derivative={comparing[0].derivative:g} compares the dictionary with the MLPs themselves, and activations "
            "that were stored or given say nothing of these; train from the model and text, or leave it out."
        )
    return Nudges(source.model, *source.sites(comparing[0]), comparing, limits=source.limits)


def sites_of_kind(config: TrainConfig, n_layers: int) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    layers = range(n_layers)
    if isinstance(config, SAEConfig):
        sites = tuple(Site(layer, config.site) for layer in layers)
        return sites, sites
    return tuple(Site(layer, "mlp_in") for layer in layers), tuple(Site(layer, "mlp_out") for layer in layers)


def _by_layer(vectors: Tensor) -> Float[Tensor, "token layer d_model"]:
    if vectors.ndim == 2:
        return vectors.unsqueeze(1)
    if vectors.ndim != 3:
        raise InputError(f"Vectors must be [token, d_model] or [token, layer, d_model]; got {list(vectors.shape)}.")
    return vectors


def open_rows(model: LanguageModel, corpus: CorpusSource | Tensor, config: TrainConfig) -> tuple[str, Rows, int]:
    """The name of the corpus, its rows of tokens, and their length."""
    if isinstance(corpus, Tensor):
        if config.documents != "packed":
            raise InputError(f"documents={config.documents!r} is of text; rows of tokens are read as they are given.")
        return ROWS, TokenRows(corpus), corpus.shape[1]
    opened = open_corpus(corpus)
    context = min(config.context, model.context)
    if config.documents == "masked":
        require_masked(model, context)
    rows = CorpusRows(model, opened, context, opened.separator_or(config.separator), config.documents)
    return opened.name, rows, context
