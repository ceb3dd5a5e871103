"""The derivative as a target of training: what a dictionary passes on of a small change, beside what its MLP does.

Attribution adds up paths through many replaced MLPs, each a product of their derivatives, which a good reconstruction
does not give. The MLPs are run and not differentiated, so it does not matter what they are made of.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transcoders.data.ahead import sent
from transcoders.data.chunks import Chunk
from transcoders.data.outliers import over
from transcoders.errors import InputError
from transcoders.held import HeldModel
from transcoders.kernels import host, inner_products
from transcoders.language_model import LanguageModel
from transcoders.sites import Site
from transcoders.training.activations import Gated
from transcoders.training.codes import DenseCode, SparseCode
from transcoders.training.config import MLPConfig, compares_at
from transcoders.training.parameters import TrainingParameters
from transcoders.training.split import WHOLE, Split

_NUDGED = 0.25
"""Share of the positions where a change starts; others are reached through attention alone."""
_AT_EMBEDDINGS = 0.5
"""Share of these whose embedding is changed; of the others it is what one of their MLPs writes."""
_SIZE = 1e-3
"""Of a change in one direction, by which the model is nudged; first order in it is enough for training."""
_FAINT = 1e-3
"""Responses below this share of the layer's median say more of rounding than of the MLP."""


class Directions(NamedTuple):
    """Small changes v of what the MLPs read at some tokens, and how the MLPs answer: J v."""

    reads: Float[Tensor, "layer token d_model"]
    changes: Float[Tensor, "layer token d_model"]
    responses: Float[Tensor, "layer token d_model"]

    def of_layers(self, layers: slice) -> "Directions":
        return Directions(*(side[layers] for side in self))

    def scaled(self, read: Float[Tensor, "layer"], write: Float[Tensor, "layer"]) -> "Directions":
        """In the coordinates of training, in float32."""
        by = (read, read, write)
        return Directions(*((x.float() * s[:, None, None]).contiguous() for x, s in zip(self, by, strict=True)))


@runtime_checkable
class HasChunk(Protocol):
    """A stream that says which rows its last batch is from."""

    @property
    def chunk(self) -> Chunk: ...


class Nudges:
    """Directions that occur in the model: what a token's embedding, or what an MLP writes, changes further on.

    Some rows of the text that is being read are run once as they are and once with a quarter of their positions nudged
    towards other tokens: there the embedding, or what the MLP of one layer writes, moves a thousandth of the way to
    that of another token of these rows. Attention patterns and norm scales are held, as attribution holds them.
    """

    def __init__(
        self,
        model: LanguageModel,
        reads: Sequence[Site],
        writes: Sequence[Site],
        configs: Sequence[MLPConfig],
        *,
        limits: Mapping[Site, float] = MappingProxyType({}),
    ) -> None:
        """`limits`: norms above which a token is left out, as from the stream of activations."""
        if model.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"derivative takes differences between activations, which {str(model.dtype).removeprefix('torch.')} is "
                "too coarse for; load the model with dtype float32."
            )
        self.model, self.reads, self.writes = model, tuple(reads), tuple(writes)
        self.configs, self.limits = list(configs), limits
        self.tokens = max(round(config.derivative_share * config.batch) for config in configs)
        self.seed, self.first = configs[0].seed, configs[0].first

    def at(self, step: int, stream: object) -> Directions | None:
        """Those of a step, from the text that a stream is at; None where no dictionary has the derivative in its loss.

        A function of the seed, the step and that text alone.
        """
        if not any(compares_at(config, step) for config in self.configs):
            return None
        assert isinstance(stream, HasChunk)
        return self.of(step, stream.chunk)

    @torch.no_grad()
    def of(self, step: int, chunk: Chunk) -> Directions:
        """Directions at tokens of a chunk; on a device those of massive activations stay among them, as zeros."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        rows, late = self._rows(chunk, generator)
        held = HeldModel(self.model, rows, self.reads, self.writes)
        found = held.nudge(*self._nudged(held, generator), size=_SIZE, central=False)
        sides = (side.flatten(1, 2)[:, late] for side in (held.clean.reads, found.reads, found.writes))
        massive = self._massive(held).flatten()[late]
        if host.queued(massive):  # how many they are is not asked
            return Directions(*(side.masked_fill(massive[:, None], 0) for side in sides))
        return Directions(*(side[:, ~massive] for side in sides))

    def _rows(self, chunk: Chunk, generator: torch.Generator) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "token"]]:
        """So many that they hold the tokens, of a longer row its beginning; and which tokens are from `first` on."""
        width = min(chunk.tokens.shape[1], max(self.tokens + self.first, 2))
        count = max(1, round(self.tokens / width))
        chosen = torch.randperm(len(chunk.tokens), generator=generator)[:count]
        late = (chunk.positions[chosen, :width] >= self.first).flatten().nonzero().squeeze(1)
        return sent(chunk.tokens[chosen, :width], self.model.device), sent(late, self.model.device)

    def _nudged(self, held: HeldModel, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Changes of the embeddings and of what is written, towards another token each."""
        shape, n_layers = held.rows.shape, len(self.writes)
        other = torch.randperm(held.rows.numel(), generator=generator)
        start, kind = torch.rand(2, *shape, generator=generator)
        layer = torch.randint(n_layers, shape, generator=generator)
        nudged, at_embeddings = start < _NUDGED, kind < _AT_EMBEDDINGS
        at_layers = [nudged & ~at_embeddings & (layer == i) for i in range(n_layers)]
        where = sent(torch.stack([nudged & at_embeddings, *at_layers]), self.model.device)
        other = sent(other, self.model.device)

        def towards(value: Float[Tensor, "row pos d_model"], where: Bool[Tensor, "row pos"]) -> Tensor:
            return (value.flatten(0, 1)[other].reshape(value.shape) - value) * where[..., None]

        written = [towards(value, here) for value, here in zip(held.clean.writes, where[1:], strict=True)]
        return towards(held.embed, where[0]), torch.stack(written)

    def _massive(self, held: HeldModel) -> Bool[Tensor, "row pos"]:
        at = {
            **dict(zip(self.reads, held.clean.reads, strict=True)),
            **dict(zip(self.writes, held.clean.writes, strict=True)),
        }
        found = [over(value, self.limits.get(site)) for site, value in at.items()]
        return torch.stack(found).any(dim=0)


