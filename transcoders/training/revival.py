"""Remedies for latents that never fire: a loss that pulls them back, or new directions.

Counting latents that no longer fire.
"""

from collections import deque
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transcoders.dictionaries import JumpReLU
from transcoders.kernels import auxk_encode, host
from transcoders.kernels.ranked import largest_of_rows
from transcoders.training.activations import Gated
from transcoders.training.codes import Code, DenseCode
from transcoders.training.config import TrainConfig
from transcoders.training.distributed import World
from transcoders.training.ghost import ghost_loss
from transcoders.training.parameters import TrainingParameters, aligned_to
from transcoders.training.ranking import kept_by_all
from transcoders.training.split import WHOLE, Split

_LATE = 8
"""Steps after which the host reads what a device measured: more than are queued, so that it is there by then."""


class DeadCounter:
    """Tokens since each latent last fired; one that has not for `dead_after` tokens counts as dead."""

    def __init__(self, since_fired: Int[Tensor, "layer feature"], dead_after: int) -> None:
        self.since_fired = since_fired
        self.dead_after = dead_after
        self.alive_until = dead_after
        """On a device: when a latent can be dead at the soonest, in tokens seen; none is silent at first."""
        self._seen, self._asked = 0, deque[tuple[int, host.Arriving]]()

    @property
    def dead(self) -> Bool[Tensor, "layer feature"]:
        return self.since_fired >= self.dead_after

    def any(self, ranks: World) -> bool:
        """Whether any latent of any rank is dead; on a device, whether one may be, which nobody waits for.

        There it says yes wherever a latent is dead, from the longest silence some steps ago: what had fired t tokens
        before is not dead for the next `dead_after − t`.
        """
        if not host.queued(self.since_fired):
            return bool(ranks.any(self.dead.any()))
        self._asked.append((self._seen, host.Arriving(ranks.least(-self.since_fired.amax()))))
        if len(self._asked) > _LATE:
            seen, silence = self._asked.popleft()
            self.alive_until = seen + self.dead_after + silence.read()
        return self._seen >= self.alive_until

    def update(self, fired: Bool[Tensor, "layer feature"], tokens: int) -> None:
        """Take in which latents were active on any token of a batch."""
        self.since_fired += tokens
        self.since_fired.masked_fill_(fired, 0)
        self._seen += tokens


def never_fired(n_layers: int, n_features: int, dead_after: int, device: torch.device) -> DeadCounter:
    return DeadCounter(torch.zeros(n_layers, n_features, dtype=torch.int64, device=device), dead_after)


_SELDOM = 0.5
"""How often a resampled latent is active at first, in mean rates of all."""

_NEW_ENCODER = 0.2
"""Norm of a resampled encoder, in mean norms of those that are alive."""


