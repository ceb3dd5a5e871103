"""Small transformers whose weights are written by hand, so that every edge that matters is known beforehand.

Directions of the residual stream are named: tokens and positions are one-hot, heads and MLPs copy between them.
Attention is close to hard (a matching key scores `SHARPNESS` above the others), so its gradients vanish where a
corruption would move it: a test for methods that rely on them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.components.known import CompiledProgram
from circuitsae.components.network import Edge, Network
from circuitsae.graph import Node, NodeKind
from circuitsae.graph.notes import Claim
from circuitsae.interventions import Recording
from circuitsae.replacement import ReplacementModel, Trace
from circuitsae.validation.claims import Pairs, Settings, judge
from transcoders.bridge import native_bridge
from transcoders.dictionaries import TranscoderSet
from transcoders.dictionaries.activations import ReLU
from transcoders.dictionaries.provenance import DictionaryProvenance
from transcoders.dictionaries.sparse_dictionary import Transcoder
from transcoders.language_model import LanguageModel
from transcoders.sites import Site

SHARPNESS = 60.0
VOCABULARY, LENGTH = 4, 6
_TOK, _POS = slice(0, 4), slice(4, 10)
_ONE, _AUX, _OUT = 10, slice(11, 15), slice(15, 19)
_WIDTH, _HEAD, _MLP = 19, 6, 2

Weights = dict[str, Float[Tensor, "..."]]


@dataclass(frozen=True)
class Handmade:
    """One program: its weights, and the edges whose ablation changes some logit after position 0, by reasoning."""

    name: str
    what: str
    layers: int
    heads: int
    build: Callable[[Weights], None]
    resample: frozenset[Edge]
    zero: frozenset[Edge]
    lengths: tuple[int, ...] = (3, 4, 6)

    def program(self, *, per_length: int = 24, seed: int = 0) -> CompiledProgram:
        """The transformer (causal, without norms), random pairs of prompts of several lengths, and the truth."""
        bridge = native_bridge(
            self.weights(), n_layers=self.layers, n_heads=self.heads, d_model=_WIDTH, d_head=_HEAD, d_mlp=_MLP,
            n_ctx=LENGTH, d_vocab=VOCABULARY, d_out=VOCABULARY, causal=True, dtype=torch.float64,
        )  # fmt: skip
        model = LanguageModel(bridge, f"handmade-{self.name}")
        generator = torch.Generator().manual_seed(seed)
        pairs = []
        for length in self.lengths:
            drawn = torch.randint(0, VOCABULARY, (per_length, 2, length), generator=generator)
            pairs += [(clean, corrupt) for clean, corrupt in drawn.tolist()]
        truth = {"resample": self.resample, "zero": self.zero}
        effects = {
            edge: {kind: float(edge in edges) for kind, edges in truth.items()}
            for edge in Network.of(model).graph.edges
        }
        return CompiledProgram(self.name, self.what, model, pairs, effects)

    def weights(self) -> Weights:
        """Named as in a compiled program's file."""
        weights = _blank(self.layers, self.heads)
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


NEURONS, READERS = 40, 8
_TOKENS, _WIRES, _MOVED, _READERS = slice(0, 8), slice(8, 48), slice(48, 56), slice(56, 64)


@dataclass(frozen=True)
class Wired:
    """Two layers of neurons that are always on, wired at random: `edges[t, s]` says who reads whom.

    Neurons of layer 0 read the token and write a wire each; a head of layer 1 spreads the first eight wires evenly over
    all later positions; neurons of layer 1 read some wires and some of these, the logits some wires and neurons of
    layer 1. Dictionaries whose features are the neurons reconstruct the MLPs exactly.
    """

    model: ReplacementModel
    same: Float[np.ndarray, "reader neuron"]
    """What each reader, neurons of layer 1 and then logits, reads of each neuron of layer 0 at its own position."""
    before: Float[np.ndarray, "reader neuron"]
    """The same, of the mean over positions up to its own."""
    late: Float[np.ndarray, "logit reader"]
    """What logits read of neurons of layer 1."""

    def truth(self, trace: Trace, claim: Claim) -> tuple[Pairs, Float[np.ndarray, "pair"]]:
        """All neurons of layer 0 against all readers at the last position, and what removing one does, by the wiring.

        Logits are centred.
        """
        last = trace.n_positions - 1
        readers = [Node(NodeKind.FEATURE, 1, last, i) for i in range(READERS)]
        readers += [Node(NodeKind.LOGIT, 2, last, i) for i in range(len(self.late))]
        index = [row for row in trace.features.index.tolist() if row[0] == 0]
        value = [v for (layer, *_), v in zip(*(x.tolist() for x in trace.features), strict=True) if layer == 0]
        reads = np.stack([self.same[:, i] * (pos == last) + self.before[:, i] / (last + 1) for _, pos, i in index])
        if claim == "graph":
            reads[:, READERS:] += reads[:, :READERS] @ self.late.T
        reads[:, READERS:] -= reads[:, READERS:].mean(axis=1, keepdims=True)
        neurons = [Node(NodeKind.FEATURE, layer, pos, i) for layer, pos, i in index]
        pairs = Pairs.of([(neuron, reader) for neuron in neurons for reader in readers])
        return pairs, -(np.array(value)[:, None] * reads).flatten()

    def judged(self, tokens: Tensor, claim: Claim, seed: int = 0) -> pd.DataFrame:
        """Every edge that is there with the effect it has, and for each another neuron without one, given the same.

        `true` says which is which. Effects are small beside what keeps the neurons on, so that δ is small too.
        """
        trace, rng = self.model.trace(tokens), np.random.default_rng(seed)
        pairs, effect = self.truth(trace, claim)
        there = np.flatnonzero(np.abs(effect) > 1e-9)
        free = [np.flatnonzero((np.abs(effect) <= 1e-9) & (pairs.target == pairs.target[i])) for i in there]
        drawn = np.array([rng.choice(numbers) for numbers in free])
        both = np.concatenate([there, drawn])
        chosen = Pairs(pairs.sources, pairs.targets, pairs.source[both], pairs.target[both])
        given: dict[Claim, np.ndarray] = {claim: np.tile(effect[there], 2)}
        settings = Settings(claims=(claim,), delta=1e-3, seed=seed)
        found = judge(self.model, Recording(self.model, trace), chosen, settings, predictions=given)
        return found.assign(true=np.arange(len(both)) < len(there))


