"""A model of the same architecture that has learnt nothing: every weight drawn anew, as large as it was."""

import copy

import torch

from transcoders.language_model import LanguageModel


@torch.no_grad()
def untrained(model: LanguageModel, seed: int = 0) -> LanguageModel:
    """A copy whose every parameter is drawn from a Gaussian of its root mean square. It takes as much memory.

    (Weight randomisation: Adebayo et al. 2018, "Sanity Checks for Saliency Maps".)
    """
    made, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    made.__dict__.pop("_components", None)
    for _, weight in made.parts.parameters():
        own = torch.randn(weight.shape, generator=draw, dtype=weight.dtype).to(weight.device)
        weight.copy_(own * weight.pow(2).mean().sqrt())
    return made
