"""TopK and BatchTopK where the features, or the tokens, that compete are on several ranks.

Each rank finds the best of its own; the smallest value that is among the best of all is then the same for everybody.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.dictionaries import TopK
from transcoders.kernels import SparseActivations
from transcoders.training.activations import BatchTopK
from transcoders.training.distributed import World


def kept_by_all(
    found: SparseActivations, group: Int[Tensor, "n"], n_groups: int, k: int, world: World
) -> SparseActivations:
    """Those of a rank's k best values of each group that are among the k best of all ranks."""
    if world.size == 1:
        return found
    value = found.value.detach()
    cut = _agreed_cut(_side_by_side(value, group, n_groups, k), k, world)
    chosen = (value >= cut[group]).nonzero().squeeze(1)
    return SparseActivations(found.value[chosen], found.active.keep(chosen))


def activate_among_ranks(
    activation: TopK | BatchTopK, h: Float[Tensor, "layer batch feature"], n_tokens: int, world: World
) -> Float[Tensor, "layer batch feature"]:
    """`max(h, 0)` for the features that are kept among those of all ranks, 0 for the rest; `n_tokens` on all ranks."""
    n_layers, batch, _ = h.shape
    values = h.detach()
    if isinstance(activation, TopK):
        k, values = activation.k, values.transpose(0, 1).flatten(1) if activation.over_layers else values.flatten(0, 1)
        shape = (1, batch, 1) if activation.over_layers else (n_layers, batch, 1)
    else:
        k, values = activation.k * n_tokens, values.reshape(1 if activation.over_layers else n_layers, -1)
        shape = (len(values), 1, 1)
    best = values.topk(min(k, values.shape[1]), dim=1, sorted=False).values
    cut = _agreed_cut(_widened(best, k), k, world).view(shape)
    return torch.relu(h) * (h >= cut)


def _agreed_cut(best: Float[Tensor, "group k"], k: int, world: World) -> Float[Tensor, "group"]:
    """Of every group the k-th largest value on all ranks; −∞ where there are not that many."""
    return world.gather(best, dim=1).topk(k, dim=1, sorted=False).values.amin(dim=1)


def _side_by_side(
    value: Float[Tensor, "n"], group: Int[Tensor, "n"], n_groups: int, width: int
) -> Float[Tensor, "group width"]:
    """The values of each group as a row, filled up with −∞."""
    group, order = group.sort(stable=True)
    count = torch.bincount(group, minlength=n_groups)
    place = torch.arange(len(group), device=group.device) - (count.cumsum(0) - count)[group]
    rows = value.new_full((n_groups, width), -torch.inf)
    rows[group, place] = value[order]
    return rows


def _widened(best: Float[Tensor, "group n"], width: int) -> Float[Tensor, "group width"]:
    return torch.nn.functional.pad(best, (0, width - best.shape[1]), value=-torch.inf)
