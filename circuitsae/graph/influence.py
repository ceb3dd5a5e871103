"""How much each node and edge matters for the logits, directly and through other nodes.

    Â = |A| with each row divided by its sum        I = wÂ + wÂ² + …        w = probabilities on the logit nodes

after Ameisen et al. 2025, "Circuit Tracing", Appendix: Graph pruning. Bias nodes stand beside: they take no
part in the sums, so that the figures compare with those of tools without bias nodes.

Edges stay as they are stored, float32 or float64; sums run in float64 over one block of rows at a time.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from scipy import sparse

from circuitsae.graph.compact import magnitude_sums, row_blocks


@dataclass(frozen=True)
class Scores:
    """How much of a graph is explained by features, rather than by error nodes or past the features; in [0, 1]."""

    replacement: float
    """I(tokens) / (I(tokens) + I(errors))."""
    completeness: float
    """Σ_t (I+w)_t · (1 − Σ_errors Â[t, e]) / Σ_t (I+w)_t, over the edges that are stored."""
    past: float | None = None
    """Σ_t (I+w)_t · (Σ_s |past| / Σ_s (|past| + |weight − past|)) / Σ_t (I+w)_t, over the edges that are stored: the
    part of all weight that passed by skip terms. None where there are none, or a file does not say."""

    def as_dict(self) -> dict[str, float]:
        """Those that there are."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def reciprocal(total: np.ndarray) -> np.ndarray:
    """1 / total, and 0 where the total is 0."""
    return np.divide(1.0, total, out=np.zeros_like(total, dtype=np.float64), where=total > 0)


def absolute_inputs(weights: sparse.csr_array, bias: np.ndarray) -> np.ndarray:
    """Σ|weights| of each row over the columns that are no bias."""
    return magnitude_sums(weights, ~bias[:, None])[:, 0]


def shares(weights: sparse.csr_array, inputs: np.ndarray) -> sparse.csr_array:
    """Â of all edges in float64: |weights| with each row divided by its entry of `inputs`; 0 where that is 0."""
    data = np.abs(weights.data, dtype=np.float64)
    data *= np.repeat(reciprocal(inputs), np.diff(weights.indptr))
    return sparse.csr_array((data, weights.indices, weights.indptr), shape=weights.shape)


def node_influence(
    weights: sparse.csr_array,
    inputs: np.ndarray,
    layers: np.ndarray,
    targets: np.ndarray,
    start: np.ndarray,
    bias: np.ndarray,
) -> np.ndarray:
    """I = wÂ + wÂ² + …, one sweep over the layers from the top, with Â[t, s] = |weights[t, s]| / inputs[t].

    All but `weights` [node, node] are [node]; `targets` has the nodes that have inputs, `start` is w.
    NaN for bias nodes.
    """
    total, scale = start.astype(np.float64), reciprocal(inputs)
    for layer in np.unique(layers[targets])[::-1]:
        pass_on(total, scale, np.arange(len(total)), weights, np.flatnonzero(targets & (layers == layer)))
    influence = total - start
    influence[bias] = np.nan
    return influence


def pass_on(
    output: np.ndarray, scale: np.ndarray, rows: np.ndarray, edges: sparse.csr_array, chosen: np.ndarray
) -> None:
    """Add to the (I+w) of all nodes, `output` [node], what the `chosen` of some rows pass on: Σ_t (I+w)_t·Â[t].

    scale: [node], 1 / Σ|weight| of each target. rows: [row], which node each row of `edges` [row, node] is.
    """
    for part, weights in row_blocks(edges, chosen):
        at = rows[part]
        output += (output[at] * scale[at]) @ abs(weights)


@dataclass(frozen=True)
class EdgeScores:
    """Â[t, s]·(I+w)[t] of each edge, in the order of `weights.data`; computed anew at each iteration, in blocks."""

    weights: sparse.csr_array
    inputs: np.ndarray
    output: np.ndarray
    """[node], I+w."""
    sources: np.ndarray
    """[node], the columns that are scored; the edges from others are 0."""

    def __iter__(self) -> Iterator[np.ndarray]:
        factor = self.output * reciprocal(self.inputs)
        for rows, edges in row_blocks(self.weights):
            by_row = np.repeat(factor[rows], np.diff(edges.indptr))
            yield np.abs(edges.data) * by_row * self.sources[edges.indices]


def scores(
    error_share: np.ndarray,
    influence: np.ndarray,
    start: np.ndarray,
    token: np.ndarray,
    error: np.ndarray,
    past_share: np.ndarray | None = None,
) -> Scores:
    """The scores of a full graph. `error_share` [node] is Σ_errors Â[t, e]; `past_share` [node] the part of each row
    that passed by skip terms.
    """
    through_tokens, through_errors = influence[token].sum(), influence[error].sum()
    output = np.nan_to_num(influence) + start
    output[np.isnan(influence)] = 0
    both = through_tokens + through_errors
    return Scores(
        replacement=float(through_tokens / both) if both > 0 else 1.0,
        completeness=float((1 - error_share) @ output / output.sum()) if output.sum() > 0 else 1.0,
        past=None if past_share is None else float(past_share @ output / output.sum()) if output.sum() > 0 else 0.0,
    )


def cumulative(influence: np.ndarray, always: np.ndarray) -> np.ndarray:
    """The share of total influence at which each node enters, most influential first; 0 for those in `always`."""
    order = np.argsort(-np.nan_to_num(influence), kind="stable")
    running = np.cumsum(np.nan_to_num(influence)[order])
    entered = np.empty(len(order))
    entered[order] = running / running[-1] if len(order) and running[-1] > 0 else 0.0
    return np.where(always, 0.0, np.clip(entered, 0.0, 1.0))
