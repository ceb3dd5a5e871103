"""The plain engine: backward passes through the frozen model, one target each, batched. Slow, short, and the reference.

    A[t, s] = a_s · Σ_{l'} W_dec[s→l'] · ∂(reader_t · read_t) / ∂ write(l', p_s)

It asks nothing of the architecture but that the model's own modules can be run and differentiated.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.attribution.sources import Gradients, Sources
from circuitsae.attribution.targets import Readers
from circuitsae.frozen import Writes
from circuitsae.replacement import ReplacementModel, Trace
from transcoders.errors import ModelError

Rows = Callable[[Readers], Float[Tensor, "target source"]]


@contextmanager
def plain_rows(model: ReplacementModel, trace: Trace, sources: Sources) -> Iterator[Rows]:
    """A function from targets to their rows of the adjacency, one column for each of `sources`."""
    frozen, groups = trace.frozen, trace.frozen.model.bias_groups()
    biases = [parameter for group in groups.values() for parameter in group]
    writes = _leaves(replace(frozen.writes, mlp_out=frozen.writes.mlp_out - frozen.skip_out(frozen.reads.mlp_in)))
    inputs = [w for w in (writes.embed, writes.position, writes.mlp_out) if w is not None] + biases
    for parameter in biases:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            reads = frozen(writes)

        def rows(targets: Readers) -> Float[Tensor, "target source"]:
            wanted = torch.zeros(len(targets.layer), model.model.n_layers + 1, *reads.final.shape, **_like(reads.final))
            wanted[torch.arange(len(wanted)), targets.layer, targets.pos] = targets.vector
            found = torch.autograd.grad(
                [reads.mlp_in, reads.final],
                inputs,
                [wanted[:, :-1], wanted[:, -1]],
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
            return sources.score(_gradients(found, inputs, len(wanted), writes.position is not None, groups))

        _check_complete(model, trace, rows)
        yield rows
    finally:
        for parameter in biases:
            parameter.requires_grad_(False)


def _check_complete(model: ReplacementModel, trace: Trace, rows: Rows) -> None:
    """Whether the sources sum up to what is read at the last position, layer by layer.

    They do not where a step is left unfrozen (its gradient is no linear map of what was written), or where
    something else writes into the stream. Raises `ModelError` then.
    """
    reads = torch.cat([trace.frozen.reads.mlp_in, trace.frozen.reads.final[None]])
    layer = torch.arange(len(reads), device=reads.device)
    found = rows(Readers(layer, torch.full_like(layer, trace.n_positions - 1), reads[:, -1]))
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


def _gradients(found: tuple, inputs: list[Tensor], batch: int, has_position: bool, groups: dict) -> Gradients:
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
        key: sum((torch.einsum("b...,...->b", next(filled), p.detach()) for p in group), zero)
        for key, group in groups.items()
    }
    return Gradients(embed, position, mlp_out, bias)


def _like(tensor: Tensor) -> dict:
    return {"dtype": tensor.dtype, "device": tensor.device}
