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

        yield rows
    finally:
        for parameter in biases:
            parameter.requires_grad_(False)


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
    bias = {
        key: sum((torch.einsum("b...,...->b", next(filled), p.detach()) for p in group), torch.zeros(batch))
        for key, group in groups.items()
    }
    return Gradients(embed, position, mlp_out, bias)


def _like(tensor: Tensor) -> dict:
    return {"dtype": tensor.dtype, "device": tensor.device}
