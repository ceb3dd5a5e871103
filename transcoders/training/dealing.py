"""Rows of text among ranks: each runs the model on every `size`-th of a chunk, and gets what it trains on.

The batches are those of a single process: all ranks read the same rows and know the order in which tokens are dealt.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transcoders.data.activations import ActivationBatch, ActivationStream, close_gaps, fill
from transcoders.data.chunks import Chunk
from transcoders.sites import Site
from transcoders.training.split import Split


class SharedStream(ActivationStream):
    """Of each batch what this rank trains on: the tokens of the rows that it ran, or all of them at its own sites."""

    def __init__(self, *settings: Any, split: Split, reads: Sequence[Site], n_layers: int, **more: Any) -> None:
        """`settings`, `more`: of the stream of a single process, with all `reads` of the model's layers."""
        super().__init__(*settings, reads=reads, **more)
        self.split, self.world = split, split.world
        self._sites = [split.sites_of(reads, n_layers, rank) for rank in range(self.world.size)]

    def __iter__(self) -> Iterator[ActivationBatch]:
        for chunk in self._chunks:
            self._chunk, self._place = chunk, self._chunks.state()
            buffer, held, kept = self._deal(chunk)
            for number in range(self.batch_in_chunk, kept // self.batch):
                self.batch_in_chunk += 1
                tokens = self._tokens[number * self.batch : (number + 1) * self.batch]
                self._own = tokens[held[tokens] >= 0]
                dealt = buffer[held[self._own].to(buffer.device)]
                yield ActivationBatch(dealt, dealt[:, :0])
            self.batch_in_chunk = 0

    def place(self, row: int) -> str:
        return self._place_of(int(self._own[row]))

    @torch.no_grad()
    def _deal(self, chunk: Chunk) -> tuple[Float[Tensor, "_ own_site d_model"], Int[Tensor, "token"], int]:
        """What this rank has of a chunk, where each token is in it (−1: with another rank), and how many are dealt."""
        row = (chunk.positions >= self.first).nonzero()[:, 0]
        owner = row % self.world.size
        own, massive = self._run(chunk)
        of_ranks = owner.argsort(stable=True)  # all tokens, those of the first rank first
        everywhere = torch.zeros(len(row), dtype=torch.bool)
        everywhere[of_ranks] = self.world.gather(massive.to(torch.uint8).cpu()).bool()
        self._tokens = self._order(chunk, len(row))
        kept = close_gaps(everywhere[self._tokens], self._tokens)
        self._require_batch(chunk, len(row), kept)
        if self.split.by == "data":
            held = torch.full_like(row, -1)
            held[owner == self.world.rank] = torch.arange(len(own))
            return own, held, kept
        mine = self._sites[self.world.rank]
        shapes = [[int((owner == rank).sum()), len(mine), own.shape[-1]] for rank in range(self.world.size)]
        received = self.world.exchange([own[:, places] for places in self._sites], shapes)
        return torch.cat(received), of_ranks.argsort(), kept

    def _run(self, chunk: Chunk) -> tuple[Float[Tensor, "own_token site d_model"], Bool[Tensor, "own_token"]]:
        """The activations of this rank's rows, and which of their tokens are over a limit."""
        mine = slice(self.world.rank, None, self.world.size)
        rows, positions = (side[mine] for side in (chunk.tokens, chunk.positions))
        own = self._room_for(int((positions >= self.first).sum()))
        if not len(own):
            return own, torch.zeros(0, dtype=torch.bool, device=own.device)
        places = torch.arange(len(own), device=own.device)
        return own, fill(self.model, rows, positions, self.reads, self.first, self.limits, own, places)
