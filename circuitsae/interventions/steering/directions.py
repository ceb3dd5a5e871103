"""What a model is steered by, and stand-ins of the same size."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitsae.interventions.changes import Add, Intervention, Scale, Set
from circuitsae.interventions.controls import matched_features
from circuitsae.interventions.prompts import PromptLike, Recording
from circuitsae.interventions.targets import Feature, Places, Stream, target_id
from circuitsae.replacement import ReplacementModel
from transcoders.errors import InputError
from transcoders.sites import Site, SiteKind

Push = Literal["add", "set", "scale"]


@dataclass(frozen=True, eq=False)
class Direction:
    """A vector to add at a site, such as the difference of two kinds of prompts."""

    layer: int
    kind: SiteKind
    vector: Float[Tensor, "d_model"]
    at: Places = None
    name: str = ""


@dataclass(frozen=True, eq=False)
class SteeringDirection:
    """What one strength means: `a ← a + s·unit` (add), `a ← s·unit` (set) or `a ← s·a` (scale); `x ← x + s·vector`."""

    what: tuple[Feature, ...] | Direction
    units: tuple[float, ...]
    push: Push

    @property
    def name(self) -> str:
        if isinstance(self.what, Direction):
            return self.what.name or f"direction at {self.what.layer}.{self.what.kind}"
        shown = ", ".join(target_id(feature) for feature in self.what[:4])
        return shown if len(self.what) <= 4 else f"{shown} and {len(self.what) - 4} more"

    def at(self, strength: float) -> list[Intervention]:
        """The interventions of one strength; none for a strength that changes nothing."""
        if strength == self.neutral:
            return []
        if isinstance(self.what, Direction):
            site = Stream(self.what.layer, self.what.kind, self.what.at)
            return [Intervention(site, Add(strength * self.what.vector))]
        pairs = zip(self.what, self.units, strict=True)
        match self.push:
            case "add":
                return [Intervention(feature, Add(strength * unit)) for feature, unit in pairs]
            case "set":
                return [Intervention(feature, Set(strength * unit)) for feature, unit in pairs]
            case "scale":
                return [Intervention(feature, Scale(strength)) for feature in self.what]

    @property
    def neutral(self) -> float | None:
        """The strength that leaves the model as it is, where there is one."""
        return {"add": 0.0, "scale": 1.0}.get(self.push)

    def everywhere(self) -> "SteeringDirection":
        """The same at every position: for unrelated text, where its places mean nothing.

        Raises `InputError` for a feature that is named twice, at different places.
        """
        if isinstance(self.what, Direction):
            return replace(self, what=replace(self.what, at=None))
        what = tuple(replace(feature, at=None) for feature in self.what)
        if len(set(what)) < len(what):
            raise InputError(f"{self.name}: a feature is named twice; steer by each feature once.")
        return replace(self, what=what)

    def control(
        self, model: ReplacementModel, generator: torch.Generator, among: Sequence[Bool[Tensor, "_"]]
    ) -> "SteeringDirection":
        """A stand-in of the same written norm: other features of the same layers, or a Gaussian vector.

        Its features are pushed by adding `s·unit` (`(s − 1)·unit` for `scale`): most are off where its own are on.
        """
        if isinstance(self.what, Direction):
            noise = torch.randn(self.what.vector.shape, generator=generator, dtype=torch.float64).to(self.what.vector)
            vector = noise * self.what.vector.norm() / noise.norm()
            same = (self.what.layer, self.what.kind)
            return SteeringDirection(Direction(*same, vector, self.what.at, "random"), (), "add")
        index = torch.tensor([(feature.layer, feature.index) for feature in self.what])
        amounts = torch.tensor(self.units, dtype=model.model.dtype)
        chosen, scaled = matched_features(model, index, amounts, generator, among)
        features = tuple(
            Feature(layer, number, feature.at)
            for (layer, number), feature in zip(chosen.tolist(), self.what, strict=True)
        )
        return _Shifted(features, tuple(scaled.tolist()), "add", 1.0 if self.push == "scale" else 0.0)


@dataclass(frozen=True, eq=False)
class _Shifted(SteeringDirection):
    """A control whose zero lies where the direction's does."""

    zero: float = 0.0

    def at(self, strength: float) -> list[Intervention]:
        return super().at(strength - self.zero)


