"""Encoders that give the active features only, with gradients that touch only these.

All take the stack of one or several layers: `x [layer, batch, d_in]`, `W_enc [layer, d_in, feature]`, `b_enc
[layer, feature]`. Rows of `W_enc.mT` are read one by one: keep `W_enc.mT` contiguous (`feature_major`), or a copy is
made of it in every call.
"""

from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transcoders.errors import InputError
from transcoders.kernels import host
from transcoders.kernels.active import ActiveFeatures, SparseActivations, active_from_pairs, active_of_rows
from transcoders.kernels.products import inner_products
from transcoders.kernels.ranked import largest_of_groups, largest_of_rows, largest_of_tokens
from transcoders.kernels.selection import (
    Approximation,
    Cut,
    approximate_product,
    candidates,
    cut_at_zero,
    cut_of_batch,
    cut_of_batch_over_layers,
    cut_of_token,
    cut_of_token_over_layers,
    k_largest,
    k_per_group,
    pays,
    product,
)


def feature_major(W_enc: Float[Tensor, "layer d_in feature"]) -> Float[Tensor, "layer d_in feature"]:
    """The same tensor with each feature's weights side by side in memory, which is how the kernels read them.

    Parameters, gradients and Adam's moments keep this layout once the parameter has it.
    """
    return W_enc.mT.contiguous().mT


def topk_encode(
    x: Float[Tensor, "layer batch d_in"],
    W_enc: Float[Tensor, "layer d_in feature"],
    b_enc: Float[Tensor, "layer feature"],
    k: int,
    *,
    over_layers: bool = False,
    approximate: bool | None = None,
) -> SparseActivations:
    """Pre-activations of the k largest features of every token, or of every token over all layers together.

    On processors with bfloat16 instructions a bfloat16 product narrows the choice down and exact pre-activations decide
    (`approximate`; default: where it saves time). The features are those of the exact product either way; only those
    that differ by rounding can change places. No ReLU is applied.

    Source: Gao et al. 2024, *Scaling and Evaluating Sparse Autoencoders*, section 2.3.
    """
    _require_positive(k)
    if not _approximate(x, W_enc, approximate):
        return _dense_topk(x, W_enc, b_enc, k, over_layers)
    batch = x.shape[1]
    if not over_layers:
        found, h = _candidates(x, W_enc, b_enc, cut_of_token(k), k, True)
        chosen, _ = k_per_group(h, found.row, len(found.start) - 1, k)
    else:
        found, h = _candidates(x, W_enc, b_enc, cut_of_token_over_layers(k), k / len(x), True)
        token, by_token = (found.row % batch).sort(stable=True)
        chosen = by_token[k_per_group(h[by_token], token, batch, k)[0]].sort().values
    return _with_gradient(x, W_enc, b_enc, found.keep(chosen), h[chosen])


def batch_topk_encode(
    x: Float[Tensor, "layer batch d_in"],
    W_enc: Float[Tensor, "layer d_in feature"],
    b_enc: Float[Tensor, "layer feature"],
    k: int | float,
    *,
    over_layers: bool = False,
    approximate: bool | None = None,
) -> SparseActivations:
    """Pre-activations of the k · batch largest features of every layer, or of all layers together. No ReLU is applied.

    The smallest value of a layer is the batch's threshold, of which training keeps the average for inference.

    Source: Bussmann et al. 2024, *BatchTopK Sparse Autoencoders*, section 3.
    """
    _require_positive(k)
    if host.queued(x):
        return _queued_batch_topk(x, W_enc, b_enc, round(k * x.shape[1]), over_layers)
    cut = cut_of_batch_over_layers(k) if over_layers else cut_of_batch(k)
    found, h = _candidates(x, W_enc, b_enc, cut, k / len(x) if over_layers else k, _approximate(x, W_enc, approximate))
    count = round(k * x.shape[1])
    if over_layers:
        chosen = k_largest(h, count)
    else:
        ends = found.start[:: x.shape[1]].tolist()
        parts = [first + k_largest(h[first:last], count) for first, last in pairwise(ends)]
        chosen = torch.cat(parts)
    return _with_gradient(x, W_enc, b_enc, found.keep(chosen), h[chosen])


def threshold_encode(
    x: Float[Tensor, "layer batch d_in"],
    W_enc: Float[Tensor, "layer d_in feature"],
    b_enc: Float[Tensor, "layer feature"],
    threshold: Float[Tensor, "layer feature"],
    *,
    approximate: bool | None = None,
) -> SparseActivations:
    """Pre-activations of all features with `h > threshold`: ReLU at zero, JumpReLU at θ.

    JumpReLU's straight-through gradient also sees features just below: ask for `θ − ε/2` and apply the function to the
    pre-activations. The threshold itself gets no gradient here.
    """
    threshold = threshold.detach()
    low = _approximate(x, W_enc, approximate)
    found, above = _candidates(x, W_enc, b_enc.detach() - threshold, cut_at_zero(), _likely(W_enc), low)
    chosen = (above > 0).nonzero().squeeze(1)
    active = found.keep(chosen)
    return _with_gradient(x, W_enc, b_enc, active, above[chosen] + threshold.flatten()[active.feature])


