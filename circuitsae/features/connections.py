"""What a feature is connected with over a corpus: virtual weights, and what they carry where both ends are active.

    ERA[s, t] = E[a_s 1(a_t > 0)] · V[s, t]        TWERA[s, t] = E[a_s a_t] / E[a_t] · V[s, t]

the expected residual attribution, and the target-weighted one, over the tokens of a corpus: what the source adds to the
target at the same position where the target is active, or in proportion to how active it is. Weights between features
that are never active together carry nothing: interference, as of any directions that share a stream. Scales of norms
are in none of them (`circuitsae.features.global_weights`).

Source: Ameisen et al. 2025, *Circuit Tracing: Revealing Computational Graphs in Language Models*, Global Weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import sparse

from circuitsae.features.coactivation import CoActivation, co_activation
from circuitsae.features.global_weights import (
    Place,
    check_feature,
    feature_widths,
    input_weights,
    output_weights,
    virtual_weights,
)
from circuitsae.replacement import ReplacementModel
from transcoders.errors import InputError

ORDERS = ("twera", "era", "weight")
"""Columns by which connections are sorted."""
_AT_ONCE = 1024


@dataclass(frozen=True, eq=False)
class Connections:
    """Global connections of features: `top_inputs` and `top_outputs` of one, `twera` and `era` of all pairs."""

    model: ReplacementModel
    over: CoActivation

    @classmethod
    def collect(
        cls, model: ReplacementModel, corpus: Any, features: Sequence[Place] | None = None, **how: Any
    ) -> "Connections":
        """Those over a corpus, of all features or of some with all; `corpus` and `how` as for `co_activation`."""
        return cls(model, co_activation(model, corpus, features, **how))

    @cached_property
    def _starts(self) -> Int[np.ndarray, "layer"]:
        """Number of each layer's first feature, and that of all."""
        return np.cumsum([0, *feature_widths(self.model)])

    def twera(self) -> sparse.csr_array:
        """`E[a_s a_t] / E[a_t] · V[s, t]`, [source, target]: all features to those whose pairs were counted.

        Stored where source and target are active together and the source writes below the target; a target that is
        never active has none.
        """
        total = self.over.total[self.over.columns]
        return self._weighted(self.over.product, 1 / np.where(total > 0, total, 1))

    def era(self) -> sparse.csr_array:
        """`E[a_s 1(a_t > 0)] · V[s, t]`, [source, target], stored as those of `twera`."""
        return self._weighted(self.over.while_on, np.full(len(self.over.columns), 1 / self.over.tokens))

    def inputs(self, feature: Place) -> pd.DataFrame:
        """All features that write below this one, with what they add to it: a row each, of those that are ever active.

        `feature`, `weight` (V), `twera`, `era`, `together` (the share of the target's active tokens on which the source
        is active) and `never_together`: no token has both, so that the weight is interference. Raises `InputError` for
        a feature that is not there, whose pairs were not counted, or that is never active.
        """
        number, column = self._find(feature)
        over, weight = self.over, input_weights(self.model, feature).double().cpu().numpy()
        added = _column(over.product, column) / over.total[number], _column(over.while_on, column) / over.tokens
        share = _column(over.together, column) / over.count[number]
        return self._frame(np.arange(self._starts[feature[0]]), weight, *added, share)

    def outputs(self, feature: Place) -> pd.DataFrame:
        """All features that read above this one, with what it adds to them; columns as of `inputs`."""
        _, column = self._find(feature)
        over, weight = self.over, output_weights(self.model, feature).double().cpu().numpy()
        total, count = np.where(over.count > 0, over.total, 1), np.maximum(over.count, 1)
        added = _column(over.product, column) / total, _column(over.on_while, column) / over.tokens
        share = _column(over.together, column) / count
        return self._frame(np.arange(self._starts[feature[0] + 1], self._starts[-1]), weight, *added, share)

    def top_inputs(self, feature: Place, n: int = 10, *, by: str = "twera") -> pd.DataFrame:
        """The `n` of `inputs` that are largest in magnitude by one of its columns; `weight` has interference too."""
        return _largest(self.inputs(feature), n, by)

    def top_outputs(self, feature: Place, n: int = 10, *, by: str = "twera") -> pd.DataFrame:
        """The `n` of `outputs` that are largest in magnitude by one of its columns."""
        return _largest(self.outputs(feature), n, by)

    def strongest(self, n: int = 5) -> dict[str, np.ndarray]:
        """`top_inputs` and `top_outputs` of all features at once, by TWERA: arrays [feature, n].

        `input_index` and `output_index` number features through the layers, −1 where there are fewer; beside each,
        `…_twera` and `…_weight`. Raises `InputError` where not all pairs were counted.
        """
        if n < 1:
            raise InputError(f"Give 1 connection or more to show; got {n}.")
        n_features = int(self._starts[-1])
        if (counted := len(self.over.columns)) < n_features:
            raise InputError(
                f"The pairs of {counted:,} features were counted; those of all {n_features:,} are needed: read the "
                "corpus without naming features."
            )
        # Of the same pairs in the same order: sums of products are above 0.
        weights = self._weighted(sparse.csr_array(self.over.product > 0, dtype=float), np.ones(n_features))
        twera = sparse.coo_array(self.twera())
        there = twera.data != 0
        source, target, weight, twera = twera.row[there], twera.col[there], weights.data[there], twera.data[there]
        arrays = {}
        for side, of, other in (("input", target, source), ("output", source, target)):
            entry = _first_of_each(of, np.lexsort((other, -np.abs(twera), of)), n_features, n)
            columns = {"index": (other, -1), "twera": (twera, 0.0), "weight": (weight, 0.0)}
            # Entry −1 is the last: that of none.
            arrays |= {f"{side}_{name}": np.append(values, none)[entry] for name, (values, none) in columns.items()}
        return arrays

    def _find(self, feature: Place) -> tuple[int, int]:
        """The feature's number and its column."""
        check_feature(self.model, feature)
        number = int(self._starts[feature[0]]) + feature[1]
        column = self.over.column(number)
        if not self.over.count[number]:
            raise InputError(
                f"Feature {feature[0]}.{feature[1]} is never active on these {self.over.tokens:,} tokens; read more "
                "text, or another."
            )
        return number, column

    def _frame(
        self,
        rows: Int[np.ndarray, "n"],
        weight: Float[np.ndarray, "feature"],
        twera: Float[np.ndarray, "feature"],
        era: Float[np.ndarray, "feature"],
        share: Float[np.ndarray, "feature"],
    ) -> pd.DataFrame:
        rows = rows[self.over.count[rows] > 0]
        layers = np.searchsorted(self._starts, rows, side="right") - 1
        names = [f"{i}.{j}" for i, j in zip(layers.tolist(), (rows - self._starts[layers]).tolist(), strict=True)]
        weight, share = weight[rows], share[rows]
        return pd.DataFrame(
            {
                "feature": names,
                "weight": weight,
                "twera": twera[rows] * weight,
                "era": era[rows] * weight,
                "together": share,
                "never_together": share == 0,
            }
        )

    def _weighted(self, sums: sparse.csr_array, scale: Float[np.ndarray, "k"]) -> sparse.csr_array:
        """`sums[s, t] · scale[t] · V[s, t]`, V made a block of features at a time."""
        layer, columns = np.searchsorted(self._starts, self.over.columns, side="right") - 1, self.over.columns
        blocks = []
        for s_layer, width in enumerate(feature_widths(self.model)):
            for start in range(0, width, _AT_ONCE):
                sources = [(s_layer, i) for i in range(start, min(start + _AT_ONCE, width))]
                first = int(self._starts[s_layer]) + start
                here = sums[first : first + len(sources)]
                parts = [sparse.csr_array((len(sources), int((layer <= s_layer).sum())))]
                above = np.flatnonzero(layer > s_layer)
                for some in np.split(above, range(_AT_ONCE, len(above), _AT_ONCE)):
                    targets = [(int(layer[c]), int(columns[c] - self._starts[layer[c]])) for c in some]
                    V = virtual_weights(self.model, sources, targets).double().cpu().numpy()
                    parts.append(sparse.csr_array(here[:, some].multiply(V * scale[some])))
                blocks.append(sparse.hstack(parts, format="csr"))
        return sparse.csr_array(sparse.vstack(blocks, format="csr"))


def _column(sums: sparse.csr_array, column: int) -> Float[np.ndarray, "feature"]:
    return sums[:, [column]].toarray()[:, 0]


def _first_of_each(
    of: Int[np.ndarray, "entry"], order: Int[np.ndarray, "entry"], n_features: int, n: int
) -> Int[np.ndarray, "feature n"]:
    """The first `n` entries of each feature in an order that has those of a feature together; −1 for no entry."""
    of = of[order]
    rank = np.arange(len(of)) - np.searchsorted(of, of)
    first = np.full((n_features, n), -1)
    first[of[rank < n], rank[rank < n]] = order[rank < n]
    return first


def _largest(frame: pd.DataFrame, n: int, by: str) -> pd.DataFrame:
    if by not in ORDERS:
        raise InputError(f"Connections have no column {by!r} to sort by; the columns are {', '.join(ORDERS)}.")
    if n < 1:
        raise InputError(f"Give 1 connection or more to show; got {n}.")
    size = np.abs(frame[by].to_numpy())
    order = np.argsort(-size, kind="stable")[: min(n, np.count_nonzero(size))]
    return frame.iloc[order].reset_index(drop=True)
