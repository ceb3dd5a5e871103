"""Small transformers whose weights are written by hand, so that every edge that matters is known beforehand.

And what an audit is to tell apart: a program's own circuit, the same one damaged, and an untrained model's.

Directions of the residual stream are named: tokens and positions are one-hot, heads and MLPs copy between them.
Attention is close to hard (a matching key scores `SHARPNESS` above the others), so its gradients vanish where a
corruption would move it: a test for methods that rely on them.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.audit.heads import GivenSource, HeadSubject
from circuitsae.audit.subject import Choice
from circuitsae.audit.untrained import untrained
from circuitsae.components.exact import run_keeping
from circuitsae.components.known import CompiledProgram, distance
from circuitsae.components.network import ComponentGraph, Edge, Network
from circuitsae.components.problem import Ablation, PatchingProblem
from transcoders.bridge import native_bridge
from transcoders.language_model import LanguageModel

SHARPNESS = 60.0
VOCABULARY, LENGTH = 4, 6
_TOK, _POS = slice(0, 4), slice(4, 10)
_ONE, _AUX, _OUT = 10, slice(11, 15), slice(15, 19)
_WIDTH, _HEAD, _MLP = 19, 6, 2

Weights = dict[str, Float[Tensor, "..."]]


@dataclass(frozen=True)
class Handmade:
    """One program: its weights, and the edges whose ablation changes some logit after position 0, by reasoning.

    A mean over prompts of one length takes away what a resampled prompt does.
    """

    name: str
    what: str
    layers: int
    heads: int
    build: Callable[[Weights], None]
    resample: frozenset[Edge]
    zero: frozenset[Edge]
    lengths: tuple[int, ...] = (3, 4, 6)

    def program(
        self,
        *,
        per_length: int = 24,
        seed: int = 0,
        layers: int | None = None,
        heads: int | None = None,
        noise: float = 0.0,
    ) -> CompiledProgram:
        """The transformer (causal, without norms), random pairs of prompts of several lengths, and the truth.

        With more `layers` and `heads` than it needs, the others are there and idle. With `noise` every weight of a
        block is moved by a Gaussian of that width: then the truth holds most of what the model does, not all.
        """
        layers, heads = layers or self.layers, heads or self.heads
        generator = torch.Generator().manual_seed(seed)
        weights = self.weights(layers, heads)
        for name in sorted(weights) if noise else ():
            if name.startswith("blocks."):
                weights[name] += noise * torch.randn(weights[name].shape, generator=generator)
        bridge = native_bridge(
            weights, n_layers=layers, n_heads=heads, d_model=_WIDTH, d_head=_HEAD, d_mlp=_MLP, n_ctx=LENGTH,
            d_vocab=VOCABULARY, d_out=VOCABULARY, causal=True, dtype=torch.float64,
        )  # fmt: skip
        model = LanguageModel(bridge, f"handmade-{self.name}")
        pairs = []
        for length in self.lengths:
            drawn = torch.randint(0, VOCABULARY, (per_length, 2, length), generator=generator)
            pairs += [(clean, corrupt) for clean, corrupt in drawn.tolist()]
        truth = {"resample": self.resample, "mean": self.resample, "zero": self.zero}
        effects = {
            edge: {kind: float(edge in edges) for kind, edges in truth.items()}
            for edge in Network.of(model).graph.edges
        }
        return CompiledProgram(self.name, self.what, model, pairs, effects)

    def weights(self, layers: int | None = None, heads: int | None = None) -> Weights:
        """Named as in a compiled program's file."""
        weights = _blank(layers or self.layers, heads or self.heads)
        self.build(weights)
        return weights


