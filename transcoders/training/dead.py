"""Counting latents that no longer fire."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class DeadCounter:
    """Tokens since each latent last fired; one that has not for `dead_after` tokens counts as dead."""

    def __init__(self, since_fired: Int[Tensor, "layer feature"], dead_after: int) -> None:
        self.since_fired = since_fired
        self.dead_after = dead_after

    @property
    def dead(self) -> Bool[Tensor, "layer feature"]:
        return self.since_fired >= self.dead_after

    def update(self, fired: Bool[Tensor, "layer feature"], tokens: int) -> None:
        """Take in which latents were active on any token of a batch."""
        self.since_fired += tokens
        self.since_fired[fired] = 0


def never_fired(n_layers: int, n_features: int, dead_after: int, device: torch.device) -> DeadCounter:
    return DeadCounter(torch.zeros(n_layers, n_features, dtype=torch.int64, device=device), dead_after)
