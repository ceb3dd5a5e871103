"""What of a run each rank has: some tokens of every batch, some layers, or some features of every layer.

The whole is what a single process has, in its order, and is what checkpoints and dictionaries hold; a run may therefore
go on with another number of ranks, or shared out in another way.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.errors import FileFormatError, InputError
from transcoders.sites import Site
from transcoders.training.config import Parallel, TrainConfig
from transcoders.training.distributed import ALONE, World

_FEATURE_AXIS = {"W_enc": 1, "b_enc": 1, "W_dec": 0, "threshold": 1, "r": 1, "b_mag": 1, "since_fired": 1}
"""Where a tensor of a run counts features; the others have none."""
_NAME = re.compile(
    r"(?:.*\.)??(W_enc|b_enc|W_dec|W_later|b_dec|W_skip_out|W_skip|since_fired|activation|scales)\b(?:\.(\w+))?(?:\.(\w+))?"
)


class Piece(NamedTuple):
    """A rank's part of a tensor of the whole run: `whole.narrow(axis, first, length)`, all of it without an axis."""

    name: str
    axis: int | None = None
    first: int = 0
    length: int = 0
    of: int = 0
    """Length of the whole along the axis."""

    def cut(self, place: str, whole: Tensor) -> Tensor:
        """This piece of the whole, in memory of its own; `FileFormatError` where the whole is of another size."""
        if self.axis is None:
            return whole
        if whole.ndim <= self.axis or whole.shape[self.axis] != self.of:
            raise FileFormatError(
                f"{place} has {self.name} as {list(whole.shape)}; expected {self.of} along axis {self.axis}; the "
                "checkpoint cannot be resumed, so remove it and train anew."
            )
        return whole.narrow(self.axis, self.first, self.length).clone()


