"""Reading the targets of a graph in many altered runs at once."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.attribution.nodes import logit_targets
from circuitsae.attribution.targets import node_vectors
from circuitsae.graph import AttributionGraph, Node, NodeKind
from circuitsae.interventions import Recording, Regime, RegimeName, run_reads
from circuitsae.interventions.forward import Alternative, regime_named
from circuitsae.interventions.intervene import ReadChunk
from circuitsae.interventions.mixed import run_mixed
from circuitsae.interventions.writers import Shares
from circuitsae.replacement import ReplacementModel, Trace
from circuitsae.validation.kept import Kept
from transcoders.errors import InputError


def traced(model: ReplacementModel, graph: AttributionGraph) -> Trace:
    """The trace of a graph's prompt. Raises `InputError` where the graph was made with another model."""
    made_with = graph.provenance.get("fingerprint")
    if made_with is not None and made_with != model.model.fingerprint():
        raise InputError(
            f"The graph was made with {graph.provenance.get('model')} ({made_with}), not with {model.model.name} "
            f"({model.model.fingerprint()}); validate it with the model it was made with."
        )
    return model.trace(torch.tensor(graph.token_ids))


def reading_like(model: ReplacementModel, graph: AttributionGraph) -> ReplacementModel:
    """The model with texts read as the graph's prompt is: with BOS first or without."""
    first, bos = graph.token_ids[0] if graph.token_ids else -1, model.model.bos
    return model if bos is None or first < 0 else model.with_bos(first == bos)


def require_active(trace: Trace, nodes: Sequence[Node]) -> None:
    """Raises `InputError` for features of a graph that the dictionaries do not find on its prompt."""
    active = {tuple(index) for index in trace.features.index.tolist()}
    features = [node for node in nodes if node.kind is NodeKind.FEATURE]
    if missing := [node.id for node in features if (node.layer, node.pos, node.index) not in active]:
        raise InputError(f"Features {missing[:3]} of the graph are not active in these dictionaries; load its own.")


def ablatable(graph: AttributionGraph) -> list[NodeKind]:
    """Kinds of nodes that can be removed: an error node that absorbed features is more than the error vector."""
    kinds = [NodeKind.FEATURE, NodeKind.TOKEN]
    if graph.provenance.get("settings", {}).get("max_features") is None:
        kinds.append(NodeKind.ERROR)
    return kinds


def node_row(graph: AttributionGraph, name: str) -> int:
    """The row of a node id. Raises `InputError` where the graph has it not."""
    if name not in graph.position:
        raise InputError(
            f"The graph has no node {name!r}; its nodes are in graph.nodes_frame(), such as {graph.ids[0]}."
        )
    return graph.position[name]


def values_of(prompts: Iterable[Recording]) -> Mapping[tuple[int, int], list[float]]:
    """All values that each feature (layer, number) takes on some prompts."""
    values: dict[tuple[int, int], list[float]] = defaultdict(list)
    for prompt in prompts:
        index, value = prompt.trace.features
        for (layer, _, feature), own in zip(index.tolist(), value.tolist(), strict=True):
            values[layer, feature].append(own)
    return values


def edge_kind(source: Node, target: Node) -> str:
    """The class of an edge: `feature→logit`."""
    return f"{source.kind}→{target.kind}"


