"""Feature activations of many prompts at one place each, features that tell some prompts from others, and what
suppressing or swapping them does.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitsae.interventions import Add, Feature, Features, Intervention, Prompt, PromptLike
from circuitsae.interventions.controls import matched_features, written_vectors
from circuitsae.interventions.prompts import Library, Recording
from circuitsae.replacement import ReplacementModel
from transcoders.dictionaries import SparseFeatures
from transcoders.errors import InputError

_ROWS = 64


@dataclass(frozen=True, eq=False)
class Activations:
    """Which features are active on which prompts, one position of each."""

    features: SparseFeatures
    """The second column of `index` is the prompt's number."""
    n_prompts: int
    widths: tuple[int, ...]
    """Features of each layer."""

    def mean(self, prompts: Bool[Tensor, "prompt"]) -> Float[Tensor, "layer feature"]:
        """Mean activation over the chosen prompts; narrower layers are filled up with 0."""
        return self._sum(self.features.value, prompts) / prompts.sum().clamp(min=1)

    def rate(self, prompts: Bool[Tensor, "prompt"]) -> Float[Tensor, "layer feature"]:
        """Share of the chosen prompts on which a feature is active."""
        return self._sum((self.features.value > 0).to(self.features.value), prompts) / prompts.sum().clamp(min=1)

    def _sum(self, value: Float[Tensor, "n"], prompts: Bool[Tensor, "prompt"]) -> Float[Tensor, "layer feature"]:
        layer, prompt, feature = self.features.index.unbind(1)
        keep = prompts.to(prompt.device)[prompt]
        total = value.new_zeros(len(self.widths), max(self.widths))
        return total.index_put_((layer[keep], feature[keep]), value[keep], accumulate=True)


@torch.no_grad()
def activations_at(model: ReplacementModel, prompts: Sequence[PromptLike], at: int | str = -1) -> Activations:
    """Activations at one position of each prompt: a number (negative: from the end) or the name of a role.

    Prompts of one length share forward passes. Raises `InputError` for no prompts, a role that a prompt has not, or
    position 0, which has no features.
    """
    if not prompts:
        raise InputError("There are no prompts to read features on; give at least one.")
    library, lm = Library(model), model.model
    tokens = [library.tokens(prompt) for prompt in prompts]
    places = [_position(prompt, at, len(row), model.first) for prompt, row in zip(prompts, tokens, strict=True)]
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(tokens):
        by_length[len(row)].append(number)
    reads = torch.zeros(lm.n_layers, len(prompts), lm.d_model, dtype=lm.dtype, device=lm.device)
    sites = model.dictionaries.reads
    for numbers in by_length.values():
        for start in range(0, len(numbers), _ROWS):
            here = numbers[start : start + _ROWS]
            found = lm.activations(torch.stack([tokens[i] for i in here]), sites)
            where = (torch.arange(len(here)), torch.tensor([places[i] for i in here]))
            reads[:, here] = torch.stack([found[site][where] for site in sites])
    widths = tuple(model.dictionaries.n_features(layer) for layer in range(lm.n_layers))
    return Activations(model.dictionaries.encode(reads), len(prompts), widths)


def _position(prompt: PromptLike, at: int | str, length: int, first: int) -> int:
    roles = prompt.roles if isinstance(prompt, Prompt) else {}
    if isinstance(at, str):
        if at not in roles:
            raise InputError(
                f"A prompt has no role {at!r} (it has {', '.join(roles) or 'none'}); give it in Prompt(...)."
            )
        at = roles[at]
    pos = at + length if at < 0 else at
    if not first <= pos < length:
        raise InputError(f"Position {at} of a prompt of {length} tokens has no features; take {first} to {length - 1}.")
    return pos


@dataclass(frozen=True, eq=False)
class FeatureGroup:
    """Features that stand for one thing, at one place of a prompt: a supernode found by contrast."""

    index: Int[Tensor, "n 2"]
    """Layer and feature of each, the strongest contrast first."""
    mean: Float[Tensor, "n"]
    """Mean activation on the prompts of its own."""
    against: Float[Tensor, "n"]
    """Mean activation on the others."""
    rate: Float[Tensor, "n"]
    """Share of its own prompts on which each is active."""
    score: Float[Tensor, "n"]
    """(mean − against) ‖W_dec‖."""
    at: int | str
    """The place: a position, or the name of a role."""

    def __len__(self) -> int:
        return len(self.index)

    def features(self) -> list[Feature]:
        """Its members as targets of interventions, for `steer` and for labels."""
        return [Feature(layer, index, self.at) for layer, index in self.index.tolist()]

    def frame(self) -> pd.DataFrame:
        """One row per feature: `layer`, `feature`, `mean`, `against`, `rate`, `score`."""
        columns = {name: getattr(self, name).tolist() for name in ("mean", "against", "rate", "score")}
        return pd.DataFrame({"layer": self.index[:, 0].tolist(), "feature": self.index[:, 1].tolist(), **columns})