def auxk_encode(
    x: Float[Tensor, "layer batch d_in"],
    W_enc: Float[Tensor, "layer d_in feature"],
    b_enc: Float[Tensor, "layer feature"],
    dead: Bool[Tensor, "layer feature"],
    k: int,
) -> SparseActivations:
    """Pre-activations of every token's k largest dead features of each layer; all of them where k or fewer are dead.

    The product runs over the dead features alone, so AuxK costs nothing where none is dead.

    Source: Gao et al. 2024, *Scaling and Evaluating Sparse Autoencoders*, appendix A.2.
    """
    _require_positive(k)
    n_layers, batch, n_features = len(x), x.shape[1], W_enc.shape[2]
    rows, columns = [], []
    for layer in range(n_layers):
        column = dead[layer].nonzero().squeeze(1)
        if not len(column):
            continue
        with torch.no_grad():
            table, bias = W_enc[layer].mT[column], b_enc[layer, column]
            best = _k_of_each_token(x[layer], table, bias, k)
        rows.append((layer * batch + torch.arange(batch, device=x.device)).repeat_interleave(best.shape[1]))
        columns.append(column[best].flatten())
    none = torch.zeros(0, dtype=torch.int64, device=x.device)
    row, column = (torch.cat(parts) if parts else none for parts in (rows, columns))
    active = active_from_pairs(row, column, n_layers=n_layers, batch=batch, n_features=n_features)
    return _with_gradient(x, W_enc, b_enc, active, None)


def pre_activations_at(
    x: Float[Tensor, "layer batch d_in"],
    W_enc: Float[Tensor, "layer d_in feature"],
    b_enc: Float[Tensor, "layer feature"],
    active: ActiveFeatures,
) -> Float[Tensor, "n"]:
    """`h = ⟨x, w_f⟩ + b_f` at the given features; gradients for x, W_enc and b_enc."""
    return _with_gradient(x, W_enc, b_enc, active, None).value


@torch.no_grad()
def _candidates(
    x: Tensor, W_enc: Tensor, bias: Tensor, cut: Cut, per_token: int | float, approximate: bool
) -> tuple[ActiveFeatures, Tensor]:
    """Features that may be chosen, and their exact pre-activations."""
    rows = _rows(W_enc)
    if not approximate:
        h = product(x, rows, bias)
        return candidates(Approximation(h, h.new_zeros(h.shape[:2]), 0.0), cut, per_token)
    found, _ = candidates(approximate_product(x, rows, bias), cut, per_token)
    return found, inner_products(x.flatten(0, 1), found, rows.flatten(0, 1)) + bias.flatten()[found.feature]


def _dense_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, over_layers: bool) -> SparseActivations:
    """The k largest of the exact product."""
    (n_layers, batch, _), n_features = x.shape, W_enc.shape[2]
    with torch.no_grad():
        h = product(x, _rows(W_enc), b_enc)
    if host.queued(h) and not over_layers:
        value, column = largest_of_rows(h.flatten(0, 1), k)
        active = active_of_rows(column, n_layers=n_layers, batch=batch, n_features=n_features)
        return _with_gradient(x, W_enc, b_enc, active, value.flatten())
    with torch.no_grad():
        if host.queued(h):
            value, column = largest_of_tokens(h, k)
        else:
            ranked = h.transpose(0, 1).flatten(1) if over_layers else h.flatten(0, 1)
            value, column = ranked.topk(min(k, ranked.shape[1]), dim=-1, sorted=False)
    row = torch.arange(len(value), device=x.device).unsqueeze(1).expand_as(value).flatten()
    value, column = value.flatten(), column.flatten()
    if over_layers:
        layer, column = column.div(n_features, rounding_mode="floor"), column % n_features
        row, order = (layer * batch + row).sort(stable=True)
        value, column = value[order], column[order]
    active = active_from_pairs(row, column, n_layers=n_layers, batch=batch, n_features=n_features)
    return _with_gradient(x, W_enc, b_enc, active, value)


def _queued_batch_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, count: int, over_layers: bool) -> SparseActivations:
    """The `count` largest of every layer's batch, or of all: so many that the host need not ask."""
    (n_layers, batch, _), n_features = x.shape, W_enc.shape[2]
    with torch.no_grad():
        h = product(x, _rows(W_enc), b_enc)
        groups = h.reshape(1, -1, n_features) if over_layers else h
        value, place = largest_of_groups(groups, count)
    before = torch.arange(len(groups), device=x.device).unsqueeze(1) * groups.shape[1]
    row = (before + place.div(n_features, rounding_mode="floor")).flatten()
    column = (place % n_features).flatten()
    active = active_from_pairs(row, column, n_layers=n_layers, batch=batch, n_features=n_features)
    return _with_gradient(x, W_enc, b_enc, active, value.flatten())


def _approximate(x: Tensor, W_enc: Tensor, asked: bool | None) -> bool:
    return pays(x, W_enc.shape[2]) if asked is None else asked


def _with_gradient(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, active: ActiveFeatures, h: Tensor | None
) -> SparseActivations:
    """The pre-activations `h` (computed here if not given) as a function of the inputs and weights."""
    bias = b_enc.flatten().index_select(0, active.feature)
    known = None if h is None else h - bias.detach()
    products = inner_products(x.flatten(0, 1), active, _rows(W_enc).flatten(0, 1), known)
    return SparseActivations(products + bias, active)


def _rows(W_enc: Tensor) -> Tensor:
    return W_enc.mT.contiguous()


def _k_of_each_token(x: Tensor, table: Tensor, bias: Tensor, k: int) -> Int[Tensor, "batch k"]:
    """Of one layer's features, each token's k largest: all where there are no more."""
    if len(table) <= k:
        return torch.arange(len(table), device=x.device).expand(len(x), -1)
    return topk_encode(x[None], table.mT[None], bias[None], k).active.feature.unflatten(0, (len(x), k))


def _likely(W_enc: Tensor) -> float:
    """Active features per token where nothing bounds their number: only the speed depends on this guess."""
    return W_enc.shape[2] / 128


def _require_positive(k: int | float) -> None:
    if k <= 0:
        raise InputError(f"At least one feature must be chosen; got k = {k}.")
