"""The loss of dictionaries in the place of all MLPs at once, attention patterns and norm scales held.

That is what an attribution graph is made of. A layer's error goes on through all later ones, so what each layer is
trained for is what becomes of its writes. The language model's own modules carry gradients and get none.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import kl_div

from transcoders.edits import Hook
from transcoders.held import HeldModel
from transcoders.language_model import LanguageModel
from transcoders.training.codes import Code
from transcoders.training.config import TrainConfig
from transcoders.training.replacement import Replacement
from transcoders.training.sparsity import sparsity_penalty

SIZE = 1e-3
"""Of a change, by which the model is nudged; first order in it is enough for training."""
_REACHED = 1e-2
"""Share of the largest change of the logits in a row below which a token counts as not reached."""


class Changed(NamedTuple):
    """One change for each row of text: of an embedding, or of what the MLPs of some layers write."""

    embed: Float[Tensor, "row pos d_model"]
    written: Float[Tensor, "layer row pos d_model"]


class EndToEndLosses(NamedTuple):
    """The parts of the loss on some rows of text."""

    kl: Float[Tensor, ""]
    """`KL(p_model ‖ p_replacement)` of the next-token distributions, in nats, at positions from the first on."""
    derivative: Float[Tensor, ""]
    """Relative squared error of how the logits change."""
    fvu: Float[Tensor, "layer"]
    """Mean squared error over the variance of the target, each layer on the model's own activations."""
    sparsity: Float[Tensor, ""]
    l0: Float[Tensor, "layer"]
    agreement: Float[Tensor, ""]
    """Share of the tokens whose likeliest successor stays the same."""


def end_to_end_losses(
    replacement: Replacement,
    held: HeldModel,
    usable: Bool[Tensor, "row pos"],
    config: TrainConfig,
    *,
    first: int,
    metric: Float[Tensor, "d_model d_model"] | None,
    generator: torch.Generator,
    size: float = SIZE,
) -> EndToEndLosses:
    """Differentiable in the weights of `replacement`.

    `usable`: tokens with features; the others keep what their MLPs write in the replaced run. `metric`: of the logits,
    as `logit_metric` gives it; None where their derivative is not compared.
    """
    reads, writes = held.clean
    x = [replacement.normalised(layer, read[usable]) for layer, read in enumerate(reads)]
    codes = [replacement.code(layer, read) for layer, read in enumerate(x)]
    kl, agreement = _divergence(replacement, held, usable, first)
    derivative = kl.new_zeros(())
    if metric is not None:
        changed = draw_changes(replacement, held, usable, generator)
        missed, reached = derivative_errors(replacement, held, usable, codes, changed, metric, size=size)
        derivative = (missed * reached).sum() / reached.sum().clamp(min=1)
    return EndToEndLosses(
        kl=kl,
        derivative=derivative,
        fvu=_unexplained(replacement, codes, x, writes[:, usable]),
        sparsity=_sparsity(replacement, codes, config),
        l0=torch.cat([code.l0() for code in codes]),
        agreement=agreement,
    )


