"""Feature activations of many prompts at one place each."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitsae.interventions import Prompt, PromptLike
from circuitsae.interventions.prompts import Library
from circuitsae.replacement import FIRST, ReplacementModel
from transcoders.dictionaries import SparseFeatures
from transcoders.errors import InputError
from transcoders.sites import Site

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
    places = [_position(prompt, at, len(row)) for prompt, row in zip(prompts, tokens, strict=True)]
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(tokens):
        by_length[len(row)].append(number)
    reads = torch.zeros(lm.n_layers, len(prompts), lm.d_model, dtype=lm.dtype, device=lm.device)
    sites = [Site(layer, "mlp_in") for layer in range(lm.n_layers)]
    for numbers in by_length.values():
        for start in range(0, len(numbers), _ROWS):
            here = numbers[start : start + _ROWS]
            found = lm.activations(torch.stack([tokens[i] for i in here]), sites)
            where = (torch.arange(len(here)), torch.tensor([places[i] for i in here]))
            reads[:, here] = torch.stack([found[site][where] for site in sites])
    widths = tuple(model.dictionaries.n_features(layer) for layer in range(lm.n_layers))
    return Activations(model.dictionaries.encode(reads), len(prompts), widths)


def _position(prompt: PromptLike, at: int | str, length: int) -> int:
    roles = prompt.roles if isinstance(prompt, Prompt) else {}
    if isinstance(at, str):
        if at not in roles:
            raise InputError(
                f"A prompt has no role {at!r} (it has {', '.join(roles) or 'none'}); give it in Prompt(...)."
            )
        at = roles[at]
    pos = at + length if at < 0 else at
    if not FIRST <= pos < length:
        raise InputError(f"Position {at} of a prompt of {length} tokens has no features; take {FIRST} to {length - 1}.")
    return pos
