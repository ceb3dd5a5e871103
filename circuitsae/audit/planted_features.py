"""Small models with exact dictionaries in which the features that a value depends on are planted.

Neurons of layer 0 are always on and write a wire each; a head of layer 1 spreads the first eight evenly over all later
positions. The logits read some wires, and some of the spread ones, with planted weights, all others with noise. The
dictionaries' features are the neurons, so that nothing is missed, and a circuit's nodes follow from the wiring.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.interventions import Feature, target_id
from circuitsae.replacement import ReplacementModel
from circuitsae.validation.circuits import CircuitNode
from circuitsae.validation.tasks import PromptExample, PromptTask
from transcoders.bridge import native_bridge
from transcoders.dictionaries import TranscoderSet
from transcoders.dictionaries.activations import ReLU
from transcoders.dictionaries.provenance import DictionaryProvenance
from transcoders.dictionaries.sparse_dictionary import Transcoder
from transcoders.language_model import LanguageModel
from transcoders.sites import Site

NEURONS, SPREAD, VOCABULARY, LENGTH = 40, 8, 8, 6
HERE, BEFORE = 6, 2
"""Features planted at the last position, and among the spread ones at every position."""
_TOKENS, _WIRES, _MOVED = slice(0, 8), slice(8, 48), slice(48, 56)
_WIDTH = 56
ON, FIRST = 2.0, 0
"""What keeps a neuron on, which tokens move by at most 1; the token that all prompts begin with, and no neuron sees."""


@dataclass(frozen=True)
class PlantedFeatures:
    """A model, prompts with the value of each, and the nodes that make it."""

    model: ReplacementModel
    task: PromptTask
    nodes: frozenset[CircuitNode]

    @property
    def ids(self) -> frozenset[str]:
        return frozenset(map(target_id, self.nodes))


def planted_features(*, prompts: int, seed: int = 0, noise: float = 0.0) -> PlantedFeatures:
    """The value is the difference of two logits at the last position; every planted weight lies in ½ to 1, of ±noise
    the others. A spread wire counts as often as there are positions, so that each of its features does as much as one
    that is read where it is written. Prompts begin with a token that turns every neuron off, for features are not
    cut out at position 0.
    """
    draw = torch.Generator().manual_seed(seed)
    last, order = LENGTH - 1, torch.randperm(NEURONS, generator=draw).tolist()
    spread = [i for i in order if i < SPREAD][:BEFORE]
    here = [i for i in order if i >= SPREAD][:HERE]
    reads = noise * torch.randn(_WIDTH, VOCABULARY, generator=draw, dtype=torch.float64)
    reads[_TOKENS] = 0
    for rows, scale in (([_WIRES.start + i for i in here], 1), ([_MOVED.start + i for i in spread], LENGTH)):
        weight = scale * (0.5 + 0.5 * torch.rand(len(rows), generator=draw, dtype=torch.float64))
        reads[rows, 0], reads[rows, 1] = weight / 2, -weight / 2
    weights = _weights(reads, 2 * torch.rand(VOCABULARY, NEURONS, generator=draw, dtype=torch.float64) - 1)
    bridge = native_bridge(
        weights, n_layers=2, n_heads=1, d_model=_WIDTH, d_head=SPREAD, d_mlp=NEURONS, n_ctx=LENGTH, d_vocab=VOCABULARY,
        d_out=VOCABULARY, causal=True, dtype=torch.float64,
    )  # fmt: skip
    model = ReplacementModel(LanguageModel(bridge, "handmade-features"), neurons(weights, 2, "handmade-features"))
    tokens = torch.randint(FIRST + 1, VOCABULARY, (prompts, LENGTH), generator=draw)
    tokens[:, 0] = FIRST
    task = PromptTask([PromptExample(row, _difference) for row in tokens], "planted")
    nodes = [Feature(0, i, last) for i in here] + [Feature(0, i, at) for i in spread for at in range(1, LENGTH)]
    return PlantedFeatures(model, task, frozenset(nodes))


def neurons(weights: Mapping[str, Tensor], layers: int, name: str) -> TranscoderSet:
    """Transcoders whose features are the MLPs' own neurons."""
    blocks = [{key: weights[f"blocks.{layer}.{key}"] for key in ("W_in", "b_in", "W_out")} for layer in range(layers)]
    transcoders = [
        Transcoder(
            W_enc=block["W_in"], b_enc=block["b_in"], W_dec=block["W_out"],
            b_dec=torch.zeros(block["W_out"].shape[1], dtype=torch.float64), activation=ReLU(),
            read=Site(layer, "mlp_in"), write=Site(layer, "mlp_out"),
        )
        for layer, block in enumerate(blocks)
    ]  # fmt: skip
    return TranscoderSet(transcoders, DictionaryProvenance(model=name))


def _difference(logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch"]:
    return logits[..., 0] - logits[..., 1]


def _weights(reads: Tensor, of_tokens: Tensor) -> dict[str, Tensor]:
    shapes = {"W_E": (VOCABULARY, _WIDTH), "W_pos": (LENGTH, _WIDTH)}
    for layer in range(2):
        here = f"blocks.{layer}."
        shapes |= {f"{here}W_{kind}": (1, _WIDTH, SPREAD) for kind in "QKV"}
        shapes |= {f"{here}W_O": (1, SPREAD, _WIDTH), f"{here}b_in": (NEURONS,)}
        shapes |= {f"{here}W_in": (_WIDTH, NEURONS), f"{here}W_out": (NEURONS, _WIDTH)}
    weights = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    weights["W_U"] = reads
    weights["W_E"][:, _TOKENS] = torch.eye(VOCABULARY, dtype=torch.float64)
    weights["blocks.0.W_in"][_TOKENS] = of_tokens
    weights["blocks.0.W_in"][_TOKENS.start + FIRST] = -2 * ON
    weights["blocks.0.b_in"][:] = ON
    weights["blocks.0.W_out"][:, _WIRES] = torch.eye(NEURONS, dtype=torch.float64)
    weights["blocks.1.W_V"][0, _WIRES.start : _WIRES.start + SPREAD] = torch.eye(SPREAD, dtype=torch.float64)
    weights["blocks.1.W_O"][0, :, _MOVED] = torch.eye(SPREAD, dtype=torch.float64)
    return weights
