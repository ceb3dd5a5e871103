"""Texts with an intended and an unintended label: what a classifier is trained on, judged with and tested on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from circuitsae.benchmark.data import Labelled, halves
from transcoders.errors import InputError

Column = Literal["label", "second"]


@dataclass(frozen=True, eq=False)
class ShiftTexts:
    """Texts of two intended and two unintended labels, split.

    `cells[:, 0]` is the intended label and `cells[:, 1]` the unintended one. In the `biased` texts the two go together.
    `judged`, a few of each cell, and `balanced` are of the training half; `tested` is the other half.
    """

    texts: tuple[str, ...]
    cells: Bool[np.ndarray, "text 2"]
    names: tuple[tuple[str, str], tuple[str, str]]
    """Of each column, what true and false stand for."""
    biased: Int[np.ndarray, "_"]
    balanced: Int[np.ndarray, "_"]
    judged: Int[np.ndarray, "_"]
    tested: Int[np.ndarray, "_"]

    @classmethod
    def of(
        cls,
        labelled: Labelled,
        *,
        intended: Column = "label",
        labels: Sequence[str] = (),
        judged: int = 8,
        seed: int = 0,
    ) -> "ShiftTexts":
        """Halves of every cell, drawn from `seed`, and of the training half `judged` of each cell.

        `labels`: the two labels that are told apart, where there are more. Raises `InputError` for texts without a
        second label, for more or fewer than two values of either, and for cells of fewer than four texts.
        """
        if not labelled.others:
            raise InputError("SHIFT needs texts with a second label of two values; give them a field `second`.")
        known = sorted(set(labelled.labels))
        wanted = tuple(labels) or tuple(known)
        if missing := [name for name in wanted if name not in labelled.labels]:
            raise InputError(f"No text has the label {missing[0]!r}; there are {', '.join(known)}.")
        others = tuple(sorted(set(labelled.others)))
        for what, values in (("labels to tell apart", wanted), ("values of `second`", others)):
            if len(set(values)) != 2:
                raise InputError(f"There are {len(set(values))} {what} ({', '.join(values)}); SHIFT takes two.")
        kept = [row for row, label in enumerate(labelled.labels) if label in wanted]
        pairs = [(labelled.labels[row] == wanted[0], labelled.others[row] == others[0]) for row in kept]
        cells, names = np.array(pairs, dtype=bool), ((wanted[0], wanted[1]), (others[0], others[1]))
        if intended == "second":
            cells, names = cells[:, ::-1].copy(), (names[1], names[0])
        strata = [tuple(cell) for cell in cells.tolist()]
        if len(set(strata)) < 4:
            raise InputError("Some pair of label and `second` has no texts; SHIFT is measured on all four pairs.")
        train, test = halves(strata, seed)
        few = np.concatenate([
            [place for place in train if strata[place] == cell][:judged] for cell in dict.fromkeys(strata)
        ]).astype(int)  # fmt: skip
        biased = train[cells[train, 0] == cells[train, 1]]
        return cls(tuple(labelled.texts[row] for row in kept), cells, names, biased, train, few, test)

    def taken(self, places: Int[np.ndarray, "_"]) -> list[str]:
        """Texts by number."""
        return [self.texts[place] for place in places]
