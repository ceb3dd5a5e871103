"""Which features fire on the same tokens: exact counts while they fit into memory, sketches beyond."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from scipy import sparse

from circuitsae.features.collection.examples import EMPTY, Entries, KeepBest, mixed
from circuitsae.features.reading import Firing

EXACT_UP_TO = 8192
"""Features of all layers together up to which every pair is counted: a table of 256 MB."""
SKETCH = 64
_ENTRIES_AT_ONCE = 2_000_000
_ROWS = 1024


@runtime_checkable
class CoFiring(Protocol):
    """`J(f, g) = |T_f ∩ T_g| / |T_f ∪ T_g|` over the tokens `T` on which features are active."""

    exact: bool

    def update(self, firing: Firing, first_token: int, n_tokens: int) -> None:
        """Count a chunk of `n_tokens` tokens, the first of which is the corpus's token `first_token`."""
        ...

    def neighbours(self, count: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Per feature the k features of largest J, the strongest first: numbers (−1 for none) and J."""
        ...

    def arrays(self) -> dict[str, np.ndarray]:
        """What `restore` goes on from, by name."""
        ...

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `arrays` gave; raises `KeyError` where something is missing, `ValueError` for other sizes."""
        ...


def cofiring(n: int, *, exact_up_to: int = EXACT_UP_TO, seed: int = 0) -> CoFiring:
    """Exact counts for up to `exact_up_to` features, sketches for more."""
    return PairCounts(n) if n <= exact_up_to else Sketches(n, seed)


class PairCounts:
    """How often each pair fires together: `Aᵀ A` of the sparse matrix A of tokens and features, added up."""

    exact = True

    def __init__(self, n: int) -> None:
        self.n = n
        self._together = np.zeros((n, n), np.int32)
        self._waiting: list[sparse.csr_array] = []

    def update(self, firing: Firing, first_token: int, n_tokens: int) -> None:
        """Count a chunk of `n_tokens` tokens; where it begins makes no difference to counts."""
        ones = np.ones(len(firing.feature), np.int32)
        self._waiting.append(sparse.csr_array((ones, (firing.token, firing.feature)), shape=(n_tokens, self.n)))
        if sum(part.nnz for part in self._waiting) >= _ENTRIES_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            tokens = sparse.csr_array(sparse.vstack(self._waiting, format="csr"))
            # Rows in blocks bound the product, which is nearly dense.
            by_feature = sparse.csr_array(tokens.T)
            for start in range(0, self.n, _ROWS):
                pairs = sparse.coo_array(by_feature[start : start + _ROWS] @ tokens)
                self._together[start + pairs.row, pairs.col] += pairs.data
            self._waiting = []

    def neighbours(self, count: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Per feature the k features of largest J, exact, by the number of tokens each is active on."""
        self._flush()
        found = []
        for start in range(0, self.n, _ROWS):
            both = self._together[start : start + _ROWS].astype(np.float64)
            here = np.arange(start, start + len(both))
            jaccard = both / np.maximum(count[here, None] + count - both, 1)
            jaccard[np.arange(len(both)), here] = 0
            found.append(largest(jaccard, k))
        return np.concatenate([i for i, _ in found]), np.concatenate([v for _, v in found])

    def arrays(self) -> dict[str, np.ndarray]:
        """What `restore` goes on from, by name."""
        self._flush()
        return {"cofiring.together": self._together}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `arrays` gave; raises `KeyError` where something is missing, `ValueError` for other sizes."""
        self._together[...] = arrays["cofiring.together"]


class Sketches:
    """Of each feature, the 64 tokens of smallest pseudo-random number among those on which it is active.

    With θ the smaller of the largest numbers that two full sketches hold, the tokens below θ are a uniform sample of
    the union of both features' tokens, and J is the share of them that is in both sketches: exact for features with
    at most 64 tokens, a standard error of at most 0.06 beyond.

    Source: Beyer et al. 2007, *On Synopses for Distinct-Value Estimation Under Multiset Operations*, section 5.
    """

    exact = False

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self._kept = KeepBest(n, SKETCH)

    def update(self, firing: Firing, first_token: int, n_tokens: int) -> None:
        """Count a chunk, the first token of which is the corpus's token `first_token`."""
        arrival = first_token + firing.token
        number = mixed(arrival.astype(np.uint64) ^ (np.uint64(self.seed) << np.uint64(40)))
        self._kept.offer(Entries(firing.feature, number, arrival, number), lambda rows: {})

    def neighbours(self, count: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Per feature the k features of largest J, estimated from the sketches; `count` is not needed."""
        held, _ = self._kept.entries()
        _, token = np.unique(held.order, return_inverse=True)
        ones = np.ones(len(token), np.int32)
        members = sparse.csr_array((ones, (held.group, token)), shape=(self.n, int(token.max(initial=0)) + 1))
        others = sparse.csc_array(members.T)
        index, score = np.full((self.n, k), -1, np.int64), np.zeros((self.n, k))
        for start in range(0, self.n, _ROWS):
            pairs = sparse.coo_array(members[start : start + _ROWS] @ others)
            a, b = pairs.row + start, pairs.col
            own = a != b
            a, b, both = a[own], b[own], pairs.data[own]
            jaccard = self._jaccard(a, b, both)
            order = np.lexsort((b, -jaccard, a))
            a, b, jaccard = a[order], b[order], jaccard[order]
            rank = np.arange(len(a)) - np.searchsorted(a, a)
            best = rank < k
            index[a[best], rank[best]], score[a[best], rank[best]] = b[best], jaccard[best]
        return index, score

    def _jaccard(self, a: np.ndarray, b: np.ndarray, both: np.ndarray) -> np.ndarray:
        jaccard = np.zeros(len(a))
        for part in np.array_split(np.arange(len(a)), max(1, len(a) // 100_000)):
            first, second = self._kept.order[a[part]], self._kept.order[b[part]]
            bound = np.minimum(first[:, -1], second[:, -1])[:, None]  # EMPTY where both are whole
            sizes = ((first <= bound) & (first != EMPTY)).sum(1) + ((second <= bound) & (second != EMPTY)).sum(1)
            jaccard[part] = both[part] / (sizes - both[part])
        return jaccard

    def arrays(self) -> dict[str, np.ndarray]:
        """What `restore` goes on from, by name."""
        return self._kept.arrays("cofiring")

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `arrays` gave; raises `KeyError` where something is missing, `ValueError` for other sizes."""
        self._kept.restore(arrays, "cofiring")


def largest(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns and values of the k largest positive scores of each row; −1 and 0 where there are fewer."""
    column = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    value = np.take_along_axis(scores, column, 1)
    return np.where(value > 0, column, -1), np.where(value > 0, value, 0)
