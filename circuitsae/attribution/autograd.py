"""The oracle: rows of the adjacency by backward passes through the frozen model, one target each, batched.

    A[t, s] = a_s · Σ_{l'} W_dec[s→l'] · ∂(target · read_t) / ∂ write(l', p_s)

Slow and short. It asks nothing of the architecture but that the model's own modules can be run and differentiated.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.attribution.nodes import Endpoints, TargetVectors, bias_keys, first_error, to_numpy
from circuitsae.frozen import Writes
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

    def every_row(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers of targets and their rows, in blocks, from the last position to the first."""
        layer, pos = self._targets.layer.cpu().numpy(), self._targets.pos.cpu().numpy()
        return self.rows(np.lexsort((-layer, -pos)))

    def rows(self, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same of some targets, in any order."""
        for start in range(0, len(numbers), self._batch_size):
            part = numbers[start : start + self._batch_size]
            targets = self._targets.take(torch.from_numpy(part).to(self._targets.pos.device))
            yield part, to_numpy(self._rows_of(targets))


@contextmanager
def autograd_rows(model: ReplacementModel, trace: Trace, *, skips: bool = True, live: bool = False) -> Iterator[RowsOf]:
    """A function from targets to their rows of the adjacency, one column for each of `source_nodes`.

    `skips=False`: where no path takes a skip term, so that the rows do not sum up to what is read. `live`: where
    attention patterns and norm scales answer, so that rows are derivatives times what is written, and no shares.
    """
    frozen, groups = trace.frozen, trace.frozen.model.bias_groups()
    biases = [parameter for group in groups.values() for parameter in group]
    writes = _leaves(replace(frozen.writes, mlp_out=frozen.writes.mlp_out - frozen.skip_out(frozen.reads.by_layer)))
    inputs = [w for w in (writes.embed, writes.position, writes.mlp_out) if w is not None] + biases
    for parameter in biases:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            held = frozen if skips else frozen.without_skips()
            reads = (held.live() if live else held)(writes)

        def rows_of(targets: TargetVectors) -> Float[Tensor, "target source"]:
            wanted = torch.zeros(len(targets.layer), model.model.n_layers + 1, *reads.final.shape, **_like(reads.final))
            wanted[torch.arange(len(wanted)), targets.layer, targets.pos] = targets.vector
            found = torch.autograd.grad(
                [reads.by_layer, reads.final],
                inputs,
                [wanted[:, :-1], wanted[:, -1]],
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
            gradients = _gradients(found, inputs, len(wanted), writes.position is not None, groups)
            return _score(model, trace, gradients)

        if skips and not live:
            _check_complete(model, trace, rows_of)
        yield rows_of
    finally:
        for parameter in biases:
            parameter.requires_grad_(False)


@dataclass(frozen=True)
class _Gradients:
    """How much each target of a batch changes per unit written at each place."""

    embed: Float[Tensor, "target pos d_model"]
    position: Float[Tensor, "target pos d_model"] | None
    mlp_out: Float[Tensor, "target layer pos d_model"]
    bias: dict[tuple[int, str], Float[Tensor, "target"]]
    """Already multiplied by the bias: what each bias group adds to each target."""


def _score(model: ReplacementModel, trace: Trace, gradients: _Gradients) -> Float[Tensor, "target source"]:
    """Each source's own vector times the gradient where it is written, in the order of `source_nodes`."""
    writes, first = trace.frozen.writes, first_error(trace)
    to_errors = torch.einsum("tlpd,lpd->tlp", gradients.mlp_out, trace.errors)
    columns = [
        _score_features(model, trace, gradients.mlp_out),
        to_errors[:, :, first:].flatten(1),
        torch.einsum("tpd,pd->tp", gradients.embed, writes.embed),
    ]
    if writes.position is not None and gradients.position is not None:
        columns.append(torch.einsum("tpd,pd->tp", gradients.position, writes.position))
    columns.append(to_errors[:, :, :first].flatten(1))
    decoder_biases = [model.dictionaries.decoder_bias(layer).detach() for layer in range(model.model.n_layers)]
    columns.append(torch.einsum("tlpd,ld->tl", gradients.mlp_out[:, :, trace.first :], torch.stack(decoder_biases)))
    columns += [gradients.bias[key][:, None] for key in bias_keys(model)]
    return torch.cat(columns, dim=1)


def _score_features(
    model: ReplacementModel, trace: Trace, mlp_out: Float[Tensor, "target layer pos d_model"]
) -> Float[Tensor, "target n"]:
    index, value = trace.features
    columns = torch.zeros(len(mlp_out), len(value), dtype=value.dtype, device=value.device)
    for layer in range(model.model.n_layers):
        here = (index[:, 0] == layer).nonzero()[:, 0]
        _, pos, feature = index[here].unbind(1)
        for written in model.dictionaries.write_layers(layer):
            rows = model.dictionaries.decoder_rows(layer, feature, written).detach()
            columns[:, here] += torch.einsum("tnd,nd->tn", mlp_out[:, written, pos], rows * value[here, None])
    return columns


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


def _leaves(writes: Writes) -> Writes:
    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_()

    position = None if writes.position is None else leaf(writes.position)
    return Writes(leaf(writes.embed), position, leaf(writes.mlp_out))


def _gradients(found: tuple, inputs: list[Tensor], batch: int, has_position: bool, groups: dict) -> _Gradients:
    """What autograd found, with zeros for what no target depends on, and biases summed to one number a group."""
    filled = iter(
        torch.zeros(batch, *at.shape, **_like(at)) if gradient is None else gradient
        for gradient, at in zip(found, inputs, strict=True)
    )
    embed = next(filled)
    position = next(filled) if has_position else None
    mlp_out = next(filled)
    zero = torch.zeros(batch, **_like(embed))
    bias = {
        key: sum((torch.einsum("b...,...->b", next(filled), p.detach()).to(zero.device) for p in group), zero)
        for key, group in groups.items()
    }
    return _Gradients(embed, position, mlp_out, bias)


def _batch_size(model: ReplacementModel, trace: Trace) -> int:
    """As many targets as keep the gradients of all layers, about ten tensors deep, within `GRADIENT_BYTES`."""
    element = torch.finfo(model.model.dtype).bits // 8
    one = (model.model.n_layers + 1) * trace.n_positions * model.model.d_model * element
    return max(1, min(512, GRADIENT_BYTES // (10 * one)))


def _like(tensor: Tensor) -> dict:
    return {"dtype": tensor.dtype, "device": tensor.device}
