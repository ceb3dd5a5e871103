"""Edges between nodes by what goes over them to a metric.

    E_s→t = ∂m/∂a_t · ∂a_t/∂a_s · (a_s − a'_s),

with ∂m/∂a_t by all ways from t on and ∂a_t/∂a_s by those that meet no dictionary's site in between, attention and norms
live, both at the clean run. An error node as target has the vectors ∂m/∂y · ∂e/∂a_s in their place; it answers in the
regime `model` alone. What goes to the logits past all sites ends in `metric`. The edges that leave a node, to all nodes
there are, sum up to its effect by `gradient`, but for what a skip term carries.

Source: Marks et al. 2024, "Sparse Feature Circuits" (section 3.2).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import networkx as nx
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.attribution.effects import MEMORY, NodeEffects, Nodes, Runs
from circuitsae.frozen import in_turn
from transcoders.edits import Hook
from transcoders.errors import InputError
from transcoders.sites import Site

METRIC = "metric"
"""The node that all others lead to."""


@dataclass(frozen=True, eq=False)
class EffectGraph:
    """Nodes with their effects on a metric, and edges with what goes over them."""

    nodes: pd.DataFrame
    """Columns `id`, `kind`, `layer`, `pos`, `feature`, `token`, `value`, `baseline`, `effect`."""
    edges: pd.DataFrame
    """`source`, `target` (`metric`: the logits), `effect`; the largest first."""

    def to_networkx(self) -> nx.DiGraph:
        """Nodes and edges with their columns as attributes; the weight of an edge is its effect."""
        graph = nx.DiGraph()
        for row in self.nodes.to_dict("records"):
            graph.add_node(row["id"], **{str(name): value for name, value in row.items() if name != "id"})
        graph.add_node(METRIC, kind=METRIC)
        for source, target, effect in self.edges.itertuples(index=False):
            graph.add_edge(source, target, weight=effect)
        return graph


def edge_effects(effects: NodeEffects, nodes: int = 100, *, memory: int = MEMORY) -> EffectGraph:
    """The edges between the `nodes` of largest effect, and from these to the metric; those of 0 are left out.

    As many targets at once as `memory` holds. Raises `InputError` for less than one node, and `DictionaryError` where
    features cannot be encoded layer by layer (TopK over layers).
    """
    if nodes < 1:
        raise InputError(f"nodes={nodes}: there are no edges between less than one node; give 1 or more.")
    chosen = effects.frame().head(nodes)
    direct = _Direct(effects, chosen)
    rows, names = [], chosen["id"].to_numpy()
    for targets, gradients in direct.gradients(memory):
        table = torch.zeros(len(targets), len(chosen), dtype=effects.errors.dtype)
        for layer, number, columns in direct.sources:
            table[:, columns] = _into(number, layer, chosen.iloc[columns], gradients).cpu()
        for row, source in table.nonzero().tolist():
            rows.append((names[source], targets[row], float(table[row, source])))
    edges = pd.DataFrame(rows, columns=["source", "target", "effect"])
    return EffectGraph(chosen, edges.sort_values("effect", key=abs, ascending=False, ignore_index=True))


def _into(nodes: Nodes, layer: int, chosen: pd.DataFrame, gradients: dict[int, Tensor]) -> Float[Tensor, "target k"]:
    """The edges of a layer's chosen nodes, features before errors, into each target."""
    features = nodes.slopes(layer, gradients) * (nodes.value - nodes.baseline)
    pos = chosen["pos"][chosen["kind"] == "error"].tolist()
    return torch.cat([features, nodes.effects_of_errors(layer, gradients[layer])[:, pos]], dim=1)


