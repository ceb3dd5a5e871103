"""PatchingProblem: what a method of this package is asked about.

A task's examples as problems.

One problem's two runs, part by part: what every later patch starts from.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitsae.components.network import Network, Projections
from circuitsae.tasks.task import END, PatchPair, Task
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

Ablation = Literal["resample", "mean", "zero", "noise"]
"""What takes a contribution's place: that of the corrupt prompt, its mean over prompts, nothing, or itself with
Gaussian noise as wide as it spreads over prompts and positions, in each dimension."""
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
    """The corrupted prompt of each clean one; may be None but for resample ablation."""
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
            raise InputError("Resample ablation needs corrupt prompts; give them, or use another ablation.")
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


_EVERYWHERE = ("first_copy_loss", "second_copy_loss")


def problems_of(
    model: LanguageModel,
    task: Task,
    *,
    metric: str | None = None,
    ablation: Ablation = "resample",
    roles: Sequence[str] = (),
) -> list[PatchingProblem]:
    """One problem for each length of prompt; with `roles`, the positions of these roles (and all others) apart.

    The metric is the task's own unless named; `kl` compares with the clean run. Means are taken within a template.
    Raises `InputError` for a role that the examples do not have.
    """
    found = []
    for pair in task.tokens(model):
        name = metric or task.metric
        reference = None
        if name == "kl":
            with torch.no_grad():
                reference = model.run(pair.clean)[0]
        length = pair.clean.shape[1]
        templates = {template: i for i, template in enumerate(dict.fromkeys(pair.templates))}
        found.append(
            PatchingProblem(
                model,
                pair.clean,
                pair.corrupt,
                task.score(pair, name, reference=reference),
                ablation,
                groups=torch.tensor([templates[t] for t in pair.templates], device=pair.clean.device),
                read=None if name in _EVERYWHERE else pair.clean.new_full((len(pair),), length - 1),
                spans=_spans(pair, roles) if roles else None,
                span_names=(*roles, "other") if roles else (),
            )
        )
    return found


def _spans(pair: PatchPair, roles: Sequence[str]) -> torch.Tensor:
    unknown = [role for role in roles if role not in pair.roles]
    if unknown:
        raise InputError(f"The examples have no role {unknown[0]!r}; they have {', '.join(pair.roles)} ({END} always).")
    at = torch.arange(pair.clean.shape[1], device=pair.clean.device)
    spans = [at == pair.roles[role][:, None] for role in roles]
    return torch.stack([*spans, ~torch.stack(spans).any(0)])


BATCH_TOKENS = 4096
"""How many tokens go through the model at a time, unless said otherwise."""


@dataclass(frozen=True)
class Layer:
    """What passes through one block."""

    before: Float[Tensor, "example pos d_model"]
    at: Projections
    z: Float[Tensor, "example pos head d_head"]
    attention: Float[Tensor, "example pos d_model"]
    """Attention's output with b_O, before any norm that follows it."""
    middle: Float[Tensor, "example pos d_model"]
    after: Float[Tensor, "example pos d_model"]

    def mlp_reads(self, parallel: bool) -> Float[Tensor, "example pos d_model"]:
        return self.before if parallel else self.middle


@dataclass(frozen=True)
class Recording:
    """Everything that is written and read in one run."""

    writes: Float[Tensor, "writer example pos d_model"]
    """Each writer's contribution to the residual stream; with the biases b_O they sum to it."""
    layers: list[Layer] = field(default_factory=list)

    @property
    def final(self) -> Float[Tensor, "example pos d_model"]:
        return self.layers[-1].after


@torch.no_grad()
def record(network: Network, tokens: Tensor, replaced: Mapping[str, Tensor] = MappingProxyType({})) -> Recording:
    """Run a batch of prompts, keeping each component's input and contribution.

    Writers in `replaced` contribute what is given, and everything after them is recomputed.
    """
    names = network.graph.writers
    written = [replaced.get(name, own) for name, own in zip(names, network.embeddings(tokens), strict=False)]
    stream = torch.stack(written).sum(0)
    layers: list[Layer] = []
    for index in range(network.graph.n_layers):
        x = stream[:, :, None]
        at = Projections(*(network.project(index, kind, x) for kind in "qkv"))
        z = network.attend(index, at)
        results = network.results(index, z)
        total = results.sum(2) + network.attention_bias(index)
        middle = stream + network.after_attention(index, total)
        for head, own in enumerate(network.share(index, results, total).unbind(2)):
            given = replaced.get(f"a{index}.h{head}")
            written.append(own if given is None else given)
            middle = middle if given is None else middle + (given - own)
        given = replaced.get(f"m{index}")
        mlp = network.mlp(index, stream if network.graph.parallel else middle) if given is None else given
        written.append(mlp)
        layers.append(Layer(stream, at, z, total, middle, middle + mlp))
        stream = middle + mlp
    return Recording(torch.stack(written), layers)


