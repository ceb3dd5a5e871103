"""An activation store → batches: in a new order each time it is read, with the next ones read ahead.

The order is a function of the store and a seed alone. In each epoch the shards come in a new order, the blocks of a
shard too, and the tokens of a block; batches are cut from that without a gap, so that they also run across shards.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from transcoders.data.activations import ActivationBatch
from transcoders.data.ahead import copies_to, read_ahead
from transcoders.data.store import ActivationStore
from transcoders.errors import InputError
from transcoders.files import short_hash
from transcoders.sites import Site

_MOST_AHEAD = 64


class Block(NamedTuple):
    """A block of a shard, and how many tokens of an epoch come with it and before it."""

    shard: int
    block: int
    end: int


class StoreStream:
    """Endless batches of a store's activations at some sites, those of another stream with the same seed.

    What does not fill a batch at the end of an epoch is left out.
    """

    def __init__(
        self,
        store: ActivationStore,
        sites: Sequence[Site],
        *,
        batch: int,
        seed: int,
        device: torch.device | str = "cpu",
        buffer_mb: int = 512,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """`state`: where an earlier stream stopped. `buffer_mb`: memory for what is read ahead.

        Raises `InputError` where the store lacks a site, does not fill a batch, or is not the one of the `state`.
        """
        store.require_sites(sites)
        if store.tokens < batch:
            raise InputError(
                f"The {store.tokens:,} tokens of {store.folder} do not fill one batch of {batch:,}; write a larger "
                "store, or take a smaller batch."
            )
        self.store, self.sites, self.batch, self.seed = store, tuple(sites), batch, seed
        self.device = torch.device(device)
        self._per_epoch = store.tokens // batch
        self._next = self._number(state)
        self._ahead = self._fitting(buffer_mb * 2**20)
        self._order = lru_cache(2)(self._epoch_order)
        self._shuffled = lru_cache(1)(self._shuffled_block)

    def __iter__(self) -> Iterator[ActivationBatch]:
        numbers = iter(range(self._next, 2**62))
        for reads in copies_to(self.device).of(read_ahead(self._read, numbers, most=self._ahead)):
            self._next += 1
            yield ActivationBatch(reads, reads[:, :0])

    def state(self) -> dict[str, Any]:
        """Where the next batch comes from."""
        epoch, batch = divmod(self._next, self._per_epoch)
        return {"chunk": epoch, "batch_in_chunk": batch, "store": self.store.digest}

    def place(self, row: int) -> str:
        """Where a row of the last batch comes from, for messages."""
        epoch, batch = divmod(self._next - 1, self._per_epoch)
        token = batch * self.batch + row
        order = self._order(epoch)
        place = bisect_right(order, token, key=lambda block: block.end)
        found = order[place]
        tokens = self.store.block_tokens(found.shard, found.block)
        within = int(self._token_order(epoch, found.shard, found.block)[token - (found.end - tokens)])
        return f"token {found.block * self.store.settings.block + within} of {self.store.shards[found.shard].file}"

    def _number(self, state: Mapping[str, Any] | None) -> int:
        """The number of the next batch since the start."""
        if state is None:
            return 0
        if state.get("store") != self.store.digest:
            raise InputError(
                f"{self.store.folder} is not the store that this run began with ({state.get('store')!r}; its hash is "
                f"{self.store.digest!r}). Give that one, or train anew."
            )
        epoch, batch = state.get("chunk"), state.get("batch_in_chunk")
        if not (isinstance(epoch, int) and isinstance(batch, int) and epoch >= 0 and 0 <= batch < self._per_epoch):
            raise InputError(
                f"The place in the data, epoch {epoch!r}, batch {batch!r}, is none in a store of {self._per_epoch} "
                f"batches of {self.batch}; train anew."
            )
        return epoch * self._per_epoch + batch

    @property
    def ahead_bytes(self) -> int:
        """What reading ahead keeps in memory: whole batches, and a block as it is read and shuffled."""
        token = 4 * len(self.sites) * self.store.d_model
        return token * ((self._ahead + 1) * self.batch + 2 * self.store.settings.block)

    def _fitting(self, memory: int) -> int:
        """How many batches may be read ahead: enough for a block that takes long, and no more than memory allows."""
        token = 4 * len(self.sites) * self.store.d_model
        block = self.store.settings.block
        free = memory - 2 * block * token  # a block as it is read, and shuffled
        useful = 2 * -(-block // self.batch) + 2
        return max(1, min(useful, _MOST_AHEAD, free // (self.batch * token)))

    # on the reading thread

    def _read(self, number: int) -> Float32[Tensor, "batch site d_model"]:
        epoch, batch = divmod(number, self._per_epoch)
        order = self._order(epoch)
        start, end = batch * self.batch, (batch + 1) * self.batch
        parts = []
        place = bisect_right(order, start, key=lambda block: block.end)
        while start < end:
            found = order[place]
            tokens = self._shuffled(epoch, found.shard, found.block)
            first = found.end - len(tokens)
            parts.append(tokens[start - first : end - first])
            start, place = found.end, place + 1
        whole = torch.cat(parts)
        return whole.pin_memory() if self.device.type == "cuda" else whole

    def _epoch_order(self, epoch: int) -> list[Block]:
        """All blocks in the order of an epoch."""
        shards = torch.randperm(len(self.store.shards), generator=self._generator(epoch)).tolist()
        blocks = [
            (shard, block)
            for shard in shards
            for block in torch.randperm(self.store.blocks(shard), generator=self._generator(epoch, shard)).tolist()
        ]
        ends = accumulate(self.store.block_tokens(*block) for block in blocks)
        return [Block(shard, block, end) for (shard, block), end in zip(blocks, ends, strict=True)]

    def _shuffled_block(self, epoch: int, shard: int, block: int) -> Float32[Tensor, "token site d_model"]:
        return self.store.read(shard, block, self.sites)[self._token_order(epoch, shard, block)]

    def _token_order(self, epoch: int, shard: int, block: int) -> Int[Tensor, "token"]:
        n = self.store.block_tokens(shard, block)
        return torch.randperm(n, generator=self._generator(epoch, shard, block))

    def _generator(self, *place: int) -> torch.Generator:
        """Of the seed and a place in the order alone."""
        return torch.Generator().manual_seed(int(short_hash([f"{(self.seed, *place)}"]), 16))
