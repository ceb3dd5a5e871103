"""Many alternatives that each take one contribution some number of times, put together in a few operations.

The alternatives of `hooks` may be any changes and are compiled one by one. Those of validation are of one form, a
number times what some node writes; their tables cost the same few operations for one as for thousands, and what is
copied to the device is one array of whole numbers and one of factors for a pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.interventions.changes import Contribution
from circuitsae.interventions.hooks import Edits, Tables, VectorTable
from circuitsae.interventions.prompts import EMBED, Recording, write_place
from circuitsae.replacement import ReplacementModel
from transcoders.errors import InputError


class Changes(Protocol):
    """Alternatives that a pass can make, a row each."""

    def __len__(self) -> int: ...

    @property
    def starts(self) -> Sequence[int]:
        """The first block that each of them changes."""
        ...

    def tables(self, rows: Sequence[int]) -> Tables:
        """What a pass over some of them changes."""
        ...


@dataclass(frozen=True)
class Compiled:
    """Alternatives of any kind."""

    edits: Sequence[Edits]
    starts: Sequence[int]

    def __len__(self) -> int:
        return len(self.edits)

    def tables(self, rows: Sequence[int]) -> Tables:
        return Tables.of([self.edits[row] for row in rows])


class Writers:
    """Contributions side by side on the device: a vector for each of them and each layer that it writes."""

    def __init__(self, model: ReplacementModel, prompt: Recording, contributions: Sequence[Contribution]) -> None:
        self.model, self.like = model, prompt.trace.errors
        self.places = (EMBED, *(write_place(model, layer) for layer in range(model.model.n_layers)))
        """Where a contribution can write: the embeddings, then every layer."""
        if beyond := [c.pos for c in contributions if not 0 <= c.pos < len(prompt)]:
            raise InputError(f"Position {beyond[0]} is none of the prompt's {len(prompt)} tokens.")
        self.pos = np.array([c.pos for c in contributions], dtype=np.int64)
        self.vector = np.full((len(contributions), len(self.places)), -1, dtype=np.int64)
        """By contribution and place the number of its vector, −1 where it has none."""
        number = 0
        for row, contribution in enumerate(contributions):
            at = np.array(contribution.layers, dtype=int) + 1
            self.vector[row, at] = np.arange(number, number + len(at))
            number += len(at)
        parts = [c.vectors for c in contributions]
        self.vectors: Float[Tensor, "vector d_model"] = (
            torch.cat(parts).to(self.like) if parts else self.like.new_zeros(0, self.like.shape[-1])
        )

    def __len__(self) -> int:
        return len(self.pos)

    @cached_property
    def starts(self) -> np.ndarray:
        """The first block that each of them writes into; what is added to the embeddings is there from the first on."""
        blocks = np.array([0, *(int(name.split(".")[1]) for name in self.places[1:])])
        return np.where(self.vector >= 0, blocks, len(blocks)).min(axis=1, initial=len(blocks)) % len(blocks)


@dataclass(frozen=True, eq=False)
class Shares:
    """Alternative i adds `factor[i]` times the writer `which[i]`."""

    writers: Writers
    which: np.ndarray
    factor: np.ndarray

    @classmethod
    def removing(cls, writers: Writers) -> "Shares":
        """Every writer taken out, one at a time."""
        return cls(writers, np.arange(len(writers)), -np.ones(len(writers)))

    @classmethod
    def join(cls, several: Sequence["Shares"]) -> "Shares":
        """Those of the same writers, one after the other."""
        which, factor = (np.concatenate([getattr(one, name) for one in several]) for name in ("which", "factor"))
        return cls(several[0].writers, which, factor)

    def __len__(self) -> int:
        return len(self.which)

    @property
    def starts(self) -> Sequence[int]:
        return self.writers.starts[self.which].tolist()

    def take(self, rows: np.ndarray) -> "Shares":
        """Some of them."""
        return Shares(self.writers, self.which[rows], self.factor[rows])

    def tables(self, rows: Sequence[int]) -> Tables:
        chosen, like = np.asarray(rows, dtype=int), self.writers.like
        which = self.which[chosen]
        place, row = np.nonzero(self.writers.vector[which].T >= 0)
        vector = self.writers.vector[which[row], place]
        numbers = torch.from_numpy(np.stack([row, self.writers.pos[which[row]], vector])).to(like.device)
        factor = torch.from_numpy(self.factor[chosen][row]).to(like.dtype).to(like.device)  # MPS has no float64
        at_row, at_pos, at_vector = numbers.unbind()
        shift = self.writers.vectors.index_select(0, at_vector) * factor[:, None]
        scale = torch.ones_like(factor)[:, None]
        ends = np.searchsorted(place, np.arange(len(self.writers.places) + 1))
        return Tables(
            {},
            {
                name: [VectorTable(at_row[a:b], at_pos[a:b], None, scale[a:b], shift[a:b])]
                for name, a, b in zip(self.writers.places, ends[:-1].tolist(), ends[1:].tolist(), strict=True)
                if b > a
            },
        )