def _blank(layers: int, heads: int) -> Weights:
    """Zero weights, but for one-hot embeddings; positions also carry a constant."""
    weights = {
        "W_E": torch.zeros(VOCABULARY, _WIDTH),
        "W_pos": torch.zeros(LENGTH, _WIDTH),
        "W_U": torch.zeros(_WIDTH, VOCABULARY),
    }
    weights["W_E"][:, _TOK] = torch.eye(VOCABULARY)
    weights["W_pos"][:, _POS] = torch.eye(LENGTH)
    weights["W_pos"][:, _ONE] = 1
    weights["W_U"][_OUT] = torch.eye(VOCABULARY)
    for layer in range(layers):
        for kind in "QKV":
            weights[f"blocks.{layer}.W_{kind}"] = torch.zeros(heads, _WIDTH, _HEAD)
        weights[f"blocks.{layer}.W_O"] = torch.zeros(heads, _HEAD, _WIDTH)
        weights[f"blocks.{layer}.W_in"] = torch.zeros(_WIDTH, _MLP)
        weights[f"blocks.{layer}.W_out"] = torch.zeros(_MLP, _WIDTH)
    return weights


def _attend(weights: Weights, layer: int, head: int, query: Tensor, key: Tensor) -> None:
    weights[f"blocks.{layer}.W_Q"][head], weights[f"blocks.{layer}.W_K"][head] = query * SHARPNESS, key


def _copy(weights: Weights, layer: int, head: int, start: slice, end: slice, sign: float = 1.0) -> None:
    size = end.stop - end.start
    weights[f"blocks.{layer}.W_V"][head, start, :size] = torch.eye(size)
    weights[f"blocks.{layer}.W_O"][head, :size, end] = sign * torch.eye(size)


def _select(rows: slice, offset: int = 0) -> Float[Tensor, "d_model d_head"]:
    """Reads direction i of a block into place i + offset."""
    matrix = torch.zeros(_WIDTH, _HEAD)
    for i in range(rows.stop - rows.start):
        if 0 <= i + offset < _HEAD:
            matrix[rows.start + i, i + offset] = 1
    return matrix


def _constant() -> Float[Tensor, "d_model d_head"]:
    matrix = torch.zeros(_WIDTH, _HEAD)
    matrix[_ONE, 0] = 1
    return matrix


def _previous(weights: Weights) -> None:
    _attend(weights, 0, 0, _select(_POS), _select(_POS, 1))
    _copy(weights, 0, 0, _TOK, _OUT)


def _induction(weights: Weights) -> None:
    _attend(weights, 0, 1, _select(_POS), _select(_POS, 1))
    _copy(weights, 0, 1, _TOK, _AUX)
    _attend(weights, 1, 0, _select(_TOK), _select(_AUX))
    _copy(weights, 1, 0, _TOK, _OUT)


def _conjunction(weights: Weights) -> None:
    first = torch.zeros(_WIDTH, _HEAD)
    first[_POS.start, 0] = 1
    _attend(weights, 0, 1, _constant(), first)
    _copy(weights, 0, 1, _TOK, _AUX)
    weights["blocks.0.W_in"][[_AUX.start, _TOK.start + 1, _ONE], 0] = torch.tensor([1.0, 1.0, -1.0])
    weights["blocks.0.W_out"][0, _OUT.start] = 1


def _opposed(weights: Weights) -> None:
    for head, sign in ((0, 1.0), (1, -1.0)):
        _attend(weights, 0, head, _select(_POS), _select(_POS, head))
        _copy(weights, 0, head, _TOK, _OUT, sign)


def _edges(*names: str) -> frozenset[Edge]:
    return frozenset(Edge(*name.split(">")) for name in names)


def _program(
    name: str,
    what: str,
    layers: int,
    build: Callable[[Weights], None],
    content: frozenset[Edge],
    fixed: frozenset[Edge],
) -> Handmade:
    """Positions are the same in every prompt: edges that carry them matter to zero ablation alone."""
    return Handmade(name, what, layers, 2, build, content, content | fixed)