class _Direct:
    """One run in which all that is written at the sites is a leaf, and the chosen nodes as functions of these."""

    def __init__(self, effects: NodeEffects, chosen: pd.DataFrame) -> None:
        self.effects, self.nodes = effects, effects.nodes
        self.model, self.trace = effects.nodes.model, effects.trace
        self.layers = [layer for layer in range(self.model.model.n_layers) if layer not in self.model.passed]
        self.sources = [
            (layer, self._features(here), here.index.to_numpy())
            for layer, part in chosen.groupby("layer")
            for here in [part.sort_values("feature", key=lambda f: f < 0, kind="stable")]
        ]
        written = self.trace.frozen.writes.mlp_out - self.trace.frozen.skip_out(self.trace.frozen.reads.by_layer)
        self.leaves = {layer: written[layer].detach().clone().requires_grad_() for layer in self.layers}
        self.reads: dict[int, Tensor] = {}
        self.arrived: dict[int, Tensor] = {}
        with torch.enable_grad():
            logits, _ = self.model.model.run(self.trace.tokens[None], edits=self._edits())
            self.targets = {METRIC: effects.metric(logits[:, -1])[0], **self._as_functions(chosen)}

    def gradients(self, memory: int) -> Iterator[tuple[list[str], dict[int, Float[Tensor, "target pos d_model"]]]]:
        """Of some targets at a time, what each changes by per unit written at each place."""
        kept = {name: value for name, value in self.targets.items() if value.requires_grad}
        names, leaves = list(kept), list(self.leaves.values())
        one = sum(leaf.numel() for leaf in leaves) * leaves[0].element_size()
        stacked = torch.stack(list(kept.values())) if kept else None
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

    def _features(self, chosen: pd.DataFrame) -> Nodes:
        """The chosen features of a layer alone."""
        every = {tuple(index): row for row, index in enumerate(self.nodes.index.tolist())}
        features = chosen[chosen["kind"] == "feature"]
        rows = [every[place] for place in zip(features["layer"], features["pos"], features["feature"], strict=True)]
        nodes = self.nodes
        return Nodes(nodes.model, nodes.index[rows], nodes.value[rows], nodes.baseline[rows], nodes.errors)

    def _edits(self) -> dict[Site, Hook]:
        edits: dict[Site, Hook] = {}
        for layer in self.layers:
            read, write = self.model.dictionaries.reads[layer], self.model.dictionaries.writes[layer]
            edits[read] = self._note(layer)
            edits[write] = in_turn(edits[read], self._cut(layer)) if read == write else self._cut(layer)
        return edits

    def _note(self, layer: int) -> Hook:
        def note(value: Tensor) -> None:
            self.reads[layer] = value[0]

        return note

    def _cut(self, layer: int) -> Hook:
        """The leaf in the place of what comes; features have no part in positions that the regime leaves as they are."""

        def cut(value: Tensor) -> Tensor:
            self.arrived[layer] = value[0]
            skip = self.model.dictionaries.skip(layer)
            out = self.leaves[layer] if skip is None else self.leaves[layer] + self.reads[layer] @ skip
            return out[None] if self.effects.regime == "model" else torch.where(self.trace.exact[:, None], value, out)

        return cut

    def _as_functions(self, chosen: pd.DataFrame) -> dict[str, Tensor]:
        """∂m/∂a_t · a_t of the chosen features and ⟨∂m/∂y, e_t⟩ of the chosen error nodes, ∂m being constants."""
        active = {
            layer: self.model.dictionaries.activations(layer, self.reads[layer]).masked_fill(
                self.trace.exact[:, None], 0
            )
            for layer in self.layers
            if self.model.dictionaries.n_features(layer)
        }
        runs = Runs(self.model, self.trace, self.effects.metric, self.effects.regime, MEMORY)
        _, at_clean = runs.gradients(range(self.model.model.n_layers))
        found = {}
        for layer, nodes, columns in self.sources:
            _, pos, feature = nodes.index.unbind(1)
            errors = chosen.iloc[columns].query("kind == 'error'")
            ids = chosen["id"].iloc[columns].tolist()
            if len(pos):
                values = nodes.slopes(layer, at_clean) * active[layer][pos, feature]
                found |= dict(zip(ids, values.unbind(), strict=False))
            if self.effects.regime == "model" and len(errors):
                values = torch.einsum("pd,pd->p", at_clean[layer], self._error(layer, active))
                found |= dict(zip(errors["id"], values[errors["pos"].tolist()].unbind(), strict=True))
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
