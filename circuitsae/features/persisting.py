"""A graph's prompt traced with other dictionaries, and what of the graph is found again there."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from circuitsae.attribution import Contrast, LogitTargets, attribute
from circuitsae.graph import AttributionGraph, NodeKind, Other, persistence_in
from circuitsae.replacement import ReplacementModel
from transcoders.dictionaries import DictionarySet
from transcoders.errors import InputError
from transcoders.evaluation import coactivations, counterparts


def persist(
    graph: AttributionGraph,
    model: ReplacementModel,
    others: Mapping[str, DictionarySet],
    rows: Int[Tensor, "row pos"] | None = None,
) -> AttributionGraph:
    """The graph with its `persistence` in graphs of the same prompt by other dictionaries, given by name.

    `model`: with the dictionaries that the graph was traced with. `rows`: tokens on which features are matched by what
    they do together (`counterparts`); without, decoders decide alone. Each matching costs the cube of the number of
    features, and the memory of its square.

    Raises `InputError` for a graph that explains neither logits nor a contrast of them, and `DictionaryError` for
    others of another kind or other sites.
    """
    return replace(graph, persistence=persistence_in(graph, other_graphs(graph, model, others, rows)))


def other_graphs(
    graph: AttributionGraph,
    model: ReplacementModel,
    others: Mapping[str, DictionarySet],
    rows: Int[Tensor, "row pos"] | None = None,
) -> list[Other]:
    """What `persistence_in` and `persistence_of_units` look in: full graphs, and which features stand for which."""
    targets = _same_targets(graph)
    prompt = torch.tensor(graph.token_ids, device=model.model.device)
    found = []
    for name, dictionaries in others.items():
        together = None if rows is None else coactivations(model.model, model.dictionaries, dictionaries, rows)
        groups = counterparts(model.dictionaries, dictionaries, together)
        traced = ReplacementModel(model.model, dictionaries)
        there = attribute(traced, prompt, targets=targets, response=graph.response, errors=graph.errors)
        found.append(Other(name, there, groups))
    return found


def _same_targets(graph: AttributionGraph) -> LogitTargets | Contrast:
    """What other dictionaries can explain as well: tokens, or a contrast of tokens."""
    explained = graph.top_logits()
    if explained and all(node.kind is NodeKind.LOGIT and not node.explained for node in explained):
        return LogitTargets([node.index for node in explained])
    if len(explained) == 1 and (terms := explained[0].terms):
        return Contrast(
            [term.token for term in terms if term.weight > 0], [term.token for term in terms if term.weight < 0]
        )
    raise InputError(
        f"The graph explains {', '.join(node.id for node in explained) or 'nothing'}, which other dictionaries cannot; "
        "give a graph of logits or of a contrast of logits."
    )