def revival_loss(
    weights: TrainingParameters,
    code: Code,
    reads: Float[Tensor, "layer batch d_model"],
    error: Float[Tensor, "layer batch d_model"],
    dead: Bool[Tensor, "layer feature"],
    config: TrainConfig,
    split: Split = WHOLE,
) -> Float[Tensor, ""]:
    """A gradient for latents that never fire; only their weights are touched.

    Where ranks share the tokens of a batch, their values add up to the loss.

    TopK, BatchTopK: AuxK (Gao et al. 2024, appendix A.2). Of the dead latents of a layer the `k_aux` with the largest
    pre-activation predict the residual e as ê. `aux_pooling`: `Σ_b ‖e − ê‖² / Σ_b ‖e‖²` over the tokens b of a batch,
    as in their code; the mean over tokens of `‖e − ê‖² / ‖e‖²`; or `‖e − ê‖² / d`, their equation, in units of the
    variance. Of each layer, averaged; of a cross-layer transcoder, sums over layers. A departure: no ReLU after the
    choice, since a dead latent's pre-activation is often negative and would have no gradient. ReLU, JumpReLU, Gated:
    `Σ_dead relu(θ − h) ‖W_dec‖ / √d`, as in Anthropic's January 2025 update. With `remedy="ghost"`: `ghost_loss`.
    """
    if config.remedy_used == "ghost":
        return ghost_loss(weights, code, reads, error, dead, config, split)
    if host.queued(error) and split.features.size == 1:
        return _masked_revival_loss(weights, code, reads, error, dead, config, split)
    encoder = weights.encoder()
    bias = weights.encoder_bias(encoder)
    if config.ranks:
        k_aux = auxk_size(config, error.shape[2])
        found = auxk_encode(reads, encoder.mT, bias, dead, k_aux)
        found = kept_by_all(found, found.active.row, len(found.active.start) - 1, k_aux, split.features)
        written = split.features.total(weights.decode_active(found.value, found.active))
        return _auxk_loss(error, written, config, split)
    norms = weights.decoder_norms().detach()
    threshold = getattr(weights.activation, "threshold", torch.zeros_like(bias)).detach()
    pull, tokens = error.new_zeros(()), reads.shape[1] / split.share_of(reads.shape[1], config.batch)
    for layer in range(weights.n_layers):
        which = dead[layer].nonzero().squeeze(1)
        if len(which) == 0:
            continue
        h = code.dead_pre_activations(layer, which)
        if h is None:
            h = weights.product(reads[layer], encoder[layer, which].T) + bias[layer, which]
        gap = torch.relu(threshold[layer, which] - h)
        pull = pull + (gap * norms[layer, which]).sum() / (weights.n_layers * tokens * weights.b_dec.shape[1] ** 0.5)
    return split.features.total(pull)


