"""Which nodes and edges carry most of the influence: masks and weights from arrays [node] and [node, node].

`columns` are those of `node_columns`. How shares of a sum are met: `selection.threshold`.

How many of the largest values hold a share of the sum, without sorting them.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from scipy import sparse

from circuitsae.graph.compact import select_edges
from circuitsae.graph.influence import EdgeScores, absolute_inputs, node_influence
from circuitsae.graph.nodes import NodeKind
from transcoders.errors import InputError

_LEVELS = (48, 32, 16, 0)
_FRACTION = 52
_LOW = 27


def threshold(blocks: Iterable[np.ndarray], share: float) -> float:
    """The smallest of the largest values that together hold `share` of their sum; 0 where nothing is above 0.

    The answer of: sort all values in descending order, walk down until (exact sum so far) / (exact sum of all), rounded
    once, is at least `share`, and return the value reached. No sum is rounded, so neither the order nor the number of
    the values matters. Values that are not above 0 have no part in it.

    The bits of positive floats order like the floats. A histogram over their first 16 bits, each bin with its exact
    sum, says in which bin the walk ends; its values are split by the next 16 bits, and so on to the last. The sums are
    exact because the 53-bit mantissas of a bin are added as integers, in two halves that float64 holds unrounded.

    blocks: the values, in pieces; iterated over twice, so that they need not be kept in memory.
    """
    sums = _bin_sums((_bits(part) for part in blocks), _LEVELS[0])
    total = sum(sums.values())
    if total == 0:
        return 0.0
    prefix, above = _walk(sums, 0, total, share)
    inside = np.concatenate([bits[bits >> _LEVELS[0] == prefix] for bits in map(_bits, blocks)])
    for shift in _LEVELS[1:]:
        chosen, above = _walk(_bin_sums([inside], shift), above, total, share)
        inside = inside[inside >> shift == chosen]
    return float(inside[:1].view(np.float64)[0])


def _bits(values: np.ndarray) -> np.ndarray:
    """The bits of the values above 0."""
    values = np.asarray(values, dtype=np.float64)
    return values[values > 0].view(np.int64)


def _walk(sums: dict[int, int], above: int, total: int, share: float) -> tuple[int, int]:
    """The bin in which the walk ends, and the sum of all values above that bin."""
    for chosen in sorted(sums, reverse=True):
        # Python rounds the quotient of two integers once.
        if (above + sums[chosen]) / total >= share:
            return chosen, above
        above += sums[chosen]
    raise ValueError(f"{share} of the sum is not reached; expected a share of at most 1.")


def _bin_sums(blocks: Iterable[np.ndarray], shift: int) -> dict[int, int]:
    """The exact sum, in units of 2^-1074, of the values of each bin `bits >> shift`, bins without values left out."""
    sums: dict[int, int] = {}
    for bits in _pieces(blocks):
        bins = bits >> shift
        first = int(bins.min())
        exponent = bits >> _FRACTION
        mantissa = (bits & (2**_FRACTION - 1)) | ((exponent > 0).astype(np.int64) << _FRACTION)
        halves = [np.bincount(bins - first, weights=half) for half in (mantissa >> _LOW, mantissa & (2**_LOW - 1))]
        for at in np.flatnonzero(halves[0] + halves[1]).tolist():
            value = (int(halves[0][at]) << _LOW) + int(halves[1][at])
            key = first + at
            exact = value << max(key << shift >> _FRACTION, 1) - 1
            sums[key] = sums.get(key, 0) + exact
    return sums


def _pieces(blocks: Iterable[np.ndarray], size: int = 2**20) -> Iterator[np.ndarray]:
    """Short enough for sums in float64 to be exact: 2^20 numbers below 2^27."""
    for block in blocks:
        for start in range(0, len(block), size):
            yield block[start : start + size]


def check_shares(**shares: float) -> None:
    for name, value in shares.items():
        if not 0 < value <= 1:
            raise InputError(f"prune: {name}={value} is not a share; give a number above 0 and at most 1.")


def strongest_nodes(influence: np.ndarray, kind: np.ndarray, share: float) -> np.ndarray:
    """[node], those that hold the `share` of the influence; tokens, logits and biases always stay."""
    score, bias = np.nan_to_num(influence), kind == NodeKind.BIAS
    always = np.isin(kind, [NodeKind.TOKEN, NodeKind.LOGIT, NodeKind.BIAS])
    return (score >= threshold([score[~bias]], share)) | always


def strongest_edges(
    weights: sparse.csr_array, columns: Mapping[str, np.ndarray], share: float
) -> tuple[np.ndarray, sparse.csr_array]:
    """A mask of the nodes that stay connected, and the edges that hold the `share`.

    Edge score Â[t, s]·(I+w)[t], with Â and I of these nodes and edges. Then features without an input or output and
    errors and biases without an output are dropped, repeatedly.
    """
    return drop_dangling(columns["kind"], _highest_scores(weights, columns, share))


def _highest_scores(weights: sparse.csr_array, columns: Mapping[str, np.ndarray], share: float) -> sparse.csr_array:
    kind, start = columns["kind"], columns["start"]
    bias, targets = kind == NodeKind.BIAS, np.isin(kind, [NodeKind.FEATURE, NodeKind.LOGIT])
    inputs = absolute_inputs(weights, bias)
    influence = node_influence(weights, inputs, columns["layer"], targets, start, bias)
    output = np.nan_to_num(influence) + start
    least = threshold(EdgeScores(weights, inputs, output, ~bias), share)
    of_all = EdgeScores(weights, inputs, output, np.ones_like(bias))
    strong = [(score >= least) & (score > 0) for score in of_all]
    return select_edges(weights, np.concatenate(strong or [np.zeros(0, dtype=bool)]))


def drop_dangling(kind: np.ndarray, edges: sparse.csr_array) -> tuple[np.ndarray, sparse.csr_array]:
    """A mask of the nodes that stay connected, and their edges: a feature needs an input that is no bias, and an
    output; an error and a bias need an output.
    """
    needs_input = kind == NodeKind.FEATURE
    needs_output = np.isin(kind, [NodeKind.FEATURE, NodeKind.ERROR, NodeKind.BIAS])
    carrying = kind != NodeKind.BIAS
    numbers = np.arange(len(kind), dtype=edges.indices.dtype)
    kept = np.ones(len(kind), dtype=bool)
    while True:
        target = np.repeat(numbers, np.diff(edges.indptr))
        has_output, has_input = np.zeros_like(kept), np.zeros_like(kept)
        has_output[edges.indices] = True
        has_input[target[carrying[edges.indices]]] = True
        still = kept & (has_output | ~needs_output) & (has_input | ~needs_input)
        if np.array_equal(still, kept):
            return kept, edges
        kept = still
        edges = select_edges(edges, kept[target] & kept[edges.indices])
