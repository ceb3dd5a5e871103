"""Prompts as interventions see them: tokens, names of positions, the clean run's values, and means over many."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitsae.frozen import check_middle
from circuitsae.interventions.targets import Places
from circuitsae.replacement import ReplacementModel, Trace
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel
from transcoders.sites import MLP_WRITES, Site, SiteKind
from transcoders.starting import streams_before

EMBED = "embed.hook_out"
ERRORS, MIDDLE = "errors.", "middle."
"""Places that are no hooks of the model's; a layer's number follows."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt whose positions have names: what a task's `IO`, `S1` or `END` are in it."""

    prompt: str | Tensor | Trace
    roles: Mapping[str, int] = field(default_factory=dict)
    """Position of each role."""
    template: str = ""
    """Prompts of one template share their means."""


PromptLike = str | Tensor | Trace | Prompt


def z_hook(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_z"


def error_place(layer: int) -> str:
    """The place of an error node's vector: no hook of the model's, but a part of what a dictionary's hook writes."""
    return f"{ERRORS}{layer}"


def site_place(model: LanguageModel, site: Site) -> str:
    """The place of a site: its hook, but `resid_mid`, which is changed by what attention adds (`in_the_middle`).

    Raises `ModelError` where the model has no such site.
    """
    hook = model.hook(site)
    return f"{MIDDLE}{site.layer}" if site.kind == "resid_mid" else hook


def write_place(model: ReplacementModel, layer: int) -> str:
    """The place that the dictionary of a layer writes: an MLP's output, or the site of an autoencoder."""
    return site_place(model.model, model.dictionaries.writes[layer])


def mlp_place(model: ReplacementModel, layer: int) -> str:
    """The place of an MLP's output, where its dictionary writes if that stands for the MLP."""
    of_mlp = model.dictionaries.writes[layer].kind in MLP_WRITES
    return model.write_hooks[layer] if of_mlp else model.model.hook(Site(layer, "mlp_out"))


class Recording:
    """The clean run of one prompt: its trace, and on demand the values at any other place."""

    def __init__(self, model: ReplacementModel, prompt: PromptLike) -> None:
        given = prompt if isinstance(prompt, Prompt) else Prompt(prompt)
        self.model = model
        self.roles, self.template = dict(given.roles), given.template
        self._clean: dict[str, Tensor] = {}
        self.trace = given.prompt if isinstance(given.prompt, Trace) else model.trace(given.prompt)
        for role, pos in self.roles.items():
            if not -len(self) <= pos < len(self):
                raise InputError(f"Role {role!r} is at position {pos}, but the prompt has {len(self)} tokens.")

    def __len__(self) -> int:
        return self.trace.n_positions

    def positions(self, at: Places) -> list[int] | None:
        """Absolute positions of `at`, or None for every one. Raises `InputError` for roles the prompt has not."""
        if at is None:
            return None
        found = [self._position(place) for place in (at if isinstance(at, tuple) else (at,))]
        if len(set(found)) != len(found):
            raise InputError(f"at={at!r} names a position twice ({found}); name each once.")
        return found

    def _position(self, place: int | str) -> int:
        if isinstance(place, str):
            if place not in self.roles:
                known = ", ".join(self.roles) or "none"
                raise InputError(
                    f"The prompt has no role {place!r}; its roles are: {known}. Give roles in Prompt(...)."
                )
            place = self.roles[place]
        if place < -len(self):
            raise InputError(f"Position {place} is before the start of a prompt of {len(self)} tokens.")
        return place + len(self) if place < 0 else place

    # values

    def activations(self, index: Int[Tensor, "n 3"]) -> Float[Tensor, "n"]:
        """Clean activations of features (layer, position, feature); 0 for those that are off."""
        features = self.trace.features
        if int((index[:, 1] >= len(self)).sum()):
            raise InputError(
                f"There is no clean activation at position {int(index[:, 1].max())}: "
                f"the prompt it is read from has {len(self)} tokens."
            )
        ours, theirs = (self._keys(i) for i in (features.index, index.to(features.index.device)))
        if not len(ours):
            return features.value.new_zeros(len(index))
        at = torch.searchsorted(ours, theirs).clamp(max=len(ours) - 1)
        return torch.where(ours[at] == theirs, features.value[at], 0.0)

    def _keys(self, index: Int[Tensor, "n 3"]) -> Int[Tensor, "n"]:
        """One sortable number for each feature."""
        width = max(self.model.dictionaries.n_features(layer) for layer in range(self.model.model.n_layers))
        return (index[:, 0] * len(self) + index[:, 1]) * width + index[:, 2]

    def vector(self, place: str) -> Float[Tensor, "pos ..."]:
        """The clean value at a place: a hook of the model's, or an error node's."""
        writes, reads = self.trace.frozen.writes, self.trace.frozen.reads
        if place == EMBED:
            return writes.embed
        if place.startswith(ERRORS):
            return self.trace.errors[int(place.removeprefix(ERRORS))]
        if place in self.model.write_hooks:
            return writes.mlp_out[self.model.write_hooks.index(place)]
        if place in self.model.read_hooks:
            return reads.by_layer[self.model.read_hooks.index(place)]
        return self._others[place]

    @cached_property
    def active(self) -> "list[Active]":
        """By layer, where which features are active; read from the device once."""
        index = self.trace.features.index.cpu().numpy()
        return [
            Active.of(index[index[:, 0] == layer], self.trace.errors.device)
            for layer in range(self.model.model.n_layers)
        ]

    @cached_property
    def streams(self) -> Mapping[int, Float[Tensor, "1 pos d_model"]]:
        """The clean stream before each block that a run can begin at."""
        return streams_before(self.model.model, range(1, self.model.model.n_layers), self.trace.tokens[None])

    @cached_property
    def _others(self) -> dict[str, Tensor]:
        """Head outputs and what the dictionaries neither read nor write, from a run of their own."""
        model, layers = self.model.model, range(self.model.model.n_layers)
        hooks = {place: model.hook(site) for i in layers for place, site in _sites(model, i).items()}
        heads = [name for name in map(z_hook, layers) if model.has_hook(name)]
        with torch.no_grad():
            _, cache = model.run_hooked(self.trace.tokens[None], read=dict.fromkeys([*hooks.values(), *heads]))
        return {place: cache[name][0] for place, name in (hooks | dict(zip(heads, heads, strict=True))).items()}

    def clean_values(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """What hooks carry in a run that nothing was written into; read once."""
        if not self._clean.keys() >= set(names):
            with torch.no_grad():
                _, cache = self.model.model.run_hooked(self.trace.tokens[None], read=names)
            self._clean |= {name: value[0] for name, value in cache.items()}
        return self._clean

    def check_mid(self, layer: int) -> None:
        """Raises `ModelError` where `resid_mid` is not the block's input plus its attention's output."""
        kinds: tuple[SiteKind, ...] = ("resid_pre", "attn_added", "resid_mid")
        pre, added, mid = (self.vector(site_place(self.model.model, Site(layer, kind))) for kind in kinds)
        check_middle(self.model.model, layer, pre, added, mid)


class Active(NamedTuple):
    """The active features of a layer by position, filled up to the same number for each."""

    pos: Int[Tensor, "pos"]
    """Positions that have any."""
    feature: Int[Tensor, "pos most"]
    """0 where there is none."""
    none: Bool[Tensor, "pos most"]

    @classmethod
    def of(cls, index: Int[np.ndarray, "n 3"], device: torch.device) -> "Active":
        """Of rows (layer, position, number) of one layer."""
        places, group, count = np.unique(index[:, 1], return_inverse=True, return_counts=True)
        order = np.argsort(group, kind="stable")
        turn = np.arange(len(index)) - np.repeat(np.cumsum(count) - count, count)
        feature = np.full((len(places), count.max(initial=0)), -1, dtype=np.int64)
        feature[group[order], turn] = index[order, 2]
        pos, number = (torch.from_numpy(x).to(device) for x in (places.astype(np.int64), feature))
        return cls(pos, number.clamp(min=0), number < 0)


class Library:
    """Recordings of prompts, each made once."""

    def __init__(self, model: ReplacementModel) -> None:
        self.model = model
        self._made: dict[Hashable, Recording] = {}

    def tokens(self, prompt: PromptLike) -> Int[Tensor, "pos"]:
        """Checked token ids of a prompt, nothing run."""
        given = prompt.prompt if isinstance(prompt, Prompt) else prompt
        return given.tokens if isinstance(given, Trace) else self.model.tokens(given)

    def __getitem__(self, prompt: "PromptLike | Recording") -> Recording:
        if isinstance(prompt, Recording):
            return prompt
        given = prompt if isinstance(prompt, Prompt) else Prompt(prompt)
        own = id(given.prompt) if isinstance(given.prompt, Trace) else tuple(self.tokens(given).tolist())
        key = (own, tuple(given.roles.items()), given.template)
        if key not in self._made:
            self._made[key] = Recording(self.model, given)
        return self._made[key]


By = Literal["role", "position", "corpus"]
Group = tuple[str, str | int]

_START, _OTHER, _ANY = "(first position)", "(no role)", "(any position)"


@dataclass(frozen=True, eq=False)
class Means:
    """Means over the positions of prompts that belong together.

    `by`: positions belong together that have the same template and role (those without a role together), the same
    template and position, or (`corpus`) all of them. Positions before the first with features, outliers in most
    models, stand apart but for `position`.
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
        if bool(prompt.trace.exact[pos]):
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
    heads = [name for name in map(z_hook, layers) if model.has_hook(name)]
    return [EMBED, *(error_place(i) for i in layers), *heads, *(place for i in layers for place in _sites(model, i))]


def _sites(model: LanguageModel, layer: int) -> dict[str, Site]:
    """The places of a layer's sites that the model has, heads apart."""
    sites = [Site(layer, kind) for kind in get_args(SiteKind) if kind != "attn_z"]
    return {site_place(model, site): site for site in sites if model.has_site(site)}
