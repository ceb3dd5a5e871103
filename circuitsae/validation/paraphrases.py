"""The same edges on other prompts that say the same: how far their effects spread.

A node of the graph stands for a feature (error, token) at a position. On a paraphrase it is the same feature at the
corresponding position: that of the same role, or the same number where the position has no role and both prompts have
as many tokens. There the prediction is the effect in the frozen regime, which is what the paraphrase's own graph says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import pandas as pd

from circuitsae.graph import AttributionGraph, Node, NodeKind
from circuitsae.interventions import PromptLike, Recording, for_node
from circuitsae.interventions.prompts import Library
from circuitsae.replacement import FIRST, ReplacementModel
from circuitsae.validation.budget import node_row
from circuitsae.validation.measuring import Targets, effects, reading_like
from circuitsae.validation.statistics import interval

RESAMPLES = 1000


def on_paraphrases(
    model: ReplacementModel,
    graph: AttributionGraph,
    edges: pd.DataFrame,
    prompts: Sequence[PromptLike],
    *,
    roles: Mapping[str, int],
) -> pd.DataFrame:
    """Edges (`source`, `target`) on each prompt: `paraphrase`, both ids, `active`, `predicted`, `measured`.

    Edges whose ends have no corresponding position on a prompt have no row there. `active` says whether the source is;
    a feature that is off on a paraphrase predicts and measures 0.
    """
    library = Library(reading_like(model, graph))
    frames = [
        _on_one(model, graph, edges, library[prompt], roles).assign(paraphrase=number)
        for number, prompt in enumerate(prompts)
    ]
    columns = ["paraphrase", "source", "target", "active", "predicted", "measured"]
    some = [frame for frame in frames if len(frame)]
    return pd.concat(some, ignore_index=True).reindex(columns=columns) if some else pd.DataFrame(columns=columns)


def _on_one(
    model: ReplacementModel,
    graph: AttributionGraph,
    edges: pd.DataFrame,
    prompt: Recording,
    roles: Mapping[str, int],
) -> pd.DataFrame:
    where = _Correspondence(len(graph.tokens), roles, prompt)
    ends = [(node_row(graph, s), node_row(graph, t)) for s, t in zip(edges["source"], edges["target"], strict=True)]
    moved = {row: where.moved(graph.nodes[row]) for pair in ends for row in pair}
    pairs = [(s, t) for s, t in ends if moved[s] is not None and moved[t] is not None]
    if not pairs:
        return pd.DataFrame()
    sources, row = np.unique([s for s, _ in pairs], return_inverse=True)
    targets, column = np.unique([t for _, t in pairs], return_inverse=True)
    read = Targets(model, prompt.trace, [node for t in targets if (node := moved[int(t)])])
    nodes = [node for s in sources if (node := moved[int(s)])]
    removed = [[for_node(node)] for node in nodes]
    on = np.array([_is_on(prompt, node) for node in nodes])
    return pd.DataFrame(
        {
            "source": [graph.nodes[s].id for s, _ in pairs],
            "target": [graph.nodes[t].id for _, t in pairs],
            "active": on[row],
            "predicted": effects(model, prompt, removed, read, "frozen")[row, column],
            "measured": effects(model, prompt, removed, read, "model")[row, column],
        }
    )


class _Correspondence:
    """Positions of the graph's prompt on another one."""

    def __init__(self, length: int, roles: Mapping[str, int], prompt: Recording) -> None:
        self.prompt, self.same_length = prompt, length == len(prompt)
        self.last = length - 1
        self.role_at = {pos % length: role for role, pos in roles.items()}

    def moved(self, node: Node) -> Node | None:
        """The node on the other prompt; a logit stays at the last position."""
        if node.kind is NodeKind.LOGIT:
            return replace(node, pos=len(self.prompt) - 1)
        role = self.role_at.get(node.pos)
        if role is not None and role in self.prompt.roles:
            pos = self.prompt.roles[role] % len(self.prompt)
        elif role is None and self.same_length:
            pos = node.pos
        else:
            return None
        return None if node.kind is NodeKind.FEATURE and pos < FIRST else replace(node, pos=pos)


def _is_on(prompt: Recording, node: Node) -> bool:
    if node.kind is not NodeKind.FEATURE:
        return True
    index = prompt.trace.features.index
    return bool((index == index.new_tensor([node.layer, node.pos, node.index])).all(dim=1).any())


def intervals(spread: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """A row per edge: its mean effect and ratio over the paraphrases, with 95 % bootstrap intervals over these.

    Columns: `source`, `target`, `paraphrases` (on how many the source is active), `kept_sign` (on which share of these
    the effect has the sign predicted there), `mean_measured`, `mean_ratio` (Σ measured / Σ predicted), and both with
    `_low` and `_high`.
    """
    records = []
    for ends, rows in spread.groupby(["source", "target"], sort=False):
        source, target = cast(tuple[str, str], ends)
        predicted, measured = rows["predicted"].to_numpy(float), rows["measured"].to_numpy(float)
        on = rows["active"].to_numpy(bool)
        rng = np.random.default_rng(seed)
        drawn = rng.integers(0, len(rows), (RESAMPLES, len(rows)))
        means = measured[drawn].mean(1)
        low, high = interval(means)
        ratio_low, ratio_high = interval(_ratio(measured[drawn].sum(1), predicted[drawn].sum(1)))
        records.append(
            {
                "source": source,
                "target": target,
                "paraphrases": int(on.sum()),
                "kept_sign": float(np.mean(np.sign(predicted[on]) == np.sign(measured[on]))) if on.any() else np.nan,
                "mean_measured": float(measured.mean()),
                "mean_measured_low": low,
                "mean_measured_high": high,
                "mean_ratio": float(_ratio(measured.sum(keepdims=True), predicted.sum(keepdims=True))[0]),
                "mean_ratio_low": ratio_low,
                "mean_ratio_high": ratio_high,
            }
        )
    return pd.DataFrame(records, columns=None if records else ["source", "target"])


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return above / np.where(below == 0, np.nan, below)
