"""Circuits that nobody would have to search for: what writes most, what speaks to the logits, what comes last."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from circuitsae.components import ComponentGraph, Edge, PatchingProblem, direct_logit_attribution, edges_of_nodes
from circuitsae.components.problem import BATCH_TOKENS, parts_of
from circuitsae.interventions import Error, Feature
from circuitsae.validation.ablation import Ablated
from circuitsae.validation.circuits import CircuitNode
from circuitsae.validation.tasks import Cases

WRITES, LOGITS, LAST = "largest writes", "direct logit attribution", "last layers"


def naive_edges(graph: ComponentGraph, problems: Sequence[PatchingProblem], size: int) -> dict[str, frozenset[Edge]]:
    """About `size` edges each: all edges between the best components, by three orders of them.

    They are ordered by the mean size of what an ablation changes in what they write, ‖Δ_u‖, by |direct logit
    attribution|, and by layer.
    """
    parts = list(parts_of(problems, BATCH_TOKENS))
    writes = torch.cat([part.delta.norm(dim=-1).mean(-1) for part in parts], 1).mean(1)
    direct = direct_logit_attribution(parts).mean.abs()
    components = [name for name in graph.writers if name[0] in "am"]
    place = graph.writer_index
    orders = {
        WRITES: sorted(components, key=lambda name: -float(writes[place[name]])),
        LOGITS: sorted(components, key=lambda name: -float(direct[place[name]])),
        LAST: components[::-1],
    }
    return {name: _among_best(graph, order, size) for name, order in orders.items()}


def _among_best(graph: ComponentGraph, order: Sequence[str], size: int) -> frozenset[Edge]:
    """The edges between so many of the first components that their number comes closest to `size`."""
    best: frozenset[Edge] = frozenset()
    for count in range(1, len(order) + 1):
        edges = edges_of_nodes(graph, order[:count])
        if best and abs(len(edges) - size) >= abs(len(best) - size):
            break
        best = edges
    return graph.connected(best)


def naive_nodes(cases: Cases, pool: Sequence[CircuitNode], size: int) -> dict[str, frozenset[CircuitNode]]:
    """`size` nodes each: those that write most, mean ‖v W_dec‖ or ‖e‖ over prompts, and those of the last layers."""
    wrote = dict.fromkeys(pool, 0.0)
    for number, recording in enumerate(cases.recordings):
        rows = zip(recording.trace.features.index.tolist(), recording.trace.features.value.tolist(), strict=True)
        active = {tuple(row): value for row, value in rows}
        errors = recording.trace.errors.norm(dim=-1)
        for node in pool:
            for pos in Ablated.positions_of(cases.recordings[number], node):
                if isinstance(node, Error):
                    wrote[node] += float(errors[node.layer, pos])
                else:
                    wrote[node] += active.get((node.layer, pos, node.index), 0.0)
    width = _decoder_norms(cases, [node for node in pool if isinstance(node, Feature)])
    wrote = {node: value * width.get(node, 1.0) for node, value in wrote.items()}
    largest = sorted(pool, key=lambda node: -wrote[node])
    last = sorted(pool, key=lambda node: (-node.layer, -wrote[node]))
    return {WRITES: frozenset(largest[:size]), LAST: frozenset(last[:size])}


def _decoder_norms(cases: Cases, features: Sequence[Feature]) -> Mapping[CircuitNode, float]:
    """‖W_dec‖ of features over every layer that they write."""
    dictionaries, found = cases.model.dictionaries, {}
    for layer in {feature.layer for feature in features}:
        own = [feature for feature in features if feature.layer == layer]
        index = torch.tensor([feature.index for feature in own], device=cases.model.model.device)
        rows = [dictionaries.decoder_rows(layer, index, at) for at in dictionaries.write_layers(layer)]
        norms = torch.stack([row.norm(dim=-1) for row in rows]).norm(dim=0).double().numpy(force=True)
        found |= dict(zip(own, np.asarray(norms).tolist(), strict=True))
    return found
