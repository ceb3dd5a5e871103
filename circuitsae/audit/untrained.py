"""A model of the same architecture that has learnt nothing: each weight matrix's entries in another order."""

import copy

import torch

from transcoders.language_model import LanguageModel


@torch.no_grad()
def untrained(model: LanguageModel, seed: int = 0) -> LanguageModel:
    """A copy whose every parameter has its entries permuted: their sizes stay, and what they compute is gone.

    (Weight randomisation of Adebayo et al. 2018, "Sanity Checks for Saliency Maps".) The copy takes as much memory.
    """
    made, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    made.__dict__.pop("_components", None)
    for _, weight in made.parts.parameters():
        order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        weight.copy_(weight.flatten()[order].view_as(weight))
    return made
