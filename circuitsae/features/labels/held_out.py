"""Texts that no label was made from, with what some features do on them: what labels are judged on."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int
from torch import Tensor

from circuitsae.features.labels.excerpts import Excerpt
from circuitsae.features.reading import encode_rows, rows_at_once
from transcoders.data import held_out_rows
from transcoders.data.corpora import CorpusSource
from transcoders.dictionaries import DictionarySet, fitted
from transcoders.dictionaries.provenance import reading_as_trained
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel
from transcoders.progress import progress_bar

WIDTH = 32
"""Tokens of an excerpt."""

Place = tuple[int, int]
"""Layer and number of a feature."""


@dataclass(frozen=True, eq=False)
class HeldOutTexts:
    """Rows of held-out text, and where some features fire on them."""

    model: LanguageModel
    rows: Int[Tensor, "row pos"]
    first: int
    """The first position with features; excerpts begin there."""
    firing: Mapping[Place, tuple[Int[np.ndarray, "n"], Float32[np.ndarray, "n"]]]
    """By feature: row · context + position of the tokens that it fires on, ascending, and its activations."""

    def excerpts(self, layer: int, feature: int, n: int, *, seed: int = 0) -> list[Excerpt]:
        """At most `n` texts of 32 tokens in which the feature fires, and as many in which it does not, drawn at random.

        Raises `InputError` for a feature that was not asked for.
        """
        if (layer, feature) not in self.firing:
            raise InputError(f"Feature {layer}.{feature} was not looked for in the held-out text; name it there.")
        token, value = self.firing[layer, feature]
        window = self._windows(token)
        there = np.unique(window[window >= 0])
        active, draw = set(there.tolist()), random.Random(f"{seed}:{layer}.{feature}")
        others = [number for number in range(len(self.rows) * self._per_row) if number not in active]
        chosen = [sorted(draw.sample(some, min(n, len(some)))) for some in (there.tolist(), others)]
        values = dict(zip(token.tolist(), value.tolist(), strict=True))
        return [self._excerpt(number, values) for some in chosen for number in some]

    @property
    def _width(self) -> int:
        return min(WIDTH, self.rows.shape[1] - self.first)

    @property
    def _per_row(self) -> int:
        return (self.rows.shape[1] - self.first) // self._width

    def _windows(self, token: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
        """The window of each token, −1 where it is in none."""
        row, pos = np.divmod(token, self.rows.shape[1])
        number = (pos - self.first) // self._width
        return np.where((pos >= self.first) & (number < self._per_row), row * self._per_row + number, -1)

    def _excerpt(self, window: int, values: Mapping[int, float]) -> Excerpt:
        row, number = divmod(window, self._per_row)
        start = self.first + number * self._width
        places = range(start, start + self._width)
        at = row * self.rows.shape[1]
        tokens = self.model.token_strings(self.rows[row, start : start + self._width])
        return Excerpt(tuple(tokens), tuple(values.get(at + pos, 0.0) for pos in places))


@torch.no_grad()
def held_out_texts(
    model: LanguageModel,
    dictionaries: DictionarySet,
    corpus: CorpusSource,
    features: Iterable[Place],
    *,
    tokens: int = 100_000,
    context: int = 128,
    separator: str | None = None,
    bos: bool | None = None,
    progress: bool = False,
) -> HeldOutTexts:
    """One pass over about `tokens` tokens of the documents that neither `train` nor `collect` reads.

    Memory grows with what `features` (layer, number) fire on. Raises `InputError` for a feature that the dictionaries
    do not have, and where the corpus holds nothing out.
    """
    dictionaries = fitted(dictionaries, model)
    model = reading_as_trained(model, dictionaries.provenance, bos)
    widths = [dictionaries.n_features(layer) for layer in range(dictionaries.n_layers)]
    numbers = _numbers(features, widths)
    rows = held_out_rows(model, corpus, tokens=tokens, context=context, separator=separator)
    first = dictionaries.provenance.first
    if not len(rows) or rows.shape[1] <= first:
        raise InputError("The corpus holds out no text to judge labels on; give more text, or more tokens.")
    found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {number: [] for number in numbers.values()}
    wanted = np.array(sorted(found))
    at_once = rows_at_once(sum(widths), rows.shape[1])
    with progress_bar(shown=progress) as bar:
        task = bar.add_task("reading held-out text", total=len(rows))
        for start in range(0, len(rows), at_once):
            firing = encode_rows(model, dictionaries, rows[start : start + at_once])
            firing = firing.take(np.isin(firing.feature, wanted))
            for number in np.unique(firing.feature).tolist():
                own = firing.take(firing.feature == number)
                found[number].append((own.token + start * rows.shape[1], own.value))
            bar.update(task, completed=min(start + at_once, len(rows)))
    return HeldOutTexts(model, rows, first, {place: _joined(found[number]) for place, number in numbers.items()})


def _numbers(features: Iterable[Place], widths: Sequence[int]) -> dict[Place, int]:
    """The number of each feature through all layers."""
    starts, found = np.cumsum([0, *widths]).tolist(), {}
    for layer, index in features:
        if not (0 <= layer < len(widths) and 0 <= index < widths[layer]):
            sizes = f"{len(widths)} layers of {min(widths)} to {max(widths)} features"
            raise InputError(f"There is no feature {layer}.{index}; the dictionaries have {sizes}.")
        found[layer, index] = starts[layer] + index
    return found


def _joined(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    token, value = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.argsort(token, kind="stable")
    return token[order], value[order]