PROGRAMS: tuple[Handmade, ...] = (
    _program(
        "previous",
        "the token before",
        1,
        _previous,
        _edges("embed>a0.h0.v", "a0.h0>logits"),
        _edges("pos>a0.h0.q", "pos>a0.h0.k"),
    ),
    _program(
        "induction",
        "what followed this token last time",
        2,
        _induction,
        _edges("embed>a0.h1.v", "a0.h1>a1.h0.k", "embed>a1.h0.q", "embed>a1.h0.v", "a1.h0>logits"),
        _edges("pos>a0.h1.q", "pos>a0.h1.k"),
    ),
    _program(
        "conjunction",
        "whether the first token is 0 and this one 1",
        1,
        _conjunction,
        _edges("embed>a0.h1.v", "a0.h1>m0", "embed>m0", "m0>logits"),
        _edges("pos>a0.h1.q", "pos>a0.h1.k", "pos>m0"),
    ),
    _program(
        "opposed",
        "this token, less the one before",
        1,
        _opposed,
        _edges("embed>a0.h0.v", "a0.h0>logits", "embed>a0.h1.v", "a0.h1>logits"),
        _edges("pos>a0.h0.q", "pos>a0.h0.k", "pos>a0.h1.q", "pos>a0.h1.k"),
    ),
)
"""Every hand-made program."""


Damage = Literal["one edge missing", "one idle edge", "random"]
DAMAGE: tuple[Damage, ...] = ("one edge missing", "one idle edge", "random")
NONE = 1e-6
"""A change of the logits that is none."""


def own_circuit(program: CompiledProgram, ablation: Ablation) -> frozenset[Edge]:
    """The program's edges, but for those so weak that either answer is right."""
    return program.truth(ablation) - program.borderline(ablation)


def damaged(program: CompiledProgram, ablation: Ablation, how: Damage, seed: int = 0) -> frozenset[Edge]:
    """Another circuit than the program's: without one of its edges, drawn at random; with one that changes nothing,
    drawn from those that lie on a path with it, if any do; or as many edges drawn from all.
    """
    graph, circuit = Network.of(program.model).graph, own_circuit(program, ablation)
    draw = torch.Generator().manual_seed(seed)
    if how == "one edge missing":
        return circuit - set(_drawn(sorted(circuit), 1, draw))
    if how == "one idle edge":
        idle = sorted(set(graph.edges) - program.truth(ablation))
        return circuit | set(_drawn(_joined(graph, circuit, idle) or idle, 1, draw))
    found = circuit
    while found == circuit:
        found = frozenset(_drawn(sorted(graph.edges), len(circuit), draw))
    return found


def _joined(graph: ComponentGraph, circuit: frozenset[Edge], edges: Collection[Edge]) -> list[Edge]:
    """The edges that, with the circuit's, lie on a path to the logits."""
    return [edge for edge in edges if edge in graph.connected(circuit | {edge})]


def _drawn(edges: list[Edge], count: int, draw: torch.Generator) -> list[Edge]:
    return [edges[i] for i in torch.randperm(len(edges), generator=draw)[:count].tolist()]


def without_learning(program: CompiledProgram, seed: int = 0) -> CompiledProgram:
    """The same program's pairs in a model whose weights are drawn anew."""
    return replace(program, model=untrained(program.model, seed))


def planted_subject(
    program: CompiledProgram, ablation: Ablation, circuit: Collection[Edge] | None = None
) -> HeadSubject:
    """A circuit of a program, its own unless given, judged by how far the logits are from the model's (`distance`).

    Only prompts on which ablating every edge changes the logits are taken: on others there is nothing to explain.
    """
    edges = own_circuit(program, ablation) if circuit is None else circuit
    given = [problem.take(rows) for problem in program.problems(ablation, distance) if len(rows := _telling(problem))]
    return HeadSubject(GivenSource(program.name, program.model, given), edges, usual=Choice(ablation))


def _telling(problem: PatchingProblem) -> Int[Tensor, "_"]:
    (change,) = run_keeping(problem, [[]])
    return torch.nonzero(change > NONE)[:, 0]