def auxk_size(config: TrainConfig, d_model: int) -> int:
    """Dead latents per layer and token: `k_aux`, or with 0 the largest power of two that is at most `d_model / 2`.

    Source of the latter: Gao et al. 2024, appendix B.1, a power of two near d_model / 2; 256 for 768 in their code.
    """
    return config.k_aux or 1 << max(0, (d_model // 2).bit_length() - 1)


def _auxk_loss(
    error: Float[Tensor, "layer batch d_model"],
    written: Float[Tensor, "layer batch d_model"],
    config: TrainConfig,
    split: Split,
) -> Float[Tensor, ""]:
    """How much of the residual the chosen latents leave, pooled as `aux_pooling` says."""
    left, of = (x.square().sum(dim=2) for x in (error - written, error))
    batch = error.shape[1] / split.share_of(error.shape[1], config.batch)
    if config.aux_pooling == "none":
        return left.sum() / (error.shape[2] * len(error) * batch)
    if config.kind == "clt":
        left, of = (x.sum(dim=0, keepdim=True) for x in (left, of))
    if config.aux_pooling == "token":
        return (left / of.clamp(min=1e-12)).sum() / (len(left) * batch)
    return (left.sum(dim=1) / split.tokens.sum(of.sum(dim=1)).clamp(min=1e-12)).mean()


def _masked_revival_loss(
    weights: TrainingParameters,
    code: Code,
    reads: Float[Tensor, "layer batch d_model"],
    error: Float[Tensor, "layer batch d_model"],
    dead: Bool[Tensor, "layer feature"],
    config: TrainConfig,
    split: Split,
) -> Float[Tensor, ""]:
    """`revival_loss` by masks over all features: more arithmetic, but nothing the host has to know; 0 if none is dead.

    Without ranks that share features.
    """
    h = code.h if isinstance(code, DenseCode) else weights.pre_activations(reads)
    of_token = dead.unsqueeze(1)
    if config.ranks:
        candidates = h.detach().masked_fill(~of_token, -torch.inf).flatten(0, 1)
        value, index = largest_of_rows(candidates, auxk_size(config, error.shape[2]))
        chosen = torch.zeros_like(candidates).scatter_(1, index, value.isfinite().to(value)).view_as(h)
        return dead.any() * _auxk_loss(error, weights.decode(h * chosen), config, split)
    threshold = getattr(weights.activation, "threshold", torch.zeros_like(weights.b_enc)).detach()
    gap = torch.relu(threshold.unsqueeze(1) - h) * of_token
    tokens = reads.shape[1] / split.share_of(reads.shape[1], config.batch)
    pull = (gap * weights.decoder_norms().detach().unsqueeze(1)).sum()
    return pull / (weights.n_layers * tokens * weights.b_dec.shape[1] ** 0.5)


@torch.no_grad()
def resample(
    weights: TrainingParameters,
    optimizer: torch.optim.Optimizer,
    reads: Float[Tensor, "layer batch d_model"],
    error: Float[Tensor, "layer batch d_model"],
    dead: Bool[Tensor, "layer feature"],
    config: TrainConfig,
    *,
    l0: Float[Tensor, "layer"],
    smallest: Float[Tensor, "layer"],
    seed: int,
    split: Split = WHOLE,
) -> Bool[Tensor, "layer feature"]:
    """Give dead latents the directions of tokens that are badly reconstructed; returns which were given one.

    `l0`, `smallest`: of the batch's code, over all ranks. `seed`: of the first of these layers; each has its own.
    `split`: which features these are, and what of the batch is with this rank.

    Tokens are drawn with probability ∝ ‖error‖⁴, each once. The decoder becomes the direction of the token's errors in
    all layers it writes to; the encoder the direction of its error for an SAE, of its read minus the mean read
    otherwise. The encoder's norm is 0.2 of the mean of the living, or the whole of it where features are ranked. The
    bias lets the latent be active half as often as an average one, so that what it is active on is mostly what it was
    drawn for. One that would not lessen the squared error of this batch, `Σ a² ‖d‖² ≥ 2 Σ a ⟨error, d⟩`, is left as it
    was. The optimizer's moments are cleared.

    Source: Bricken et al. 2023, *Towards Monosemanticity*, appendix on neuron resampling. Departures: there both
    directions are the token's input, which is a mixture of features, where its error is what has no feature yet; the
    bias is zero, with which a new latent is active on so much else that it is soon driven to silence again; and every
    dead latent is renewed, whether that helps or not.
    """
    renewed = torch.zeros_like(dead)
    reads, error = (split.tokens.gather(x, dim=1) for x in (reads, error))
    for layer in range(weights.n_layers):
        if not bool(split.features.any(dead[layer].any())):
            continue
        cut = config.threshold if isinstance(weights.activation, JumpReLU) else 0.0
        if config.ranks:
            cut = float(smallest[layer].nan_to_num(posinf=0.0))
        token = _tokens_for(error, weights.W_dec[layer].shape[1], layer, dead[layer], seed + layer * 7_919, split)
        drawn = _drawn(weights, reads, error, layer, dead[layer], config, cut, float(l0[layer]), token, split.features)
        which = dead[layer].nonzero().squeeze(1)[: len(drawn.b_enc)]
        useful = drawn.useful.nonzero().squeeze(1)
        which = which[useful]
        weights.W_enc[layer, which], weights.b_enc[layer, which] = drawn.W_enc[useful], drawn.b_enc[useful]
        weights.W_dec[layer][which] = drawn.W_dec[useful]
        if isinstance(weights.activation, JumpReLU):
            weights.activation.threshold[layer, which] = config.threshold
        if isinstance(weights.activation, Gated):
            weights.activation.r[layer, which] = 0
            weights.activation.b_mag[layer, which] = weights.b_enc[layer, which]
        _clear_moments(weights, optimizer, layer, which)
        renewed[layer, which] = True
    return renewed


class _Drawn(NamedTuple):
    """New latents of a layer, one for a token each."""

    W_enc: Float[Tensor, "n d_model"]
    b_enc: Float[Tensor, "n"]
    W_dec: Float[Tensor, "n span d_model"]
    useful: Bool[Tensor, "n"]
    """Whether the squared error of the batch is less with it."""


def _drawn(
    weights: TrainingParameters,
    reads: Float[Tensor, "layer batch d_model"],
    error: Float[Tensor, "layer batch d_model"],
    layer: int,
    dead: Bool[Tensor, "feature"],
    config: TrainConfig,
    cut: float,
    l0: float,
    token: Int[Tensor, "n"],
    ranks: World,
) -> _Drawn:
    """`ranks`: those that have the other features of the layer."""
    error = error[layer : layer + weights.W_dec[layer].shape[1]].transpose(0, 1)
    direction = _unit(error[token, 0] if config.kind == "sae" else reads[layer, token] - reads[layer].mean(dim=0))
    size = _mean_norm(weights.encoder()[layer][~dead].norm(dim=1), ranks)
    W_enc = (1.0 if config.ranks else _NEW_ENCODER) * size * direction
    norm = 1.0 if weights.unit_decoders else _mean_norm(weights.decoder_norms()[layer][~dead], ranks)
    W_dec = error[token].flatten(1)
    W_dec = (norm * W_dec / weights.norms_of(W_dec).clamp(min=1e-12).unsqueeze(1)).view_as(error[token])
    if weights.aligned:
        W_enc = aligned_to(W_dec.sum(dim=1), W_enc)
    centre = weights.b_dec[layer] if weights.centred else 0.0
    h = (reads[layer] - centre) @ W_enc.T
    b_enc = cut - _exceeded_by(h, _SELDOM * l0 / config.features)
    a = torch.where(h + b_enc > cut, torch.relu(h + b_enc), 0.0)
    along = error.flatten(1) @ W_dec.flatten(1).T
    useful = (a * (2 * along - a * W_dec.square().sum(dim=(1, 2)))).sum(dim=0) > 0
    return _Drawn(W_enc, b_enc, W_dec, useful)


def _tokens_for(
    error: Float[Tensor, "layer batch d_model"],
    span: int,
    layer: int,
    dead: Bool[Tensor, "feature"],
    seed: int,
    split: Split,
) -> Int[Tensor, "n"]:
    """Tokens for this rank's dead latents of a layer: its part of those that are drawn for the latents of all ranks.

    The order of tokens, which depends on the ranks, plays no part.
    """
    loss, order = error[layer : layer + span].square().sum(dim=(0, 2)).sort()
    counts = split.features.gather(dead.sum().view(1)).tolist()
    before = sum(counts[: split.features.rank])
    generator = torch.Generator(device=error.device).manual_seed(seed)
    drawn = torch.multinomial(loss.square() + 1e-12, min(sum(counts), len(loss)), generator=generator)
    return order[drawn[before : before + counts[split.features.rank]]]


def _mean_norm(norms: Float[Tensor, "n"], ranks: World) -> Float[Tensor, ""]:
    """Of all ranks' norms; one where there are none."""
    total, count = ranks.sum(torch.stack([norms.sum(), norms.new_tensor(float(len(norms)))]))
    return total / count if count else torch.ones_like(total)


def _clear_moments(weights: TrainingParameters, optimizer: torch.optim.Optimizer, layer: int, which: Tensor) -> None:
    stacked = [weights.W_enc, weights.b_enc, *weights.activation.parameters()]
    for parameter in [*stacked, weights.W_dec[layer]]:
        moments = [m for m in optimizer.state.get(parameter, {}).values() if m.shape == parameter.shape]
        for moment in moments:
            (moment if parameter is weights.W_dec[layer] else moment[layer])[which] = 0


def _exceeded_by(x: Float[Tensor, "batch n"], share: float) -> Float[Tensor, "n"]:
    """Of every column, the value that this share of its entries exceeds."""
    rank = max(1, round(share * len(x)))
    return x.topk(min(rank + 1, len(x)), dim=0).values[-1]


def _unit(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
