"""PatchingProblem: what a method of this package is asked about."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

Ablation = Literal["resample", "zero", "mean"]
"""What takes the place of a component's output: its output on the corrupt prompt, nothing, or a mean over prompts."""

Metric = Callable[[Float[Tensor, "example pos d_vocab"]], Float[Tensor, "example"]]
"""One value for each example, from its own logits alone; differentiable for the gradient methods."""


@runtime_checkable
class Divisible(Protocol):
    """A metric that can be cut down to some of its examples."""

    def take(self, index: Int[Tensor, "taken"]) -> Metric:
        """The metric of the examples at `index` alone."""
        ...


@dataclass(frozen=True)
class PatchingProblem:
    """Prompts of equal length, what each is corrupted to, and the value that is read from the logits.

    Effects have one sign everywhere: **metric after − metric before**, where before is the clean run.
    `swapped()` turns noising (a part of the clean run corrupted) into denoising.
    """

    model: LanguageModel
    clean: Int[Tensor, "example pos"]
    corrupt: Int[Tensor, "_ _"] | None
    """The corrupted prompt of each clean one; may be None for zero and mean ablation."""
    metric: Metric
    ablation: Ablation | str = "resample"
    groups: Int[Tensor, "_"] | None = None
    """For mean ablation: examples whose outputs are averaged together (one template, one alignment); default: all."""
    read: Int[Tensor, "_"] | None = None
    """The one position whose logits the metric needs; it is then given logits of shape [example, 1, d_vocab]."""
    spans: Bool[Tensor, "_ _ _"] | None = None
    """Sets of positions to be patched apart (one for each position or role); default: one set, all positions."""
    span_names: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.ablation not in get_args(Ablation):
            raise InputError(f"Unknown ablation {self.ablation!r}; use one of {', '.join(get_args(Ablation))}.")
        if self.clean.ndim != 2 or not len(self.clean):
            raise InputError(f"Clean prompts must be a table [example, pos] of ids; got {tuple(self.clean.shape)}.")
        if self.corrupt is None and self.ablation == "resample":
            raise InputError("Resample ablation needs corrupt prompts; give them, or use ablation='zero' or 'mean'.")
        if self.corrupt is not None and self.corrupt.shape != self.clean.shape:
            raise InputError(
                f"Clean prompts have shape {tuple(self.clean.shape)} and corrupt ones {tuple(self.corrupt.shape)}; "
                "each pair must have equal length (group the examples by length)."
            )
        for row in (self.clean, *([] if self.corrupt is None else [self.corrupt])):
            if row.shape[1] > self.model.context or int(row.max()) >= self.model.d_vocab or int(row.min()) < 0:
                raise InputError(
                    f"Prompts of {row.shape[1]} tokens with ids {int(row.min())} to {int(row.max())} do not fit "
                    f"{self.model.name}, which reads {self.model.context} tokens of ids below {self.model.d_vocab}."
                )
        expected = (len(self.clean),)
        for name, value in (("groups", self.groups), ("read", self.read)):
            if value is not None and tuple(value.shape) != expected:
                raise InputError(
                    f"`{name}` has shape {tuple(value.shape)}; expected one value per example, {expected}."
                )
        if self.spans is not None and tuple(self.spans.shape[1:]) != tuple(self.clean.shape):
            raise InputError(
                f"`spans` has shape {tuple(self.spans.shape)}; expected [span, *{tuple(self.clean.shape)}]."
            )

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def n_pos(self) -> int:
        return self.clean.shape[1]

    def each_position(self) -> "PatchingProblem":
        """The same problem with every position patched apart."""
        here = torch.eye(self.n_pos, dtype=torch.bool, device=self.clean.device)
        spans = here[:, None, :].expand(-1, len(self), -1)
        return replace(self, spans=spans, span_names=tuple(str(p) for p in range(self.n_pos)))

    def swapped(self) -> "PatchingProblem":
        """Clean and corrupt exchanged: patching then restores (denoises) instead of destroying."""
        if self.corrupt is None:
            raise InputError("Only a problem with corrupt prompts can be swapped; give `corrupt`.")
        return replace(self, clean=self.corrupt, corrupt=self.clean)

    def take(self, index: Int[Tensor, "taken"]) -> "PatchingProblem":
        """The examples at `index` alone. (Means of a mean ablation are then over these.)"""
        device = self.clean.device
        index = index.to(device)

        def at(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[index]

        return replace(
            self,
            clean=self.clean[index],
            corrupt=at(self.corrupt),
            metric=self.metric.take(index)
            if isinstance(self.metric, Divisible)
            else _Taken(self.metric, index, len(self)),
            groups=at(self.groups),
            read=at(self.read),
            spans=None if self.spans is None else self.spans[:, index],
        )

    def chunks(self, size: int) -> Iterator["PatchingProblem"]:
        """This problem in parts of at most `size` examples, in order. Mean ablation keeps its examples together."""
        if len(self) <= size or self.ablation == "mean":
            yield self
            return
        for index in torch.arange(len(self), device=self.clean.device).split(size):
            yield self.take(index)


@dataclass(frozen=True)
class _Taken:
    """A metric over all examples, asked about some: the others' logits are zero and their values dropped."""

    metric: Metric
    index: Int[Tensor, "taken"]
    total: int

    def __call__(self, logits: Float[Tensor, "taken pos d_vocab"]) -> Float[Tensor, "taken"]:
        whole = logits.new_zeros(self.total, *logits.shape[1:]).index_copy(0, self.index, logits)
        return self.metric(whole)[self.index]
