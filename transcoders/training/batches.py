"""Where training data come from: a language model reading text, or vectors that are there already."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.data.activations import ActivationBatch, ActivationStream
from transcoders.data.tokens import Corpus, CorpusSource, open_corpus, pack_rows
from transcoders.dictionaries.provenance import ROWS, VECTORS
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel
from transcoders.sites import Frame, Site
from transcoders.training.config import SAEConfig, TrainConfig

Vectors = Tensor | Callable[[int], Tensor]
"""`[token, d_model]` or `[token, layer, d_model]`, or a function from a chunk's number to such a tensor."""


@runtime_checkable
class Stream(Protocol):
    """Endless batches."""

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
    frame: Frame
    n_layers: int
    d_model: int
    d_vocab: int | None
    device: torch.device

    def fingerprint(self) -> str | None:
        """Of the model's weights."""
        ...

    def sites(self, config: TrainConfig) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        """What a dictionary of each layer reads and writes."""
        ...

    def open(self, sites: Sequence[Site], *, batch: int, state: Mapping[str, Any] | None = None) -> Stream:
        """Batches with all `sites` as reads `[batch, site, d_model]`, from the first one or from a stream's `state`."""
        ...

    def sample(self, sites: Sequence[Site], tokens: int) -> Float[Tensor, "token site d_model"]:
        """For first values."""
        ...


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
        self.corpus, self._rows, self._context = _open_rows(model, corpus, config)
        self.bos: bool | None = model.adds_bos
        if isinstance(corpus, Tensor):
            self.bos = model.bos is not None and bool((corpus[:, 0] == model.bos).all())

    def sites(self, config: TrainConfig) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        return sites_of_kind(config, self.n_layers)

    def sample(self, sites: Sequence[Site], tokens: int) -> Float[Tensor, "token site d_model"]:
        return next(iter(self._stream(sites, batch=tokens, buffer_mb=0, state=None))).reads

    def open(self, sites: Sequence[Site], *, batch: int, state: Mapping[str, Any] | None = None) -> ActivationStream:
        return self._stream(sites, batch=batch, buffer_mb=self.config.buffer_mb, state=state)

    def _stream(
        self, sites: Sequence[Site], *, batch: int, buffer_mb: int, state: Mapping[str, Any] | None
    ) -> ActivationStream:
        """Chunks as large as the buffer, and large enough for a batch."""
        bytes_per_row = self._context * len(sites) * self.d_model * self.model.W_U.element_size()
        enough = -(-batch // (self._context - 1))
        return ActivationStream(
            self.model,
            self._rows,
            reads=sites,
            writes=(),
            batch=batch,
            chunk_rows=max(enough, buffer_mb * 2**20 // bytes_per_row),
            seed=self.config.seed,
            state=state,
        )


class VectorSource:
    """Vectors without a language model: `reads`, and `writes` where a transcoder is to map the ones to the others."""

    name, corpus, frame = "vectors", VECTORS, Frame()
    origin: Mapping[str, str]
    bos: bool | None = None
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

    def open(self, sites: Sequence[Site], *, batch: int, state: Mapping[str, Any] | None = None) -> "VectorStream":
        return VectorStream(self, sites, batch=batch, state=state)

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
            return reads[:, [site.layer for site in sites]]
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


def _open_rows(model: LanguageModel, corpus: CorpusSource | Tensor, config: TrainConfig) -> tuple[str, Any, int]:
    """The name of the corpus, a function that opens a pass over its rows of tokens, and their length."""
    if isinstance(corpus, Tensor):
        rows = corpus.tolist()
        return ROWS, lambda: iter(rows), corpus.shape[1]
    opened: Corpus = open_corpus(corpus)
    context = min(config.context, model.context)

    def passes() -> Iterator[Sequence[int]]:
        separator = opened.separator_or(config.separator)
        return pack_rows(model, opened.training(), context=context, separator=separator)

    return opened.name, passes, context
