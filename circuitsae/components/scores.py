"""Scores of edges or nodes, by example, and how they compare with a truth."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.components.network import Edge
from transcoders.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

Item = Edge | str


@dataclass(frozen=True)
class Scores:
    """An effect, exact or estimated, of ablating each edge (or node) in each example: metric after − metric before."""

    items: tuple[Item, ...]
    values: Float[Tensor, "example item span"]
    method: str
    spans: tuple[str, ...] = ("0",)
    patches: int = 0
    """How many patched runs it took (one for each edge and span, over all examples)."""

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The items, where they are edges."""
        return tuple(item for item in self.items if isinstance(item, Edge))

    @property
    def mean(self) -> Float[Tensor, "item"]:
        """Mean effect over examples, summed over spans."""
        return self.values.sum(2).mean(0)

    @property
    def mean_abs(self) -> Float[Tensor, "item"]:
        """Mean size of the effect: what helps in one example and hurts in another does not cancel."""
        return self.values.sum(2).abs().mean(0)

    @property
    def largest(self) -> Float[Tensor, "item"]:
        """Largest size of the effect in any example and span."""
        return self.values.abs().amax((0, 2))

    def ranked(self, by: str = "mean") -> list[Item]:
        """The items, largest |score| first; `by` is mean, mean_abs or largest."""
        if by not in ("mean", "mean_abs", "largest"):
            raise InputError(f"Unknown ranking {by!r}; use 'mean', 'mean_abs' or 'largest'.")
        order = getattr(self, by).abs().argsort(descending=True, stable=True)
        return [self.items[i] for i in order.tolist()]

    def of(self, item: Item | tuple[str, str]) -> float:
        """The mean effect of one item."""
        return float(self.mean[self.items.index(item)])  # pyright: ignore[reportArgumentType]

    def only(self, items: Sequence[Item | tuple[str, str]]) -> "Scores":
        """Some items' scores, in this order."""
        place = {item: index for index, item in enumerate(self.items)}
        at = [place[item] for item in items]  # pyright: ignore[reportArgumentType]
        return replace(self, items=tuple(self.items[i] for i in at), values=self.values[:, at])

    def frame(self) -> "pd.DataFrame":
        """One row for each item and span: writer, reader (or node), mean, standard error, mean_abs."""
        import pandas as pd

        values = self.values.double().cpu()
        rows = []
        for index, item in enumerate(self.items):
            name = {"writer": item.writer, "reader": item.reader} if isinstance(item, Edge) else {"node": item}
            for span, label in enumerate(self.spans):
                column = values[:, index, span]
                error = float(column.std() / len(column) ** 0.5) if len(column) > 1 else float("nan")
                means = {"mean": float(column.mean()), "standard_error": error, "mean_abs": float(column.abs().mean())}
                rows.append(name | ({"span": label} if len(self.spans) > 1 else {}) | means)
        return pd.DataFrame(rows)


def join(parts: Sequence[Scores]) -> Scores:
    """Scores of the same items on several sets of examples, as one.

    Sets whose prompts differ in length can be joined where positions are not told apart.
    """
    first = parts[0]
    for part in parts[1:]:
        if part.items != first.items or part.spans != first.spans:
            raise InputError("Only scores of the same edges (or nodes) and the same spans can be joined.")
    values = torch.cat([part.values for part in parts])
    return replace(first, values=values, patches=max(part.patches for part in parts))


def auroc(score: Sequence[float] | Tensor, truth: Sequence[bool] | Tensor) -> float:
    """Area under the ROC curve: the chance that a true item scores above a false one, ties counting half."""
    s, t = _checked(score, truth)
    order = torch.unique(s, return_inverse=True, return_counts=True)
    _, inverse, counts = order
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse]  # mean rank of ties
    n_true = int(t.sum())
    return float((ranks[t].sum() - n_true * (n_true + 1) / 2) / (n_true * (len(t) - n_true)))


def average_precision(score: Sequence[float] | Tensor, truth: Sequence[bool] | Tensor) -> float:
    """Area under the precision-recall curve, `Σ (R_n − R_{n−1}) P_n` over distinct thresholds."""
    s, t = _checked(score, truth)
    levels, inverse = torch.unique(s, return_inverse=True)
    true_at = torch.zeros(len(levels), dtype=torch.float64).index_add(0, inverse, t.double()).flip(0)
    all_at = torch.zeros(len(levels), dtype=torch.float64).index_add(0, inverse, torch.ones_like(s)).flip(0)
    precision = true_at.cumsum(0) / all_at.cumsum(0)
    return float((true_at * precision).sum() / t.sum())


def overlap(found: Collection[Item], known: Collection[Item]) -> dict[str, float]:
    """Precision, recall and Jaccard index of one set against another."""
    a, b = set(found), set(known)
    both = len(a & b)
    return {
        "precision": both / len(a) if a else float("nan"),
        "recall": both / len(b) if b else float("nan"),
        "jaccard": both / len(a | b) if a | b else float("nan"),
    }


def _checked(score: Sequence[float] | Tensor, truth: Sequence[bool] | Tensor) -> tuple[Tensor, Tensor]:
    s, t = torch.as_tensor(score).double().cpu(), torch.as_tensor(truth).bool().cpu()
    if s.shape != t.shape or s.ndim != 1:
        raise InputError(f"Scores {tuple(s.shape)} and truth {tuple(t.shape)} must be two rows of equal length.")
    if t.all() or not t.any():
        raise InputError(f"The truth has {int(t.sum())} true items of {len(t)}; both kinds are needed to compare.")
    return s, t
