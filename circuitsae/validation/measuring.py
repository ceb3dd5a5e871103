"""Reading the targets of a graph in many altered runs at once."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.attribution.nodes import TargetVectors, feature_targets, logit_targets
from circuitsae.graph import AttributionGraph, Node, NodeKind
from circuitsae.interventions import Recording, Regime, RegimeName, run_reads
from circuitsae.interventions.forward import MEMORY, Alternative
from circuitsae.replacement import ReplacementModel, Trace
from transcoders.dictionaries import SparseFeatures
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
    """What some features and logits read, as vectors to multiply with the stream.

    A target's value is its pre-activation without b_enc; a logit's its centred logit without b_U.
    """

    def __init__(self, model: ReplacementModel, trace: Trace, nodes: Sequence[Node]) -> None:
        kinds = np.array([node.kind is NodeKind.LOGIT for node in nodes], dtype=bool)
        features, logits = self._features(model, trace, nodes, ~kinds), self._logits(trace, nodes, kinds)
        self.order = torch.from_numpy(np.argsort(np.concatenate([np.flatnonzero(~kinds), np.flatnonzero(kinds)])))
        self.vectors = TargetVectors.join(features, logits)
        place = torch.stack([self.vectors.layer, self.vectors.pos], dim=1)
        self._places, self._place_of = place.unique(dim=0, return_inverse=True)
        self.clean = self.read(trace.frozen.reads.by_layer[None], trace.frozen.reads.final[None])[0]

    @staticmethod
    def _features(model: ReplacementModel, trace: Trace, nodes: Sequence[Node], which: np.ndarray) -> TargetVectors:
        rows = [(nodes[i].layer, nodes[i].pos, nodes[i].index) for i in np.flatnonzero(which).tolist()]
        index = torch.tensor(rows, dtype=torch.long, device=trace.features.index.device).reshape(-1, 3)
        alone = replace(trace, features=SparseFeatures(index, trace.features.value.new_zeros(len(index))))
        return feature_targets(model, alone, torch.arange(len(index), device=index.device))

    @staticmethod
    def _logits(trace: Trace, nodes: Sequence[Node], which: np.ndarray) -> TargetVectors:
        tokens = [nodes[i].index for i in np.flatnonzero(which).tolist()]
        return logit_targets(trace, torch.tensor(tokens, dtype=torch.long, device=trace.logits.device))

    @torch.no_grad()
    def read(
        self, by_layer: Float[Tensor, "batch layer pos d_model"], final: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch target"]:
        """The value of every target in every run; one matrix product for each place that is read."""
        values = by_layer.new_empty(len(by_layer), len(self.vectors.layer))
        for number, (layer, pos) in enumerate(self._places.tolist()):
            here = self._place_of == number
            read = final[:, pos] if layer == by_layer.shape[1] else by_layer[:, layer, pos]
            values[:, here] = read @ self.vectors.vector[here].T
        return values[:, self.order.to(values.device)]


@torch.no_grad()
def effects(
    model: ReplacementModel,
    prompt: Recording,
    alternatives: Sequence[Alternative],
    targets: Targets,
    regime: RegimeName | Regime,
    memory: int = MEMORY,
) -> Float[np.ndarray, "alternative target"]:
    """Value after − value before of every target under every alternative, as many alternatives a pass as fit.

    With norm scales held, activations can square from layer to layer: what is not finite stays so.
    """
    moved = np.zeros((len(alternatives), len(targets.clean)))
    for chunk in run_reads(model, prompt, alternatives, regime, memory=memory):
        moved[chunk.rows] = (targets.read(chunk.by_layer, chunk.final) - targets.clean).double().cpu().numpy()
    return moved
