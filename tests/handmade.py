"""A small transformer with exact dictionaries, whose weights are written by hand so that every edge is known.

Programs whose edges between heads and MLPs are known are the package's own: `circuitsae.audit.planted`.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.audit.planted import LENGTH
from circuitsae.audit.planted_features import neurons
from circuitsae.graph import Node, NodeKind
from circuitsae.graph.notes import Claim
from circuitsae.interventions import Recording
from circuitsae.replacement import ReplacementModel, Trace
from circuitsae.validation.claims import Pairs, Settings, judge
from transcoders.bridge import native_bridge
from transcoders.language_model import LanguageModel

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
    model = ReplacementModel(LanguageModel(bridge, "handmade-wired"), neurons(weights, 2, "handmade-wired"))
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
