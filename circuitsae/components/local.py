"""What a patched edge changes in its reader alone: the first, cheap step of patching it.

A head's result depends on no other head of its layer, so one run of attention with input q of all heads patched by one
writer gives every edge from that writer to a q of that layer. Where the reader's output does not change, nothing after
it does: the edge's effect is zero, and no further run is needed.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitsae.components.network import Projections
from circuitsae.components.recording import Prepared


def head_changes(
    prepared: Prepared, layer: int, kind: str, delta: Float[Tensor, "patch example pos d_model"]
) -> Float[Tensor, "patch example pos head d_head"]:
    """The change of every head's z when `delta` is added to the stream that input `kind` of the heads reads."""
    clean = prepared.clean.layers[layer]
    patches = len(delta)
    patched = (clean.before + delta).flatten(0, 1)
    at = {name: _repeat(getattr(clean.at, name), patches) for name in "qkv" if name != kind}
    at[kind] = prepared.network.project(layer, kind, patched[:, :, None])
    z = prepared.network.attend(layer, Projections(**at))
    return z.unflatten(0, (patches, -1)) - clean.z


def mlp_changes(
    prepared: Prepared, layer: int, delta: Float[Tensor, "patch example pos d_model"]
) -> Float[Tensor, "patch example pos d_model"]:
    """The change of an MLP's output when `delta` is added to the stream that it reads."""
    clean = prepared.clean.layers[layer]
    patched = (clean.mlp_reads(prepared.graph.parallel) + delta).flatten(0, 1)
    return prepared.network.mlp(layer, patched).unflatten(0, (len(delta), -1)) - (clean.after - clean.middle)


def is_changed(
    change: Float[Tensor, "patch example *rest"], reference: Float[Tensor, "example *rest"]
) -> Bool[Tensor, "patch"]:
    """Whether a change is more than rounding."""
    noise = 8 * torch.finfo(change.dtype).eps * reference.abs().amax()
    return change.abs().flatten(1).amax(1) > noise


def live_patches(
    prepared: Prepared, writers: Sequence[int], per_batch: int
) -> Iterator[tuple[list[tuple[int, int]], Float[Tensor, "patch example pos d_model"]]]:
    """The (writer, span) pairs whose ablation changes something, with the change, in batches."""
    live = [
        (writer, span)
        for writer in writers
        for span in range(len(prepared.spans))
        if bool((prepared.delta[writer].abs().amax(-1) * prepared.spans[span]).any())
    ]
    for start in range(0, len(live), per_batch):
        batch = live[start : start + per_batch]
        delta = torch.stack([prepared.delta[w] * prepared.spans[s][..., None] for w, s in batch])
        yield batch, delta


def _repeat(x: Tensor, times: int) -> Tensor:
    return x[None].expand(times, *x.shape).flatten(0, 1)