class Prepared:
    """A problem with its clean run, and with what takes the place of each writer's contribution."""

    def __init__(self, problem: PatchingProblem) -> None:
        self.problem = problem
        self.network = Network.of(problem.model)
        self.graph = self.network.graph
        self.clean = record(self.network, problem.clean)

    @cached_property
    def replacement(self) -> Float[Tensor, "writer example pos d_model"]:
        """Each writer's contribution when it is ablated."""
        problem = self.problem
        if problem.ablation == "zero":
            return torch.zeros_like(self.clean.writes)
        if problem.ablation == "noise":
            return _noisy(self.clean.writes)
        source = self.clean.writes if problem.corrupt is None else record(self.network, problem.corrupt).writes
        return source if problem.ablation == "resample" else _group_means(source, problem.groups)

    @cached_property
    def delta(self) -> Float[Tensor, "writer example pos d_model"]:
        """What an ablation adds to each writer's contribution."""
        return self.replacement - self.clean.writes

    def without(self, writers: Collection[str]) -> Recording:
        """The clean prompts run with these writers ablated; the clean run itself where there are none."""
        if not writers:
            return self.clean
        gone = self.graph.check_writers(writers)
        ablated = {name: self.replacement[self.graph.writer_index[name]] for name in gone}
        return record(self.network, self.problem.clean, ablated)

    @cached_property
    def spans(self) -> Bool[Tensor, "span example pos"]:
        given = self.problem.spans
        return torch.ones_like(self.problem.clean, dtype=torch.bool)[None] if given is None else given

    @property
    def span_names(self) -> tuple[str, ...]:
        names = self.problem.span_names
        return names if len(names) == len(self.spans) else tuple(str(i) for i in range(len(self.spans)))

    def span(self, name: str) -> Bool[Tensor, "example pos"]:
        """The positions of one span."""
        if name not in self.span_names:
            raise InputError(f"The problem has no span {name!r}; it has {', '.join(self.span_names)}.")
        return self.spans[self.span_names.index(name)]

    @cached_property
    def clean_value(self) -> Float[Tensor, "example"]:
        """The metric of the clean run."""
        with torch.no_grad():
            return self.values(self.clean.final[None])[0]

    def logits(self, final: Float[Tensor, "*run example _ d_model"]) -> Float[Tensor, "*run example read d_vocab"]:
        """Logits of what the last block leaves, at the positions that the metric reads."""
        runs, shape = final.shape[:-3], final.shape[-3:]
        rows = self.needed(self.graph.n_layers, final.reshape(-1, *shape[1:]))
        out = self.network.logits(rows)
        return out.reshape(*runs, shape[0], *out.shape[1:])

    def needed(self, layer: int, x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row read d_model"]:
        """The positions that the metric reads, from the last block's attention on; before, every position."""
        read = self.problem.read
        if read is None or layer < self.graph.n_layers - 1 or x.shape[1] < self.problem.n_pos:
            return x
        rows = torch.arange(len(x), device=x.device)
        return x[rows, read.repeat(len(x) // len(read))][:, None]

    def values(self, final: Float[Tensor, "run example read d_model"]) -> Float[Tensor, "run example"]:
        """The metric of several runs, from what their last blocks leave."""
        return torch.stack([self.problem.metric(logits) for logits in self.logits(final)])

    def effects(self, final: Float[Tensor, "run example read d_model"]) -> Float[Tensor, "run example"]:
        """Metric after − metric before."""
        return self.values(final) - self.clean_value

    def runs_at_once(self, batch_tokens: int) -> int:
        """How many runs of all examples fit one batch."""
        return max(1, batch_tokens // self.problem.clean.numel())


Problems = PatchingProblem | Prepared | Sequence[PatchingProblem] | Sequence[Prepared]
"""One problem, or several whose prompts differ in length; their examples count alike."""


def parts_of(problems: Problems, batch_tokens: int = BATCH_TOKENS) -> Iterator[Prepared]:
    """The problems in parts that fit a batch, each with its runs; made one after the other."""
    given = [problems] if isinstance(problems, PatchingProblem | Prepared) else list(problems)
    if not given:
        raise InputError("No problem was given; give at least one PatchingProblem.")
    for problem in given:
        if isinstance(problem, Prepared):
            yield problem
        else:
            yield from map(Prepared, problem.chunks(max(1, batch_tokens // problem.n_pos)))


def _noisy(writes: Float[Tensor, "writer example pos d_model"]) -> Float[Tensor, "writer example pos d_model"]:
    """Each contribution with noise, the same in every call."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(writes.shape, generator=draw, dtype=writes.dtype).to(writes.device)
    return writes + noise * writes.std((1, 2), correction=0, keepdim=True)


def _group_means(source: Tensor, groups: Tensor | None) -> Tensor:
    if groups is None:
        return source.mean(1, keepdim=True).expand_as(source)
    out = torch.empty_like(source)
    for group in groups.unique():
        members = groups == group
        out[:, members] = source[:, members].mean(1, keepdim=True)
    return out