def contrast_features(
    model: ReplacementModel,
    prompts: Sequence[PromptLike],
    against: Sequence[PromptLike],
    *,
    at: int | str = -1,
    layers: Sequence[int] | None = None,
    k: int = 20,
    rate: float = 0.3,
) -> FeatureGroup:
    """The `k` features that write most more on `prompts` than on `against`, at one place of each prompt.

        score_f = (mean_prompts a_f − mean_against a_f) ‖W_dec,f‖

    over the features active on a share of at least `rate` of `prompts`; ‖W_dec,f‖ is the norm of all its decoders
    stacked. What is found is a hypothesis about what the prompts have in common, to be tested on others.
    """
    both = activations_at(model, [*prompts, *against], at)
    own = torch.arange(both.n_prompts) < len(prompts)
    return contrast(model, both, own, ~own, at=at, layers=layers, k=k, rate=rate)


def contrast(
    model: ReplacementModel,
    activations: Activations,
    own: Bool[Tensor, "prompt"],
    others: Bool[Tensor, "prompt"],
    *,
    at: int | str,
    layers: Sequence[int] | None = None,
    k: int = 20,
    rate: float = 0.3,
) -> FeatureGroup:
    """`contrast_features` from activations that were read once, for many contrasts of the same prompts."""
    if not own.any() or not others.any():
        raise InputError(f"A contrast needs prompts on both sides; got {int(own.sum())} and {int(others.sum())}.")
    chosen = range(len(activations.widths)) if layers is None else layers
    mean, against, active = activations.mean(own), activations.mean(others), activations.rate(own)
    score = torch.zeros_like(mean)
    for layer in chosen:
        candidates = ((active[layer] >= rate) & (mean[layer] > against[layer])).nonzero()[:, 0]
        norms = written_vectors(model, layer, candidates).flatten(1).norm(dim=1)
        score[layer, candidates] = (mean - against)[layer, candidates] * norms
    best = score.flatten().topk(min(k, score.numel())).indices
    best = best[score.flatten()[best] > 0]
    if not len(best):
        raise InputError(
            f"No feature of layers {list(chosen)} is active on {rate:.0%} of the prompts and more than on the others; "
            "lower rate, or look at another place."
        )
    width = mean.shape[1]
    index = torch.stack([best // width, best % width], dim=1)
    return FeatureGroup(index, *(table.flatten()[best] for table in (mean, against, active, score)), at=at)


@dataclass(frozen=True, eq=False)
class FeatureChange:
    """Amounts added to features' activations at positions of one prompt."""

    index: Int[Tensor, "n 3"]
    amount: Float[Tensor, "n"]

    def intervention(self) -> Intervention:
        return Intervention(Features(self.index), Add(self.amount))

    def control(
        self, model: ReplacementModel, generator: torch.Generator, among: Sequence[Bool[Tensor, "_"]] | None = None
    ) -> "FeatureChange":
        """The same amounts on other features of the same layers, written with the same norm; see `matched_features`."""
        pair, amount = matched_features(model, self.index[:, [0, 2]], self.amount, generator, among)
        index = self.index.clone()
        index[:, 2] = pair[:, 1]
        return replace(self, index=index, amount=amount)


def suppress(prompt: Recording, group: FeatureGroup, factor: float = 0.0) -> FeatureChange:
    """Every feature of the group, at its place, to `factor` times its clean activation (0: off; −1: inverted)."""
    index = _placed(prompt, group)
    return FeatureChange(index, (factor - 1) * prompt.activations(index))


def swap(
    prompt: Recording, group: FeatureGroup, by: FeatureGroup, *, factor: float = 0.0, strength: float = 1.0
) -> FeatureChange:
    """The features of `group` to `factor` times their clean activation, those of `by` to `strength` times their mean.

    A feature of both is set as one of `by`.
    """
    ours, theirs = _placed(prompt, group), _placed(prompt, by)
    kept = ~(ours[:, None] == theirs[None]).all(-1).any(1)
    index = torch.cat([ours[kept], theirs])
    clean = prompt.activations(index)
    wanted = torch.cat([factor * clean[: int(kept.sum())], strength * by.mean])
    return FeatureChange(index, wanted - clean)


def _placed(prompt: Recording, group: FeatureGroup) -> Int[Tensor, "n 3"]:
    found = prompt.positions(group.at)
    assert found is not None
    pos = torch.full_like(group.index[:, :1], found[0])
    return torch.cat([group.index[:, :1], pos, group.index[:, 1:]], dim=1)
