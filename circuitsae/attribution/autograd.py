"""The oracle: rows of the adjacency by backward passes through the frozen model, one target each, batched.

    A[t, s] = a_s · Σ_{l'} W_dec[s→l'] · ∂(target · read_t) / ∂ write(l', p_s)

Slow and short. It asks nothing of the architecture but that the model's own modules can be run and differentiated.
A pass goes no further down than to what its targets depend on: of autoencoders of the stream to the one before.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.attribution.nodes import (
    CACHE_BYTES,
    Endpoints,
    TargetVectors,
    bias_keys,
    first_error,
    to_numpy,
)
from circuitsae.frozen import FrozenModel
from circuitsae.patterns import not_saved
from circuitsae.replacement import ReplacementModel, Trace
from transcoders.errors import ModelError

GRADIENT_BYTES = 256 * 2**20
"""The gradients of a batch of targets may take this much."""

RowsOf = Callable[[TargetVectors], Float[Tensor, "target source"]]


class Autograd:
    """Rows of the adjacency of one prompt, columns in the order of `source_nodes`."""

    def __init__(self, rows_of: RowsOf, ends: Endpoints, *, batch_size: int | None = None) -> None:
        self.columns = np.arange(len(ends.sources))
        self._rows_of, self._targets = rows_of, ends.targets
        self._batch_size = batch_size or _batch_size(ends.model, ends.trace)
        self._n_layers = ends.model.model.n_layers

    def every_row(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers of targets and their rows, in blocks, from the last position to the first."""
        layer, pos = self._targets.layer.cpu().numpy(), self._targets.pos.cpu().numpy()
        return self.rows(np.lexsort((-layer, -pos)))

    def rows(self, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same of some targets, in any order."""
        for part in self._batches(numbers):
            targets = self._targets.take(torch.from_numpy(part).to(self._targets.pos.device))
            yield part, to_numpy(self._rows_of(targets))

    def _batches(self, numbers: np.ndarray) -> Iterator[np.ndarray]:
        """Targets of one layer each, of which a pass takes many, though not far from their order."""
        near, layer = self._batch_size * (self._n_layers + 1), self._targets.layer.cpu().numpy()
        for start in range(0, len(numbers), near):
            part = numbers[start : start + near]
            for own in np.unique(layer[part])[::-1]:
                here = part[layer[part] == own]
                yield from (here[i : i + self._batch_size] for i in range(0, len(here), self._batch_size))


@contextmanager
def autograd_rows(
    model: ReplacementModel, trace: Trace, *, skips: bool = True, live: bool = False, responds: bool = False
) -> Iterator[RowsOf]:
    """A function from targets to their rows of the adjacency, one column for each of `source_nodes`.

    `skips=False`: where no path takes a skip term, so that the rows do not sum up to what is read. `live`: where
    attention patterns and norm scales answer, so that rows are derivatives times what is written, and no shares.
    `responds`: where errors answer as what they are of, so that rows are derivatives likewise.
    Raises `ModelError` where the model's run on what is written is not the clean one.
    """
    frozen, groups = trace.frozen, trace.frozen.model.bias_groups()
    biases = [parameter for key in bias_keys(model) for parameter in groups[key]]
    for parameter in biases:
        parameter.requires_grad_(True)
    try:
        held = frozen if skips else frozen.without_skips()
        held = held.responding(_Answer(model, trace)) if responds else held
        run = _Run.of(held.live() if live else held, biases)
        columns = _Columns(model, trace)

        def rows_of(targets: TargetVectors) -> Float[Tensor, "target source"]:
            rows = targets.vector.new_zeros(len(targets.layer), columns.count)
            for layer in targets.layer.unique().tolist():
                here = (targets.layer == layer).nonzero()[:, 0]
                rows[here] = columns.score(run.gradients(layer, targets.take(here)))
            return rows

        if responds or (skips and live):
            _check_clean(model, trace, run)
        elif skips:
            _check_complete(model, trace, rows_of)
        yield rows_of
    finally:
        for parameter in biases:
            parameter.requires_grad_(False)


@dataclass(frozen=True)
class _Gradients:
    """How much each target of a batch changes per unit written at each place; None where none of them depends on it."""

    embed: Float[Tensor, "target pos d_model"] | None
    position: Float[Tensor, "target pos d_model"] | None
    written: list[Float[Tensor, "target pos d_model"] | None]
    biases: list[Tensor | None]
    count: int


@dataclass(frozen=True)
class _Run:
    """One run of the model on what is written, as leaves, and what is read in it."""

    embed: Float[Tensor, "pos d_model"]
    position: Float[Tensor, "pos d_model"] | None
    written: list[Float[Tensor, "pos d_model"]]
    biases: list[Tensor]
    reads: list[Float[Tensor, "pos d_model"]]
    """Of each layer, and then of the unembedding."""

    @classmethod
    def of(cls, frozen: FrozenModel, biases: list[Tensor]) -> "_Run":
        clean = frozen.writes
        written = [_leaf(value) for value in _written(frozen)]
        embed, position = _leaf(clean.embed), None if clean.position is None else _leaf(clean.position)
        with torch.enable_grad(), not_saved(frozen.constants):
            reads, final = frozen.apart(embed, position, written)
        return cls(embed, position, written, biases, [*reads, final])

    def gradients(self, layer: int, targets: TargetVectors) -> _Gradients:
        """Of targets that all read at one layer."""
        read, count = self.reads[layer], len(targets.layer)
        inputs = [x for x in (self.embed, self.position, *self.written, *self.biases) if x is not None]
        found: list[Tensor | None] = [None] * len(inputs)
        if read.requires_grad:
            wanted = read.new_zeros(count, *read.shape)
            wanted[torch.arange(count, device=read.device), targets.pos] = targets.vector
            found = list(
                torch.autograd.grad(read, inputs, wanted, retain_graph=True, allow_unused=True, is_grads_batched=True)
            )
        embed, position = found.pop(0), None if self.position is None else found.pop(0)
        return _Gradients(embed, position, found[: len(self.written)], found[len(self.written) :], count)


def _written(frozen: FrozenModel) -> Float[Tensor, "layer pos d_model"]:
    """What is written besides what answers, so that the run is the clean one."""
    reads = frozen.reads.by_layer
    if frozen.answer is None:
        return frozen.writes.mlp_out - frozen.skip_out(reads)
    return torch.stack([frozen.answer(layer, reads.unbind()) for layer in range(len(reads))])


class _Answer:
    """What the active features of a prompt write, each with a slope of one, for what their layers read."""

    def __init__(self, model: ReplacementModel, trace: Trace) -> None:
        self._dictionaries, self._index = model.dictionaries, trace.features.index

    def __call__(self, written: int, reads: Sequence[Float[Tensor, "pos d_model"]]) -> Float[Tensor, "pos d_model"]:
        out = torch.zeros_like(reads[written])
        for layer in range(written + 1):
            if written in self._dictionaries.write_layers(layer):
                pos, feature = self._index[self._index[:, 0] == layer, 1:].unbind(1)
                encoders = self._dictionaries.encoder_rows(layer, feature).detach()
                decoders = self._dictionaries.decoder_rows(layer, feature, written).detach()
                answered = (reads[layer][pos] * encoders).sum(1, keepdim=True) * decoders
                out = out.index_add(0, pos, answered)
        return out


class _Columns:
    """Each source's own vector, times the gradient where it is written, in the order of `source_nodes`."""

    def __init__(self, model: ReplacementModel, trace: Trace) -> None:
        self._model, self._trace, self._first = model, trace, first_error(trace)
        self._layers, n_positions = model.written, trace.n_positions
        groups = model.model.bias_groups()
        self._groups = [[parameter.detach() for parameter in groups[key]] for key in bias_keys(model)]
        writes, errors = trace.frozen.writes, len(self._layers) * (n_positions - self._first)
        sizes = [len(trace.features.value), errors, n_positions, n_positions * (writes.position is not None)]
        sizes += [len(self._layers) * self._first, len(self._layers), len(self._groups)]
        self._start = np.cumsum([0, *sizes]).tolist()
        self.count: int = self._start[-1]
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._kept_bytes = 0

    def score(self, G: _Gradients) -> Float[Tensor, "target source"]:
        trace, writes = self._trace, self._trace.frozen.writes
        rows = trace.errors.new_zeros(G.count, self.count)
        features, errors, tokens, positions, starts, decoder_biases, biases = (
            rows[:, a:b] for a, b in zip(self._start[:-1], self._start[1:], strict=True)
        )
        for number, layer in enumerate(self._layers):
            if (g := G.written[layer]) is None:
                continue
            self._score_features(g, layer, features)
            to_errors, n = torch.einsum("tpd,pd->tp", g, trace.errors[layer]), trace.n_positions - self._first
            errors[:, number * n : (number + 1) * n] = to_errors[:, self._first :]
            starts[:, number * self._first : (number + 1) * self._first] = to_errors[:, : self._first]
            b_dec = self._model.dictionaries.decoder_bias(layer).detach()
            decoder_biases[:, number] = g[:, trace.first :].sum(1) @ b_dec
        if G.embed is not None:
            tokens[:] = torch.einsum("tpd,pd->tp", G.embed, writes.embed)
        if G.position is not None and writes.position is not None:
            positions[:] = torch.einsum("tpd,pd->tp", G.position, writes.position)
        found = iter(G.biases)
        for number, group in enumerate(self._groups):
            parts = [(next(found), bias) for bias in group]
            for g, bias in parts:
                if g is not None:
                    biases[:, number] += torch.einsum("b...,...->b", g, bias).to(biases.device)
        return rows

    def _score_features(
        self, g: Float[Tensor, "target pos d_model"], written: int, columns: Float[Tensor, "target n"]
    ) -> None:
        """Add what all features write at one layer: a matrix product for each place that they are active at."""
        for number, (layer, pos, row) in enumerate(self._active):
            if written in self._model.dictionaries.write_layers(layer):
                columns[:, row] += g[:, pos] @ self._vectors(number, written).T

    @cached_property
    def _active(self) -> list[tuple[int, int, Int[Tensor, "k"]]]:
        """Layer, position and row numbers of the features of each place."""
        place = self._trace.features.index[:, :2]
        places, group = place.unique(dim=0, return_inverse=True)
        rows = group.argsort(stable=True).split(torch.bincount(group, minlength=len(places)).tolist())
        return [(layer, pos, row) for (layer, pos), row in zip(places.tolist(), rows, strict=True)]

    def _vectors(self, place: int, written: int) -> Float[Tensor, "k d_model"]:
        """What the features of a place write at a layer; kept while there is room."""
        if (kept := self._kept.get((place, written))) is not None:
            return kept
        layer, _, row = self._active[place]
        index, value = self._trace.features
        decoders = self._model.dictionaries.decoder_rows(layer, index[row, 2], written).detach()
        vectors = decoders * value[row, None]
        size = vectors.numel() * vectors.element_size()
        if self._kept_bytes + size <= CACHE_BYTES:
            self._kept[place, written], self._kept_bytes = vectors, self._kept_bytes + size
        return vectors


def _check_clean(model: ReplacementModel, trace: Trace, run: _Run) -> None:
    """Whether the run that is differentiated is the model's. Raises `ModelError` where it is not."""
    for place, (found, clean) in enumerate(
        zip(run.reads, [*trace.frozen.reads.by_layer, trace.frozen.reads.final], strict=True)
    ):
        if (found - clean).abs().max() > torch.finfo(clean.dtype).eps ** 0.5 * clean.abs().max():
            at = str(trace.frozen.read_sites[place]) if place < model.model.n_layers else "the unembedding"
            raise ModelError(
                f"With its own values put where the dictionaries write, {model.model.name} reads something else at "
                f"{at} (by up to {float((found - clean).abs().max()):.3g}); its architecture is not supported."
            )


def _check_complete(model: ReplacementModel, trace: Trace, rows_of: RowsOf) -> None:
    """Whether the sources sum up to what is read at the last position, layer by layer.

    They do not where a step is left unfrozen (its gradient is no linear map of what was written), or where
    something else writes into the stream. Raises `ModelError` then.
    """
    reads = torch.cat([trace.frozen.reads.by_layer, trace.frozen.reads.final[None]])
    layer = torch.arange(len(reads), device=reads.device)
    found = rows_of(TargetVectors(layer, torch.full_like(layer, trace.n_positions - 1), reads[:, -1]))
    expected = (reads[:, -1] ** 2).sum(-1)
    wrong = (found.sum(1) - expected).abs() > torch.finfo(reads.dtype).eps ** 0.5 * found.abs().sum(1)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        place = f"MLP {first}" if first < model.model.n_layers else "the unembedding"
        raise ModelError(
            f"What {place} of {model.model.name} reads is not the sum of what attribution knows to be written "
            f"({float(found[first].sum()):.6g} of {float(expected[first]):.6g}): before it the model has a step that "
            "is not frozen, or a writer that is not known; its architecture is not supported."
        )


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def _batch_size(model: ReplacementModel, trace: Trace) -> int:
    """As many targets as keep within `GRADIENT_BYTES` the gradients of all layers and of what stands inside a block."""
    lm, n = model.model, trace.n_positions
    inside = 18 * lm.d_model + 3 * lm.n_heads * n  # MLPs are four streams wide
    one = n * ((lm.n_layers + 1) * lm.d_model + inside) * lm.dtype.itemsize
    return max(1, min(512, GRADIENT_BYTES // one))
