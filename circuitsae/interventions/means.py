"""Means of everything that can be intervened on, over prompts: what a mean ablation puts in a value's place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.interventions.prompts import EMBED, Library, PromptLike, Recording, error_place, z_hook
from circuitsae.replacement import FIRST, ReplacementModel
from transcoders.errors import InputError
from transcoders.sites import Site, SiteKind

By = Literal["role", "position", "corpus"]
Group = tuple[str, str | int]

_SITES: tuple[SiteKind, ...] = ("resid_pre", "resid_mid", "resid_post", "mlp_in", "mlp_out", "attn_out")
_START, _OTHER, _ANY = "(first position)", "(no role)", "(any position)"


@dataclass(frozen=True, eq=False)
class Means:
    """Means over the positions of prompts that belong together.

    `by`: positions belong together that have the same template and role (those without a role together), the same
    template and position, or (`corpus`) all of them. Position 0, an outlier in most models, is always on its own but
    for `position`.
    """

    by: By
    count: dict[Group, int]
    features_: dict[Group, Float[Tensor, "layer feature"]]
    vectors: dict[Group, dict[str, Tensor]]
    """By group, then place: `[d_model]`, heads `[head d_head]`."""

    @classmethod
    def over(cls, model: ReplacementModel, prompts: Sequence[PromptLike], *, by: By = "role") -> "Means":
        """Means over some prompts, one forward pass or two each. Raises `InputError` for none."""
        if not prompts:
            raise InputError("There are no prompts to take means over; give at least one.")
        if by not in ("role", "position", "corpus"):
            raise InputError(f"by={by!r} is no way to group positions; give 'role', 'position' or 'corpus'.")
        means, library = cls(by, {}, {}, {}), Library(model)
        for prompt in prompts:
            recording = library[prompt]
            dense = _dense(recording)
            places = {place: recording.vector(place) for place in _places(recording)}
            for pos in range(len(recording)):
                group = means.group(recording, pos)
                means._add(group, dense[:, pos], {place: value[pos] for place, value in places.items()})
        for group, n in means.count.items():
            means.features_[group] /= n
            means.vectors[group] = {place: value / n for place, value in means.vectors[group].items()}
        return means

    def _add(self, group: Group, features: Tensor, vectors: dict[str, Tensor]) -> None:
        if group not in self.count:
            self.count[group] = 0
            self.features_[group] = torch.zeros_like(features)
            self.vectors[group] = {place: torch.zeros_like(value) for place, value in vectors.items()}
        self.count[group] += 1
        self.features_[group] += features
        for place, value in vectors.items():
            self.vectors[group][place] += value

    def group(self, prompt: Recording, pos: int) -> Group:
        """What the position of a prompt belongs to: its template, and its role or number."""
        if self.by == "position":
            return prompt.template, pos
        if pos < FIRST:
            return ("" if self.by == "corpus" else prompt.template), _START
        if self.by == "corpus":
            return "", _ANY
        named = [role for role, at in prompt.roles.items() if at % len(prompt) == pos]
        return prompt.template, named[0] if named else _OTHER

    def _of(self, prompt: Recording, pos: int) -> Group:
        group = self.group(prompt, pos)
        if group not in self.count:
            raise InputError(
                f"These means have nothing for template {group[0]!r} and {self.by} {group[1]!r}; "
                f"take them over prompts that have it, or with by='corpus'. They have {list(self.count)[:5]}."
            )
        return group

    def activations(self, prompt: Recording, index: Int[Tensor, "n 3"]) -> Float[Tensor, "n"]:
        """Means of features' activations at positions of a prompt (layer, position, feature)."""
        values = [self.features_[self._of(prompt, pos)][layer, i] for layer, pos, i in index.tolist()]
        return torch.stack(values) if values else torch.zeros(0)

    def vector(self, prompt: Recording, place: str, positions: Sequence[int]) -> Float[Tensor, "pos ..."]:
        """Means at a place, for positions of a prompt."""
        return torch.stack([self.vectors[self._of(prompt, pos)][place] for pos in positions])


def _dense(recording: Recording) -> Float[Tensor, "layer pos feature"]:
    model = recording.model
    layers = range(model.model.n_layers)
    width = max(model.dictionaries.n_features(layer) for layer in layers)
    dense = recording.trace.errors.new_zeros(len(layers), len(recording), width)
    index, value = recording.trace.features
    dense[index[:, 0], index[:, 1], index[:, 2]] = value
    return dense


def _places(recording: Recording) -> list[str]:
    model = recording.model.model
    layers = range(model.n_layers)
    hooks = [z_hook(i) for i in layers] + [Site(i, kind).hook for i in layers for kind in _SITES]
    return [EMBED, *(error_place(i) for i in layers), *(name for name in hooks if model.has_hook(name))]
