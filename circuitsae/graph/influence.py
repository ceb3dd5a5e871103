"""How much each node and edge matters for the logits, directly and through other nodes.

    Â = |A| with each row divided by its sum        I = wÂ + wÂ² + …        w = probabilities on the logit nodes

after Ameisen et al. 2025, "Circuit Tracing", Appendix: Graph pruning. Bias nodes stand beside: they take no
part in the sums, so that the figures compare with those of tools without bias nodes.
"""

from dataclasses import asdict, dataclass

import numpy as np
from scipy import sparse


@dataclass(frozen=True)
class Scores:
    """How much of a graph is explained by features rather than by error nodes; both in [0, 1]."""

    replacement: float
    """I(tokens) / (I(tokens) + I(errors))."""
    completeness: float
    """Σ_t (I+w)_t · (1 − Σ_errors Â[t, e]) / Σ_t (I+w)_t."""

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def shares(weights: sparse.csr_array, bias: np.ndarray) -> sparse.csr_array:
    """Â: |weights| divided by each row's sum over the columns that are no bias; bias columns are scaled alike."""
    return divide_rows(weights, row_sums(weights, bias))


def row_sums(weights: sparse.csr_array, bias: np.ndarray) -> np.ndarray:
    """Σ|weights| of each row over the columns that are no bias."""
    return abs(weights) @ (~bias).astype(float)


def divide_rows(weights: sparse.csr_array, total: np.ndarray) -> sparse.csr_array:
    """|weights| with each row divided by its total; rows of total 0 become 0."""
    scale = np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)
    return sparse.csr_array(sparse.diags_array(scale) @ abs(weights))


def node_influence(
    share: sparse.csr_array, layers: np.ndarray, targets: np.ndarray, start: np.ndarray, bias: np.ndarray
) -> np.ndarray:
    """I = wÂ + wÂ² + …, one sweep over the layers from the top; `start` is w. NaN for bias nodes."""
    total = start.astype(float).copy()
    without_bias = share @ sparse.diags_array((~bias).astype(float))
    for layer in np.unique(layers[targets])[::-1]:
        rows = np.flatnonzero(targets & (layers == layer))
        total += total[rows] @ without_bias[rows]
    influence = total - start
    influence[bias] = np.nan
    return influence


def scores(
    share: sparse.csr_array, influence: np.ndarray, start: np.ndarray, token: np.ndarray, error: np.ndarray
) -> Scores:
    """Replacement and completeness score of a full graph."""
    through_tokens, through_errors = influence[token].sum(), influence[error].sum()
    explained = 1 - share @ error.astype(float)
    output = np.nan_to_num(influence) + start
    output[np.isnan(influence)] = 0
    both = through_tokens + through_errors
    return Scores(
        replacement=float(through_tokens / both) if both > 0 else 1.0,
        completeness=float(explained @ output / output.sum()) if output.sum() > 0 else 1.0,
    )


def cumulative(influence: np.ndarray, always: np.ndarray) -> np.ndarray:
    """The share of total influence at which each node enters, most influential first; 0 for those in `always`."""
    order = np.argsort(-np.nan_to_num(influence), kind="stable")
    running = np.cumsum(np.nan_to_num(influence)[order])
    entered = np.empty(len(order))
    entered[order] = running / running[-1] if len(order) and running[-1] > 0 else 0.0
    return np.where(always, 0.0, np.clip(entered, 0.0, 1.0))


def threshold(values: np.ndarray, share: float) -> float:
    """The smallest of the largest `values` that together hold `share` of their sum."""
    ordered = np.sort(values)[::-1]
    running = np.cumsum(ordered)
    if not len(ordered) or running[-1] <= 0:
        return 0.0
    return float(ordered[min(np.searchsorted(running / running[-1], share), len(ordered) - 1)])