def wired(seed: int = 0, density: float = 0.2) -> Wired:
    """Two layers of known wiring, in float64. Weights are drawn from ±[½, 1]; every fifth wire is read."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        size = rng.uniform(0.5, 1, shape) * rng.choice([-1, 1], shape)
        return np.where(rng.uniform(size=shape) < density, size, 0.0)

    width, vocabulary = _READERS.stop, _TOKENS.stop
    same, moved, late = draw(READERS + vocabulary, NEURONS), draw(READERS, 8), draw(vocabulary, READERS)
    weights = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in _shapes(width, vocabulary).items()}
    weights["W_E"][:, _TOKENS] = torch.eye(vocabulary, dtype=torch.float64)
    weights["blocks.0.W_in"][_TOKENS] = torch.from_numpy(rng.uniform(-1, 1, (vocabulary, NEURONS)))
    weights["blocks.0.b_in"][:] = 2
    weights["blocks.0.W_out"][:, _WIRES] = torch.eye(NEURONS, dtype=torch.float64)
    weights["blocks.1.W_V"][0, _WIRES.start : _WIRES.start + 8] = torch.eye(8, dtype=torch.float64)
    weights["blocks.1.W_O"][0, :, _MOVED] = torch.eye(8, dtype=torch.float64)
    weights["blocks.1.W_in"][_WIRES, :READERS] = torch.from_numpy(same[:READERS].T)
    weights["blocks.1.W_in"][_MOVED, :READERS] = torch.from_numpy(moved.T)
    weights["blocks.1.b_in"][:READERS] = 100
    weights["blocks.1.W_out"][:READERS, _READERS] = torch.eye(READERS, dtype=torch.float64)
    weights["W_U"][_WIRES] = torch.from_numpy(same[READERS:].T)
    weights["W_U"][_READERS] = torch.from_numpy(late.T)
    bridge = native_bridge(
        weights, n_layers=2, n_heads=1, d_model=width, d_head=8, d_mlp=NEURONS, n_ctx=LENGTH, d_vocab=vocabulary,
        d_out=vocabulary, causal=True, dtype=torch.float64,
    )  # fmt: skip
    before = np.zeros((READERS + vocabulary, NEURONS))
    before[:READERS, :8] = moved
    model = ReplacementModel(LanguageModel(bridge, "handmade-wired"), _neurons(weights))
    return Wired(model, same, before, late)


def _shapes(width: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "W_E": (vocabulary, width),
        "W_pos": (LENGTH, width),
        "W_U": (width, vocabulary),
    }
    for layer in range(2):
        here = f"blocks.{layer}."
        shapes |= {f"{here}W_{kind}": (1, width, 8) for kind in "QKV"}
        shapes |= {f"{here}W_O": (1, 8, width), f"{here}W_in": (width, NEURONS), f"{here}W_out": (NEURONS, width)}
        shapes[f"{here}b_in"] = (NEURONS,)
    return shapes


def _neurons(weights: Weights) -> TranscoderSet:
    """Transcoders whose features are the MLPs' own neurons."""
    blocks = [{name: weights[f"blocks.{layer}.{name}"] for name in ("W_in", "b_in", "W_out")} for layer in range(2)]
    transcoders = [
        Transcoder(
            W_enc=block["W_in"],
            b_enc=block["b_in"],
            W_dec=block["W_out"],
            b_dec=torch.zeros(block["W_out"].shape[1], dtype=torch.float64),
            activation=ReLU(),
            read=Site(layer, "mlp_in"),
            write=Site(layer, "mlp_out"),
        )
        for layer, block in enumerate(blocks)
    ]
    return TranscoderSet(transcoders, DictionaryProvenance(model="handmade-wired"))
