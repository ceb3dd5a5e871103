"""Numbers that are not finite, noticed without making a device wait for each step."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transcoders.sites import Site
from transcoders.training.distributed import World


class Spoilt(NamedTuple):
    """The first number that was not finite."""

    step: int
    """Counted from one, as in the metrics."""
    site: Site | None
    """Whose activations were not finite, or None where they were and a loss was not."""
    name: str
    """Whose loss it was."""


class Watch:
    """For every site and every dictionary the first step with a number that is not finite, kept on the device."""

    def __init__(
        self, sites: Sequence[Site], names: Sequence[str], device: torch.device, world: World, own: Sequence[int]
    ) -> None:
        """`own`: the places of the sites that this rank sees."""
        self.sites, self.names, self.world = list(sites), list(names), world
        self._own = torch.tensor(own, device=device)
        self._first = torch.zeros(len(self.sites) + len(self.names), dtype=torch.int64, device=device)

    def see(
        self, step: int, activations: Float[Tensor, "batch site d_model"], finite: Sequence[Bool[Tensor, ""]]
    ) -> None:
        """Take in a step's activations, and whether each dictionary's loss and gradient were finite."""
        ends = torch.stack([activations.amax(dim=(0, 2)), activations.amin(dim=(0, 2))])  # NaN where anything is
        good = torch.ones_like(self._first, dtype=torch.bool)
        good[self._own] = ends.isfinite().all(dim=0)
        good[len(self.sites) :] = torch.stack(list(finite))
        self._first = torch.where((self._first == 0) & ~good, step, self._first)

    def first(self) -> Spoilt | None:
        """The first of them on any rank; waits for the device. Activations go before the losses they spoil."""
        never = torch.iinfo(self._first.dtype).max
        first = self.world.least(self._first.where(self._first > 0, never))
        steps = first.where(first < never, 0).tolist()
        if not any(steps):
            return None
        step, place = min((step, place) for place, step in enumerate(steps) if step)
        if place < len(self.sites):
            return Spoilt(step, self.sites[place], "")
        return Spoilt(step, None, self.names[place - len(self.sites)])


def spoilt_rows(activations: Float[Tensor, "batch site d_model"]) -> list[int]:
    """The rows of a batch that hold a number that is not finite."""
    return (~activations.isfinite().all(dim=2).all(dim=1)).nonzero().squeeze(1).tolist()
