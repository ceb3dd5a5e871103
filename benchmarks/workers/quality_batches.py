"""What the libraries of `quality_worker.py` are given, the same for all, and what they give back."""

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """`[batch, d]`, or `[batch, layer, d]` where there are layers; an autoencoder's reads are its writes."""

    reads: Tensor
    writes: Tensor


class Data:
    """The same batches in the same order for everybody, from files that all processes share in memory."""

    def __init__(self, reads: str, writes: str | None, *, batch: int, held_out: int, seed: int) -> None:
        self._reads = np.load(reads, mmap_mode="r", allow_pickle=False)
        self._writes = self._reads if writes is None else np.load(writes, mmap_mode="r", allow_pickle=False)
        self.n, self.batch, self.generator = len(self._reads) - held_out, batch, np.random.default_rng(seed)
        self.order = np.zeros(0, dtype=np.int64)
        self.held_out = self._rows(slice(self.n, None))

    def __iter__(self) -> "Data":
        return self

    def __next__(self) -> Batch:
        if len(self.order) < self.batch:
            self.order = self.generator.permutation(self.n)
        picked, self.order = self.order[: self.batch], self.order[self.batch :]
        return self._rows(picked)

    def sample(self, n: int = 8192) -> Batch:
        """Rows from all over the training data, for first values."""
        return self._rows(slice(0, self.n, max(1, self.n // n)))

    def _rows(self, rows: Any) -> Batch:
        reads = torch.from_numpy(np.array(self._reads[rows]))
        return Batch(reads, reads if self._writes is self._reads else torch.from_numpy(np.array(self._writes[rows])))


class Reconstruction(NamedTuple):
    """Of the writes, and how many features were active in all."""

    writes: Tensor
    active: int


class Library(Protocol):
    """One library with one training; made with the task and the data."""

    rate: float
    """The learning rate it trains with."""

    def step(self, batch: Batch) -> None:
        """As the library's own loop does it, its bookkeeping included."""
        ...

    def reconstruct(self, reads: Tensor) -> Reconstruction:
        """With the weights that the library would hand out, features chosen as in training."""
        ...
