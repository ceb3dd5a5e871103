"""One problem's two runs, part by part: what every later patch starts from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitsae.components.network import Network, Projections
from circuitsae.components.problem import PatchingProblem
from transcoders.errors import InputError

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
def record(network: Network, tokens: Tensor) -> Recording:
    """Run a batch of prompts, keeping each component's input and contribution."""
    written = list(network.embeddings(tokens))
    stream = torch.stack(written).sum(0)
    layers: list[Layer] = []
    for index in range(network.graph.n_layers):
        x = stream[:, :, None]
        at = Projections(*(network.project(index, kind, x) for kind in "qkv"))
        z = network.attend(index, at)
        results = network.results(index, z)
        total = results.sum(2) + network.attention_bias(index)
        written += list(network.share(index, results, total).unbind(2))
        middle = stream + network.after_attention(index, total)
        mlp = network.mlp(index, stream if network.graph.parallel else middle)
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
        source = self.clean.writes if problem.corrupt is None else record(self.network, problem.corrupt).writes
        return source if problem.ablation == "resample" else _group_means(source, problem.groups)

    @cached_property
    def delta(self) -> Float[Tensor, "writer example pos d_model"]:
        """What an ablation adds to each writer's contribution."""
        return self.replacement - self.clean.writes

    @cached_property
    def spans(self) -> Bool[Tensor, "span example pos"]:
        given = self.problem.spans
        return torch.ones_like(self.problem.clean, dtype=torch.bool)[None] if given is None else given

    @property
    def span_names(self) -> tuple[str, ...]:
        names = self.problem.span_names
        return names if len(names) == len(self.spans) else tuple(str(i) for i in range(len(self.spans)))

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


def _group_means(source: Tensor, groups: Tensor | None) -> Tensor:
    if groups is None:
        return source.mean(1, keepdim=True).expand_as(source)
    out = torch.empty_like(source)
    for group in groups.unique():
        members = groups == group
        out[:, members] = source[:, members].mean(1, keepdim=True)
    return out
