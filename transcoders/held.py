"""A language model whose attention patterns and norm scales are held, and how small changes spread in it.

What is left is what attribution graphs are about: the stream is linear but for the MLPs. Nothing is differentiated:
derivatives are differences between two forward passes, whatever the MLPs are made of.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.edits import Hook
from transcoders.errors import ModelError
from transcoders.language_model import LanguageModel
from transcoders.sites import Site

EMBED = "embed.hook_out"
SIZE = 1e-2
"""By which part of a change the model is nudged to find its derivative."""


class Changes(NamedTuple):
    """What the MLPs read and write, or derivatives of these in one direction of the whole model."""

    reads: Float[Tensor, "layer batch pos d_model"]
    writes: Float[Tensor, "layer batch pos d_model"]

    def __sub__(self, other: "Changes") -> "Changes":
        return Changes(self.reads - other.reads, self.writes - other.writes)

    def __truediv__(self, size: float) -> "Changes":
        return Changes(self.reads / size, self.writes / size)


def held_hooks(model: LanguageModel) -> list[str]:
    """TransformerBridge's names of every attention pattern and norm scale."""
    return [
        name
        for name in model.hook_names
        if name.endswith((".attn.hook_pattern", ".hook_scale")) and not name.startswith(("embed.", "unembed."))
    ]


class HeldModel:
    """A model on rows of tokens, with the patterns and scales of its clean run.

    `reads[l]` and `writes[l]`: the sites of layer l's MLP that are looked at. Raises `ModelError` where the model never
    comes to one of them, or to what is to be held.
    """

    @torch.no_grad()
    def __init__(
        self, model: LanguageModel, rows: Int[Tensor, "batch pos"], reads: Sequence[Site], writes: Sequence[Site]
    ) -> None:
        self.model, self.rows, self.read_sites, self.write_sites = model, rows, tuple(reads), tuple(writes)
        self._after = [Site(site.layer, "resid_post") for site in reads]
        self.constants: dict[str, Tensor] = {}
        names = [*held_hooks(model), EMBED]
        self._held: dict[str, Hook] = {name: _noting(self.constants, name) for name in names}
        self.final, at = self.run({})
        """What the unembedding reads."""
        self.clean, self._streams = self._changes(at)
        for name in names:
            if name not in self.constants:
                raise ModelError(
                    f"{model.name} never calls {name}, which is to be held; its architecture is not supported."
                )
        self.embed: Float[Tensor, "batch pos d_model"] = self.constants.pop(EMBED)
        self._held = {name: _giving(value) for name, value in self.constants.items()}

    def run(
        self, edits: Mapping[Site, Hook], embed: Float[Tensor, "batch pos d_model"] | None = None
    ) -> tuple[Float[Tensor, "batch pos _"], dict[Site, Float[Tensor, "batch pos d_model"]]]:
        """What the unembedding reads under `edits`, and reads, writes and the stream after each block.

        `embed`: other embeddings. Differentiable in what edits and embeddings are made of.
        """
        held = self._held if embed is None else self._held | {EMBED: _giving(embed)}
        sites = {*self.read_sites, *self.write_sites, *self._after}
        return self.model.run_to_unembedding(self.rows, sites, edits, held=held)

    @torch.no_grad()
    def nudge(
        self,
        embed: Float[Tensor, "batch pos d_model"] | None = None,
        written: Float[Tensor, "layer batch pos d_model"] | None = None,
        *,
        size: float = SIZE,
        central: bool = True,
    ) -> Changes:
        """The derivative of all reads, and of what the MLPs make of them, as embeddings and writes are changed.

        `written[l]` is added to what MLP l writes, and is no part of the change of its own write. `central`: from
        `size` forward and back, to second order; otherwise from one pass, to first.
        """
        forward = self._nudged(embed, written, size)
        return (
            (forward - self._nudged(embed, written, -size)) / (2 * size) if central else (forward - self.clean) / size
        )

    def _nudged(self, embed: Tensor | None, written: Tensor | None, size: float) -> Changes:
        moved = None if embed is None else self.embed + size * embed
        if written is None:
            return self._changes(self.run({}, moved)[1])[0]
        edits = {site: _adding(size * change) for site, change in zip(self.write_sites, written, strict=True)}
        found, _ = self._changes(self.run(edits, moved)[1])
        return Changes(found.reads, found.writes - size * written)

    @torch.no_grad()
    def respond(
        self, directions: Float[Tensor, "layer batch pos d_model"], *, size: float = SIZE
    ) -> Float[Tensor, "layer batch pos d_model"]:
        """J v of every MLP by itself: the stream after each block is the clean one again."""
        forward, back = (self._alone(directions, by).writes for by in (size, -size))
        return (forward - back) / (2 * size)

    def _alone(self, directions: Tensor, size: float) -> Changes:
        moved = zip(self.read_sites, self.clean.reads, directions, strict=True)
        edits: dict[Site, Hook] = {site: _giving(clean + size * direction) for site, clean, direction in moved}
        edits |= {site: _giving(stream) for site, stream in zip(self._after, self._streams, strict=True)}
        return self._changes(self.run(edits)[1])[0]

    def carry(
        self,
        answer: Callable[[int, Tensor], Tensor],
        embed: Float[Tensor, "batch pos d_model"] | None = None,
        written: Float[Tensor, "layer batch pos d_model"] | None = None,
    ) -> tuple[list[Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos _"]]:
        """How all reads and the last one change with embeddings and writes, where MLP l writes `answer(l, its change)`.

        `written[l]` is added to what is written at layer l, as in `nudge`. Differentiable in the answers.
        """
        found: list[Tensor] = []
        edits: dict[Site, Hook] = {}

        def read(layer: int) -> Hook:
            def note(value: Tensor) -> None:
                found.append(value - self.clean.reads[layer])

            return note

        def write(layer: int) -> Hook:
            beside = 0.0 if written is None else written[layer]
            return lambda _: self.clean.writes[layer] + answer(layer, found[layer]) + beside

        for layer, (before, behind) in enumerate(zip(self.read_sites, self.write_sites, strict=True)):
            edits |= {before: read(layer), behind: write(layer)}
        final, _ = self.run(edits, None if embed is None else self.embed + embed)
        return found, final - self.final

    @torch.no_grad()
    def through(
        self,
        answer: Callable[[int, Tensor], Tensor],
        embed: Float[Tensor, "batch pos d_model"] | None = None,
        written: Float[Tensor, "layer batch pos d_model"] | None = None,
    ) -> Float[Tensor, "layer batch pos d_model"]:
        """The change of all reads that `carry` finds."""
        return torch.stack(self.carry(answer, embed, written)[0])

    def _changes(self, at: Mapping[Site, Tensor]) -> tuple[Changes, list[Tensor]]:
        """Reads and writes, and the stream after each block."""
        read, written = (torch.stack([at[site] for site in side]) for side in (self.read_sites, self.write_sites))
        return Changes(read, written), [at[site] for site in self._after]


def _noting(found: dict[str, Tensor], name: str) -> Hook:
    def note(value: Tensor) -> None:
        found[name] = value

    return note


def _giving(value: Tensor) -> Hook:
    return lambda _: value


def _adding(change: Tensor) -> Hook:
    return lambda value: value + change
