"""The two ways to rows of the adjacency: the fast engine, and the plain one that it is checked against."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from circuitsae.attribution.cost import choose_cut
from circuitsae.attribution.fast import FastRows, batches
from circuitsae.attribution.linear import LinearModel, linear_model
from circuitsae.attribution.plain import Rows, plain_rows
from circuitsae.attribution.sources import Sources
from circuitsae.attribution.targets import Readers
from circuitsae.attribution.writers import Writers
from circuitsae.replacement import ReplacementModel, Trace
from transcoders.errors import InputError, ModelError

EngineName = Literal["auto", "fast", "plain"]

_PLAIN_BYTES = 256 * 2**20

RowsOf = Iterator[tuple[np.ndarray, np.ndarray]]
"""Numbers of targets, and their rows: one for each target, with the engine's columns."""


@runtime_checkable
class Engine(Protocol):
    """Rows of the adjacency of one prompt. `targets` are all that may be asked for; they are named by number."""

    columns: np.ndarray
    """Number among the sources' nodes of each column of a row."""

    def every_row(self) -> RowsOf:
        """The rows of all targets, as far as it costs nothing from the last position to the first."""
        ...

    def rows(self, numbers: np.ndarray) -> RowsOf:
        """The rows of some targets, in any order. Those of a block that was found before are found the same."""
        ...


def linear_for(name: EngineName, trace: Trace) -> LinearModel | None:
    """The matrices that the fast engine needs of a prompt; None where the engine called `name` is the plain one.

    `auto` is the fast engine where it knows the architecture, else, with a notice, the plain one. Raises `InputError`
    for another name, and `ModelError` where the fast engine is asked for and cannot take the model.
    """
    if name not in get_args(EngineName):
        raise InputError(f"Unknown engine {name!r}; the engines are {', '.join(get_args(EngineName))}.")
    if name == "plain":
        return None
    try:
        return linear_model(trace.frozen)
    except ModelError as error:
        if name == "fast":
            raise ModelError(f"{error}; use engine='plain'.") from error
        logging.getLogger(__name__).warning("%s; using the plain engine, which is slower.", error)
        return None


@contextmanager
def open_engine(
    linear: LinearModel | None,
    model: ReplacementModel,
    trace: Trace,
    sources: Sources,
    targets: Readers,
    *,
    share: float = 1.0,
    batch_size: int | None = None,
) -> Iterator[Engine]:
    """The fast engine with the matrices of a prompt, the plain one without.

    `share` is that of the targets whose rows will be asked for; 1: of all, by `every_row`.
    """
    if linear is not None:
        yield _Fast(Writers(model, trace, sources, linear), targets, share, batch_size)
        return
    with plain_rows(model, trace, sources) as rows:
        yield _Plain(rows, model, trace, sources, targets, batch_size)


class _Fast:
    def __init__(self, writers: Writers, targets: Readers, share: float, batch_size: int | None) -> None:
        self.columns = writers.columns
        self._targets = targets
        self._size = batch_size
        self._engine = FastRows(writers, cut=choose_cut(writers, targets, share=share))
        self._climbed = False

    def every_row(self) -> RowsOf:
        for numbers, block in self._engine.climb(self._targets):
            yield numbers, to_numpy(block)
        self._climbed = True
        upper = np.flatnonzero(self._targets.layer.cpu().numpy() >= self._engine.cut)
        yield from self._in_batches(upper, last_first=True)

    def rows(self, numbers: np.ndarray) -> RowsOf:
        if not self._climbed:
            for _ in self._engine.climb():
                raise AssertionError("climbing without targets yields nothing")
            self._climbed = True
        yield from self._in_batches(numbers)

    def _in_batches(self, numbers: np.ndarray, *, last_first: bool = False) -> RowsOf:
        chosen = torch.from_numpy(numbers).to(self._targets.pos.device)
        readers = self._targets.take(chosen)
        found = batches(readers, readers.vector.shape[1], size=self._size)
        for batch in reversed(found) if last_first else found:
            yield numbers[batch.cpu().numpy()], to_numpy(self._engine.rows(readers.take(batch)))


class _Plain:
    def __init__(
        self,
        rows: Rows,
        model: ReplacementModel,
        trace: Trace,
        sources: Sources,
        targets: Readers,
        batch_size: int | None,
    ) -> None:
        self._rows = rows
        self._targets = targets
        self._size = batch_size or _plain_batch_size(model, trace)
        self.columns = np.arange(len(sources.nodes))

    def every_row(self) -> RowsOf:
        layer, pos = self._targets.layer.cpu().numpy(), self._targets.pos.cpu().numpy()
        return self.rows(np.lexsort((-layer, -pos)))

    def rows(self, numbers: np.ndarray) -> RowsOf:
        for start in range(0, len(numbers), self._size):
            part = numbers[start : start + self._size]
            yield part, to_numpy(self._rows(self._targets.take(torch.from_numpy(part).to(self._targets.pos.device))))


def _plain_batch_size(model: ReplacementModel, trace: Trace) -> int:
    """As many targets as keep the gradients of all layers, about ten tensors deep, within the budget."""
    element = torch.finfo(model.model.dtype).bits // 8
    one = (model.model.n_layers + 1) * trace.n_positions * model.model.d_model * element
    return max(1, min(512, _PLAIN_BYTES // (10 * one)))


def to_numpy(block: Tensor) -> np.ndarray:
    """In float32 where numpy has no such precision."""
    return (block.float() if block.dtype in (torch.bfloat16, torch.float16) else block).cpu().numpy()
