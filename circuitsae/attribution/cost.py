"""What attribution costs in operations and in memory, and in which layer sources and targets should meet."""

from dataclasses import dataclass

import numpy as np
import torch

from circuitsae.attribution.nodes import SourceVectors, Targets

LEAST_STORED_BYTES = 64 * 2**20
"""Sources carried to the meeting layer may always take this much; beyond it, no more than the edges they become."""


@dataclass(frozen=True)
class Cost:
    """Of a choice of the meeting layer. Operations are multiplications and additions of the hops and of the meeting."""

    meeting_layer: int
    operations: float
    stored: float
    """Numbers kept at the meeting layer."""


def choose_meeting_layer(sources: SourceVectors, targets: Targets, *, share: float = 1.0) -> int:
    """The meeting layer of least operations whose stored sources take no more memory than the edges do.

    `share` < 1: only this share of the targets, not known in advance, will be asked for.
    """
    counts = _Counts(sources, targets, share)
    element = targets.itemsize
    allowed = max(LEAST_STORED_BYTES, counts.edges * (element + 4))
    costs = [counts.cost(layer) for layer in range(len(sources.linear.blocks) + 1)]
    return min((c for c in costs if c.stored * element <= allowed), key=lambda c: c.operations).meeting_layer


class _Counts:
    """Targets and sources by layer and position."""

    def __init__(self, sources: SourceVectors, targets: Targets, share: float) -> None:
        self.n_layers, n_positions = len(sources.linear.blocks), sources.trace.n_positions
        self.d = sources.trace.errors.shape[-1]
        local = slice(0, sources.n_local)
        self.sources = np.zeros((self.n_layers + 1, n_positions))  # row 0: the embeddings
        np.add.at(self.sources, (sources.layer[local] + 1, sources.pos[local]), 1)
        self.targets = np.zeros((self.n_layers + 1, n_positions))
        np.add.at(self.targets, (targets.layer.cpu().numpy(), targets.pos.cpu().numpy()), share)
        self.all_targets = share == 1
        skip = any(skip is not None for skip in sources.skips)
        self.hop = (6 if skip else 4) * self.d**2

    @property
    def edges(self) -> float:
        """Pairs of a target and a source that can reach it."""
        before = np.cumsum(np.cumsum(self.sources, axis=0), axis=1)
        return float((self.targets * before[: len(self.targets)]).sum())

    def cost(self, meeting_layer: int) -> Cost:
        """Every row pays its first hop once, and each further one at all positions that it has reached."""
        n_positions = self.sources.shape[1]
        reach = np.arange(1, n_positions + 1)  # of targets; of sources it is the reverse
        layers = np.arange(self.n_layers + 1)
        until = np.minimum(layers, self.n_layers - 1)
        down = np.where(layers >= meeting_layer, until - meeting_layer, until if not self.all_targets else 0).clip(0)
        up = (meeting_layer - 1 - layers).clip(0)  # row l is layer l − 1
        lower = np.where(layers[:, None] <= meeting_layer, self.sources, 0) if meeting_layer else 0 * self.sources
        upper = np.where(layers[:, None] >= meeting_layer, self.targets, 0)
        hops = (self.targets * down[:, None]) @ reach + (self.sources * up[:, None]) @ reach[::-1]
        first = upper.sum() + lower[:meeting_layer].sum()
        stored = lower.sum(0).cumsum()
        meeting = 2 * self.d * float(stored @ upper.sum(0)[::-1].cumsum()[::-1])
        return Cost(
            meeting_layer, self.hop * (float(hops.sum()) + float(first)) + meeting, float(stored.sum()) * self.d
        )


def operations(sources: SourceVectors, targets: Targets, meeting_layer: int) -> float:
    """Operations of the hops and of the meeting for all `targets`; with meeting layer 0, of the textbook way."""
    with torch.no_grad():
        return _Counts(sources, targets, 1.0).cost(meeting_layer).operations
