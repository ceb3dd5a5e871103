"""What an edge's source is held against: other writers at its place whose own edge into the target is negligible."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from circuitsae.graph import Node, NodeKind
from circuitsae.interventions import Contribution
from circuitsae.interventions.changes import node_changes
from circuitsae.interventions.prompts import EMBED
from circuitsae.replacement import ReplacementModel, Trace

AT_FIRST = 40
"""Tokens removed at the first position."""
REACHING = 40
"""Features to hold a target against, where the prompt has so many that could reach it; below 19 none is confirmed."""


@dataclass(frozen=True)
class Controls:
    """Writers to remove, one at a time.

    For features and error nodes they are the other features active at these nodes' positions; for tokens, embeddings of
    other tokens of the vocabulary. Which of them have no edge to speak of into a target is decided target by target.
    """

    contributions: list[Contribution]
    layer: np.ndarray
    pos: np.ndarray
    index: np.ndarray
    """Of a feature its number; −1 of a token, which is never the source's own."""
    is_token: np.ndarray


def draw_controls(
    model: ReplacementModel, trace: Trace, sources: Sequence[Node], targets: Sequence[Node], count: int, seed: int
) -> Controls:
    """At most `count` features and `count` tokens, spread evenly over layers and the sources' positions.

    More features where these leave a target, in an early layer or at an early position, too few that could reach it.
    """
    rng = np.random.default_rng(seed)
    features = _features(trace, sorted({n.pos for n in sources if n.kind is not NodeKind.TOKEN}), count, rng)
    if features:
        features += _for_early_targets(trace, targets, features, min(REACHING, count), rng)
    at = sorted({n.pos for n in sources if n.kind is NodeKind.TOKEN})
    tokens = _tokens(model, trace, at, count, rng) if at and count else []
    nodes = [Node(NodeKind.FEATURE, layer, pos, index) for layer, pos, index in features]
    return Controls(
        contributions=[*node_changes(model, trace, nodes), *tokens],
        layer=np.array([node.layer for node in nodes] + [-1] * len(tokens), dtype=int),
        pos=np.array([node.pos for node in nodes] + [token.pos for token in tokens], dtype=int),
        index=np.array([node.index for node in nodes] + [-1] * len(tokens), dtype=int),
        is_token=np.arange(len(nodes) + len(tokens)) >= len(nodes),
    )


def _features(trace: Trace, positions: list[int], count: int, rng: np.random.Generator) -> list[list[int]]:
    """Active features (layer, position, feature), a round over all layers and positions after the other."""
    index = trace.features.index.cpu().numpy()
    here = index[np.isin(index[:, 1], positions)]
    here = here[rng.permutation(len(here))]
    _, cell = np.unique(here[:, :2], axis=0, return_inverse=True)
    turn = np.zeros(len(here), dtype=int)
    for number in range(cell.max(initial=-1) + 1):
        turn[cell == number] = np.arange((cell == number).sum())
    return here[np.argsort(turn, kind="stable")[:count]].tolist()


def _for_early_targets(
    trace: Trace, targets: Sequence[Node], drawn: list[list[int]], wanted: int, rng: np.random.Generator
) -> list[list[int]]:
    """Features (layer, position, feature), for targets with fewer than are `wanted` below them among those drawn."""
    index = trace.features.index.cpu().numpy()
    index = index[rng.permutation(len(index))]
    taken, added = np.array(drawn), []
    for layer, pos in sorted({(node.layer, node.pos) for node in targets}):
        there = taken[(taken[:, 0] < layer) & (taken[:, 1] <= pos)].tolist()
        below = index[(index[:, 0] < layer) & (index[:, 1] <= pos)]
        more = [row for row in below.tolist() if row not in there][: max(0, wanted - len(there))]
        taken, added = np.concatenate([taken, np.reshape(more, (-1, 3)).astype(int)]), added + more
    return added


@torch.no_grad()
def _tokens(
    model: ReplacementModel, trace: Trace, positions: list[int], count: int, rng: np.random.Generator
) -> list[Contribution]:
    """Embeddings of tokens that the prompt has not, as many at each position, but more at the first.

    Targets just after it can be held against nothing else. A small vocabulary is gone through again.
    """
    others = np.setdiff1d(np.arange(model.model.d_vocab), trace.tokens.cpu().numpy())
    if not len(others):
        return []
    drawn = torch.from_numpy(rng.permutation(others)[:count]).to(trace.tokens)
    _, cache = model.model.run_hooked(drawn[:, None], read=[EMBED])
    n_drawn, at_first = len(drawn), min(AT_FIRST, count)
    places = [positions[0]] * at_first + [positions[i % len(positions)] for i in range(count - at_first)]
    turns = [(i + i // n_drawn) % n_drawn for i in range(count)]
    pairs = dict.fromkeys(zip(places, turns, strict=True))
    return [Contribution(pos, (-1,), cache[EMBED][turn]) for pos, turn in pairs]