def _divergence(
    replacement: Replacement, held: HeldModel, usable: Bool[Tensor, "row pos"], first: int
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """KL of the replaced run's next-token distributions, and how often the likeliest token is the model's."""
    final, _ = held.run(replacement.splice(usable, held.read_sites, held.write_sites))
    with torch.no_grad():
        p = held.model.logits_of(held.final[:, first:].flatten(0, 1)).log_softmax(-1)
    q = held.model.logits_of(final[:, first:].flatten(0, 1)).log_softmax(-1)
    same = (p.argmax(-1) == q.argmax(-1)).float().mean()
    return kl_div(q, p, reduction="batchmean", log_target=True), same


def _unexplained(
    replacement: Replacement, codes: list[Code], x: list[Tensor], writes: Float[Tensor, "layer token d_model"]
) -> Float[Tensor, "layer"]:
    """As the loss of training has it: per coordinate, whose variance is one."""
    found = replacement.reconstruct(codes, x)
    targets = [write.to(y.dtype) * t for y, write, t in zip(found, writes, replacement.scales.write, strict=True)]
    return torch.stack([(y - target).square().mean() for y, target in zip(found, targets, strict=True)])


def _sparsity(replacement: Replacement, codes: list[Code], config: TrainConfig) -> Float[Tensor, ""]:
    penalties = zip(replacement.layers, codes, strict=True)
    return torch.stack([sparsity_penalty(weights, code, config) for weights, code in penalties]).mean()


@torch.no_grad()
def logit_metric(model: LanguageModel) -> Float[Tensor, "d_model d_model"]:
    """`R` with `‖f R‖ = ‖centred f W_U‖`: sizes of changes of the logits, which are never made as such.

    Centred over the vocabulary, as a constant added to all logits changes nothing; before a soft cap of the logits.
    """
    W_U, mean = model.W_U, model.W_U.mean(dim=1)
    gram = W_U @ W_U.T - W_U.shape[1] * torch.outer(mean, mean)
    value, vector = torch.linalg.eigh(gram.double())
    return (vector * value.clamp(min=0).sqrt()).to(W_U.dtype)


def derivative_errors(
    replacement: Replacement,
    held: HeldModel,
    usable: Bool[Tensor, "row pos"],
    codes: list[Code],
    changed: Changed,
    metric: Float[Tensor, "d_model d_model"],
    *,
    size: float = SIZE,
) -> tuple[Float[Tensor, "row pos"], Bool[Tensor, "row pos"]]:
    """`‖Ĵ v − J v‖² / ‖J v‖²` of the centred logits at each token, and which tokens a row's change v reaches.

    J v: a difference of two runs of the model, patterns, scales and what MLPs write at tokens without features held.
    Ĵ v: of the replacement, in a graph's own terms: linear, with the features held that are active on the model's own
    reads (`codes`, of the usable tokens). No step is needed for it, so it is exact.
    """
    true = _response(held, usable, changed, size) @ metric
    _, moved = held.carry(replacement.answers(codes, usable), *changed)
    square = true.square().sum(-1)
    reached = square > _REACHED**2 * square.amax(-1, keepdim=True)
    return (moved @ metric - true).square().sum(-1) / square.where(reached, 1.0), reached


@torch.no_grad()
def _response(held: HeldModel, usable: Tensor, changed: Changed, size: float) -> Float[Tensor, "row pos d_model"]:
    """How what the unembedding reads changes in the model."""

    def nudged(layer: int) -> Hook:
        clean, change = held.clean.writes[layer], size * changed.written[layer]
        return lambda value: torch.where(usable[..., None], value, clean) + change

    edits = {site: nudged(layer) for layer, site in enumerate(held.write_sites)}
    final, _ = held.run(edits, held.embed + size * changed.embed)
    return (final - held.final) / size


@torch.no_grad()
def draw_changes(
    replacement: Replacement, held: HeldModel, usable: Bool[Tensor, "row pos"], generator: torch.Generator
) -> Changed:
    """In half of the rows a token's embedding moves to that of another token of the row; in the others what an active
    feature of a random layer writes is added, as large as all that is written there.
    """
    n_rows, length = usable.shape
    where, which = torch.rand(2, n_rows, length, generator=generator).to(usable.device)
    kind, among = torch.rand(2, n_rows, generator=generator).tolist()
    layers = torch.randint(len(replacement.layers), (n_rows,), generator=generator).tolist()
    embed, written = torch.zeros_like(held.embed), torch.zeros_like(held.clean.writes)
    position = where.where(usable, -1.0).argmax(-1)
    for row, pos in enumerate(position.tolist()):
        if not usable[row, pos]:
            continue
        if kind[row] < 0.5:
            donor = which[row].where(held.rows[row] != held.rows[row, pos], -1.0).argmax()
            embed[row, pos] = held.embed[row, donor] - held.embed[row, pos]
        else:
            layer = layers[row]
            parts = _feature_write(replacement, layer, held.clean.reads[layer, row, pos], among[row])
            if (size := float(parts.norm())) > 0:  # a feature that writes nothing changes nothing
                size = float(held.clean.writes[layer, row, pos].norm()) / size
            written[layer : layer + len(parts), row, pos] = parts.to(written) * size
    return Changed(embed, written)


def _feature_write(
    replacement: Replacement, layer: int, read: Float[Tensor, "d_model"], chosen: float
) -> Float[Tensor, "span d_model"]:
    """What one of the features that are active on a read writes, in the model's coordinates; zeros where none is."""
    weights = replacement.layers[layer]
    active = weights.activate(weights.pre_activations(replacement.normalised(layer, read[None])[None]))[0, 0].nonzero()
    W_dec = weights.W_dec[0]
    if not len(active):
        return torch.zeros_like(W_dec[0])
    scale = replacement.scales.write[layer : layer + W_dec.shape[1], None].to(W_dec)
    return W_dec[active[int(chosen * len(active)), 0]] / scale
