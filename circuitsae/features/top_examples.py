"""The tokens on which features are most active, from a list of texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.features.contrasts import FeatureGroup
from circuitsae.interventions import Feature, PromptLike
from circuitsae.interventions.controls import written_vectors
from circuitsae.interventions.prompts import Library
from circuitsae.replacement import ReplacementModel
from transcoders.errors import InputError

BEFORE, AFTER = 12, 4
"""Tokens of context that an example shows."""


@dataclass(frozen=True)
class Example:
    """One token of a text, and how active a feature (or a group of them) is there."""

    text: int
    pos: int
    activation: float
    token: str
    before: str
    """The context, up to and without the token."""
    after: str


@torch.no_grad()
def token_activations(
    model: ReplacementModel, features: Sequence[Feature], texts: Sequence[PromptLike]
) -> list[Float[Tensor, "pos"]]:
    """How active the features are at every position of every text, one forward pass each.

    One feature: its activation. Several: `Σ a_f ‖W_dec,f‖`, what they write. Positions before the first with
    features: 0.
    """
    if not texts or not features:
        raise InputError(f"Examples need features and texts; got {len(features)} and {len(texts)}.")
    library, layers = Library(model), sorted({feature.layer for feature in features})
    index = {layer: torch.tensor([f.index for f in features if f.layer == layer]) for layer in layers}
    one = len(features) == 1
    weight = {layer: written_vectors(model, layer, i).flatten(1).norm(dim=1) for layer, i in index.items()}
    found = []
    for text in texts:
        tokens = library.tokens(text)
        reads = model.model.activations(tokens[None], [model.dictionaries.reads[layer] for layer in layers])
        total = torch.zeros(len(tokens), dtype=model.model.dtype, device=model.model.device)
        for layer in layers:
            active = model.dictionaries.activations(layer, reads[model.dictionaries.reads[layer]][0])[:, index[layer]]
            total += active[:, 0] if one else active @ weight[layer]
        total[model.exact(tokens)] = 0
        found.append(total)
    return found


def examples(
    model: ReplacementModel, features: Sequence[Feature] | FeatureGroup, texts: Sequence[PromptLike], *, n: int = 20
) -> list[Example]:
    """The `n` tokens on which the features are most active, the strongest first; fewer where fewer are active."""
    chosen = features.features() if isinstance(features, FeatureGroup) else features
    found, library = token_activations(model, chosen, texts), Library(model)
    places = [(float(a), i, pos) for i, row in enumerate(found) for pos, a in enumerate(row.tolist()) if a > 0]
    made = []
    for activation, text, pos in sorted(places, key=lambda place: -place[0])[:n]:
        strings = model.model.token_strings(library.tokens(texts[text]))
        before, after = (
            "".join(strings[max(model.first, pos - BEFORE) : pos]),
            "".join(strings[pos + 1 : pos + 1 + AFTER]),
        )
        made.append(Example(text, pos, activation, strings[pos], before, after))
    return made


def examples_frame(found: Sequence[Example]) -> pd.DataFrame:
    """One row per example: `text`, `pos`, `activation`, `token`, `before`, `after`."""
    columns = ["text", "pos", "activation", "token", "before", "after"]
    return pd.DataFrame([[getattr(example, name) for name in columns] for example in found], columns=columns)