class Targets:
    """What some features and logits (contrasts, directions) read, as vectors to multiply with the stream.

    A target's value is its pre-activation without b_enc; a logit's its centred logit without b_U.
    """

    def __init__(self, model: ReplacementModel, trace: Trace, nodes: Sequence[Node]) -> None:
        n_layers, last = model.model.n_layers, trace.n_positions - 1
        layer = [n_layers if _is_token(node) else node.layer for node in nodes]
        pos = [last if node.kind is NodeKind.LOGIT else node.pos for node in nodes]
        order = np.argsort(layer, kind="stable")
        vectors = self._vectors_of(model, trace, [nodes[i] for i in order.tolist()])
        self._by_place(np.array([layer, pos], dtype=np.int64).T, order, vectors, (n_layers, trace.n_positions))
        self.clean = self.read(trace.frozen.reads.by_layer[None], trace.frozen.reads.final[None])[0]

    @staticmethod
    def _vectors_of(model: ReplacementModel, trace: Trace, nodes: Sequence[Node]) -> Float[Tensor, "target d_model"]:
        """Of nodes by layer: encoder directions of features, unembedding directions of logits."""
        device = trace.errors.device
        parts = [trace.errors.new_zeros(0, trace.errors.shape[-1])]
        for _, group in groupby(nodes, key=lambda node: (node.kind, _is_token(node), node.layer)):
            here = list(group)
            number = torch.tensor([node.index for node in here], device=device)
            if _is_token(here[0]):
                parts.append(logit_targets(trace, number).vector)
            elif here[0].kind is NodeKind.LOGIT:
                parts += [node_vectors(model, trace, node).vector for node in here]
            else:
                parts.append(model.dictionaries.encoder_rows(here[0].layer, number).detach())
        return torch.cat(parts)

    def _by_place(
        self,
        place: Int[np.ndarray, "target 2"],
        order: Int[np.ndarray, "target"],
        vectors: Float[Tensor, "target d_model"],
        sizes: tuple[int, int],
    ) -> None:
        """The vectors (in an order of targets) of each place (layer, position) side by side, filled up with zeros."""
        places, group, count = np.unique(place, axis=0, return_inverse=True, return_counts=True)
        group, most = group.reshape(-1), int(count.max(initial=0))
        by_place = np.argsort(group, kind="stable")
        turn = np.empty(len(group), dtype=np.int64)
        turn[by_place] = np.arange(len(group)) - np.repeat(np.cumsum(count) - count, count)
        slot = group * most + turn
        below = places[:, 0] < sizes[0]  # these come first, as places are sorted
        inside, at_end = places[below] @ np.array([sizes[1], 1]), places[~below][:, 1].copy()
        self._slot, self._inside, self._at_end, at = (
            torch.from_numpy(x.astype(np.int64)).to(vectors.device) for x in (slot, inside, at_end, slot[order])
        )
        filled = vectors.new_zeros(len(places) * most, vectors.shape[1])
        self._vectors = filled.index_copy_(0, at, vectors).unflatten(0, (len(places), most))

    @property
    def identity(self) -> list[Tensor]:
        """What is read, and where."""
        return [self._vectors, self._inside, self._at_end, self._slot]

    @torch.no_grad()
    def read(
        self, by_layer: Float[Tensor, "batch layer pos d_model"], final: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch target"]:
        """The value of every target in every run: the same few operations for any number of targets."""
        parts = by_layer.flatten(1, 2).index_select(1, self._inside), final.index_select(1, self._at_end)
        values = torch.einsum("bpd,pmd->bpm", torch.cat(parts, dim=1), self._vectors)
        return values.flatten(1).index_select(1, self._slot)


def _is_token(node: Node) -> bool:
    """Whether it is the logit of one token."""
    return node.kind is NodeKind.LOGIT and not node.explained


@torch.no_grad()
def effects(
    model: ReplacementModel,
    prompt: Recording,
    alternatives: Sequence[Alternative] | Shares,
    targets: Targets,
    regime: RegimeName | Regime,
    memory: int | None = None,
    advance: Callable[[int], Any] = lambda _: None,
) -> Float[np.ndarray, "alternative target"]:
    """Value after − value before of every target under every alternative, as many alternatives a pass as fit.

    With norm scales held, activations can square from layer to layer: what is not finite stays so.
    """
    found = run_reads(model, prompt, alternatives, regime, memory=memory)
    return _moved(found, len(alternatives), targets, advance)


Asked = tuple[Shares, RegimeName | Regime]
"""Alternatives, and the regime that they are run in."""


@torch.no_grad()
def effects_in(
    model: ReplacementModel,
    prompt: Recording,
    asked: Sequence[Asked],
    targets: Targets,
    memory: int | None = None,
    *,
    together: bool | None = None,
    kept: Kept | None = None,
    begin: Callable[[int], Any] = lambda _: None,
    advance: Callable[[int], Any] = lambda _: None,
) -> list[Float[np.ndarray, "alternative target"]]:
    """`effects` of several lists of alternatives of the same writers, each in its regime.

    `together`: rows of all regimes share passes, as they do by default anywhere but on a CPU. `kept`: where effects are
    kept as soon as a list (or all of them together) is done, and taken from. `begin` is called with the number of runs
    to make, `advance` with the number made.
    """
    together = model.model.device.type != "cpu" if together is None else together
    groups = [list(asked)] if together else [[one] for one in asked]
    counts = [sum(len(shares) for shares, _ in group) for group in groups]
    keys, known = [""] * len(groups), [None] * len(groups)
    if kept is not None:
        keys = list(map(kept.of(prompt, asked[0][0].writers, targets.identity, memory), groups))
        known = [kept.get(key, (count, len(targets.clean))) for key, count in zip(keys, counts, strict=True)]
    begin(sum(count for count, effect in zip(counts, known, strict=True) if effect is None))
    found: list[Float[np.ndarray, "alternative target"]] = []
    for group, key, effect in zip(groups, keys, known, strict=True):
        if effect is None:
            shares = Shares.join([one for one, _ in group])
            if together:
                regimes = [regime_named(regime) for one, regime in group for _ in range(len(one))]
                chunks = run_mixed(model, prompt, shares, regimes, memory=memory)
                effect = _moved(chunks, len(shares), targets, advance)
            else:
                effect = effects(model, prompt, shares, targets, group[0][1], memory, advance)
            if kept is not None:
                kept.put(key, effect)
        found += np.split(effect, np.cumsum([len(one) for one, _ in group])[:-1])
    return found


def _moved(
    chunks: Iterable[ReadChunk], count: int, targets: Targets, advance: Callable[[int], Any] = lambda _: None
) -> Float[np.ndarray, "alternative target"]:
    """What targets read beyond their clean values, by alternative; copied to the host once, after all passes."""
    rows, values = [], []
    for chunk in chunks:
        values.append(targets.read(chunk.by_layer, chunk.final) - targets.clean)
        rows += chunk.rows
        advance(len(chunk.rows))
        del chunk  # its reads go before the next pass comes
    moved = np.zeros((count, len(targets.clean)))
    if rows:
        moved[rows] = torch.cat(values).cpu().double().numpy()
    return moved