def derivative_loss(
    weights: TrainingParameters,
    directions: Directions,
    config: MLPConfig,
    *,
    sparse: bool = False,
    split: Split = WHOLE,
) -> Float[Tensor, "layer"]:
    """`mean over tokens of ‖Ĵ v − J v‖² / ‖J v‖²`, with the features held that are active on the reads.

    With `config.derivative_along` = μ, `+ μ (1 − Ĵ v · J v / ‖J v‖²)²`. For a cosine c between the two, the whole is
    least where their norms are as `(1 + μ) c / (1 + μ c²)` to one: as c without it, for μ = ½ and c = .7 as .84.

    `Ĵ v` at layer l' is `Σ_{l ≤ l'} ((v_l W_enc[l]) ∘ active_l) W_dec[l→l'] + v_l' W_skip[l']`. Tokens that a change
    hardly reaches are left out of a layer. `directions`: in the coordinates of training. `sparse`: whether only active
    features are touched.
    """
    own = WHOLE if split.by == "data" else split  # ranks that share tokens have the same directions
    passed_on = own.features.total(_through_features(weights, directions, config, sparse, own))
    if (skipped := weights.skipped(directions.changes)) is not None:
        passed_on = passed_on + skipped
    size = directions.responses.square().sum(dim=-1)
    median = size.where(size > 0, torch.nan).nanmedian(dim=1, keepdim=True).values
    reached = size > _FAINT**2 * median
    size = size.where(reached, 1.0)
    missed = (passed_on - directions.responses).square().sum(dim=-1) / size
    if config.derivative_along:
        along = (passed_on * directions.responses).sum(dim=-1) / size
        missed = missed + config.derivative_along * (1 - along).square()
    return (missed * reached).sum(dim=1) / reached.sum(dim=1).clamp(min=1)


def _through_features(
    weights: TrainingParameters, directions: Directions, config: MLPConfig, sparse: bool, split: Split
) -> Float[Tensor, "layer token d_model"]:
    reads, changes, _ = directions
    encoder = weights.encoder()
    activation = weights.activation
    slope = activation.r.exp() if isinstance(activation, Gated) else None
    if sparse:
        with torch.no_grad():
            code = SparseCode.of(weights, reads, 0.0, split)
            active, on = code.active, code.a > 0
            if not host.queued(on):
                active = active.keep(on.nonzero().squeeze(1))
        moved = inner_products(changes.flatten(0, 1), active, encoder.flatten(0, 1))
        if host.queued(on):  # how many they are is not asked
            moved = moved * on
        moved = SparseCode(moved, moved, active)
        if slope is not None:
            moved.a = moved.h * moved.of_feature(slope)
    else:
        with torch.no_grad():
            active = DenseCode.of(weights, reads, split).a > 0
        a = torch.where(active, weights.product(changes, encoder.mT), 0.0)
        moved = DenseCode(a, a if slope is None else a * slope.unsqueeze(1))
    return moved.decode(weights, 0, len(split.features_of(config.features)))
