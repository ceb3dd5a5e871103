"""Edges between nodes by what goes over them to a metric.

    E_s→t = ∂m/∂a_t · ∂a_t/∂a_s · (a_s − a'_s),

with ∂m/∂a_t by all ways from t on and ∂a_t/∂a_s by those that meet no dictionary's site in between, attention and norms
live, both at the clean run. An error node as target has the vectors ∂m/∂y · ∂e/∂a_s in their place; it answers in the
regime `model` alone. What goes to the logits past all sites ends in `metric`. The edges that leave a node, to all nodes
there are, sum up to its effect by `gradient`, but for what a skip term carries.

Source: Marks et al. 2024, "Sparse Feature Circuits" (section 3.2).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import networkx as nx
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.attribution.effects import MEMORY, NodeEffects, Nodes, Runs, measured
from transcoders.edits import Hook, after
from transcoders.errors import InputError
from transcoders.sites import Site

METRIC = "metric"
"""The node that all others lead to."""


@dataclass(frozen=True, eq=False)
class EffectGraph:
    """Nodes with their effects on a metric, and edges with what goes over them."""

    nodes: pd.DataFrame
    """A row per node: `id`, `kind`, `layer`, and what else is known of it."""
    edges: pd.DataFrame
    """`source`, `target` (`metric`: the logits), `effect`, and of many prompts `frequency`; the largest first."""

    def triples(self) -> list[tuple[str, str, float]]:
        """Source, target and effect of each edge."""
        columns = (self.edges[name].tolist() for name in ("source", "target", "effect"))
        return list(zip(*columns, strict=True))

    def to_networkx(self) -> nx.DiGraph:
        """Nodes and edges with their columns as attributes; the weight of an edge is its effect."""
        graph = nx.DiGraph()
        for row in self.nodes.to_dict("records"):
            graph.add_node(row["id"], **{str(name): value for name, value in row.items() if name != "id"})
        graph.add_node(METRIC, kind=METRIC)
        for row in self.edges.to_dict("records"):
            source, target, weight = row.pop("source"), row.pop("target"), row.pop("effect")
            graph.add_edge(source, target, weight=weight, **{str(name): value for name, value in row.items()})
        return graph


def edge_effects(effects: NodeEffects, nodes: int | Collection[str] = 100, *, memory: int = MEMORY) -> EffectGraph:
    """The edges between the nodes of largest effect, or those of some ids, and from these to the metric.

    Edges of 0 are left out. As many targets at once as `memory` holds. Raises `InputError` for less than one node, and
    `DictionaryError` where features cannot be encoded layer by layer (TopK over layers).
    """
    every = effects.frame()
    wanted = range(max(0, nodes)) if isinstance(nodes, int) else np.flatnonzero(every["id"].isin(list(nodes)))
    chosen: pd.DataFrame = every.take([row for row in wanted if row < len(every)]).reset_index(drop=True)
    if len(chosen) == 0:
        raise InputError(f"nodes={nodes!r}: none of the prompt's {len(every)} nodes; give how many, or ids of some.")
    names, rows = chosen["id"].tolist(), []
    direct = _Direct(effects, chosen)
    for targets, gradients in direct.gradients(memory):
        table = torch.zeros(len(targets), len(names), dtype=effects.errors.dtype)
        for source in direct.sources:
            table[:, source.columns] = source.into(gradients).cpu()
        for row, column in table.nonzero().tolist():
            rows.append((names[column], targets[row], float(table[row, column])))
    edges = pd.DataFrame(rows, columns=["source", "target", "effect"])
    return EffectGraph(chosen, edges.sort_values("effect", key=abs, ascending=False, ignore_index=True))


class _Source(NamedTuple):
    """The chosen nodes of a layer."""

    layer: int
    features: Nodes
    errors: list[int]
    """Positions."""
    columns: list[int]
    """Numbers of the features among all that are chosen, then of the error nodes."""

    def into(self, gradients: dict[int, Tensor]) -> Float[Tensor, "target k"]:
        """Their edges into each target."""
        features = self.features.slopes(self.layer, gradients) * (self.features.value - self.features.baseline)
        errors = self.features.effects_of_errors(self.layer, gradients[self.layer])[:, self.errors]
        return torch.cat([features, errors], dim=1)


class _Direct:
    """One run in which all that is written at the sites is a leaf, and the chosen nodes as functions of these."""

    def __init__(self, effects: NodeEffects, chosen: pd.DataFrame) -> None:
        self.effects, self.nodes = effects, effects.nodes
        self.model, self.trace = effects.nodes.model, effects.trace
        self.layers = [layer for layer in range(self.model.model.n_layers) if layer not in self.model.passed]
        self.sources = [self._source(layer, chosen) for layer in self.layers]
        written = self.trace.frozen.writes.mlp_out - self.trace.frozen.skip_out(self.trace.frozen.reads.by_layer)
        self.leaves = {layer: written[layer].detach().clone().requires_grad_() for layer in self.layers}
        self.reads: dict[int, Tensor] = {}
        self.arrived: dict[int, Tensor] = {}
        with torch.enable_grad():
            found = measured(self.model.model, effects.metric, self.trace.tokens[None], self._edits())
            self.targets = {METRIC: found[0], **self._as_functions(chosen["id"].tolist())}

    def gradients(self, memory: int) -> Iterator[tuple[list[str], dict[int, Float[Tensor, "target pos d_model"]]]]:
        """Of some targets at a time, what each changes by per unit written at each place."""
        kept = {name: value for name, value in self.targets.items() if value.requires_grad}
        names, leaves = list(kept), list(self.leaves.values())
        one = sum(leaf.numel() for leaf in leaves) * leaves[0].element_size()
        stacked = torch.stack(list(kept.values()))
        for rows in torch.eye(len(names), dtype=leaves[0].dtype, device=leaves[0].device).split(
            max(1, memory // (10 * one))
        ):
            found = torch.autograd.grad(
                stacked, leaves, rows, retain_graph=True, is_grads_batched=True, allow_unused=True
            )
            filled = [
                leaf.new_zeros(len(rows), *leaf.shape) if gradient is None else gradient.detach()
                for leaf, gradient in zip(leaves, found, strict=True)
            ]
            yield [names[i] for i in rows.argmax(1).tolist()], dict(zip(self.leaves, filled, strict=True))

    def _source(self, layer: int, chosen: pd.DataFrame) -> _Source:
        number = {tuple(index): row for row, index in enumerate(self.nodes.index.tolist())}
        places = list(enumerate(zip(*(chosen[name].tolist() for name in ("layer", "pos", "feature")), strict=True)))
        features = [(column, number[place]) for column, place in places if place[0] == layer and place[2] >= 0]
        errors = [(column, pos) for column, (at, pos, feature) in places if at == layer and feature < 0]
        nodes, rows = self.nodes, [row for _, row in features]
        taken = Nodes(nodes.model, nodes.index[rows], nodes.value[rows], nodes.baseline[rows], nodes.errors)
        return _Source(layer, taken, [pos for _, pos in errors], [column for column, _ in features + errors])

    def _edits(self) -> dict[Site, Hook]:
        edits: dict[Site, Hook] = {}
        for layer in self.layers:
            read, write = self.model.dictionaries.reads[layer], self.model.dictionaries.writes[layer]
            edits[read] = self._note(layer)
            edits[write] = after(edits[read], self._cut(layer)) if read == write else self._cut(layer)
        return edits

    def _note(self, layer: int) -> Hook:
        def note(value: Tensor) -> None:
            self.reads[layer] = value[0]

        return note

    def _cut(self, layer: int) -> Hook:
        """The leaf in the place of what comes, but where the regime leaves positions as they are."""

        def cut(value: Tensor) -> Tensor:
            self.arrived[layer] = value[0]
            skip = self.model.dictionaries.skip(layer)
            out = self.leaves[layer] if skip is None else self.leaves[layer] + self.reads[layer] @ skip
            return out[None] if self.effects.regime == "model" else torch.where(self.trace.exact[:, None], value, out)

        return cut

    def _as_functions(self, names: list[str]) -> dict[str, Tensor]:
        """∂m/∂a_t · a_t of the chosen features and ⟨∂m/∂y, e_t⟩ of the chosen error nodes, ∂m being constants."""
        exact = self.trace.exact[:, None]
        active = {
            layer: self.model.dictionaries.activations(layer, read).masked_fill(exact, 0)
            for layer, read in self.reads.items()
            if self.model.dictionaries.n_features(layer)
        }
        runs = Runs(self.model, self.trace, self.effects.metric, self.effects.regime, MEMORY)
        _, at_clean = runs.gradients(range(self.model.model.n_layers))
        found: dict[str, Tensor] = {}
        for layer, nodes, errors, columns in self.sources:
            _, pos, feature = nodes.index.unbind(1)
            values = list(nodes.slopes(layer, at_clean) * active[layer][pos, feature]) if len(pos) else []
            if self.effects.regime == "model" and errors:
                values += torch.einsum("pd,pd->p", at_clean[layer], self._error(layer, active))[errors]
            found |= {names[column]: value for column, value in zip(columns, values, strict=False)}
        return found

    def _error(self, layer: int, active: dict[int, Tensor]) -> Float[Tensor, "pos d_model"]:
        """e of a layer in this run, but for constants."""
        dictionaries, out = self.model.dictionaries, self.arrived[layer]
        if (skip := dictionaries.skip(layer)) is not None:
            out = out - self.reads[layer] @ skip
        for at, value in active.items():
            if layer in dictionaries.write_layers(at):
                out = out - dictionaries.decode_layer(at, value)[..., layer - dictionaries.write_layers(at).start, :]
        return out