def steering_direction(
    what: Feature | Sequence[Feature] | Direction,
    units: Sequence[float] | None,
    push: Push,
    seen: Sequence[Float[Tensor, "_"]],
) -> SteeringDirection:
    """What is steered by; a feature's unit, unless given, is the largest activation `seen` (by layer), 1 if never on.

    Raises `InputError` for units that do not match, and for a direction that is to be set or scaled.
    """
    if push not in ("add", "set", "scale"):
        raise InputError(f"push={push!r} is no way to push; give 'add', 'set' or 'scale'.")
    if isinstance(what, Direction):
        if push != "add" or units is not None:
            raise InputError(f"A direction is added and has no units; got push={push!r}, units={units!r}.")
        return SteeringDirection(what, (), "add")
    features = (what,) if isinstance(what, Feature) else tuple(what)
    if not features:
        raise InputError("There is nothing to steer by; give a feature, several, or a Direction.")
    for feature in features:
        if not 0 <= feature.layer < len(seen) or not 0 <= feature.index < len(seen[feature.layer]):
            raise InputError(_no_such(feature, [len(layer) for layer in seen]))
    if units is None:
        found = [float(seen[feature.layer][feature.index]) for feature in features]
        return SteeringDirection(features, tuple(value if value > 0 else 1.0 for value in found), push)
    if len(units) != len(features):
        raise InputError(
            f"{len(features)} features need as many units, the change that strength 1 makes; got {len(units)}."
        )
    return SteeringDirection(features, tuple(float(unit) for unit in units), push)


def _no_such(feature: Feature, widths: Sequence[int]) -> str:
    there = f"{widths[0]:,} features each" if len(set(widths)) == 1 else f"{', '.join(map(str, widths))} features"
    layer = min(max(feature.layer, 0), len(widths) - 1)
    return (
        f"There is no feature {feature.layer}.{feature.index}: these dictionaries have layers 0 to {len(widths) - 1} "
        f"with {there}, numbered from 0; give LAYER.INDEX, in layer {layer} "
        + (f"from {layer}.0 to {layer}.{widths[layer] - 1}." if widths[layer] else "there are none.")
    )


@torch.no_grad()
def difference_of_prompts(
    model: ReplacementModel,
    prompts: Sequence[PromptLike],
    against: Sequence[PromptLike],
    *,
    layer: int,
    kind: SiteKind = "resid_pre",
    read_at: int | str | None = -1,
    at: Places = None,
) -> Direction:
    """The mean of a site over `prompts` minus that over `against`, as a direction to steer by.

        v = mean_prompts x − mean_against x

    Read at one place of each prompt (`read_at`: position or role; None: the mean of all positions but the first),
    added at `at` (None: everywhere). Source: activation addition, Turner et al. 2023; contrastive means, Rimsky et
    al. 2024, section 3. Raises `InputError` for an empty side.
    """
    if not prompts or not against:
        raise InputError(f"A difference needs prompts on both sides; got {len(prompts)} and {len(against)}.")
    site = Site(layer, kind)
    sums: dict[int, list[Tensor]] = defaultdict(list)
    for side, members in enumerate((prompts, against)):
        for prompt in members:
            recording = Recording(model, prompt)
            value = model.model.activations(recording.trace.tokens[None], [site])[site][0]
            chosen = None if read_at is None else recording.positions(read_at)
            sums[side].append(value[model.first :].mean(0) if chosen is None else value[chosen[0]])
    ours, theirs = (torch.stack(sums[side]).mean(0) for side in (0, 1))
    name = f"difference of {len(prompts)} and {len(against)} prompts at {layer}.{kind}"
    return Direction(layer, kind, ours - theirs, at, name)
