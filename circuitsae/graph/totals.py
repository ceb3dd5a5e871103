"""What a graph foresees of a change: its effect on what is explained, along all paths that are drawn."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import sparse


def total_effects(
    nodes: pd.DataFrame, edges: pd.DataFrame, targets: Sequence[int], held: Sequence[int] = ()
) -> np.ndarray:
    """[target, node]: by how much each target (a row of `nodes`) rises where a node is doubled.

        E[t, s] = Σ over paths s → f₁ → … → t of A[f₁, s] · Π A[fᵢ₊₁, fᵢ] / a[fᵢ]

    with A the edges' weights and a the features' activations: active features answer with a slope of one, as in T̂ of
    `circuitsae.validation.claims`, but along the edges of this graph alone. Nodes that are `held` pass nothing on:
    their values are set, whatever comes to them. A feature without an activation passes nothing on either.
    """
    row_of = {name: row for row, name in enumerate(nodes["id"].tolist())}
    source, target = ([row_of[name] for name in edges[end].tolist()] for end in ("source", "target"))
    weights = sparse.csr_array(
        (np.nan_to_num(edges["weight"].to_numpy(float)), (target, source)), shape=(len(nodes), len(nodes))
    )
    activation = nodes["activation"].to_numpy(float)
    answers = (nodes["kind"] == "feature").to_numpy() & np.isfinite(activation) & (activation != 0)
    answers[list(held)] = False
    slope = np.divide(1.0, activation, out=np.zeros(len(nodes)), where=answers)
    found = weights[list(targets)].toarray()
    layers = nodes["layer"].to_numpy()
    for layer in np.unique(layers[answers])[::-1]:
        rows = np.flatnonzero(answers & (layers == layer))
        found += (found[:, rows] * slope[rows]) @ weights[rows]
    return found


def foreseen(
    nodes: pd.DataFrame, edges: pd.DataFrame, targets: Sequence[int], doses: Mapping[int, float]
) -> np.ndarray:
    """[target]: the change of each target where nodes (by row) are changed together, each by `dose` times itself.

    A dose of −1 removes a node, 1 doubles it.
    """
    rows = list(doses)
    return total_effects(nodes, edges, targets, held=rows)[:, rows] @ np.array(list(doses.values()), dtype=float)


def explained_rows(nodes: pd.DataFrame) -> list[int]:
    """Rows of what the graph explains: logits, most probable first, or the one contrast, direction or feature."""
    explained = nodes["explained"].to_numpy(bool) if "explained" in nodes else np.zeros(len(nodes), dtype=bool)
    start = np.where(explained, 1.0, np.nan_to_num(nodes["probability"].to_numpy(float)))
    rows = np.flatnonzero((nodes["kind"] == "logit").to_numpy() | explained)
    return [int(row) for row in rows[np.argsort(-start[rows], kind="stable")]]
