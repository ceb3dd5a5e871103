"""How strongly features are active on the same tokens: sums over a corpus, of all pairs or some features with all."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from circuitsae.features.global_weights import Place, check_feature, feature_widths
from circuitsae.features.reading import Firing, encode_rows, open_reading, rows_at_once
from circuitsae.replacement import ReplacementModel
from transcoders.data.corpora import CorpusSource
from transcoders.errors import InputError
from transcoders.progress import progress_bar

CONTEXT = 128
MOST = 16_384
"""Features of all layers together up to which every pair may be counted."""


@dataclass(frozen=True, eq=False)
class CoActivation:
    """Sums over the tokens of a corpus, `a` the activations there and `1[a]` whether they are above 0.

    Rows are all features, numbered through the layers; columns c are the features that were asked for.
    """

    tokens: int
    columns: Int[np.ndarray, "k"]
    """The number of each column's feature, ascending."""
    total: Float[np.ndarray, "feature"]
    """`Σ a_f`"""
    count: Int[np.ndarray, "feature"]
    """`Σ 1[a_f]`"""
    product: sparse.csr_array
    """`Σ a_f a_c`, [feature, k]."""
    while_on: sparse.csr_array
    """`Σ a_f 1[a_c]`, [feature, k]."""
    on_while: sparse.csr_array
    """`Σ 1[a_f] a_c`, [feature, k]."""
    together: sparse.csr_array
    """`Σ 1[a_f] 1[a_c]`, [feature, k]."""

    def column(self, number: int) -> int:
        """The column of a feature; raises `InputError` for one that was not asked for."""
        at = int(np.searchsorted(self.columns, number))
        if at == len(self.columns) or self.columns[at] != number:
            raise InputError(
                f"Feature number {number} is not among the {len(self.columns):,} whose pairs were counted; name it "
                "among the features when the corpus is read, or none to count all pairs."
            )
        return at


@torch.no_grad()
def co_activation(
    model: ReplacementModel,
    corpus: CorpusSource | Int[Tensor, "row pos"],
    features: Sequence[Place] | None = None,
    *,
    tokens: int = 20_000,
    context: int = CONTEXT,
    separator: str | None = None,
    bos: bool | None = None,
    progress: bool = False,
) -> CoActivation:
    """Sums of all pairs of features at the same position, from one pass over a corpus; or of some `features` with all.

    Positions without features are left out, and so are the documents that `train` holds out, as of feature cards.
    Memory does not grow with the number of tokens: it is that of the pairs that are ever active together.

    Raises `InputError` for a feature that the dictionaries do not have, for all pairs of more than 16,384 features, for
    a corpus without a single row, and for rows that the model cannot take; `DictionaryError` where an active feature
    has an activation that is not above 0.
    """
    for place in features or ():
        check_feature(model, place)
    if tokens < 1 or context < 2:
        raise InputError(f"Give 1 token or more, in rows of 2 or more; got tokens = {tokens}, context = {context}.")
    widths, first, done = feature_widths(model), model.first, 0
    if features is None and sum(widths) > MOST:
        raise InputError(f"All pairs of {sum(widths):,} features are more than those of {MOST:,}; name some features.")
    reading = open_reading(
        model.model, model.dictionaries, corpus, tokens, context,
        separator=separator, bos=model.model.adds_bos if bos is None else bos,
    )  # fmt: skip
    n_rows = math.ceil(tokens / (reading.context - first))
    sums, rows = _Sums(sum(widths), _columns(widths, features)), islice(reading.rows, n_rows)
    with progress_bar(shown=progress) as bar:
        task = bar.add_task("reading", total=n_rows)
        while batch := list(islice(rows, rows_at_once(sum(widths), reading.context))):
            firing = encode_rows(reading.model, model.dictionaries, torch.tensor(batch, device=model.model.device))
            sums.add(firing, len(batch) * reading.context)
            done += len(batch)
            bar.update(task, completed=done)
    if not done:
        raise InputError(f"The corpus does not fill a single row of {reading.context} tokens; give more text.")
    return sums.finished(done * (reading.context - first))


def _columns(widths: Sequence[int], features: Sequence[Place] | None) -> Int[np.ndarray, "k"]:
    if features is None:
        return np.arange(sum(widths))
    starts = np.cumsum([0, *widths])
    return np.unique(np.array([starts[layer] + index for layer, index in features], dtype=np.int64))


class _Sums:
    """The sums so far. With A the activations [token, feature] of a chunk, and B where they are above 0, `Aᵀ A[:, c]`
    and so on; products of sparse matrices.
    """

    def __init__(self, n: int, columns: Int[np.ndarray, "k"]) -> None:
        self.columns, self.n = columns, n
        self.total, self.count = np.zeros(n), np.zeros(n, dtype=np.int64)
        self.every = len(columns) == n
        self._pairs = [sparse.csr_array((n, len(columns))) for _ in range(3 if self.every else 4)]

    def add(self, firing: Firing, n_tokens: int) -> None:
        value = firing.value.astype(np.float64)
        a = sparse.csr_array((value, (firing.token, firing.feature)), shape=(n_tokens, self.n))
        on = sparse.csr_array((np.ones_like(a.data), a.indices, a.indptr), shape=a.shape)
        self.total += a.sum(axis=0)
        self.count += np.bincount(firing.feature, minlength=self.n)
        a_c, on_c = (x if self.every else x[:, self.columns] for x in (a, on))
        sides = [(a, a_c), (a, on_c), (on, on_c), (on, a_c)][: len(self._pairs)]
        self._pairs = [pairs + x.T.tocsr() @ y for pairs, (x, y) in zip(self._pairs, sides, strict=True)]

    def finished(self, tokens: int) -> CoActivation:
        product, while_on, together = self._pairs[:3]
        on_while = while_on.T.tocsr() if self.every else self._pairs[3]
        return CoActivation(tokens, self.columns, self.total, self.count, product, while_on, on_while, together)