@dataclass(frozen=True)
class Split:
    """How the ranks of a world share a run. One of three worlds is theirs; along the others each rank has all."""

    world: World = ALONE
    by: Parallel = "data"

    @property
    def tokens(self) -> World:
        return self.world if self.by == "data" else ALONE

    @property
    def layers(self) -> World:
        return self.world if self.by == "layers" else ALONE

    @property
    def features(self) -> World:
        return self.world if self.by == "features" else ALONE

    @property
    def competing(self) -> World:
        """The ranks with other tokens or other features of the same layers."""
        return ALONE if self.by == "layers" else self.world

    def require(self, config: TrainConfig, n_layers: int) -> None:
        """`InputError` where there is not enough for every rank."""
        if config.features % self.features.size:
            raise InputError(
                f"{self.world.size} ranks cannot share {config.features} features evenly; give a multiple of "
                f"{self.world.size}."
            )
        if config.compile and self.competing.size > 1:
            raise InputError(
                "compile needs a loss that no other rank has a part in; leave it out, or give parallel='layers'."
            )
        if n_layers < self.layers.size:
            raise InputError(f"{self.world.size} ranks cannot share {n_layers} layers; start {n_layers} at most.")

    # whose is what

    def layers_of(self, n_layers: int, rank: int | None = None) -> range:
        """The layers of a rank, of this one by default: neighbours, as evenly as they can be shared."""
        return _share(n_layers, self.layers, rank)

    def features_of(self, n_features: int) -> range:
        """The features of each layer that this rank has."""
        return _share(n_features, self.features, None)

    def share_of(self, n_tokens: int, batch: int) -> float:
        """The part of a batch that so many tokens are; what there is, is the batch, where tokens are not shared.

        Raises `InputError` where there are none.
        """
        if self.tokens.size == 1:
            return 1.0
        if n_tokens == 0:
            raise InputError(
                f"None of a batch's {batch} tokens is with rank {self.world.rank} of {self.world.size}; give a larger "
                "batch or buffer_mb, or start fewer processes."
            )
        return n_tokens / batch

    def of_batch(self, own: Float[Tensor, "*n"], n_tokens: int, batch: int) -> Float[Tensor, "*n"]:
        """Means over a batch, of each rank's mean over its own tokens."""
        return self.tokens.sum(own * self.share_of(n_tokens, batch))

    def sites_of(self, sites: Sequence[Site], n_layers: int, rank: int | None = None) -> list[int]:
        """Places among `sites` of those that a rank trains on, this one by default."""
        layers = self.layers_of(n_layers, rank)
        return [place for place, site in enumerate(sites) if site.layer in layers]

    # tensors of a run by their names

    def piece(self, name: str, n_layers: int, n_features: int) -> Piece:
        """Which part of the whole run's tensors a tensor of this rank is."""
        if self.world.size == 1 or self.by == "data":
            return Piece(name)
        kind, sub = _kind(name)
        if self.by == "features":
            axis = None if sub == "step" else _FEATURE_AXIS.get(kind)
            own = self.features_of(n_features)
            return Piece(name) if axis is None else Piece(name, axis, own.start, len(own), n_features)
        own = self.layers_of(n_layers)
        if kind == "W_dec":
            return Piece(re.sub(r"W_dec\.(\d+)", lambda m: f"W_dec.{int(m[1]) + own.start}", name))
        return Piece(name) if sub == "step" else Piece(name, 0, own.start, len(own), n_layers)

    def own(self, name: str, n_layers: int, n_features: int) -> tuple[str, Piece] | None:
        """Of a tensor of the whole run, the name it has on this rank and the piece of it; None where it has none."""
        if self.layers.size > 1 and (found := re.search(r"W_dec\.(\d+)", name)):
            layer, own = int(found[1]), self.layers_of(n_layers)
            return (name.replace(found[0], f"W_dec.{layer - own.start}"), Piece(name)) if layer in own else None
        return name, self.piece(name, n_layers, n_features)

    def whole_shapes(self, tensors: Mapping[str, Tensor], n_layers: int, n_features: int) -> dict[str, Tensor]:
        """Of every tensor of the whole run its shape and type, as a tensor without data, in one order on all ranks."""
        shapes: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            piece, shape = self.piece(name, n_layers, n_features), list(tensor.shape)
            if piece.axis is not None:
                shape[piece.axis] = piece.of
            names = [piece.name]
            if self.layers.size > 1 and _kind(name)[0] == "W_dec":
                if "W_dec.0" not in name:
                    continue
                names = [name.replace("W_dec.0", f"W_dec.{layer}") for layer in range(n_layers)]
            shapes |= {each: torch.empty(shape, dtype=tensor.dtype, device="meta") for each in names}
        return shapes

    def to_first(
        self, tensors: Mapping[str, Tensor], n_layers: int, n_features: int
    ) -> Iterator[tuple[str, Tensor | None]]:
        """One tensor of the whole run after the other, on the first rank; None on the others, who all take part."""
        for name, like in self.whole_shapes(tensors, n_layers, n_features).items():
            yield name, self._whole(name, like, tensors, n_layers, n_features)

    def whole(
        self, tensors: Mapping[str, Tensor], n_layers: int, n_features: int, everywhere: bool
    ) -> dict[str, Tensor] | None:
        """The tensors of the whole run, on every rank or on the first one and those that have them anyway."""
        if self.world.size == 1 or self.by == "data":
            return dict(tensors)
        shapes, whole = self.whole_shapes(tensors, n_layers, n_features), {}
        for name, found in self.to_first(tensors, n_layers, n_features):
            if found is not None:
                whole[name] = found.detach().cpu().clone()
            if everywhere:
                like = shapes[name]
                whole.setdefault(name, torch.empty(like.shape, dtype=like.dtype))
                self.world.broadcast([whole[name]])
        return whole or None

    def _whole(
        self, name: str, like: Tensor, tensors: Mapping[str, Tensor], n_layers: int, n_features: int
    ) -> Tensor | None:
        kind, _ = _kind(name)
        if self.layers.size > 1 and kind == "W_dec":
            layer = int(re.search(r"W_dec\.(\d+)", name)[1])  # pyright: ignore[reportOptionalSubscript]
            owner = next(r for r in range(self.layers.size) if layer in self.layers_of(n_layers, r))
            own = tensors.get(name.replace(f"W_dec.{layer}", f"W_dec.{layer - self.layers_of(n_layers).start}"))
            return self.layers.send_to_first(own if self.world.rank == owner else None, like, owner)
        axis = self.piece(name, n_layers, n_features).axis
        if axis is None:
            return tensors[name] if self.world.first else None
        lengths = [len(self.layers_of(n_layers, r)) for r in range(self.layers.size)]
        own = _padded(tensors[name], axis, max(lengths)) if self.by == "layers" else tensors[name]
        received = self.world.gather_to_first(own)
        if received is None:
            return None
        if self.by == "layers":
            received = [part.narrow(axis, 0, n) for part, n in zip(received, lengths, strict=True)]
        return torch.cat(received, dim=axis)


WHOLE = Split()


def _share(n: int, world: World, rank: int | None) -> range:
    r = 0 if world.size == 1 else world.rank if rank is None else rank
    return range(n * r // world.size, n * (r + 1) // world.size)


def _padded(x: Tensor, axis: int, length: int) -> Tensor:
    shape = list(x.shape)
    shape[axis] = length - shape[axis]
    return torch.cat([x, x.new_zeros(shape)], dim=axis)


def _kind(name: str) -> tuple[str, str]:
    """What a tensor is (`W_enc`, `threshold`, …), and `step` where it is the count of an optimizer's steps."""
    found = _NAME.fullmatch(name)
    if found is None:  # of a file that is no checkpoint
        return "", "step"
    kind = found[2] if found[1] in ("activation", "scales") else found[1]
    return kind, "step" if name.endswith(".step") else ""
